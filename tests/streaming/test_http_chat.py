"""Chat completions over HTTP: shapes, streams, stop strings, logprobs, several choices."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from ar_core.request import SamplingParams
from tests.streaming.http_fakes import CONTEXT, EOS, FakeEngine, saying

PATH = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hi"}]


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": USER, **fields}


def ask(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = http.post(PATH, json=body(**fields))
    assert response.status_code == 200, response.text
    return response.json()


def stream(http: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    """The chunks of a stream that ends well."""
    response = http.post(PATH, json=body(stream=True, **fields))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def streamed_text(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def test_an_answer_has_the_shape_of_openai(http: httpx.Client) -> None:
    answer = ask(http)
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 1.7e9
    assert answer.pop("system_fingerprint").startswith("fp_")
    assert answer == {
        "object": "chat.completion",
        "model": "fake",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": len("<user>Hi<assistant>"),
            "completion_tokens": 6,
            "total_tokens": 25,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(http: httpx.Client) -> None:
    chunks = stream(http)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert "usage" not in chunks[0]
    deltas = [chunk["choices"][0] for chunk in chunks]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    assert streamed_text(chunks) == "Hello"
    assert [d["finish_reason"] for d in deltas] == [None] * (len(deltas) - 1) + ["stop"]
    assert deltas[-1]["delta"] == {}


def test_usage_comes_in_a_last_chunk_without_choices(http: httpx.Client) -> None:
    chunks = stream(http, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 6


def test_usage_in_every_chunk_grows(http: httpx.Client) -> None:
    chunks = stream(http, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] == 6


def test_tokens_that_arrive_together_make_one_chunk(http: httpx.Client, fake_engine: FakeEngine) -> None:
    fake_engine.script = saying("Hello", together=3)
    texts = [chunk["choices"][0]["delta"].get("content") for chunk in stream(http)]
    assert texts == ["", "Hel", "lo", None]


def test_characters_of_several_tokens_come_whole(http: httpx.Client, fake_engine: FakeEngine) -> None:
    fake_engine.script = saying("aé漢🙂")
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in stream(http)]
    assert [text for text in texts if text] == ["a", "é", "漢", "🙂"]


@pytest.mark.parametrize("together", [1, 2, 5, 50])
@pytest.mark.parametrize("stop", ["END", ["zzz", "END"], ["ND", "END", "DX"]])
def test_a_stop_string_ends_the_answer_and_the_work(
    http: httpx.Client, fake_engine: FakeEngine, together: int, stop: Any
) -> None:
    fake_engine.script = saying("one E two EN three END four five six" + "." * 500, together)
    expected = "one E two EN three "
    assert ask(http, stop=stop)["choices"][0] | {"index": 0} == {
        "index": 0,
        "message": {"role": "assistant", "content": expected, "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }
    chunks = stream(http, stop=stop)
    assert streamed_text(chunks) == expected
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert fake_engine.aborted == {request.id for request in fake_engine.requests}


def test_a_stop_string_that_never_comes_true_is_given_out(http: httpx.Client, fake_engine: FakeEngine) -> None:
    fake_engine.script = saying("almost EN")
    assert streamed_text(stream(http, stop="END")) == "almost EN"
    assert not fake_engine.aborted


def test_max_tokens_ends_with_length(http: httpx.Client) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        choice = ask(http, **{name: 3})["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("Hel", "length")


def test_the_default_of_max_tokens_is_what_the_context_leaves(http: httpx.Client, fake_engine: FakeEngine) -> None:
    ask(http)
    request = fake_engine.requests[0]
    assert request.sampling.max_tokens == CONTEXT - len(request.segments[0].ids)


def test_every_choice_is_a_request_of_its_own(http: httpx.Client, fake_engine: FakeEngine) -> None:
    fake_engine.script = lambda request: [list(b"choice "), list(request.id[-1].encode()), [EOS]]
    answer = ask(http, n=3, seed=40)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["choice 0", "choice 1", "choice 2"]
    assert [request.sampling.seed for request in fake_engine.requests] == [40, 41, 42]
    assert len({tuple(request.segments[0].ids) for request in fake_engine.requests}) == 1
    assert answer["usage"]["prompt_tokens"] == len("<user>Hi<assistant>")
    assert answer["usage"]["completion_tokens"] == 3 * 9


def test_choices_stream_side_by_side(http: httpx.Client, fake_engine: FakeEngine) -> None:
    fake_engine.script = lambda request: saying(f"I am {request.id[-1]} STOP and go on")(request)
    chunks = stream(http, n=3, stop="STOP", stream_options={"include_usage": True})
    for index in range(3):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert streamed_text(chunks, index) == f"I am {index} "
        assert [c["finish_reason"] for c in mine].count("stop") == 1
    assert len(fake_engine.aborted) == 3


def test_logprobs_are_those_of_the_content(http: httpx.Client, fake_engine: FakeEngine) -> None:
    fake_engine.script = saying("é!")
    content = ask(http, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xA9], [0x21]]  # and none for the end token
    assert content[2]["token"] == "!"
    assert content[2]["logprob"] == -0.5
    assert content[2]["top_logprobs"] == [
        {"token": "!", "logprob": -0.5, "bytes": [0x21]},
        {"token": "a", "logprob": -9999.0, "bytes": [97]},
    ]


def test_streamed_logprobs_do_not_give_a_stop_string_away(http: httpx.Client, fake_engine: FakeEngine) -> None:
    fake_engine.script = saying("no EN, yes END of it")
    for chunks in (stream(http, stop="END", logprobs=True), stream(http, stop="END", logprobs=True, top_logprobs=0)):
        entries = [
            entry
            for chunk in chunks
            for choice in chunk["choices"]
            for entry in (choice["logprobs"] or {"content": []})["content"]
        ]
        assert "".join(entry["token"] for entry in entries) == streamed_text(chunks) == "no EN, yes "


def test_all_fields_reach_the_engine(http: httpx.Client, fake_engine: FakeEngine) -> None:
    fields = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.1,
        "presence_penalty": -1,
        "frequency_penalty": 1,
        "repetition_penalty": 1.5,
        "seed": 1,
        "logprobs": True,
        "top_logprobs": 5,
        "ignore_eos": True,
    }
    fake_engine.script = saying("x" * 20)
    bias = {"65": -100, "66": 5.5}
    others = {"cache_salt": "tenant", "priority": -3, "user": "someone", "unknown_field": {"is": "ignored"}}
    ask(http, **fields, stop_token_ids=[70, 71], logit_bias=bias, **others)
    request = fake_engine.requests[0]
    expected = {**fields, "logprobs": 5, "logit_bias": {65: -100.0, 66: 5.5}, "stop_token_ids": (70, 71)}
    del expected["top_logprobs"]
    assert request.sampling == SamplingParams(**expected)
    assert (request.cache_salt, request.priority) == ("tenant", -3)


@pytest.mark.parametrize("null", ["temperature", "top_p", "n", "stop", "seed", "max_tokens", "logit_bias", "tools"])
def test_null_means_the_default(http: httpx.Client, fake_engine: FakeEngine, null: str) -> None:
    ask(http, **{null: None})
    ask(http)
    assert fake_engine.requests[0].sampling == fake_engine.requests[1].sampling


def test_messages_reach_the_template_as_it_knows_them(http: httpx.Client, fake_engine: FakeEngine) -> None:
    messages = [
        {"role": "developer", "content": "Be brief.", "name": "dev"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None},
    ]
    ask(http, messages=messages, add_generation_prompt=False, chat_template_kwargs={"thinking": False})
    prompt = bytes(fake_engine.requests[0].segments[0].ids).decode()
    assert prompt == "<system>Be brief.<user>a\nb<assistant>[thinking=False]"


def test_a_long_prompt_is_templated_off_the_loop(http: httpx.Client, fake_engine: FakeEngine) -> None:
    response = http.post(PATH, json=body(messages=[{"role": "user", "content": "x" * 20_000}]))
    assert response.status_code == 400
    assert "20017" in response.json()["error"]["message"]
    assert str(CONTEXT - 1) in response.json()["error"]["message"]
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_accepted_values_of_fields_that_do_nothing(http: httpx.Client) -> None:
    ask(http, response_format={"type": "text"}, modalities=["text"], tools=[{"type": "function"}], tool_choice="none")
    ask(http, top_k=-1, stop=[], tools=[], store=True, metadata={"a": "b"}, service_tier="auto")
