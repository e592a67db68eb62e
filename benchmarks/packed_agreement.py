"""How often weights that stay packed at 4 bits say what the dequantised float32 model says.

    python -m benchmarks.packed_agreement --out benchmarks/results/packed-agreement.json

Both run the embedded chat model greedily on the same prompts.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Annotated

import typer

from ar_core.config import EngineConfig
from ar_core.request import Request, SamplingParams, Tokens
from modalities.chat import ChatModel
from modalities.checkpoint import locate
from modalities.registry import build_engine

_OPENINGS = (
    "What is {}?",
    "Write one sentence about {}.",
    "Once upon a time, {} met a dragon and",
    "Q: Who invented {}?\nA:",
    "def describe():\n    '''Return a text about {}.'''\n    return",
    "The history of {} begins in the year",
    "Translate into French: I like {}.",
    "1. {}\n2.",
    "Three facts about {}:",
    "A letter to a friend who loves {}. Dear",
)
_TOPICS = (
    *("a bridge", "the sea", "electric light", "chess", "the number 42", "Zürich", "volcanoes", "bread", "tea", "ink"),
    *("the moon", "printing", "a triptych", "winter", "glass", "Ada Lovelace", "an orchestra", "rice", "rain", "maps"),
)


def main(
    model: Annotated[str, typer.Option(help="A model whose weights can stay packed.")] = "smollm2-135m-instruct",
    tokens: Annotated[int, typer.Option(min=1, help="Length of each answer.")] = 16,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
) -> None:
    checkpoint = locate(model)
    chat = ChatModel(checkpoint)
    prompts = [chat.encode(opening.format(topic)) for topic in _TOPICS for opening in _OPENINGS]
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    answers = {}
    for dtype in ("bfloat16", "float32"):
        engine = build_engine(checkpoint, EngineConfig(device="cpu", dtype=dtype, max_running=32))
        requests = [Request(str(i), [Tokens(ids)], params) for i, ids in enumerate(prompts)]
        answers[dtype] = [output.tokens for output in engine.generate(requests)]
    pairs = list(zip(answers["bfloat16"], answers["float32"], strict=True))
    shares = {
        "first token": sum(a[0] == b[0] for a, b in pairs) / len(pairs),
        "whole answer": sum(a == b for a, b in pairs) / len(pairs),
    }
    print(f"{len(pairs)} prompts, {tokens} tokens each: " + ", ".join(f"{k} {v:.1%}" for k, v in shares.items()))
    if out is not None:
        record = {"date": date.today().isoformat(), "model": model, "prompts": len(pairs), "tokens": tokens, **shares}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
