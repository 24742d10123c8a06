"""Keys, and adapters that come and go."""

from __future__ import annotations

import shutil
import threading
import time

import pytest

from turnrow.errors import UserError

pytest.importorskip("fastapi", reason="needs the extra [serve]")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai", reason="needs the official client")

from turnrow.serving.http import ServerSettings  # noqa: E402 - needs the extra

HTTP = httpx.Client(verify=False, timeout=30)  # loads no certificates, which takes longer than a request
ASKED = {"prompt": "Call me", "max_tokens": 4, "temperature": 0}


@pytest.fixture
def root(folders, tmp_path):
    """An adapters' folder with one adapter, and one beside it."""
    shutil.copytree(folders["rows"], tmp_path / "adapters" / "rows")
    shutil.copytree(folders["lora"], tmp_path / "outside")
    return tmp_path / "adapters"


def call(running, method, where="", /, *, key=None, **body):
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return HTTP.request(method, f"{running.url}/v1/adapters{where}", headers=headers, json=body or None)


def test_a_key_is_asked_for_under_v1_and_nowhere_else(start):
    running = start(settings={"api_key": "s\u00e9sam"})
    for path in ("/v1/models", "/v1/adapters", "/v1/models/base"):
        refused = HTTP.get(running.url + path)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "invalid_api_key"
    for header in (
        "Bearer wrong",
        "Bearer",
        "Bearer x",
        "s\u00e9sam",
        "Basic s\u00e9sam",
        "Bearer s\u00e9sa",
        "Bearer s\u00e9sam x",
    ):
        refused = HTTP.post(
            f"{running.url}/v1/completions", json={"model": "base", **ASKED}, headers={"Authorization": header.encode()}
        )
        assert refused.status_code == 401, header
    for header in ("Bearer s\u00e9sam", "bearer  s\u00e9sam"):
        assert HTTP.get(f"{running.url}/v1/models", headers={"Authorization": header.encode()}).status_code == 200
    assert HTTP.get(f"{running.url}/health").status_code == 200
    assert HTTP.get(f"{running.url}/metrics").status_code == 200


def test_the_client_is_let_in_with_the_key(start):
    running = start(settings={"api_key": "sesame"})
    with running.client(openai.OpenAI, api_key="sesame") as client:
        assert client.completions.create(model="base", **ASKED).choices[0].text
    with running.client(openai.OpenAI, api_key="other") as client, pytest.raises(openai.AuthenticationError):
        client.completions.create(model="base", **ASKED)


def test_no_request_has_all_names_listed(start, root, folders, monkeypatch):
    running = start({"lora": folders["lora"]}, root=root, settings={"manage_adapters": True})
    monkeypatch.setattr(running.engine.store, "names", None)
    assert HTTP.post(f"{running.url}/v1/completions", json={"model": "lora", **ASKED}).status_code == 200
    assert HTTP.get(f"{running.url}/v1/models/lora").status_code == 200
    assert call(running, "POST", name="rows").status_code == 201
    assert call(running, "POST", name="rows").status_code == 409
    assert call(running, "POST", "/rows/reload").status_code == 200
    assert call(running, "DELETE", "/rows").status_code == 200
    assert call(running, "DELETE", "/rows").status_code == 404


def test_adapters_come_and_go_while_the_server_runs(start, root, folders):
    running = start(root=root, settings={"api_key": "k"})
    client = running.client(openai.OpenAI, api_key="k")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="rows", **ASKED)
    loaded = call(running, "POST", key="k", name="rows")
    assert loaded.status_code == 201
    assert loaded.json()["id"] == "rows"
    assert loaded.json()["method"] == "ROCOFT"
    assert loaded.json()["version"] == 1
    again = call(running, "POST", key="k", name="rows")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "adapter_exists")
    assert call(running, "POST", key="k", name="second", path="rows").status_code == 201
    assert call(running, "POST", key="k", name="third", path=str(root / "rows")).status_code == 201
    assert [one["id"] for one in call(running, "GET", key="k").json()["data"]] == ["rows", "second", "third"]
    assert {model.id for model in client.models.list()} == {"base", "rows", "second", "third"}
    first = client.completions.create(model="rows", **ASKED)
    shutil.rmtree(root / "rows")
    shutil.copytree(folders["road1"], root / "rows")
    assert call(running, "POST", "/rows/reload", key="k").json()["version"] == 2
    second = client.completions.create(model="rows", **ASKED)
    assert (first.system_fingerprint[-2:], second.system_fingerprint[-2:]) == ("-1", "-2")
    assert first.choices[0].text != second.choices[0].text
    assert call(running, "DELETE", "/rows", key="k").json() == {"id": "rows", "object": "adapter", "deleted": True}
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="rows", **ASKED)
    gone = call(running, "DELETE", "/rows", key="k")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "adapter_not_found")
    assert call(running, "POST", "/rows/reload", key="k").status_code == 404
    client.close()


PATHS = [
    "../outside",
    "..",
    ".",
    "",
    "/",
    "/etc",
    "rows/../../outside",
    "link",
    "{outside}",
    "rows\0",
    "nothing",
    "~",
    "a" * 5000,
]


@pytest.fixture(scope="module")
def open_to_all(folders, byte_tokenizer, tmp_path_factory):
    """A server without a key that nobody manages to load anything into."""
    from tests.serving.http.running import Running

    place = tmp_path_factory.mktemp("open")
    root = place / "adapters"
    shutil.copytree(folders["rows"], root / "rows")
    shutil.copytree(folders["lora"], place / "outside")
    (root / "link").symlink_to(place / "outside")
    running = Running(byte_tokenizer, root=root, settings={"manage_adapters": True})
    yield running
    running.close()


@pytest.mark.parametrize("path", PATHS)
def test_no_path_leads_out_of_the_adapters_folder(open_to_all, path):
    running = open_to_all
    answer = call(running, "POST", name="x", path=path.format(outside=running.engine.store.root.parent / "outside"))
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "path"
    assert running.engine.store.names() == []


@pytest.mark.parametrize(
    "name", ["..", "../outside", "", "a/b", "x\0", "\uff52ows", "ro\u200bws", "base", "a" * 129, ".rows", "rows\n"]
)
def test_no_name_is_a_path(open_to_all, name):
    running = open_to_all
    for body in ({"name": name}, {"name": name, "path": "rows"}):
        answer = call(running, "POST", **body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "name"
    assert running.engine.store.names() == []


def test_any_path_is_allowed_only_by_whoever_starts_the_server(start, root):
    running = start(root=root, settings={"manage_adapters": True, "any_path": True})
    assert call(running, "POST", name="x", path=str(root.parent / "outside")).status_code == 201
    assert call(running, "POST", name="y", path="rows").status_code == 201


def test_files_that_are_no_adapter_are_refused_with_the_reason(start, root):
    (root / "bad").mkdir()
    (root / "bad" / "adapter_config.json").write_text("{")
    running = start(root=root, settings={"manage_adapters": True})
    answer = call(running, "POST", name="bad")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_adapter")
    assert "adapter_config.json" in answer.json()["error"]["message"]


def test_the_bases_own_name_is_not_given_away(start, root):
    running = start(root=root, settings={"manage_adapters": True, "base_name": "rows"})
    assert "base model's own name" in call(running, "POST", name="rows").json()["error"]["message"]


def test_without_a_key_nobody_loads_unless_that_is_said(start, root):
    running = start(root=root)
    for method, path in [("POST", ""), ("DELETE", "/rows"), ("POST", "/rows/reload")]:
        refused = call(running, method, path, **({"name": "rows"} if not path else {}))
        assert refused.status_code == 403
        assert "--allow-adapter-management" in refused.json()["error"]["message"]
    assert call(running, "GET").status_code == 200
    assert running.engine.store.names() == []


def test_an_admin_key_keeps_loading_from_those_who_only_ask(start, root):
    running = start(root=root, settings={"api_key": "user", "admin_key": "admin"})
    assert call(running, "GET", key="user").status_code == 200
    assert call(running, "POST", key="user", name="rows").status_code == 401
    assert call(running, "POST", key="admin", name="rows").status_code == 201
    assert call(running, "DELETE", "/rows", key="user").status_code == 401
    assert call(running, "DELETE", "/rows", key="admin").status_code == 200
    alone = start(root=root, settings={"admin_key": "admin"})
    assert call(alone, "GET").status_code == 200
    assert call(alone, "POST", name="rows").status_code == 401
    assert call(alone, "POST", key="admin", name="rows").status_code == 201


def test_loading_stops_nobody(start, root, monkeypatch):
    running = start(root=root, settings={"manage_adapters": True})
    load = running.engine.store.load

    def slowly(*args):
        time.sleep(0.5)
        return load(*args)

    monkeypatch.setattr(running.engine.store, "load", slowly)
    loading = threading.Thread(target=call, args=(running, "POST"), kwargs={"name": "rows"})
    loading.start()
    answered = 0
    while loading.is_alive():
        assert HTTP.post(f"{running.url}/v1/completions", json={"model": "base", **ASKED}).status_code == 200
        answered += 1
    loading.join()
    assert answered > 2
    assert running.engine.store.names() == ["rows"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"api_key": ""}, "api_key is empty"),
        ({"admin_key": ""}, "admin_key is empty"),
        ({"request_timeout_s": -1}, "request_timeout_s is -1"),
        ({"max_body_bytes": 0}, "max_body_bytes is 0"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(UserError, match=message):
        ServerSettings(**{"base_name": "x", **changes})
