"""Both attention backends against float64; Triton's kernels in its interpreter where there is no GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ar_core.attention import make_backend
from ar_core.attention.triton import split_work
from ar_core.kernels import attention as kernels
from tests.ar_core.attention_cases import Case, expected, make, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}

both_backends = pytest.mark.parametrize("backend", ["torch", "triton"])


def check(backend: str, case: Case, seed: int = 0) -> None:
    pool, step = make(case, DEVICE, seed)
    want = expected(pool, step, case.spec)
    got = run(make_backend(backend, pool), step, case.spec)
    assert got.dtype == case.dtype
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)
    for memory, rows in ((pool.k[0], step.k), (pool.v[0], step.v)):
        assert torch.equal(memory[step.batch.slots], rows)


@both_backends
def test_one_step_mixes_prefill_and_decode_of_any_length(backend: str) -> None:
    check(backend, Case([(0, 1), (150, 1), (0, 37), (90, 5), (3, 2), (33, 1), (0, 2)]))


@both_backends
@pytest.mark.parametrize("length", [1, 2, 64, 65, 200])
def test_decodes_one_position(backend: str, length: int) -> None:
    check(backend, Case([(length - 1, 1)]))


@both_backends
def test_decodes_short_and_long_contexts_together(backend: str) -> None:
    check(backend, Case([(300, 1), (0, 1), (64, 1), (129, 1), (7, 1)]))


@both_backends
@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (4, 1), (9, 3), (7, 1), (20, 1)])
def test_query_heads_share_kv_heads(backend: str, heads: int, kv_heads: int) -> None:
    check(backend, Case([(40, 1), (20, 9)], heads, kv_heads))
    check(backend, Case([(80, 1), (20, 1)], heads, kv_heads))


def test_more_query_heads_than_a_tile_has_rows_share_a_kv_head() -> None:
    check("triton", Case([(100, 1), (20, 1)], heads=70, kv_heads=1))
    check("triton", Case([(100, 1), (20, 3)], heads=70, kv_heads=1))


@both_backends
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
def test_head_dims(backend: str, head_dim: int) -> None:
    check(backend, Case([(70, 1), (20, 6)], head_dim=head_dim))
    check(backend, Case([(70, 1), (20, 1)], head_dim=head_dim))


@both_backends
@pytest.mark.parametrize("head_dim, value_dim", [(64, 32), (48, 80)])
def test_values_may_have_another_dim_than_keys(backend: str, head_dim: int, value_dim: int) -> None:
    check(backend, Case([(70, 1), (20, 6)], head_dim=head_dim, value_dim=value_dim))
    check(backend, Case([(150, 1), (20, 1)], head_dim=head_dim, value_dim=value_dim))


@both_backends
@pytest.mark.parametrize("window", [1, 70, 500])
def test_a_window_hides_what_is_behind_it(backend: str, window: int) -> None:
    check(backend, Case([(170, 1), (5, 1), (60, 20), (0, 90)], window=window))
    check(backend, Case([(230, 1), (69, 1), (5, 1)], window=window))


@both_backends
def test_scores_are_capped(backend: str) -> None:
    check(backend, Case([(130, 1), (20, 9)], softcap=0.7))
    check(backend, Case([(130, 1), (20, 1)], softcap=0.7, window=90))


# Triton's interpreter multiplies the bits of bfloat16 matrices as if they were integers.
@pytest.mark.parametrize(
    "backend, dtype",
    [("torch", torch.float16), ("torch", torch.bfloat16), ("triton", torch.float16)]
    + [("triton", torch.bfloat16)] * (DEVICE == "cuda"),
)
def test_half_precision_loses_no_more_than_its_rounding(backend: str, dtype: torch.dtype) -> None:
    check(backend, Case([(100, 1), (20, 9)], dtype=dtype))
    check(backend, Case([(100, 1), (20, 1)], dtype=dtype))


@both_backends
def test_sequences_share_a_cached_prefix(backend: str) -> None:
    check(backend, Case([(50, 3), (50, 4), (60, 1)], shared={1: (0, 50), 2: (0, 50)}))


@both_backends
def test_a_sequence_reads_what_another_computes_in_the_same_step(backend: str) -> None:
    check(backend, Case([(10, 30), (40, 2), (25, 1), (40, 1)], shared={1: (0, 40), 2: (0, 25), 3: (0, 40)}))


def test_a_long_context_is_read_in_pieces_by_prefill_too() -> None:
    case = Case([(700, 3), (5, 4), (400, 1)], kv_heads=1)
    tile = kernels.wide_tile(64, 64, torch.float32, 160 << 10)
    items, merges = split_work(
        np.array([0, 1]), np.array([3, 4]), np.array([703, 9]), tile, group=4, window=None, pieces=8, shortest=256
    )
    assert merges.shape[1] == 1 and items.shape[1] > 3
    check("triton", case)
    check("triton", Case(case.sequences, kv_heads=1, window=600))


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("group", [1, 6])
def test_pieces_cover_every_row_and_position_once(group: int, window: int | None) -> None:
    rng = np.random.default_rng(0)
    new = rng.integers(1, 60, 12)
    context = new + rng.integers(0, 900, 12)
    tile = kernels.Tile(rows=32, columns=16, warps=4, stages=2, programs=1)
    items, merges = split_work(np.arange(12), new, context, tile, group=group, window=window, pieces=16, shortest=32)
    partial = items[4][items[4] >= 0]
    assert sorted(partial) == list(range(merges[3].sum())), "each partial output has one writer"
    for seq in range(12):
        for first_row in range(0, new[seq] * group, tile.rows):
            mine = items[:, (items[0] == seq) & (items[1] == first_row)]
            mine = mine[:, np.argsort(mine[2])]
            assert (mine[2, 1:] == mine[3, :-1]).all()
            last_row = min(first_row + tile.rows, new[seq] * group) - 1
            before = context[seq] - new[seq]
            assert mine[3, -1] == before + last_row // group + 1
            assert mine[2, 0] == max(0, before + first_row // group + 1 - (window or 10**6))
            if mine.shape[1] > 1:
                merge = merges[:, (merges[0] == seq) & (merges[1] == first_row)][:, 0]
                assert list(mine[4]) == list(range(merge[2], merge[2] + merge[3]))
            else:
                assert mine[4, 0] == -1


def test_padding_of_a_decode_step_gets_zeros_and_changes_nothing() -> None:
    case = Case([(100, 1), (3, 1), (0, 1), (0, 1)])
    pool, step = make(case, DEVICE)
    want = expected(pool, step, case.spec)[:2]
    step.batch.context_len[2:] = 0
    step.batch.slots[2:] = 0
    got = run(make_backend("triton", pool), step, case.spec)
    torch.testing.assert_close(got[:2].double(), want, atol=2e-5, rtol=2e-5)
    assert not got[2:].any()


def test_one_backend_serves_steps_and_layers_that_differ() -> None:
    """What a step leaves in reused memory is not seen by the next one."""
    case = Case([(200, 1), (30, 1), (10, 8)])
    pool, step = make(case, DEVICE)
    backend = make_backend("triton", pool)
    for window in (None, 40, None):
        spec = Case([], window=window).spec
        want = expected(pool, step, spec)
        torch.testing.assert_close(run(backend, step, spec).double(), want, atol=2e-5, rtol=2e-5)
    for sequences in ([(90, 1), (200, 1)], [(3, 1)], [(10, 1)] * 4):
        other, step = make(Case(sequences, window=64), DEVICE)
        pool.k[0], pool.v[0] = other.k[0], other.v[0]
        for window in (64, None):
            spec = Case([], window=window).spec
            want = expected(pool, step, spec)
            torch.testing.assert_close(run(backend, step, spec).double(), want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kibibytes", [99, 163, 227])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_tiles_fit_into_the_shared_memory_of_a_gpu(head_dim: int, dtype: torch.dtype, kibibytes: int) -> None:
    memory, padded = kibibytes << 10, kernels.padded(head_dim)
    for tile in (
        kernels.narrow_tile(head_dim, head_dim, 8, dtype, memory),
        kernels.wide_tile(head_dim, head_dim, dtype, memory),
    ):
        assert (tile.rows + 2 * tile.columns * tile.stages) * padded * dtype.itemsize < memory
        assert tile.columns >= 16 and tile.stages >= 1


def test_a_pool_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, _ = make(Case([(0, 1)]))
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    with pytest.raises(ValueError, match="needs a GPU, and the KV pool is on cpu"):
        make_backend("triton", pool)


def test_an_unknown_backend_is_refused() -> None:
    pool, _ = make(Case([(0, 1)]))
    with pytest.raises(ValueError, match="'flash'; it must be one of auto, torch, triton"):
        make_backend("flash", pool)
