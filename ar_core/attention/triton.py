"""Attention on a GPU, by the kernels of `ar_core/kernels/attention.py`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton

from ar_core.attention.base import AttentionSpec
from ar_core.batch import Batch
from ar_core.kernels import attention as kernels
from ar_core.kernels.attention import NO_WINDOW, Tile
from ar_core.kv_pool import KVPool

# In positions: a shorter piece of a context costs more to merge than it saves.
_DECODE_PIECE = 64
_PREFILL_PIECE = 256


@dataclass(frozen=True, slots=True)
class _Shape:
    """What layers that share a plan have in common."""

    group: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None


@dataclass(frozen=True, slots=True)
class _Work:
    """One launch of the attention kernel and, if `merges` has columns, one of the merging kernel."""

    tile: Tile
    items: torch.Tensor
    merges: torch.Tensor
    partial: torch.Tensor
    partial_lse: torch.Tensor


class TritonAttention:
    """An AttentionBackend (see `base`) on a GPU, or on any device under Triton's interpreter.

    A step of prefill, or of prefill and decode, is planned on the host. A decode step (`Batch.decode_only`) is made
    to be captured in a CUDA graph: everything it launches, `plan` included, depends on the sizes of the batch's tensors
    alone and not on the host's copies of lengths. Lengths, lanes and slots are read on the device, so that a replay
    after they have changed there is right. A sequence with context_len 0 is padding: it gets zeros.
    """

    def __init__(self, pool: KVPool) -> None:
        """Raises ValueError if the pool is not on a GPU and Triton's interpreter is off."""
        device = pool.k[0].device
        if device.type != "cuda" and not triton.knobs.runtime.interpret:
            raise ValueError(f"triton attention needs a GPU, and the KV pool is on {device}; use the torch attention")
        self._pool = pool
        self._device = device
        self._processors, self._shared_memory = _limits(device)
        self._batch: Batch | None = None
        self._plans: dict[_Shape, list[_Work]] = {}
        self._buffers: dict[tuple[object, ...], torch.Tensor] = {}
        self._outgrown: list[torch.Tensor] = []

    def plan(self, batch: Batch) -> None:
        self._batch = batch
        self._plans = {}  # of this step: made by the first layer of each shape

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, spec: AttentionSpec
    ) -> torch.Tensor:
        batch = self._batch
        assert batch is not None, "attend was called before plan"
        keys, values = self._pool.k[layer], self._pool.v[layer]
        kernels.store(k, v, keys, values, batch.slots)
        _, heads, head_dim = q.shape
        kv_heads, value_dim = values.shape[1:]
        shape = _Shape(heads // kv_heads, kv_heads, head_dim, value_dim, spec.window)
        if shape not in self._plans:
            self._plans[shape] = self._decode(batch, shape) if batch.decode_only else self._mixed(batch, shape)
        out = q.new_empty(q.shape[0], heads, value_dim)
        for work in self._plans[shape]:
            kernels.attend(
                q,
                keys,
                values,
                out,
                batch,
                work.items,
                work.partial,
                work.partial_lse,
                work.tile,
                scale=spec.scale,
                window=spec.window,
                softcap=spec.softcap,
            )
            if work.merges.shape[1]:
                kernels.merge(work.partial, work.partial_lse, out, batch.query_start, work.merges, group=shape.group)
        return out

    def _decode(self, batch: Batch, shape: _Shape) -> list[_Work]:
        tile = self._narrow(shape)
        count = batch.context_len.shape[0]
        tiles = count * triton.cdiv(shape.group, tile.rows)
        pieces = self._items(tile, shape)
        num_items = tiles + pieces
        items = self._buffer(("items", shape), torch.int32, 5, num_items)
        merges = self._buffer(("merges", shape), torch.int32, 4, tiles)
        kernels.plan_decode(
            batch.context_len,
            items,
            merges,
            tile,
            group=shape.group,
            window=NO_WINDOW if shape.window is None else shape.window,
            pieces=pieces,
            shortest=_DECODE_PIECE,
        )
        return [_Work(tile, items, merges, *self._partials(shape, num_items, min(shape.group, tile.rows)))]

    def _mixed(self, batch: Batch, shape: _Shape) -> list[_Work]:
        new, context = np.array(batch.query_lens), np.array(batch.context_lens)
        wide, narrow = self._wide(shape), self._narrow(shape)
        planned: list[tuple[Tile, int, np.ndarray, np.ndarray]] = []
        for tile, sequences, rows, shortest in (
            (wide, np.flatnonzero(new > 1), wide.rows, _PREFILL_PIECE),
            (narrow, np.flatnonzero(new == 1), min(shape.group, narrow.rows), _DECODE_PIECE),
        ):
            if len(sequences):
                items, merges = split_work(
                    sequences,
                    new[sequences],
                    context[sequences],
                    tile,
                    group=shape.group,
                    window=shape.window,
                    pieces=self._items(tile, shape),
                    shortest=shortest,
                )
                planned.append((tile, rows, items, merges))
        tables = self._to_device([table for _, _, *tables in planned for table in tables])
        return [
            _Work(tile, items, merges, *self._partials(shape, int(host_merges[3].sum()), rows))
            for (tile, rows, _, host_merges), items, merges in zip(planned, tables[::2], tables[1::2], strict=True)
        ]

    def _narrow(self, shape: _Shape) -> Tile:
        dtype = self._pool.k[0].dtype
        return kernels.narrow_tile(shape.head_dim, shape.value_dim, shape.group, dtype, self._shared_memory)

    def _wide(self, shape: _Shape) -> Tile:
        return kernels.wide_tile(shape.head_dim, shape.value_dim, self._pool.k[0].dtype, self._shared_memory)

    def _items(self, tile: Tile, shape: _Shape) -> int:
        """How many items keep the GPU busy: each is a program for every KV head."""
        return max(1, self._processors * tile.programs // shape.kv_heads)

    def _partials(self, shape: _Shape, count: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Layers of every shape may share them: the layers run one after another.
        partial = self._buffer(("partial",), torch.float32, count, shape.kv_heads, rows, shape.value_dim)
        return partial, self._buffer(("partial_lse",), torch.float32, count, shape.kv_heads, rows)

    def _buffer(self, key: tuple[object, ...], dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """Memory that is reused by whoever asks with the same key, with what it held before in it."""
        size = int(np.prod(shape))
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            if buffer is not None:
                self._outgrown.append(buffer)  # a captured graph may use it as long as there is a graph
            buffer = torch.empty(triton.next_power_of_2(size), dtype=dtype, device=self._device)
            self._buffers[key] = buffer
        return buffer[:size].view(shape)

    def _to_device(self, tables: list[np.ndarray]) -> list[torch.Tensor]:
        packed = torch.from_numpy(np.concatenate([table.reshape(-1) for table in tables], dtype=np.int32))
        if self._device.type == "cuda":
            packed = packed.pin_memory().to(self._device, non_blocking=True)
        parts = packed.split([table.size for table in tables])
        return [part.view(table.shape) for part, table in zip(parts, tables, strict=True)]


def split_work(
    sequences: np.ndarray,
    new: np.ndarray,
    context: np.ndarray,
    tile: Tile,
    *,
    group: int,
    window: int | None,
    pieces: int,
    shortest: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The tables `items` and `merges` of `ar_core/kernels/attention.py` for some of a batch's sequences.

    sequences, new and context, each int [n], say which ones, how many positions of each are new and how long it is
    with them. A tile that would make the others wait is read in pieces, none longer than its share if all the work
    were dealt to `pieces` programs, or than `shortest` if that is more.
    """
    rows = new * group
    tiles = -(-rows // tile.rows)
    of = np.repeat(np.arange(len(sequences)), tiles)
    first_row = _count_up(tiles) * tile.rows
    last_row = np.minimum(first_row + tile.rows, rows[of]) - 1
    before = (context - new)[of]
    begin = np.maximum(before + first_row // group + 1 - (window or NO_WINDOW), 0)
    end = before + last_row // group + 1
    length = end - begin
    longest = max(shortest, -(-int(length.sum()) // pieces))
    step = _round_up(-(-length // -(-length // longest)), tile.columns)
    parts = -(-length // step)

    tile_of = np.repeat(np.arange(len(parts)), parts)
    starts = begin[tile_of] + _count_up(parts) * step[tile_of]
    ends = np.minimum(starts + step[tile_of], end[tile_of])
    split = parts > 1
    partial = np.where(split[tile_of], np.cumsum(split[tile_of]) - 1, -1)
    items = np.stack([sequences[of[tile_of]], first_row[tile_of], starts, ends, partial])
    first_partial = np.cumsum(parts[split]) - parts[split]
    merges = np.stack([sequences[of[split]], first_row[split], first_partial, parts[split]])
    # The longest go first, so that what is left at the end is short.
    return items[:, np.argsort(starts - ends, kind="stable")], merges


def _count_up(counts: np.ndarray) -> np.ndarray:
    """0 .. n - 1 for each n of `counts`, one after another."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _round_up(numbers: np.ndarray, to: int) -> np.ndarray:
    return -(-numbers // to) * to


def _limits(device: torch.device) -> tuple[int, int]:
    """The device's multiprocessors, and the shared memory in bytes that a program may have."""
    if device.type != "cuda":
        return 8, 160 << 10
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
