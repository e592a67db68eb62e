# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Attention over the paged KV memory: Triton kernels, and a function that launches each.

The method is FlashAttention-2 (arXiv 2307.08691) and, where too few programs would be left for the GPU, Flash-Decoding:
a context is read in pieces by several programs, and their outputs are merged by the logarithm of their sums.

A sequence's work is counted in *rows*: row r is its new position r // group for the r % group-th of the query heads
that share a KV head. So all of them read a key once, however few positions are new. A *tile* is a run of rows, and a
program computes one tile over one piece of the context, for one KV head. Which ones is said by two tables:

items int32 [5, n]: the sequence (-1: nothing to do), the tile's first row, the first position to read and the one
behind the last, and the partial output to write (-1: the piece is the tile's only one, so write the output itself).
merges int32 [4, m]: the sequence, the tile's first row, its first partial output and how many it has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from ar_core.batch import Batch

NO_WINDOW = 1 << 30
LOG2E = tl.constexpr(1.4426950408889634)
_FILL = tl.constexpr(128)  # table entries written at a time
_MERGED = 16  # partial outputs read at a time
_SCRATCH = 8 << 10  # shared memory in bytes that is left for what Triton itself moves through it


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program holds at a time: rows of queries and columns of keys and values, `stages` of these in flight.

    programs: how many on a multiprocessor keep it busy. The sizes below were measured on an H100.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    programs: int


def padded(size: int) -> int:
    """The tensor cores' size for a dimension: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


def narrow_tile(head_dim: int, value_dim: int, group: int, dtype: torch.dtype, shared_memory: int) -> Tile:
    """For one new position a sequence: decode, which waits for memory.

    `shared_memory` is what a program may have, in bytes.
    """
    tile = Tile(min(64, padded(group)), 32, warps=4, stages=3, programs=2)
    return _within(shared_memory, tile, head_dim, value_dim, dtype)


def wide_tile(head_dim: int, value_dim: int, dtype: torch.dtype, shared_memory: int) -> Tile:
    """For several: prefill, which waits for the tensor cores."""
    if dtype.itemsize > 2:
        tile = Tile(32, 32, warps=4, stages=2, programs=2)
    else:
        tile = Tile(128, 64, warps=8, stages=3, programs=1)
    return _within(shared_memory, tile, head_dim, value_dim, dtype)


def _within(memory: int, tile: Tile, head_dim: int, value_dim: int, dtype: torch.dtype) -> Tile:
    """The tile with as many stages as fit into `memory`, and fewer columns if that would leave only one."""
    column = (padded(head_dim) + padded(value_dim)) * dtype.itemsize
    free = memory - tile.rows * padded(head_dim) * dtype.itemsize - _SCRATCH
    columns = tile.columns
    while columns > 16 and free < 2 * columns * column:
        columns //= 2
    return replace(tile, columns=columns, stages=max(1, min(tile.stages, free // (columns * column))))


def store(k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
    """keys[slots] = k and values[slots] = v.

    k [T, kv_heads, head_dim], v [T, kv_heads, value_dim], keys and values the same with slots for T; slots int64 [T].
    """
    tokens, kv_heads, head_dim = k.shape
    value_dim = v.shape[2]
    _store[(tokens,)](
        k,
        v,
        keys,
        values,
        slots,
        k.stride(0),
        k.stride(1),
        k.stride(2),
        v.stride(0),
        v.stride(1),
        v.stride(2),
        keys.stride(0),
        values.stride(0),
        KV_HEADS=kv_heads,
        HEADS_PAD=triton.next_power_of_2(kv_heads),
        K_DIM=head_dim,
        K_PAD=triton.next_power_of_2(head_dim),
        V_DIM=value_dim,
        V_PAD=triton.next_power_of_2(value_dim),
    )


# Whatever changes from step to step is not specialised on, or a step would now and then wait for a compiler.
@triton.jit(do_not_specialize_on_alignment=["slots"])
def _store(
    k,
    v,
    keys,
    values,
    slots,
    k_token,
    k_head,
    k_dim,
    v_token,
    v_head,
    v_dim,
    keys_slot,
    values_slot,
    KV_HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    K_DIM: tl.constexpr,
    K_PAD: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PAD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    head = tl.arange(0, HEADS_PAD)[:, None]
    at = tl.arange(0, K_PAD)[None]
    real = (head < KV_HEADS) & (at < K_DIM)
    row = tl.load(k + token * k_token + head * k_head + at * k_dim, mask=real)
    tl.store(keys + slot * keys_slot + head * K_DIM + at, row, mask=real)
    at = tl.arange(0, V_PAD)[None]
    real = (head < KV_HEADS) & (at < V_DIM)
    row = tl.load(v + token * v_token + head * v_head + at * v_dim, mask=real)
    tl.store(values + slot * values_slot + head * V_DIM + at, row, mask=real)


def plan_decode(
    context_len: torch.Tensor,
    items: torch.Tensor,
    merges: torch.Tensor,
    tile: Tile,
    *,
    group: int,
    window: int,
    pieces: int,
    shortest: int,
) -> None:
    """Fill the tables for one new position in each of B sequences, on the device.

    context_len int32 [B]. The contexts are cut into pieces of about one length, so that B tiles and about `pieces`
    more make up the work, but none shorter than `shortest`. A sequence has t = ceil(group / tile.rows) tiles: items
    is int32 [5, B * t + pieces] and merges int32 [4, B * t].
    """
    count = context_len.shape[0]
    tiles = triton.cdiv(group, tile.rows)
    _plan_decode[(count * tiles,)](
        context_len,
        items,
        merges,
        count,
        items.shape[1],
        window,
        pieces,
        shortest,
        COUNT_PAD=triton.next_power_of_2(count),
        TILES=tiles,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["count", "num_items", "window", "pieces", "shortest"])
def _plan_decode(
    context_len,
    items,
    merges,
    count,
    num_items,
    window,
    pieces,
    shortest,
    COUNT_PAD: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    seq = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    i = tl.arange(0, COUNT_PAD)
    lengths = tl.minimum(tl.load(context_len + i, mask=i < count, other=0), window)
    piece = tl.maximum(tl.cdiv(tl.cdiv(tl.sum(lengths) * TILES, pieces), COLUMNS) * COLUMNS, shortest)
    # Even pieces, for a short last one would leave its program idle. An empty context has one piece: it writes zeros.
    parts = tl.maximum(tl.cdiv(lengths, piece), 1)
    steps = tl.maximum(tl.cdiv(tl.cdiv(lengths, parts), COLUMNS) * COLUMNS, COLUMNS)
    parts = tl.where(i < count, tl.maximum(tl.cdiv(lengths, steps), 1), 0)
    mine = tl.sum(tl.where(i == seq, parts, 0))
    step = tl.sum(tl.where(i == seq, steps, 0))
    first = tl.sum(tl.where(i < seq, parts, 0)) * TILES + tile * mine
    end = tl.load(context_len + seq)
    begin = tl.maximum(end - window, 0)

    for j0 in range(0, mine, _FILL):
        j = j0 + tl.arange(0, _FILL)
        item = items + first + j
        mask = j < mine
        tl.store(item, tl.zeros_like(j) + seq, mask=mask)
        tl.store(item + num_items, tl.zeros_like(j) + tile * ROWS, mask=mask)
        tl.store(item + 2 * num_items, begin + j * step, mask=mask)
        tl.store(item + 3 * num_items, tl.minimum(begin + (j + 1) * step, end), mask=mask)
        tl.store(item + 4 * num_items, tl.where(mine > 1, first + j, -1), mask=mask)
    num_merges = count * TILES
    merge = merges + tl.program_id(0)
    tl.store(merge, seq)
    tl.store(merge + num_merges, tile * ROWS)
    tl.store(merge + 2 * num_merges, first)
    tl.store(merge + 3 * num_merges, mine)

    if tl.program_id(0) == 0:
        for j0 in range(tl.sum(parts) * TILES, num_items, _FILL):
            j = j0 + tl.arange(0, _FILL)
            tl.store(items + j, tl.full([_FILL], -1, tl.int32), mask=j < num_items)


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    batch: Batch,
    items: torch.Tensor,
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    tile: Tile,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """Do the work of `items`.

    q [T, heads, head_dim], keys [slots, kv_heads, head_dim], values [slots, kv_heads, value_dim], out
    [T, heads, value_dim] (contiguous), partial float32 [n, kv_heads, r, value_dim] and partial_lse float32
    [n, kv_heads, r] for tiles of at most r rows that more than one piece is read for.
    """
    _, heads, head_dim = q.shape
    kv_heads, value_dim = values.shape[1:]
    _attend[(items.shape[1] * kv_heads,)](
        q,
        keys,
        values,
        out,
        partial,
        partial_lse,
        items,
        items.shape[1],
        batch.query_start,
        batch.context_len,
        batch.lanes,
        batch.slot_table,
        q.stride(0),
        q.stride(1),
        q.stride(2),
        keys.stride(0),
        values.stride(0),
        batch.slot_table.stride(0),
        scale,
        NO_WINDOW if window is None else window,
        1.0 if softcap is None else softcap,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        K_DIM=head_dim,
        K_PAD=padded(head_dim),
        V_DIM=value_dim,
        V_PAD=padded(value_dim),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        PARTIAL_ROWS=partial.shape[2],
        WINDOWED=window is not None,
        CAPPED=softcap is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@triton.jit(do_not_specialize=["num_items", "window"], do_not_specialize_on_alignment=["items", "lanes"])
def _attend(
    q,
    keys,
    values,
    out,
    partial,
    partial_lse,
    items,
    num_items,
    query_start,
    context_len,
    lanes,
    slot_table,
    q_token,
    q_head,
    q_dim,
    keys_slot,
    values_slot,
    table_lane,
    scale,
    window,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    K_DIM: tl.constexpr,
    K_PAD: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTIAL_ROWS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    item = items + tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    seq = tl.load(item)
    if seq < 0:
        return
    first_row = tl.load(item + num_items)
    begin = tl.load(item + 2 * num_items)
    end = tl.load(item + 3 * num_items)
    part = tl.load(item + 4 * num_items).to(tl.int64)
    query = tl.load(query_start + seq)
    new = tl.load(query_start + seq + 1) - query
    slots = slot_table + tl.load(lanes + seq) * table_lane
    before = tl.load(context_len + seq) - new

    row = first_row + tl.arange(0, ROWS)
    real = row < new * GROUP
    at = before + row // GROUP
    token = (query + row // GROUP).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    k_dim = tl.arange(0, K_PAD)
    v_dim = tl.arange(0, V_PAD)
    queries = tl.load(
        q + token[:, None] * q_token + head[:, None] * q_head + k_dim[None] * q_dim,
        mask=real[:, None] & (k_dim < K_DIM)[None],
        other=0,
    )
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, V_PAD], tl.float32)
    keys += kv_head * K_DIM
    values += kv_head * V_DIM

    # [begin, low) hides positions from some rows by the window, [high, end) by their order; in between, no row needs
    # a mask.
    first_at = before + first_row // GROUP
    last_at = before + (tl.minimum(first_row + ROWS, new * GROUP) - 1) // GROUP
    low = begin
    if WINDOWED:
        outside = tl.maximum(last_at - window + 1 - begin, 0)
        low = tl.minimum(begin + tl.cdiv(outside, COLUMNS) * COLUMNS, end)
        peak, total, acc = _read(
            peak, total, acc, queries, at, begin, low, end, slots, keys, values, keys_slot, values_slot,
            scale, window, softcap, k_dim, v_dim, K_DIM, V_DIM, COLUMNS, True, WINDOWED, CAPPED, PRECISION,
        )  # fmt: skip
    high = low + tl.maximum(tl.minimum(first_at + 1, end) - low, 0) // COLUMNS * COLUMNS
    peak, total, acc = _read(
        peak, total, acc, queries, at, low, high, end, slots, keys, values, keys_slot, values_slot,
        scale, window, softcap, k_dim, v_dim, K_DIM, V_DIM, COLUMNS, False, WINDOWED, CAPPED, PRECISION,
    )  # fmt: skip
    peak, total, acc = _read(
        peak, total, acc, queries, at, high, end, end, slots, keys, values, keys_slot, values_slot,
        scale, window, softcap, k_dim, v_dim, K_DIM, V_DIM, COLUMNS, True, WINDOWED, CAPPED, PRECISION,
    )  # fmt: skip

    acc = acc / tl.where(total > 0, total, 1)[:, None]
    mask = real[:, None] & (v_dim < V_DIM)[None]
    if part < 0:
        where = (token * (KV_HEADS * GROUP) + head)[:, None] * V_DIM + v_dim[None]
        tl.store(out + where, acc.to(out.dtype.element_ty), mask=mask)
    else:
        line = (part * KV_HEADS + kv_head) * PARTIAL_ROWS + tl.arange(0, ROWS)
        tl.store(partial + line[:, None] * V_DIM + v_dim[None], acc, mask=mask)
        tl.store(partial_lse + line, peak + tl.log2(total), mask=real)


@triton.jit
def _read(
    peak,
    total,
    acc,
    queries,
    at,
    begin,
    stop,
    end,
    slots,
    keys,
    values,
    keys_slot,
    values_slot,
    scale,
    window,
    softcap,
    k_dim,
    v_dim,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The online softmax over positions begin to stop; positions from `end` on are not read, for nothing owns them."""
    column = tl.arange(0, COLUMNS)
    # Slots are read a round ahead. Were they read in the round that needs them, the loads of keys and values would
    # wait for them and could not be put in flight as early.
    ahead = tl.load(slots + begin + column, mask=begin + column < end, other=0)
    for first in range(begin, stop, COLUMNS):
        seen = first + column
        slot = ahead.to(tl.int64)
        ahead = tl.load(slots + seen + COLUMNS, mask=seen + COLUMNS < end, other=0)
        if MASKED:
            k_mask = (seen < end)[:, None] & (k_dim < K_DIM)[None]
            v_mask = (seen < end)[:, None] & (v_dim < V_DIM)[None]
        else:
            k_mask = (k_dim < K_DIM)[None]
            v_mask = (v_dim < V_DIM)[None]
        key = tl.load(keys + slot[:, None] * keys_slot + k_dim[None], mask=k_mask, other=0)
        scores = tl.dot(queries, tl.trans(key), input_precision=PRECISION)
        if CAPPED:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1), which overflow leaves right.
            scores = 1 - 2 / (tl.exp2(scores * (2 * LOG2E * scale / softcap)) + 1)
            factor = softcap * LOG2E
        else:
            factor = scale * LOG2E
        if MASKED:
            shown = (seen[None] <= at[:, None]) & (seen < end)[None]
            if WINDOWED:
                shown &= seen[None] > at[:, None] - window
            scores = tl.where(shown, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
        # A row that has seen nothing has no peak, and -inf - -inf is not a number.
        base = tl.where(new_peak == float("-inf"), 0, new_peak) if MASKED else new_peak
        weights = tl.exp2(scores * factor - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, 1)
        value = tl.load(values + slot[:, None] * values_slot + v_dim[None], mask=v_mask, other=0)
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
        peak = new_peak
    return peak, total, acc


def merge(
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    out: torch.Tensor,
    query_start: torch.Tensor,
    merges: torch.Tensor,
    *,
    group: int,
) -> None:
    """Put the partial outputs of `attend` together, where a tile has several."""
    kv_heads, rows, value_dim = partial.shape[1:]
    _merge[(merges.shape[1] * rows * kv_heads,)](
        partial,
        partial_lse,
        out,
        query_start,
        merges,
        merges.shape[1],
        KV_HEADS=kv_heads,
        GROUP=group,
        V_DIM=value_dim,
        V_PAD=triton.next_power_of_2(value_dim),
        ROWS=rows,
        PARTS=_MERGED,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["num_merges"], do_not_specialize_on_alignment=["merges"])
def _merge(
    partial,
    partial_lse,
    out,
    query_start,
    merges,
    num_merges,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0) % ROWS
    kv_head = tl.program_id(0) // ROWS % KV_HEADS
    tile = merges + tl.program_id(0) // (ROWS * KV_HEADS)
    parts = tl.load(tile + 3 * num_merges)
    if parts < 2:
        return
    seq = tl.load(tile)
    first_row = tl.load(tile + num_merges)
    first = tl.load(tile + 2 * num_merges).to(tl.int64)
    query = tl.load(query_start + seq)
    if first_row + row >= (tl.load(query_start + seq + 1) - query) * GROUP:
        return

    v_dim = tl.arange(0, V_PAD)
    peak = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([V_PAD], tl.float32)
    for j0 in range(0, parts, PARTS):
        j = j0 + tl.arange(0, PARTS)
        line = ((first + j) * KV_HEADS + kv_head) * ROWS + row
        lse = tl.load(partial_lse + line, mask=j < parts, other=float("-inf"))
        part = tl.load(
            partial + line[:, None] * V_DIM + v_dim[None],
            mask=(j < parts)[:, None] & (v_dim < V_DIM)[None],
            other=0,
        )
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        base = tl.where(new_peak == float("-inf"), 0, new_peak)
        weights = tl.exp2(lse - base)
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(part * weights[:, None], 0)
        peak = new_peak
    token = (query + (first_row + row) // GROUP).to(tl.int64)
    head = kv_head * GROUP + (first_row + row) % GROUP
    where = (token * (KV_HEADS * GROUP) + head) * V_DIM + v_dim
    tl.store(out + where, (acc / total).to(out.dtype.element_ty), mask=v_dim < V_DIM)
