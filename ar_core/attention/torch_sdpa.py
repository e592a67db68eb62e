"""Attention in torch's own operations: right on any device, and quick on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ar_core.attention.base import AttentionSpec
from ar_core.batch import Batch
from ar_core.kv_pool import KVPool

# Decoding sequences of different lengths are read together, the shorter ones padded, while that reads at most so
# many times what they need.
_MOST_PADDED = 1.5


@dataclass(frozen=True, slots=True)
class _Group:
    """`count` sequences, side by side in the batch, with `new` positions each, that one operation serves.

    Of each the last `span` positions are read. Their slots begin at `first` if they are consecutive, else they are
    `slots`, int64 [count * span]. `mask` [count, 1, new, span] is added to the scores; with `causal` there is none.
    Scores are computed in `dtype`.
    """

    rows: slice
    count: int
    new: int
    span: int
    first: int
    slots: torch.Tensor | None
    mask: torch.Tensor | None
    causal: bool
    dtype: torch.dtype

    def read(self, memory: torch.Tensor) -> torch.Tensor:
        """[slots, kv_heads, dim] -> [count, kv_heads, span, dim] in `dtype`."""
        _, heads, dim = memory.shape
        if self.slots is None:  # a view, in one operation
            shape, strides = (1, heads, self.span, dim), (0, dim, heads * dim, 1)
            start = memory.storage_offset() + self.first * heads * dim
            return memory.as_strided(shape, strides, start).to(self.dtype)
        gathered = memory.index_select(0, self.slots).to(self.dtype)
        return gathered.view(self.count, self.span, heads, dim).transpose(1, 2)


class TorchAttention:
    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self._batch: Batch | None = None
        self._groups: dict[int | None, list[_Group]] = {}  # of the planned batch, by window

    def plan(self, batch: Batch) -> None:
        self._batch = batch
        self._groups = {}

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, spec: AttentionSpec
    ) -> torch.Tensor:
        batch = self._batch
        assert batch is not None, "attend was called before plan"
        keys, values = self._pool.k[layer], self._pool.v[layer]
        groups = self._groups.get(spec.window)
        if groups is None:
            groups = self._groups[spec.window] = list(_groups(batch, spec.window, q.dtype, keys.dtype))
        if len(groups) == 1 and groups[0].slots is None:
            end = groups[0].first + groups[0].span
            keys[end - len(k) : end] = k
            values[end - len(v) : end] = v
            return _attend(q, keys, values, groups[0], spec)
        keys.index_copy_(0, batch.slots, k.to(keys.dtype))
        values.index_copy_(0, batch.slots, v.to(values.dtype))
        return torch.cat([_attend(q[group.rows], keys, values, group, spec) for group in groups])


def _groups(batch: Batch, window: int | None, dtype: torch.dtype, stored: torch.dtype) -> Iterator[_Group]:
    """The groups of a batch whose q is of `dtype`, over KV that is `stored` as another, perhaps."""
    row = at = 0
    while at < len(batch.query_lens):
        new = batch.query_lens[at]
        end = at + 1 if new > 1 else _end_of_decoding(batch, at, window)
        # What one position reads is not worth converting.
        yield _group(batch, at, end, row, window, stored if new == 1 else dtype)
        row += new * (end - at)
        at = end


def _end_of_decoding(batch: Batch, at: int, window: int | None) -> int:
    """Where those sequences from `at` on end that have one new position and are worth reading together."""
    longest = total = 0
    for end in range(at, len(batch.query_lens)):
        span = min(batch.context_lens[end], window or batch.context_lens[end])
        longest, total = max(longest, span), total + span
        if batch.query_lens[end] > 1 or longest * (end + 1 - at) > _MOST_PADDED * total:
            return end
    return len(batch.query_lens)


def _group(batch: Batch, at: int, end: int, row: int, window: int | None, dtype: torch.dtype) -> _Group:
    new, count = batch.query_lens[at], end - at
    longest, shortest = max(batch.context_lens[at:end]), min(batch.context_lens[at:end])
    # The first new position sees a window up to itself, the last one `new` - 1 positions more.
    span = longest if window is None else min(longest, window + new - 1)
    behind = torch.arange(span, device=batch.slots.device) - span  # counted from a sequence's end
    slots = None
    if count > 1 or batch.first_slots[at] < 0:
        # A sequence that is shorter reads its first position again and again, masked.
        positions = (batch.context_len[at:end, None] + behind).clamp_(min=0)
        slots = batch.slot_table[batch.lanes[at:end, None], positions].flatten().long()
    causal = new == longest > 1 and (window is None or window >= longest)
    mask = None
    if not causal and (new > 1 or shortest < span):
        ends = torch.arange(new, device=behind.device)[:, None] + 1 - new
        hidden = (behind >= ends) | (behind < -batch.context_len[at:end, None, None, None])
        if window is not None:
            hidden |= behind < ends - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
    first = batch.first_slots[at] + longest - span
    return _Group(slice(row, row + count * new), count, new, span, first, slots, mask, causal, dtype)


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: _Group, spec: AttentionSpec
) -> torch.Tensor:
    """A group's q [count * new, heads, head_dim] -> [count * new, heads, value_dim]."""
    k, v = group.read(keys), group.read(values)
    count, heads, dim = q.shape
    # Of one position, the heads that share a KV head attend to it like so many positions.
    shaped = q.reshape(count, k.shape[1], -1, dim) if group.new == 1 else q.transpose(0, 1)[None]
    shaped = shaped.to(group.dtype)
    if spec.softcap is not None:
        out = _capped(shaped, k, v, group, spec)
    else:
        out = F.scaled_dot_product_attention(
            shaped, k, v, group.mask, is_causal=group.causal, scale=spec.scale, enable_gqa=group.new > 1
        )
    out = out.reshape(count, heads, -1) if group.new == 1 else out[0].transpose(0, 1)
    return out.to(q.dtype)


def _capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: _Group, spec: AttentionSpec) -> torch.Tensor:
    """Scores through tanh, which no kernel of torch does, in float32: [count, heads, n, dim] -> [.., value_dim]."""
    assert spec.softcap is not None
    shared = q.shape[1] // k.shape[1]
    k, v = (heads.float().repeat_interleave(shared, dim=1) for heads in (k, v))
    scores = spec.softcap * torch.tanh(q.float() @ k.transpose(2, 3) * (spec.scale / spec.softcap))
    if group.causal:
        scores += torch.full(scores.shape[2:], -torch.inf, device=scores.device).triu_(1)
    elif group.mask is not None:
        scores += group.mask
    return (scores.softmax(-1) @ v).to(q.dtype)
