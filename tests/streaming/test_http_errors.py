"""Whatever a client sends, the answer is an error object that says what was wrong; never a 5xx."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest

from ar_core.request import QueueFull, RequestError
from streaming.client import EngineUnavailable
from tests.streaming.http_fakes import EOS, VOCAB, FakeEngine, fake_app, running

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hi"}]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"model": None}, "model", ["null", "valid string"]),
        ({"model": 5}, "model", ["5", "valid string"]),
        ({"messages": None}, "messages", ["null"]),
        ({"messages": []}, "messages", ["at least 1"]),
        ({"messages": "Hi"}, "messages", ['"Hi"', "valid array"]),
        ({"messages": ["Hi"]}, "messages[0]", ['"Hi"', "object"]),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role", ["missing"]),
        (
            {"messages": [{"role": "wizard", "content": "Hi"}]},
            "messages[0].role",
            ['"wizard"', "'developer'", "'user'"],
        ),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", ["5", "valid string", "valid array"]),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            ['"image_url"', "'text'"],
        ),
        ({"messages": [{"role": "tool", "content": "4"}]}, "messages", ["this template knows no tools"]),
        ({"temperature": 2.5}, "temperature", ["2.5", "less than or equal to 2"]),
        ({"temperature": "hot"}, "temperature", ['"hot"', "valid number"]),
        ({"top_p": 0}, "top_p", ["greater than 0"]),
        ({"top_p": True}, "top_p", ["true", "valid number"]),
        ({"top_k": -2}, "top_k", ["-2", "-1"]),
        ({"min_p": 1.5}, "min_p", ["1.5"]),
        ({"repetition_penalty": 0}, "repetition_penalty", ["greater than 0"]),
        ({"presence_penalty": 3}, "presence_penalty", ["3", "2"]),
        ({"frequency_penalty": -3}, "frequency_penalty", ["-3", "-2"]),
        ({"max_tokens": 0}, "max_tokens", ["0", "1"]),
        ({"max_tokens": 10**30}, "max_tokens", ["1" + "0" * 30]),
        ({"max_tokens": 1.5}, "max_tokens", ["1.5", "valid integer"]),
        ({"max_completion_tokens": -1}, "max_completion_tokens", ["-1", "1"]),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", ["5", "4"]),
        ({"n": 0}, "n", ["0", "1"]),
        ({"n": 129}, "n", ["129", "128"]),
        ({"seed": 2**63}, "seed", [str(2**63)]),
        ({"stop": 5}, "stop", ["5", "valid string", "valid array"]),
        ({"stop": ["a", ""]}, "stop[1]", ["at least 1 character"]),
        ({"stop": ["a"] * 17}, "stop", ["16"]),
        ({"stop_token_ids": [VOCAB]}, "stop_token_ids", [str(VOCAB), str(VOCAB - 1)]),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", ["valid integer"]),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", ["101", "100"]),
        ({"logit_bias": {str(10**40): 1}}, "logit_bias", [str(VOCAB - 1)]),
        ({"logit_bias": {"-1": 1}}, "logit_bias", ["-1"]),
        ({"logprobs": 5}, "logprobs", ["5", "valid boolean"]),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", ["21", "20"]),
        ({"top_logprobs": 2}, "top_logprobs", ["logprobs"]),
        ({"stream": "yes"}, "stream", ['"yes"', "valid boolean"]),
        ({"stream_options": {"include_usage": True}}, "stream_options", ["stream"]),
        ({"response_format": {"type": "json_schema"}}, "response_format.type", ["json_schema", "text"]),
        ({"tools": [{"type": "function"}]}, "tools", ["not supported"]),
        ({"functions": [{}]}, "functions", ["not supported"]),
        ({"modalities": ["audio"]}, "modalities", ["text"]),
        ({"continue_final_message": True}, "continue_final_message", ["not supported"]),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", ["chat_template"]),
        ({"cache_salt": 5}, "cache_salt", ["5"]),
        ({"priority": 2**40}, "priority", [str(2**40)]),
    ],
)
def test_a_wrong_field_is_named(http: httpx.Client, fields: dict[str, Any], param: str, says: list[str]) -> None:
    error = error_of(http.post(CHAT, json={"model": "fake", "messages": USER, **fields}), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    for part in says:
        assert part in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"prompt": None}, "prompt", ["null"]),
        ({"prompt": {}}, "prompt", ["an object", "valid string", "valid array"]),
        ({"prompt": []}, "prompt", ["at least 1"]),
        ({"prompt": ""}, "prompt", ["empty"]),
        ({"prompt": ["a", 1]}, "prompt[1]", ["1"]),
        ({"prompt": [[1, 2], []]}, "prompt[1]", ["at least 1"]),
        ({"prompt": [1, VOCAB]}, "prompt", [str(VOCAB), str(VOCAB - 1)]),
        ({"prompt": [1, -1]}, "prompt[1]", ["-1", "0"]),
        ({"prompt": ["a"] * 1025}, "prompt", ["1024"]),
        ({"prompt": ["a"] * 1000, "n": 2}, "n", ["1000", "1024"]),
        ({"prompt": [65] * 3000}, "prompt", ["3000", "2047"]),
        ({"prompt": ["ok", "x" * 2048]}, "prompt", ["2048", "2047"]),
        ({"suffix": "end"}, "suffix", ["leave it out"]),
        ({"best_of": 3}, "best_of", ["3", "1"]),
        ({"echo": True, "logprobs": 1}, "echo", ["logprobs"]),
        ({"logprobs": 21}, "logprobs", ["21", "20"]),
    ],
)
def test_a_wrong_field_of_a_completion_is_named(
    http: httpx.Client, fields: dict[str, Any], param: str, says: list[str]
) -> None:
    error = error_of(http.post(TEXT, json={"model": "fake", "prompt": "Hi", **fields}), 400)
    assert error["param"] == param
    for part in says:
        assert part in error["message"]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"model": "fake", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
        rb'{"model": "fake", "messages": [{"role": "user", "content": "\ud800"}]}',
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b"[" * 50_000,
        b'{"model": "fake", "seed": ' + b"9" * 6000 + b"}",
        b"\x00" * 100,
        b"\xef\xbb\xbf{}",
    ],
    ids=["empty", "cut", "text", "utf-8", "surrogate", "deep", "brackets", "digits", "zeros", "mark"],
)
def test_what_is_not_json_is_refused(http: httpx.Client, raw: bytes) -> None:
    assert "not valid JSON" in error_of(http.post(CHAT, content=raw), 400)["message"]


@pytest.mark.parametrize("raw", [b"[]", b"5", b'"text"', b"null", b"NaN"])
def test_a_body_must_be_an_object(http: httpx.Client, raw: bytes) -> None:
    assert "object" in error_of(http.post(CHAT, content=raw), 400)["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_must_be_finite(http: httpx.Client, number: str) -> None:
    raw = f'{{"model": "fake", "messages": [{{"role": "user", "content": "Hi"}}], "temperature": {number}}}'
    error = error_of(http.post(CHAT, content=raw), 400)
    assert error["param"] == "temperature"
    assert "finite" in error["message"]


def test_an_unknown_model_is_404_and_lists_those_there_are(http: httpx.Client) -> None:
    responses = [
        http.post(CHAT, json={"model": "gpt-9", "messages": USER}),
        http.post(TEXT, json={"model": "gpt-9", "prompt": "Hi"}),
        http.post("/v1/tokenize", json={"model": "gpt-9", "prompt": "Hi"}),
        http.get("/v1/models/gpt-9"),
    ]
    for response in responses:
        error = error_of(response, 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert '"gpt-9"' in error["message"]
        assert "fake" in error["message"]


def test_unknown_paths_and_methods(http: httpx.Client) -> None:
    assert error_of(http.get("/v2/nothing"), 404)["code"] == "unknown_url"
    assert error_of(http.get("/v1/models/"), 404)
    response = http.get(CHAT)
    error_of(response, 405)
    assert response.headers["allow"] == "POST"
    error_of(http.delete("/health"), 405)


def test_a_body_that_announces_too_much_is_refused(http: httpx.Client) -> None:
    error = error_of(http.post(CHAT, content=b"x" * 100_001), 413)
    assert "100001" in error["message"]
    assert "100000" in error["message"]


def test_a_body_that_grows_too_large_is_refused_and_the_connection_goes_on(http: httpx.Client) -> None:
    def chunks() -> Any:
        for _ in range(200):
            yield b"x" * 1000

    error_of(http.post(CHAT, content=chunks()), 413)
    assert http.post(CHAT, json={"model": "fake", "messages": USER}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (QueueFull("the queue has 1024 of 1024 requests"), 503),
        (EngineUnavailable("the engine stopped"), 503),
        (RequestError("logit_bias names token 999", "logit_bias"), 400),
    ],
)
def test_what_the_engine_refuses_at_once_has_a_status(
    http: httpx.Client, fake_engine: FakeEngine, stream: bool, n: int, failure: Exception, status: int
) -> None:
    fake_engine.script = lambda request: [failure]
    response = http.post(CHAT, json={"model": "fake", "messages": USER, "stream": stream, "n": n})
    error = error_of(response, status)
    assert str(failure) in error["message"]
    assert (response.headers.get("retry-after") is not None) == (status == 503)
    if n == 1:
        assert error["param"] == getattr(failure, "param", None)


def test_an_engine_that_dies_in_a_stream_ends_it_with_an_error(http: httpx.Client, fake_engine: FakeEngine) -> None:
    fake_engine.script = lambda request: [[72], [105], EngineUnavailable("the engine stopped")]
    for n in (1, 2):
        with http.stream("POST", CHAT, json={"model": "fake", "messages": USER, "stream": True, "n": n}) as response:
            events = response.read().decode().split("\n\n")
        assert response.status_code == 200
        assert events[-2:] == ["data: [DONE]", ""]
        error = json.loads(events[-3].removeprefix("data: "))["error"]
        assert (error["code"], error["type"]) == ("engine_unavailable", "server_error")
        assert "the engine stopped" in error["message"]


def test_an_engine_that_dies_in_an_answer_is_a_503(http: httpx.Client, fake_engine: FakeEngine) -> None:
    fake_engine.script = lambda request: [[72], EngineUnavailable("the engine stopped")]
    response = http.post(CHAT, json={"model": "fake", "messages": USER})
    assert error_of(response, 503)["code"] == "engine_unavailable"
    assert response.headers["retry-after"]


def test_the_server_does_not_tell_about_its_own_faults(http: httpx.Client, fake_engine: FakeEngine) -> None:
    fake_engine.script = lambda request: [[72], KeyError("secret")]
    response = http.post(CHAT, json={"model": "fake", "messages": USER})
    assert "secret" not in error_of(response, 500)["message"]
    assert response.headers["connection"] == "close"
    text = http.post(CHAT, json={"model": "fake", "messages": USER, "stream": True}).text
    assert "secret" not in text
    assert text.endswith("data: [DONE]\n\n")
    assert '"internal_error"' in text


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: minus\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 500\r\n\r\n{",
    ],
)
def test_what_is_not_http_harms_nobody(http: httpx.Client, garbage: bytes) -> None:
    address = (http.base_url.host, http.base_url.port)
    with socket.create_connection(address, timeout=5) as raw:
        raw.sendall(garbage)
        raw.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: raw.recv(4096), b""))
    assert not answer or int(answer.split()[1]) < 500
    assert http.get("/health").status_code == 200


def test_without_the_key_only_the_probes_answer() -> None:
    with running(fake_app(FakeEngine(), api_key="s3cret")) as url, httpx.Client(base_url=url) as http:
        assert http.get("/health").status_code == 200
        assert http.get("/ready").status_code == 200
        wrong = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}, {"Authorization": "Basic s3cret"}]
        for path in ("/v1/models", "/metrics", "/docs", "/openapi.json", "/nowhere"):
            for headers in wrong:
                response = http.get(path, headers=headers)
                assert error_of(response, 401)["type"] == "authentication_error"
                assert response.headers["www-authenticate"] == "Bearer"
            assert http.get(path, headers={"Authorization": "Bearer s3cret"}).status_code in {200, 404}
        assert http.get("/v1/models", headers={"Authorization": b"Bearer \xff\xfe"}).status_code == 401


def test_an_end_token_alone_is_an_empty_answer(http: httpx.Client, fake_engine: FakeEngine) -> None:
    fake_engine.script = lambda request: [[EOS]]
    choice = http.post(CHAT, json={"model": "fake", "messages": USER}).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")
