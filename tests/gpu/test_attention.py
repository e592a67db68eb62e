"""Triton's attention on a real GPU against float64, at the sizes of real models and at odd ones."""

from __future__ import annotations

import pytest
import torch

from ar_core.attention.base import AttentionSpec
from ar_core.attention.triton import TritonAttention
from tests.ar_core.attention_cases import Case, Step, expected, make, run

# Of the outputs' root mean square: the error's own, and the worst element's.
TOLERANCE = {torch.float32: (1e-5, 2e-4), torch.float16: (1e-3, 2e-2), torch.bfloat16: (8e-3, 1e-1)}
DTYPES = list(TOLERANCE)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    size = want.square().mean().sqrt()
    error = (got.double() - want) / size
    mean, worst = TOLERANCE[got.dtype]
    assert error.square().mean().sqrt() < mean
    assert error.abs().max() < worst * max(1, want.abs().max() / size)


def check(case: Case, seed: int = 0) -> None:
    pool, step = make(case, "cuda", seed)
    want = expected(pool, step, case.spec)
    assert_close(run(TritonAttention(pool), step, case.spec), want)
    assert torch.equal(pool.k[0][step.batch.slots], step.k)
    assert torch.equal(pool.v[0][step.batch.slots], step.v)


@every_dtype
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    shape = {"heads": 8, "head_dim": head_dim, "dtype": dtype}
    check(Case([(0, 700), (1500, 1), (300, 77), (5, 1), (0, 2)], **shape))
    check(Case([(4000, 1), (0, 1), (63, 1), (64, 1), (1023, 1)], **shape))


@every_dtype
@pytest.mark.parametrize("heads, kv_heads", [(32, 8), (28, 4), (16, 16), (9, 3), (48, 1), (96, 1)])
def test_query_heads_share_kv_heads(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    check(Case([(0, 129), (800, 1), (33, 50)], heads, kv_heads, dtype=dtype))
    check(Case([(999, 1), (31, 1)], heads, kv_heads, dtype=dtype))


@every_dtype
@pytest.mark.parametrize("window, softcap", [(1, None), (100, None), (1000, 20.0), (None, 1.0)])
def test_windows_and_caps(window: int | None, softcap: float | None, dtype: torch.dtype) -> None:
    shape = {"heads": 8, "window": window, "softcap": softcap, "dtype": dtype}
    check(Case([(0, 500), (900, 300), (1500, 1)], **shape))
    check(Case([(3000, 1), (99, 1), (100, 1), (0, 1)], **shape))


@every_dtype
def test_values_may_have_another_dim_than_keys(dtype: torch.dtype) -> None:
    for head_dim, value_dim in ((192, 128), (64, 160)):
        check(Case([(100, 200), (700, 1)], head_dim=head_dim, value_dim=value_dim, dtype=dtype))
        check(Case([(1200, 1), (700, 1)], head_dim=head_dim, value_dim=value_dim, dtype=dtype))


@every_dtype
def test_long_contexts(dtype: torch.dtype) -> None:
    shape = {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": dtype}
    check(Case([(0, 2048)], **shape))
    check(Case([(16000, 20), (3000, 1)], **shape))
    check(Case([(20000, 1)], **shape))
    check(Case([(length, 1) for length in range(0, 3000, 37)], **shape))


@every_dtype
def test_sequences_read_what_others_hold_or_compute(dtype: torch.dtype) -> None:
    shape = {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": dtype}
    check(Case([(10, 700), (710, 2), (600, 1), (500, 90)], shared={1: (0, 710), 2: (0, 600), 3: (0, 500)}, **shape))


@every_dtype
def test_random_mixes(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for seed in range(8):
        new = torch.randint(1, 400, (6,), generator=generator) * torch.randint(0, 2, (6,), generator=generator)
        cached = torch.randint(0, 2000, (6,), generator=generator)
        sequences = list(zip(cached.tolist(), new.clamp(min=1).tolist()))
        check(Case(sequences, 32, 8, 128, window=(None, 333)[seed % 2], dtype=dtype), seed)


@every_dtype
def test_a_captured_decode_step_follows_lengths_lanes_and_slots(dtype: torch.dtype) -> None:
    shape = {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": dtype}
    steps = [
        [(0, 1), (0, 1), (0, 1), (0, 1), (0, 1)],
        [(5000, 1), (3, 1), (700, 1), (64, 1), (63, 1)],
        [(10, 1), (8000, 1), (7999, 1), (127, 1), (1, 1)],
        [(100, 1), (101, 1), (102, 1), (103, 1), (104, 1)],
    ]
    made = [make(Case(sequences, **shape), "cuda", seed, 8200) for seed, sequences in enumerate(steps)]
    pool, static = make(Case([(8100, 1)] * 5, **shape), "cuda", 9, 8200)
    backend = TritonAttention(pool)
    specs = [AttentionSpec(128**-0.5), AttentionSpec(128**-0.5, window=500)]

    def step() -> list[torch.Tensor]:
        backend.plan(static.batch)
        return [backend.attend(static.q, static.k, static.v, 0, spec) for spec in specs]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = step()
    # A larger step makes the workspaces grow, and the graph goes on with the smaller ones.
    run(backend, make(Case([(50, 1)] * 300, **shape), "cuda")[1], specs[0])
    for other, new in made:
        load(static, new)
        for memory, filled in ((pool.k[0], other.k[0]), (pool.v[0], other.v[0])):
            memory.fill_(float("nan"))
            memory[: len(filled)] = filled
        wants = [expected(pool, new, spec) for spec in specs]
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        for out, want in zip(outs, wants):
            assert_close(out, want)


def load(into: Step, new: Step) -> None:
    """Put a step's tensors where a captured one reads them."""
    for name in ("slots", "query_start", "context_len", "slot_table", "lanes"):
        getattr(into.batch, name).copy_(getattr(new.batch, name))
    for name in ("q", "k", "v"):
        getattr(into, name).copy_(getattr(new, name))
