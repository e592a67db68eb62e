"""One server with a language model and a voice, asked at the same time: each answers as it does alone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import pytest

from benchmarks.server import running
from tests.ar_core.tiny_checkpoints import make_checkpoint
from tests.streaming.speech_server import NAME, TINY

IDS = list(range(10, 40))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("models")
    text = make_checkpoint(folder / "text", "llama")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (text / file).write_bytes((Path(TINY) / file).read_bytes())
    models = ("--model", f"text={text}", "--model", f"{NAME}={TINY}", "--voices", str(folder / "voices"))
    options = ("--port", "0", "--device", "cpu", "--dtype", "float32")
    with (
        running("streaming.cli", "serve", *options, *models, environment={"OMP_NUM_THREADS": "1"}) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none needed", timeout=60, max_retries=0) as made,
    ):
        yield made


def spoken(client: openai.OpenAI, seed: int) -> np.ndarray:
    extra = {"seed": seed, "max_new_tokens": 16}
    made = client.audio.speech.create(
        model=NAME, voice="default", input="The quick brown fox.", response_format="pcm", extra_body=extra
    )
    return np.frombuffer(made.content, np.int16).astype(np.int64)


def written(client: openai.OpenAI, seed: int) -> list[float]:
    made = client.completions.create(
        model="text",
        prompt=[seed % 100 + 3, *IDS],
        max_tokens=16,
        logprobs=0,
        seed=seed,
        extra_body={"ignore_eos": True},
    )
    logprobs = made.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None
    return [float(value or 0.0) for value in logprobs.token_logprobs]


def test_both_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["text", NAME]


def test_speech_and_text_at_once_are_what_they_are_alone(client: openai.OpenAI) -> None:
    seeds = range(8)
    sounds, texts = [spoken(client, seed) for seed in seeds], [written(client, seed) for seed in seeds]
    with ThreadPoolExecutor(16) as pool:
        sounding = [pool.submit(spoken, client, seed) for seed in seeds]
        writing = [pool.submit(written, client, seed) for seed in seeds]
        for sound, right in zip(sounding, sounds, strict=True):  # the codec rounds otherwise in a batch
            np.testing.assert_allclose(sound.result(), right, atol=4, rtol=0)
        for task, alone in zip(writing, texts, strict=True):
            assert task.result() == pytest.approx(alone, abs=1e-3)


def test_each_refuses_what_the_other_does(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="makes text and cannot speak"):
        client.audio.speech.create(model="text", voice="default", input="Hello.")
    with pytest.raises(openai.BadRequestError, match="speaks and takes no messages or prompts"):
        client.completions.create(model=NAME, prompt="Hello.")
