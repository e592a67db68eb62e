"""The embedded chat model in float32 against transformers on the same weights: 200 prompts, greedy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM

from ar_core.config import EngineConfig
from ar_core.engine import Engine
from ar_core.heads import TextHead
from ar_core.models import load_backbone
from ar_core.request import Output, Request, SamplingParams, Tokens
from modalities.chat import ChatModel
from modalities.checkpoint import Checkpoint

NEW_TOKENS = 8
TOLERANCE = 1e-3

_OPENINGS = [
    "What is {}?",
    "Write one sentence about {}.",
    "Once upon a time, {} met a dragon and",
    "Q: Who invented {}?\nA:",
    "def describe():\n    '''Return a text about {}.'''\n    return",
    "The history of {} begins in the year",
    "Translate into French: I like {}.",
    "1. {}\n2.",
    "{}, {} and {} are three words. The next one is",
    "<|im_start|>system\nYou are terse.<|im_end|>\n<|im_start|>user\nTell me about {}, please. I should like to know "
    "where it comes from, what it is good for and what it costs.<|im_end|>\n<|im_start|>assistant\n",
]
_TOPICS = [
    "a bridge", "the sea", "electric light", "chess", "the number 42", "Zürich", "volcanoes", "bread", "友達", "ink",
    "the moon", "printing", "a triptych", "tea", "winter", "glass", "Ada Lovelace", "an orchestra", "rice", "rain",
]  # fmt: skip


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    logprobs: torch.Tensor  # [NEW_TOKENS, vocab]


@pytest.fixture(scope="module")
def prompts(chat_checkpoint: Checkpoint) -> list[list[int]]:
    chat = ChatModel(chat_checkpoint)
    return [chat.encode(opening.replace("{}", topic)) for topic in _TOPICS for opening in _OPENINGS]


@pytest.fixture(scope="module")
def answers(chat_checkpoint: Checkpoint, prompts: list[list[int]]) -> list[Answer]:
    path = chat_checkpoint.path
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    return [answer for at in range(0, len(prompts), 25) for answer in _generate(model, prompts[at : at + 25])]


def _generate(model: torch.nn.Module, prompts: list[list[int]]) -> Iterator[Answer]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    out = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logprobs = torch.stack(out.logits, dim=1).log_softmax(-1)
    for tokens, rows in zip(out.sequences[:, longest:].tolist(), logprobs, strict=True):
        yield Answer(tokens, rows)


@pytest.fixture(scope="module")
def backbone(chat_checkpoint: Checkpoint) -> object:
    return load_backbone(chat_checkpoint.path, device=torch.device("cpu"), dtype="float32")


def _requests(prompts: list[list[int]], tokens: int) -> list[Request]:
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=5)
    return [Request(str(i), [Tokens(ids)], params) for i, ids in enumerate(prompts)]


def _assert_agree(outputs: list[Output], answers: list[Answer]) -> None:
    """Tokens and log-probabilities agree; two tokens that transformers holds equal may be swapped, but rarely."""
    swapped = 0
    for output, answer in zip(outputs, answers, strict=True):
        assert output.logprobs is not None and len(output.logprobs) == NEW_TOKENS
        for step, (got, right, token) in enumerate(zip(output.logprobs, answer.logprobs, answer.tokens, strict=True)):
            ids = [token_id for token_id, _ in got.top]
            torch.testing.assert_close(torch.tensor([p for _, p in got.top]), right[ids], atol=TOLERANCE, rtol=0)
            if got.token != token:
                assert right[token] - right[got.token] < TOLERANCE, f"request {output.request_id}, token {step}"
                swapped += 1
                break
    assert swapped <= 2


@pytest.mark.parametrize(
    "options",
    [
        {"max_running": 32},
        {"max_running": 1},
        {"max_running": 32, "max_step_tokens": 40, "overlap": True},
        {"max_running": 32, "kv_slots": 400, "max_step_tokens": 64},
    ],
    ids=["batch of 32", "alone", "chunks and overlap", "eviction and preemption"],
)
def test_equals_transformers_cold_and_warm(
    backbone: object, prompts: list[list[int]], answers: list[Answer], options: dict[str, int]
) -> None:
    engine = Engine(backbone, TextHead(backbone), EngineConfig(device="cpu", **options))  # type: ignore[arg-type]
    _assert_agree(engine.generate(_requests(prompts, NEW_TOKENS)), answers)
    cold = engine.stats().cached_tokens
    _assert_agree(engine.generate(_requests(prompts[:60], NEW_TOKENS)), answers[:60])
    engine.scheduler.check()
    if "kv_slots" in options:
        assert engine.stats().evicted_tokens > 1000
    else:
        assert engine.stats().cached_tokens - cold > 0.9 * sum(map(len, prompts[:60]))
