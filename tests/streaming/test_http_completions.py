"""Completions over HTTP: prompts of every kind, echo, choices, streams and logprobs."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.streaming.http_fakes import CONTEXT, EOS, FakeEngine, saying

PATH = "/v1/completions"


def ask(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = http.post(PATH, json={"model": "fake", "prompt": "Hi", **fields})
    assert response.status_code == 200, response.text
    return response.json()


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


def stream(http: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    response = http.post(PATH, json={"model": "fake", "prompt": "Hi", "stream": True, **fields})
    assert response.status_code == 200, response.text
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def streamed_text(chunks: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"] if choice["index"] == index)


def prompts_of(engine: FakeEngine) -> list[list[int]]:
    return [list(request.segments[0].ids) for request in engine.requests]


def test_an_answer_has_the_shape_of_openai(http: httpx.Client) -> None:
    answer = ask(http)
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1.7e9
    assert answer.pop("system_fingerprint").startswith("fp_")
    assert answer == {
        "object": "text_completion",
        "model": "fake",
        "choices": [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 6,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


@pytest.mark.parametrize(
    ("prompt", "sent"),
    [
        ("ab", [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
        ([EOS], [[EOS]]),
    ],
)
def test_a_prompt_is_a_text_or_ids_or_several(
    http: httpx.Client, fake_engine: FakeEngine, prompt: Any, sent: list[list[int]]
) -> None:
    answer = ask(http, prompt=prompt)
    assert prompts_of(fake_engine) == sent
    assert texts(answer) == ["Hello"] * len(sent)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, sent))


def test_choices_come_prompt_by_prompt(http: httpx.Client, fake_engine: FakeEngine) -> None:
    fake_engine.script = lambda request: [[*request.segments[0].ids, *request.id[-1].encode(), EOS]]
    answer = ask(http, prompt=["x", "y"], n=2, best_of=2)
    assert texts(answer) == ["x0", "x1", "y2", "y3"]
    assert answer["usage"]["prompt_tokens"] == 2
    chunks = stream(http, prompt=["x", "y"], n=2)
    assert [streamed_text(chunks, index) for index in range(4)] == ["x0", "x1", "y2", "y3"]


def test_a_stream_says_the_same_and_ends_with_the_reason(http: httpx.Client) -> None:
    chunks = stream(http, stream_options={"include_usage": True})
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert streamed_text(chunks) == "Hello"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 6
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]


@pytest.mark.parametrize("prompt", ["Say: ", [83, 97, 121, 58, 32]])
def test_echo_puts_the_prompt_before_each_answer(http: httpx.Client, prompt: Any) -> None:
    assert texts(ask(http, prompt=prompt, echo=True, n=2)) == ["Say: Hello"] * 2
    chunks = stream(http, prompt=prompt, echo=True, n=2)
    assert [streamed_text(chunks, index) for index in (0, 1)] == ["Say: Hello"] * 2


def test_a_stop_string_is_not_looked_for_in_the_echo(http: httpx.Client, fake_engine: FakeEngine) -> None:
    fake_engine.script = saying("one END two")
    assert texts(ask(http, prompt="END: ", echo=True, stop="END")) == ["END: one "]


def test_logprobs_have_the_older_shape(http: httpx.Client, fake_engine: FakeEngine) -> None:
    fake_engine.script = saying("aé")
    logprobs = ask(http, logprobs=1)["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["a", "bytes:\\xc3", "bytes:\\xa9"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"a": -0.5}, {"bytes:\\xc3": -0.5}, {"bytes:\\xa9": -0.5}],
        "text_offset": [0, 1, 1],
    }


def test_streamed_logprobs_add_up_to_the_whole(http: httpx.Client, fake_engine: FakeEngine) -> None:
    fake_engine.script = saying("Hello, it is me", together=2)
    whole = ask(http, logprobs=2)["choices"][0]["logprobs"]
    parts = [choice["logprobs"] for chunk in stream(http, logprobs=2) for choice in chunk["choices"]]
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [item for part in parts for item in part[field]] == whole[field]


def test_max_tokens_is_what_the_context_leaves_at_most(http: httpx.Client, fake_engine: FakeEngine) -> None:
    fake_engine.script = saying("x" * 20)
    assert ask(http, max_tokens=3)["choices"][0] | {"logprobs": None} == {
        "index": 0,
        "text": "xxx",
        "logprobs": None,
        "finish_reason": "length",
    }
    ask(http, prompt=[65] * 2040, max_tokens=10**6)
    assert fake_engine.requests[-1].sampling.max_tokens == CONTEXT - 2040


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text("aEN D🙂é", max_size=30),
    stop=st.lists(st.text("EN D🙂", min_size=1, max_size=3), min_size=1, max_size=3),
    together=st.integers(1, 7),
)
def test_whole_and_streamed_answers_agree_about_stop_strings(
    http: httpx.Client, fake_engine: FakeEngine, text: str, stop: list[str], together: int
) -> None:
    fake_engine.script = saying(text, together)
    whole = ask(http, stop=stop)["choices"][0]
    assert not any(one in whole["text"] for one in stop)
    assert whole["text"] == text or any(text.startswith(whole["text"] + one) for one in stop)
    assert streamed_text(stream(http, stop=stop)) == whole["text"]
