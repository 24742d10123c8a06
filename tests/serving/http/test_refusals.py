"""What cannot be done is said, in the form of OpenAI's API, and never done otherwise."""

from __future__ import annotations

import json
import socket

import pytest

pytest.importorskip("fastapi", reason="needs the extra [serve]")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai", reason="needs the official client")

HTTP = httpx.Client(verify=False, timeout=30)  # loads no certificates, which takes longer than a request
COMPLETION = {"model": "base", "prompt": "Call me", "max_tokens": 2}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


def post(running, body, path="/v1/completions", **headers):
    content = body if isinstance(body, (bytes, str)) else json.dumps(body)
    return HTTP.post(running.url + path, content=content, headers={"Content-Type": "application/json", **headers})


def error_in(response, status):
    """The error, after a look at its form."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    return error


CANNOT = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "functions": [{"name": "f"}],
    "tool_choice": "required",
    "function_call": {"name": "f"},
    "response_format": {"type": "json_schema", "json_schema": {}},
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy"},
    "prediction": {"type": "content", "content": "x"},
    "suffix": "the end",
    "best_of": 3,
    "reasoning_effort": "high",
    "verbosity": "low",
    "web_search_options": {},
}


@pytest.mark.parametrize("field", CANNOT)
def test_what_the_server_cannot_do_is_refused_by_name(shared, field):
    asked = [(COMPLETION, PATHS["completions"]), (CHAT, PATHS["chat"])]
    for body, path in asked:
        error = error_in(post(shared, {**body, field: CANNOT[field]}, path), 400)
        assert error["param"] == field
        assert error["code"] == "unsupported_parameter"
        assert "this server" in error["message"]


HARMLESS = {
    "user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "x", "prompt_cache_key": "x",
    "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"], "suffix": None, "logit_bias": {},
    "parallel_tool_calls": True, "audio": None, "stop": None, "unheard_of": None,
}  # fmt: skip


@pytest.mark.parametrize("path", ["completions", "chat"])
def test_what_makes_no_difference_is_let_pass(shared, path):
    body = COMPLETION if path == "completions" else CHAT
    answer = post(shared, {**body, **HARMLESS}, PATHS[path])
    assert answer.status_code == 200, answer.text


def test_a_misspelt_field_is_refused_with_the_right_one(shared):
    error = error_in(post(shared, {**COMPLETION, "temprature": 0}), 400)
    assert "no field 'temprature'; did you mean 'temperature'?" in error["message"]
    assert (error["param"], error["code"]) == ("temprature", "unknown_parameter")
    assert "no field 'messages'" in error_in(post(shared, {**COMPLETION, "messages": []}), 400)["message"]


WRONG_TYPES = [
    ({"prompt": 3}, "prompt", "must be a text, a list of tokens"),
    ({"prompt": ["a", 3]}, "prompt", "must be a text, a list of tokens"),
    ({"prompt": None}, "prompt", "must be a text, a list of tokens"),
    ({"prompt": [[1], [True]]}, "prompt", "must be a text"),
    ({"prompt": []}, "prompt", "empty list"),
    ({"prompt": ""}, None, "the prompt has no tokens"),
    ({"prompt": [[]]}, None, "the prompt has no tokens"),
    ({"prompt": [5, 300]}, None, "the prompt has the token 300; the model's are 0 to 299"),
    ({"prompt": [-1]}, None, "the prompt has the token -1"),
    ({"prompt": [-1], "echo": True}, None, "the prompt has the token -1"),
    ({"model": 3}, "model", "valid string"),
    ({"model": ""}, "model", "at least 1 character"),
    ({"model": "x" * 600}, "model", "at most 512 characters"),
    ({"max_tokens": "5"}, "max_tokens", "valid integer"),
    ({"max_tokens": 2.5}, "max_tokens", "valid integer"),
    ({"max_tokens": True}, "max_tokens", "valid integer"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens is 0; it must be a whole number of at least 1"),
    ({"n": 0}, "n", "n is 0"),
    ({"n": 129}, "n", "n is 129"),
    ({"temperature": -1}, "temperature", "temperature is -1"),
    ({"temperature": "hot"}, "temperature", "valid number"),
    ({"top_p": 0}, "top_p", "top_p is 0"),
    ({"top_p": 1.5}, "top_p", "top_p is 1.5"),
    ({"top_k": -2}, "top_k", "top_k is -2"),
    ({"min_p": 2}, "min_p", "min_p is 2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty is 0"),
    ({"presence_penalty": 3}, "presence_penalty", "presence_penalty is 3"),
    ({"seed": 1.5}, "seed", "valid integer"),
    ({"logprobs": 21}, "logprobs", "logprobs is 21"),
    ({"logprobs": True}, "logprobs", "valid integer"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "logit_bias has the token 'x'"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "logit_bias[5] is 101"),
    ({"logit_bias": {"5": "much"}}, "logit_bias.5", "must be an object from tokens to numbers"),
    ({"logit_bias": {"300": 1}}, "logit_bias", "logit_bias has the token 300"),
    ({"stop": [1]}, "stop", "must be a text, or a list of texts"),
    ({"stop": ["a"] * 17}, "stop", "up to 16 texts"),
    ({"stop": [""]}, "stop", "not empty"),
    ({"stop_token_ids": [300]}, "stop_token_ids", "stop_token_ids has the token 300"),
    ({"stream": "yes"}, "stream", "valid boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "set stream to true"),
    ({"echo": True, "logprobs": 1}, "echo", "log-probabilities of the prompt"),
    ({"best_of": 2, "n": 3}, "best_of", "this server hands out every answer"),
    ({"n": 100, "prompt": ["a"] * 3}, "n", "these are 300 answers; a request may ask for 256 here"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "param", "message"), WRONG_TYPES)
def test_wrong_values_are_named(shared, changes, param, message):
    error = error_in(post(shared, {**COMPLETION, **changes}), 400)
    assert message in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


WRONG_CHATS = [
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": "hi"}, "messages", "valid array"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "'system', 'developer'"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "is missing"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages[0].content", "reads text alone"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0]", "no tools"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0]", "no tools"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "a chat begins with the user"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "logprobs", "logprobs is 21"),
    ({"logprobs": 2}, "logprobs", "valid boolean"),
    ({"max_completion_tokens": 3}, "max_completion_tokens", "differ"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "param", "message"), WRONG_CHATS)
def test_wrong_chats_are_named(shared, changes, param, message):
    error = error_in(post(shared, {**CHAT, **changes}, PATHS["chat"]), 400)
    assert message in error["message"]
    assert error["param"] == param


BROKEN = [
    (b"", "the body is no JSON"),
    (b"{", "the body is no JSON"),
    (b"[]", "the body must be a JSON object"),
    (b"3", "the body must be a JSON object"),
    (b'{"model": "base"}', "prompt is missing"),
    (b'{"model": "base", "prompt": "\xff"}', "the body is no JSON"),
    (b'{"model": "base", "prompt": "\\ud800"}', "the body is no JSON"),
    (b'{"model": "base", "prompt": "x", "temperature": NaN}', "temperature: input should be a finite number"),
    (b'{"model": "base", "prompt": "x", "temperature": 1e999}', "temperature: input should be a finite number"),
    (b'{"model": "base", "prompt": "x", "seed": 1' + b"0" * 5000 + b"}", "the body is no JSON: number out of range"),
    (b'{"model": "base", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", "the body is no JSON"),
]


@pytest.mark.parametrize(("body", "message"), BROKEN)
def test_broken_bodies_are_refused(shared, body, message):
    assert message in error_in(post(shared, body), 400)["message"]


def test_bodies_that_are_not_said_to_be_json_are_refused(shared):
    """A web page can send those to a server of this machine without being asked whether it may."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        error = error_in(post(shared, COMPLETION, **{"Content-Type": kind}), 400)
        assert "Content-Type: application/json" in error["message"]
    assert post(shared, COMPLETION, **{"Content-Type": "application/json; charset=utf-8"}).status_code == 200


def test_too_long_a_prompt_says_how_long_it_may_be(shared):
    for body, path, param in [
        ({**COMPLETION, "prompt": "x" * 127}, PATHS["completions"], "prompt"),
        ({**COMPLETION, "max_tokens": 10**6}, PATHS["completions"], "prompt"),
        ({**CHAT, "messages": [{"role": "user", "content": "x" * 200}], "max_tokens": None}, PATHS["chat"], "messages"),
    ]:
        error = error_in(post(shared, body, path), 400)
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == param
        assert f"together they may be {shared.engine.max_length} here" in error["message"]
    assert post(shared, {**COMPLETION, "prompt": "x" * 126}).status_code == 200


NAMES = [
    "..", "../rows", "rows/../lora", "/etc/passwd", "rows/", "./rows", "rows\0", "\0", "ro\u200bws", "\uff52ows", "ROWS", " rows", "rows\n",
    "..%2frows", "%2e%2e", "rows\\..\\lora", "~", "$HOME", "\u202eswor", "con", "x" * 500, "base/rows", "org/tiny-llama/rows",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_no_name_but_a_registered_one_is_a_model(shared, name):
    for body, path in [(COMPLETION, PATHS["completions"]), (CHAT, PATHS["chat"])]:
        error = error_in(post(shared, {**body, "model": name}, path), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert len(error["message"]) < 400


def test_near_names_are_told(shared):
    with (
        shared.client(openai.OpenAI) as client,
        pytest.raises(openai.NotFoundError, match="no model 'row'; did you mean 'rows'"),
    ):
        client.completions.create(**{**COMPLETION, "model": "row"})


def test_a_chat_without_a_template_is_refused(start):
    running = start(template=None)
    error = error_in(post(running, CHAT, PATHS["chat"]), 400)
    assert error["code"] == "no_chat_template"
    assert "/v1/completions" in error["message"]


def test_unknown_paths_and_methods_are_errors_of_the_same_form(shared):
    assert error_in(HTTP.get(f"{shared.url}/v1/nothing"), 404)["message"] == "there is no '/v1/nothing' here"
    assert "GET is not for" in error_in(HTTP.get(f"{shared.url}/v1/completions"), 405)["message"]
    assert error_in(HTTP.get(f"{shared.url}/openapi.json"), 404)


def test_a_body_that_is_too_long_is_refused_before_it_is_read(start):
    running = start(settings={"max_body_bytes": 1000})
    fits, long = {**COMPLETION, "user": "x" * 900}, {**COMPLETION, "user": "x" * 2000}
    assert post(running, fits).status_code == 200
    error = error_in(post(running, long), 413)
    assert "longer than 1,000 bytes" in error["message"]
    assert error_in(
        HTTP.post(
            f"{running.url}/v1/completions", content=iter([b"{"] * 3000), headers={"Content-Type": "application/json"}
        ),
        413,
    )
    # a length that is only announced, however large
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n{"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_come_in_is_given_up(start):
    running = start(settings={"body_timeout_s": 0.2})
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_web_pages_may_not_call_unless_they_are_named(start, shared):
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    plain = HTTP.options(f"{shared.url}/v1/completions", headers=asked)
    assert "access-control-allow-origin" not in plain.headers
    running = start(settings={"allow_origins": ("https://page.example",)})
    allowed = HTTP.options(f"{running.url}/v1/completions", headers=asked)
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    other = HTTP.options(f"{running.url}/v1/completions", headers={**asked, "Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers
