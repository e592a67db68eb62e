"""The models that a gateway serves, and what their tokenizers make of a text."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from streaming.http.app import build_app
from streaming.http.served import ServedModel
from streaming.messages import ModelInfo
from tests.streaming.http_fakes import CONTEXT, EOS, VOCAB, FakeChat, FakeEngine, running

CARD = {"id": "fake", "object": "model", "created": 1700000000, "owned_by": "triptych", "max_model_len": CONTEXT}


def post(http: httpx.Client, path: str, **fields: Any) -> dict[str, Any]:
    response = http.post(path, json={"model": "fake", **fields})
    assert response.status_code == 200, response.text
    return response.json()


def refused(http: httpx.Client, path: str, **fields: Any) -> dict[str, Any]:
    response = http.post(path, json={"model": "fake", **fields})
    assert response.status_code == 400, response.text
    return response.json()["error"]


def test_the_models_are_listed(http: httpx.Client) -> None:
    assert http.get("/v1/models").json() == {"object": "list", "data": [CARD]}
    assert http.get("/v1/models/fake").json() == CARD


def test_a_name_may_hold_slashes_and_signs() -> None:
    names = ["org/model", "über model", "a:b"]
    app = build_app({name: ServedModel(name, 1700000000, FakeEngine(), FakeChat()) for name in names})
    with running(app) as url, httpx.Client(base_url=url, timeout=20) as http:
        assert [card["id"] for card in http.get("/v1/models").json()["data"]] == names
        for name in names:
            assert http.get(f"/v1/models/{name}").json()["id"] == name
            assert http.post("/v1/completions", json={"model": name, "prompt": "x"}).json()["model"] == name
        assert http.get("/v1/models/org%2Fmodel").json()["id"] == "org/model"


def test_the_engine_may_have_room_for_less_than_the_model(http: httpx.Client, fake_engine: FakeEngine) -> None:
    fake_engine.info = ModelInfo("fake", "chat", "cpu", "float32", 100, VOCAB, (EOS,), 100)
    assert http.get("/v1/models/fake").json()["max_model_len"] == 100
    error = refused(http, "/v1/completions", prompt=[65] * 100)
    assert "99" in error["message"] and error["code"] == "context_length_exceeded"


def test_a_text_becomes_ids_and_back(http: httpx.Client) -> None:
    made = post(http, "/v1/tokenize", prompt="aé")
    assert made == {"count": 3, "max_model_len": CONTEXT, "tokens": [97, 0xC3, 0xA9]}
    assert post(http, "/v1/detokenize", tokens=made["tokens"]) == {"text": "aé"}


def test_each_tokens_text_can_be_asked_for(http: httpx.Client) -> None:
    assert post(http, "/v1/tokenize", prompt="aé", return_token_strs=True)["token_strs"] == ["a", "\ufffd", "\ufffd"]


@pytest.mark.parametrize("prompt", [None, True, False])
def test_messages_become_the_prompt_that_a_chat_would_have(http: httpx.Client, prompt: bool | None) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    ids = post(http, "/v1/tokenize", messages=messages, add_generation_prompt=prompt)["tokens"]
    assert bytes(ids).decode() == "<user>Hi" + ("" if prompt is False else "<assistant>")


def test_nothing_is_a_text_too(http: httpx.Client) -> None:
    assert post(http, "/v1/tokenize", prompt="")["tokens"] == []
    assert post(http, "/v1/detokenize", tokens=[])["text"] == ""


def test_a_long_text_is_taken_whole(http: httpx.Client) -> None:
    made = post(http, "/v1/tokenize", prompt="x" * 20_000)
    assert made["count"] == 20_000
    assert post(http, "/v1/detokenize", tokens=made["tokens"])["text"] == "x" * 20_000


def test_wrong_requests_name_what_is_wrong(http: httpx.Client) -> None:
    both = refused(http, "/v1/tokenize", prompt="x", messages=[{"role": "user", "content": "x"}])
    neither = refused(http, "/v1/tokenize")
    assert both["message"] == neither["message"] == "give either prompt or messages"
    assert refused(http, "/v1/detokenize", tokens=[VOCAB])["param"] == "tokens"
    assert refused(http, "/v1/detokenize", tokens=[-1])["param"] == "tokens[0]"
    assert refused(http, "/v1/detokenize", tokens="abc")["param"] == "tokens"
    tool = refused(http, "/v1/tokenize", messages=[{"role": "tool", "content": "x"}])
    assert (tool["param"], "knows no tools" in tool["message"]) == ("messages", True)


def test_a_model_without_a_template_says_so(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeChat, "has_template", False)
    for path in ("/v1/tokenize", "/v1/chat/completions"):
        error = refused(http, path, messages=[{"role": "user", "content": "x"}])
        assert (error["param"], "no chat template" in error["message"]) == ("model", True)
