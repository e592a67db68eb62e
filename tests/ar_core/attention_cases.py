"""Batches for tests of attention, and what attention is, position by position in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ar_core.attention.base import AttentionBackend, AttentionSpec
from ar_core.batch import Batch
from ar_core.interfaces import KVShape
from ar_core.kv_pool import KVPool


@dataclass(frozen=True)
class Case:
    """Sequences of `new` positions after `cached` ones, as (cached, new), and the shape of what attends to them."""

    sequences: list[tuple[int, int]]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    value_dim: int | None = None
    window: int | None = None
    softcap: float | None = None
    dtype: torch.dtype = torch.float32
    shared: dict[int, tuple[int, int]] = field(default_factory=dict)  # sequence -> (another, its first n slots)

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.head_dim**-0.5, self.window, self.softcap)


@dataclass(frozen=True)
class Step:
    batch: Batch
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def make(case: Case, device: str = "cpu", seed: int = 0, max_context: int | None = None) -> tuple[KVPool, Step]:
    """A step's batch, and a pool with NaN in every slot that no sequence owns, padding's slot among them."""
    torch.manual_seed(seed)
    value_dim = case.value_dim or case.head_dim
    lengths = [cached + new for cached, new in case.sequences]
    count = len(lengths)
    num_slots = sum(lengths) + 50
    pool = KVPool((KVShape(case.kv_heads, case.head_dim, value_dim),), num_slots, case.dtype, device)
    table = torch.randint(0, num_slots + 1, (count + 3, max_context or max(lengths) + 40), dtype=torch.int32)
    lanes = torch.randperm(count + 3)[:count]
    free = torch.randperm(num_slots)[: sum(lengths)] + 1
    owned = []
    for i, length in enumerate(lengths):
        mine, free = free[:length].clone(), free[length:]
        if i in case.shared:
            other, n = case.shared[i]
            mine[:n] = owned[other][:n]
        owned.append(mine)
        table[lanes[i], :length] = mine.int()
    # What lies behind a context is poison, wherever it points to.
    unused = torch.ones(num_slots + 1, dtype=torch.bool)
    unused[torch.cat(owned)] = False
    for memory, dim in ((pool.k[0], case.head_dim), (pool.v[0], value_dim)):
        memory.copy_(torch.randn(num_slots + 1, case.kv_heads, dim))
        memory[unused.to(device)] = float("nan")
    dead = unused.nonzero()[:, 0].int()
    for i, length in enumerate(lengths):
        behind = table[lanes[i], length:]
        behind.copy_(dead[torch.randint(0, len(dead), behind.shape)])

    new = [n for _, n in case.sequences]
    total = sum(new)
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()])
    batch = Batch(
        inputs=torch.zeros(total, 1, dtype=torch.int64, device=device),
        positions=torch.cat([torch.arange(cached, cached + n) for cached, n in case.sequences]).to(device),
        slots=torch.cat([slots[cached:] for slots, (cached, _) in zip(owned, case.sequences, strict=True)]).to(device),
        query_start=starts.int().to(device),
        context_len=torch.tensor(lengths, dtype=torch.int32, device=device),
        slot_table=table.to(device),
        lanes=lanes.to(device),
        select=(starts[1:] - 1).to(device),
        query_lens=new,
        context_lens=lengths,
        first_slots=[-1] * count,
    )
    # Side by side in memory, as a model's projection leaves them.
    q_size, k_size = case.heads * case.head_dim, case.kv_heads * case.head_dim
    qkv = torch.randn(total, q_size + k_size + case.kv_heads * value_dim).to(device, case.dtype)
    q, k, v = qkv.split([q_size, k_size, case.kv_heads * value_dim], dim=1)
    return pool, Step(
        batch,
        q.unflatten(1, (case.heads, case.head_dim)),
        k.unflatten(1, (case.kv_heads, case.head_dim)),
        v.unflatten(1, (case.kv_heads, value_dim)),
    )


def run(backend: AttentionBackend, step: Step, spec: AttentionSpec) -> torch.Tensor:
    backend.plan(step.batch)
    return backend.attend(step.q, step.k, step.v, 0, spec)


def expected(pool: KVPool, step: Step, spec: AttentionSpec) -> torch.Tensor:
    """float64 [T, heads, value_dim], from the pool as it is once the step's k and v are stored."""
    batch = step.batch
    keys, values = pool.k[0].double(), pool.v[0].double()
    keys[batch.slots], values[batch.slots] = step.k.double(), step.v.double()
    group = step.q.shape[1] // keys.shape[1]
    out, start = [], 0
    for i, (new, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        slots = batch.slot_table[batch.lanes[i], :context].long()
        k, v = (memory[slots].repeat_interleave(group, dim=1) for memory in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", step.q[start : start + new].double(), k) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        distance = torch.arange(context - new, context)[:, None] - torch.arange(context)[None]
        hidden = (distance < 0) | (distance >= (spec.window or context))
        weights = scores.masked_fill(hidden.to(scores.device), float("-inf")).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v))
        start += new
    return torch.cat(out)
