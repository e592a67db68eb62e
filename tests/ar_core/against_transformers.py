"""A tiny model served by the engine must say what transformers' own code says, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ar_core.attention import make_backend
from ar_core.batch import Batch
from ar_core.config import EngineConfig
from ar_core.engine import Engine
from ar_core.heads import TextHead
from ar_core.interfaces import Backbone
from ar_core.kv_pool import KVPool
from ar_core.models import load_backbone
from ar_core.request import Output, Request, SamplingParams, Tokens
from tests.ar_core.tiny_checkpoints import VOCAB_SIZE

CPU = torch.device("cpu")
TOLERANCE = 1e-3
NEW_TOKENS = 10


@dataclass(frozen=True)
class Answer:
    """What transformers says greedily: the tokens, and the log-probabilities [n, vocab] that they come from."""

    tokens: list[int]
    logprobs: torch.Tensor


@dataclass(frozen=True)
class Served:
    """A backbone, and what transformers answers with the same weights."""

    backbone: Backbone
    prompts: list[list[int]]
    answers: list[Answer]


def serve(folder: Path) -> Served:
    """Load a checkpoint both ways, and let transformers answer 32 prompts, without a cache."""
    backbone = load_backbone(folder, device=CPU, dtype="float32")
    prompts = shared_prompts(32)
    return Served(backbone, prompts, greedy_answers(eager(folder), prompts))


def eager(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def shared_prompts(n: int) -> list[list[int]]:
    """Prompts of 1 to 40 tokens; three of four begin with one of two openings, at whatever length."""
    generator = torch.Generator().manual_seed(n)

    def ids(count: int) -> list[int]:
        return torch.randint(3, VOCAB_SIZE, (count,), generator=generator).tolist()

    def up_to(most: int) -> int:
        return int(torch.randint(1, most + 1, (1,), generator=generator))

    openings = [ids(24), ids(24), []]
    return [openings[min(i % 4, 2)][: up_to(24)] + ids(up_to(16)) for i in range(n)]


@torch.inference_mode()
def greedy_answers(model: PreTrainedModel, prompts: list[list[int]], new_tokens: int = NEW_TOKENS) -> list[Answer]:
    """Padding follows each sequence, where nothing that counts can see it."""
    lengths = torch.tensor([len(ids) for ids in prompts])
    rows = torch.arange(len(prompts))
    tokens = torch.zeros(len(prompts), int(lengths.max()) + new_tokens, dtype=torch.int64)
    for row, ids in zip(tokens, prompts, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    steps = []
    for step in range(new_tokens):
        logits = model(tokens[:, : int(lengths.max()) + step], use_cache=False).logits[rows, lengths + step - 1]
        tokens[rows, lengths + step] = logits.argmax(-1)
        steps.append(logits.log_softmax(-1))
    logprobs = torch.stack(steps, dim=1)
    return [
        Answer(row[length : length + new_tokens].tolist(), logprobs[i])
        for i, (row, length) in enumerate(zip(tokens, lengths.tolist(), strict=True))
    ]


def make_engine(backbone: Backbone, **options: object) -> Engine:
    return Engine(backbone, TextHead(backbone), EngineConfig(device="cpu", **options))  # type: ignore[arg-type]


def ask(engine: Engine, prompts: list[list[int]], new_tokens: int = NEW_TOKENS) -> list[Output]:
    params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True, logprobs=20)
    return engine.generate([Request(str(i), [Tokens(ids)], params) for i, ids in enumerate(prompts)])


def assert_agree(outputs: list[Output], answers: list[Answer]) -> None:
    for output, answer in zip(outputs, answers, strict=True):
        assert output.tokens == answer.tokens, f"request {output.request_id}"
        assert output.logprobs is not None
        for got, right in zip(output.logprobs, answer.logprobs, strict=True):
            assert abs(got.logprob - float(right[got.token])) < TOLERANCE
            ids, values = zip(*got.top, strict=True)
            torch.testing.assert_close(torch.tensor(values), right.topk(20).values, atol=TOLERANCE, rtol=0)
            torch.testing.assert_close(torch.tensor(values), right[list(ids)], atol=TOLERANCE, rtol=0)


@torch.inference_mode()
def prefill_logits(backbone: Backbone, tokens: list[int]) -> torch.Tensor:
    """The logits of every position of one sequence, in one step: float32 [n, vocab]."""
    n = len(tokens)
    pool = KVPool(backbone.kv_layout, n, backbone.dtype, CPU)
    attention = make_backend("torch", pool)
    batch = Batch(
        inputs=torch.tensor(tokens)[:, None],
        positions=torch.arange(n),
        slots=torch.arange(1, n + 1),
        query_start=torch.tensor([0, n], dtype=torch.int32),
        context_len=torch.tensor([n], dtype=torch.int32),
        slot_table=torch.arange(1, n + 1, dtype=torch.int32)[None],
        lanes=torch.tensor([0]),
        select=torch.arange(n),
        query_lens=[n],
        context_lens=[n],
        first_slots=[1],
    )
    attention.plan(batch)
    return backbone.logits(backbone.forward(backbone.embed(batch.inputs), batch, attention))
