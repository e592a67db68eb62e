"""OpenAI's own Python package against a real server with a real model."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import httpx
import openai
import pytest

from benchmarks.server import Server

MODEL = "smollm2-135m-instruct"
COLOURS: list[Any] = [{"role": "user", "content": "Name three colours."}]
PROMPT = "The capital of France is"


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "triptych"


def test_a_chat_streams_what_it_says_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=COLOURS, temperature=0, max_tokens=24)
    message = whole.choices[0].message
    assert message.role == "assistant" and message.content
    options: Any = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=COLOURS, temperature=0, max_tokens=24, stream=True, stream_options=options
        )
    )
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(piece or "" for piece in pieces) == message.content
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason


def test_the_packages_own_stream_helper_agrees(client: openai.OpenAI) -> None:
    fields: Any = {"model": MODEL, "messages": COLOURS, "temperature": 0, "stop": ["."]}
    whole = client.chat.completions.create(**fields)
    with client.chat.completions.stream(**fields) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content


def test_a_completion_goes_on_from_a_text_or_from_ids(client: openai.OpenAI, server: Server) -> None:
    ids = httpx.post(f"{server.url}/v1/tokenize", json={"model": MODEL, "prompt": PROMPT}).json()["tokens"]
    text = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=8).choices[0].text
    assert "Paris" in text
    streamed = client.completions.create(model=MODEL, prompt=ids, temperature=0, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text


def test_several_prompts_and_choices_keep_their_order(client: openai.OpenAI) -> None:
    prompts = [PROMPT, "Two and two make"]
    alone = [client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=6) for prompt in prompts]
    both = client.completions.create(model=MODEL, prompt=prompts, temperature=0, max_tokens=6, n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in both.choices]
    assert texts == [alone[0].choices[0].text] * 2 + [alone[1].choices[0].text] * 2


def test_two_choices_differ_and_a_seed_brings_both_back(client: openai.OpenAI) -> None:
    def ask(seed: int) -> list[str | None]:
        answer = client.chat.completions.create(
            model=MODEL, messages=COLOURS, temperature=1.2, max_tokens=16, n=2, seed=seed
        )
        return [choice.message.content for choice in answer.choices]

    first = ask(7)
    assert first[0] != first[1]
    assert ask(7) == first
    assert ask(1000) != first


def test_logprobs_are_those_of_the_answer(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(
        model=MODEL, messages=COLOURS, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3
    ).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    content = choice.logprobs.content
    assert "".join(entry.token for entry in content) == choice.message.content
    assert bytes(byte for entry in content for byte in entry.bytes or []).decode() == choice.message.content
    for entry in content:
        assert entry.top_logprobs[0].logprob == entry.logprob  # greedy: the likeliest is what was said
        probabilities = [math.exp(top.logprob) for top in entry.top_logprobs]
        assert probabilities == sorted(probabilities, reverse=True) and sum(probabilities) <= 1.0001
    legacy = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=4, logprobs=2).choices[0]
    assert legacy.logprobs is not None and legacy.logprobs.tokens is not None
    assert "".join(legacy.logprobs.tokens) == legacy.text


def test_a_stop_string_is_cut_off(client: openai.OpenAI) -> None:
    def count(**more: Any) -> Any:
        return client.completions.create(model=MODEL, prompt="1, 2, 3, 4,", temperature=0, max_tokens=24, **more)

    free = count().choices[0].text
    assert " 7" in free
    stopped = count(stop=[" 7"]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (free[: free.index(" 7")], "stop")
    assert "".join(chunk.choices[0].text for chunk in count(stop=" 7", stream=True)) == stopped.text


def test_the_second_turn_finds_the_first_in_the_cache(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Tell me about " + "rivers and lakes and " * 20 + "seas."}]
    first = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=8)
    assert first.usage is not None
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "Go."}]
    second = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=8)
    assert second.usage is not None and second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None and cached >= first.usage.prompt_tokens - 16
    assert second.usage.total_tokens == second.usage.prompt_tokens + second.usage.completion_tokens


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError),
        ({"temperature": 9}, openai.BadRequestError),
        ({"messages": [{"role": "king", "content": "Obey."}]}, openai.BadRequestError),
        ({"messages": [{"role": "user", "content": "long " * 9000}]}, openai.BadRequestError),
        ({"extra_body": {"top_k": "many"}}, openai.BadRequestError),
    ],
)
def test_errors_are_the_packages_own(client: openai.OpenAI, fields: Any, kind: type[openai.APIStatusError]) -> None:
    for stream in (False, True):
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**{"model": MODEL, "messages": COLOURS, "stream": stream, **fields})
        assert isinstance(caught.value.body, dict) and caught.value.body["message"]


async def test_many_async_streams_each_get_their_own(server: Server) -> None:
    async def count_from(client: openai.AsyncOpenAI, start: int) -> str:
        prompt = f"{start}, {start + 1}, {start + 2},"
        stream = await client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=4, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client:
        together = await asyncio.gather(*(count_from(client, start) for start in range(1, 17)))
        alone = [await count_from(client, start) for start in (1, 9)]
    assert [together[0], together[8]] == alone
    assert len(set(together)) > 8


async def test_a_stream_that_is_closed_early_frees_the_engine(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client:
        stream = await client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
        )
        async for _ in stream:
            break
        await stream.close()
        async with asyncio.timeout(60):
            while await _running(server) > 0:
                await asyncio.sleep(0.1)


async def _running(server: Server) -> float:
    async with httpx.AsyncClient() as http:
        text = (await http.get(f"{server.url}/metrics", timeout=60)).text
    line = next(line for line in text.splitlines() if line.startswith("triptych:num_running_reqs{"))
    return float(line.split()[-1])
