"""Adapters by name: registered, loaded, evicted, reloaded, removed."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.serving_models import configurations, model_of, write_adapter
from turnrow.errors import AdapterError, UserError
from turnrow.serving import BASE, AdapterStore
from turnrow.serving.store import Version


@pytest.fixture(scope="module")
def model():
    return model_of("llama")


@pytest.fixture
def root(adapters, tmp_path) -> Path:
    """An adapters' folder with three good ones."""
    for name in ("rows", "road1", "lora"):
        shutil.copytree(adapters("llama")[name], tmp_path / "adapters" / name)
    return tmp_path / "adapters"


@pytest.fixture
def store(model, root) -> Iterator[AdapterStore]:
    store = AdapterStore(model, root)
    yield store
    store.close()


def loaded(store: AdapterStore, version: Version):
    """The weights of a version, waited for."""
    done = threading.Event()
    store.on_loaded = done.set
    while store.weights(version) is None:
        assert done.wait(20)
        done.clear()
    return store.weights(version)


def test_a_folder_is_registered_and_what_is_wrong_in_it_is_told(store, root):
    (root / "empty").mkdir()
    (root / ".git").mkdir()
    shutil.copytree(root / "rows", root / "bad name")
    shutil.copytree(root / "rows", root / "base")
    (root / "file.txt").write_text("x")
    refused = store.add_folder()
    assert store.names() == ["lora", "road1", "rows"]
    assert set(refused) == {"empty", "bad name", "base"}
    assert "has no adapter_config.json" in refused["empty"]
    assert "no adapter can be called 'base'" in refused["base"]
    assert store.stats()["in_memory"] == 0  # looked at, not read


def test_equal_names_are_refused(store):
    store.load("rows")
    with pytest.raises(UserError, match="an adapter called 'rows' is registered already"):
        store.load("rows")


def test_whether_a_name_is_known_is_one_look_up(store, root, monkeypatch):
    store.add("rows", root / "rows")
    monkeypatch.setattr(store, "names", None)  # no list of all of them is made
    monkeypatch.setattr(store, "_entries", _OnlyLookedUp(store._entries))
    assert "rows" in store
    assert "road1" not in store
    assert BASE not in store
    assert 3 not in store


class _OnlyLookedUp(dict):
    def __iter__(self):
        raise AssertionError("all names are gone through")


def test_an_unknown_name_tells_near_ones(store):
    store.add_folder()
    with pytest.raises(UserError, match=r"no adapter is called 'row'; did you mean 'rows'.*; 3 are registered"):
        store.get("row")


@pytest.mark.parametrize("folder", ["..", "../outside", "/etc"])
def test_loading_at_run_time_does_not_leave_the_folder(store, root, folder):
    shutil.copytree(root / "rows", root.parent / "outside")
    with pytest.raises(UserError, match="is no folder inside of the adapters' folder"):
        store.load("mine", folder)
    with pytest.raises(UserError, match="must be 1 to 128 letters"):
        store.load(folder)
    assert store.names() == []


def test_without_a_folder_nothing_is_loaded_by_name(model):
    store = AdapterStore(model)
    with pytest.raises(UserError, match="there is no adapters' folder to load from"):
        store.load("rows")
    with pytest.raises(UserError, match="the adapters' folder 'None' does not exist"):
        store.add_folder()
    with pytest.raises(UserError, match="the adapters' folder '/no/such' does not exist"):
        AdapterStore(model, "/no/such")


def test_a_bad_file_is_refused_at_once_or_when_it_is_asked_for(store, root):
    (root / "lora" / "adapter_model.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(AdapterError, match="truncated"):
        store.load("lora")
    # a file that looks right and is not
    path = root / "rows" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    entry = store.add("rows", root / "rows", whole=False)
    with pytest.raises(AdapterError, match="was altered"):
        loaded(store, entry.version)
    with pytest.raises(AdapterError, match="was altered"):
        store.weights(entry.version)


def test_weights_come_from_disk_in_a_thread_of_their_own_and_go_when_there_is_no_room(model, root):
    store = AdapterStore(model, root, host_bytes=1)
    store.add_folder()
    first, second = (store.get(name).version for name in ("rows", "lora"))
    assert store.weights(first) is None
    assert loaded(store, first) is not None
    assert loaded(store, second) is not None
    # what nobody waits for any more has gone
    assert store.stats()["in_memory"] == 1
    assert store.weights(first) is None
    loaded(store, first)
    assert store.stats()["loads"] == 3
    store.close()


def test_the_longest_unused_weights_go_first(model, root):
    store = AdapterStore(model, root)
    store.add_folder(whole=True)
    store.host_bytes = store.stats()["bytes_in_memory"]
    versions = {name: store.get(name).version for name in store.names()}
    for name in ("rows", "road1", "lora"):  # read in the order of their names
        assert store.weights(versions[name]) is not None
    shutil.copytree(root / "road1", root / "other")
    store.load("other")
    assert store.weights(versions["rows"]) is None
    assert store.weights(versions["lora"]) is not None
    store.close()


def test_weights_that_somebody_waits_for_stay(model, root):
    store = AdapterStore(model, root, host_bytes=1)
    store.add_folder()
    versions = [store.get(name).version for name in store.names()]
    for version in versions:
        assert store.weights(version) is None
    deadline = time.monotonic() + 20
    while store.stats()["in_memory"] < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    store.no_longer_wanted(versions[0])
    for version in versions[1:]:
        assert store.weights(version) is not None
    store.close()


def test_files_that_changed_since_they_were_registered_are_not_served_unsaid(store, root):
    entry = store.add("rows", root / "rows", whole=False)
    path = root / "rows" / "adapter_model.safetensors"
    os.utime(path, (1, 1))
    with pytest.raises(AdapterError, match="were changed since it was registered: reload it"):
        loaded(store, entry.version)
    store.reload("rows")
    assert entry.version.number == 2
    assert store.weights(entry.version) is not None


def test_an_adapter_is_described_as_it_is_now(store, root):
    store.add("rows", root / "rows", whole=False)
    expected = {"name": "rows", "method": "ROCOFT", "version": 1, "folder": str(root / "rows"), "failure": None}
    assert store.describe("rows") == {**expected, "in_memory": False, "bytes": None}
    store.reload("rows")
    described = store.describe("rows")
    # rows 2 x in, and their numbers, of every layer
    values = 2 * sum(2 * (layer.in_features * 4 + 8) for name, layer in store.layers.items() if "layers.0" in name)
    assert described == {**expected, "version": 2, "in_memory": True, "bytes": values}


def test_a_reload_gives_a_new_version_and_a_bad_one_changes_nothing(store, root):
    entry = store.load("rows")
    first = entry.version
    shutil.rmtree(root / "rows")
    write_adapter("llama", configurations("llama")["columns"], root / "rows", seed=9)
    store.reload("rows")
    second = entry.version
    assert (first.number, second.number) == (1, 2)
    parts = store.weights(second)
    assert parts is not None
    assert {part.kind for own in parts.values() for part in own} == {"columns"}
    (root / "rows" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterError, match="truncated"):
        store.reload("rows")
    assert entry.version is second


def test_a_removed_name_is_free_at_once(store, root):
    entry = store.load("rows")
    store.remove("rows")
    assert entry.removed
    with pytest.raises(UserError, match="no adapter is called 'rows'"):
        store.get("rows")
    assert store.stats() == {"registered": 0, "in_memory": 0, "bytes_in_memory": 0, "loads": 1}
    again = store.load("rows")
    assert again.version.number == 2


def test_a_thousand_adapters_are_registered_without_being_read(model, adapters, tmp_path):
    store = AdapterStore(model)
    folder = adapters("llama")["rows"]
    for number in range(1000):
        store.add(f"tenant-{number}", folder, whole=False)
    assert store.stats() == {"registered": 1000, "in_memory": 0, "bytes_in_memory": 0, "loads": 0}
    store.close()
