"""The chat model on a CPU, with transformers' `generate` on the same weights beside it in the same run.

    python -m benchmarks.chat_cpu --out benchmarks/results/chat-cpu.json

Prompts are random token ids, greedy, with end-of-text ignored, so that every engine does exactly the same work.
Each figure is the median of `--repeats` runs.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from ar_core.config import EngineConfig
from ar_core.engine import Engine
from ar_core.request import Request, SamplingParams, Tokens
from modalities.checkpoint import Checkpoint, locate
from modalities.registry import build_engine

_rng = np.random.default_rng(0)


def prompt(length: int) -> list[int]:
    return _rng.integers(1000, 40000, length).tolist()


def run_engine(engine: Engine, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
    """Seconds until all is done, and until the first token of all."""
    params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
    requests = [Request(str(i), [Tokens(ids)], params) for i, ids in enumerate(prompts)]
    first: list[float] = []
    start = time.perf_counter()
    outputs = engine.generate(requests, lambda output: first.append(time.perf_counter()) if not first else None)
    end = time.perf_counter()
    assert all(len(output.rows) == new_tokens for output in outputs)
    return end - start, first[0] - start


def median(measure: Callable[[], float], repeats: int) -> float:
    return statistics.median(measure() for _ in range(repeats))


def measure_engine(engine: Engine, repeats: int) -> dict[str, float]:
    def throughput(streams: int, length: int, new_tokens: int) -> float:
        seconds, _ = run_engine(engine, [prompt(length) for _ in range(streams)], new_tokens)
        return streams * new_tokens / seconds

    def decode() -> float:
        seconds, first = run_engine(engine, [prompt(128)], 128)
        return 127 / (seconds - first)

    def cached_first_token() -> float:
        prefix = prompt(1000)
        run_engine(engine, [[*prefix, *prompt(24)]], 1)
        return run_engine(engine, [[*prefix, *prompt(24)]], 1)[1]

    run_engine(engine, [prompt(128) for _ in range(4)], 8)
    return {
        "1 stream, 128 in, 128 out (tok/s)": median(lambda: throughput(1, 128, 128), repeats),
        "1 stream, decode alone (tok/s)": median(decode, repeats),
        "16 streams, 128 in, 64 out (tok/s)": median(lambda: throughput(16, 128, 64), repeats),
        "first token, 1,024 in (ms)": 1000 * median(lambda: run_engine(engine, [prompt(1024)], 1)[1], repeats),
        "first token, 1,000 cached + 24 (ms)": 1000 * median(cached_first_token, repeats),
    }


def measure_transformers(checkpoint: Checkpoint, repeats: int) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.path.parent, gguf_file=checkpoint.path.name, dtype=torch.bfloat16
    ).eval()

    def seconds(streams: int, length: int, new_tokens: int) -> float:
        ids = torch.tensor([prompt(length) for _ in range(streams)])
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=0,
            )
        assert out.shape[1] == length + new_tokens
        return time.perf_counter() - start

    seconds(1, 128, 8)
    return {
        "1 stream, 128 in, 128 out (tok/s)": 128 / median(lambda: seconds(1, 128, 128), repeats),
        "16 streams, 128 in, 64 out (tok/s)": 16 * 64 / median(lambda: seconds(16, 128, 64), repeats),
        "first token, 1,024 in (ms)": 1000 * median(lambda: seconds(1, 1024, 1), repeats),
    }


def main(
    model: Annotated[str, typer.Option(help="Name, folder, file or hub id of the model.")] = "smollm2-135m-instruct",
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads for both.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
) -> None:
    torch.set_num_threads(threads)
    checkpoint = locate(model)
    ours = measure_engine(build_engine(checkpoint, EngineConfig(device="cpu")), repeats)
    theirs = measure_transformers(checkpoint, repeats)
    table = Table("", "triptych", "transformers", "ratio")
    for name, value in ours.items():
        peer = theirs.get(name)
        table.add_row(name, f"{value:.1f}", f"{peer:.1f}" if peer else "", f"{value / peer:.2f}" if peer else "")
    Console().print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads",
            "torch": torch.__version__,
            "model": model,
            "triptych": ours,
            "transformers": theirs,
        }
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
