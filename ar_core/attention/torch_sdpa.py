"""Attention in plain torch operations: right on any device."""

from __future__ import annotations

import torch

from ar_core.attention.base import AttentionSpec
from ar_core.batch import Batch
from ar_core.kv_pool import KVPool


class TorchAttention:
    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self._batch: Batch | None = None

    def plan(self, batch: Batch) -> None:
        self._batch = batch

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, spec: AttentionSpec
    ) -> torch.Tensor:
        batch = self._batch
        assert batch is not None, "attend was called before plan"
        keys, values = self._pool.k[layer], self._pool.v[layer]
        keys.index_copy_(0, batch.slots, k)
        values.index_copy_(0, batch.slots, v)
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        start = 0
        for i, (new, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
            slots = batch.slot_table[batch.lanes[i], :context]
            out[start : start + new] = _sequence(
                q[start : start + new], keys.index_select(0, slots), values.index_select(0, slots), spec
            )
            start += new
        return out


def _sequence(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    new, heads, _ = q.shape
    context, kv_heads, _ = k.shape
    grouped = q.view(new, kv_heads, heads // kv_heads, -1).permute(1, 2, 0, 3).float()
    scores = grouped @ k.permute(1, 2, 0).unsqueeze(1).float() * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    at = torch.arange(context - new, context, device=q.device)[:, None]
    seen = torch.arange(context, device=q.device)[None]
    hidden = seen > at
    if spec.window is not None:
        hidden |= seen <= at - spec.window
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    out = weights @ v.transpose(0, 1).unsqueeze(1).float()
    return out.permute(2, 0, 1, 3).reshape(new, heads, -1).to(q.dtype)
