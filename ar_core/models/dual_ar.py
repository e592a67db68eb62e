"""Dual-AR decoders: a slow transformer over positions, and a fast one over the integers within a position.

A position is a row [id, code 0, .. code K-1]. Where the id is one of the `semantic` tokens the row is a frame and its
codes count; elsewhere the row is text and they are zeros. The slow transformer is a Backbone like any other; the
`FrameHead` (see `frame_head.py`) asks it for the first integer of the next row and the fast one for the rest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from ar_core.attention.base import AttentionBackend, AttentionSpec
from ar_core.batch import Batch
from ar_core.interfaces import KVShape
from ar_core.layers import Linear, PairRotary, RMSNorm, silu_mul
from ar_core.models.dual_ar_config import DualARConfig, StackConfig
from ar_core.weights import Weights

# q [T, heads, head_dim], k and v [T, kv_heads, head_dim] -> [T, heads, head_dim]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Attention:
    def __init__(self, weights: Weights, prefix: str, config: StackConfig) -> None:
        c = self._config = config
        self._qkv = _linear(
            weights, f"{prefix}.wqkv", (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, c.dim, c.qkv_bias
        )
        self._out = _linear(weights, f"{prefix}.wo", c.dim, c.num_heads * c.head_dim, c.out_bias)
        self._norm = self._qk_norm(weights, prefix) if c.qk_norm else None

    def _qk_norm(self, weights: Weights, prefix: str) -> RMSNorm:
        """One norm for q's and k's heads, which lie side by side: each head has its row of weights."""
        c = self._config
        q, k = (weights.tensor(f"{prefix}.{part}_norm.weight", (c.head_dim,)) for part in "qk")
        return RMSNorm(torch.cat((q.expand(c.num_heads, -1), k.expand(c.num_kv_heads, -1))), c.norm_eps)

    def __call__(self, x: torch.Tensor, rotary: PairRotary, rows: torch.Tensor, attend: Attend) -> torch.Tensor:
        heads, kv_heads = self._config.num_heads, self._config.num_kv_heads
        qkv = self._qkv(x).view(x.shape[0], -1, self._config.head_dim)
        qk, v = qkv[:, :-kv_heads], qkv[:, -kv_heads:]
        if self._norm is not None:
            qk = self._norm(qk)
        qk = rotary.apply(qk, rows)
        return self._out(attend(qk[:, :heads], qk[:, heads:], v).reshape(x.shape[0], -1))


class Block:
    def __init__(self, weights: Weights, prefix: str, config: StackConfig) -> None:
        c = config
        self._attention_norm = RMSNorm(weights.tensor(f"{prefix}.attention_norm.weight", (c.dim,)), c.norm_eps)
        self._attention = Attention(weights, f"{prefix}.attention", c)
        self._ffn_norm = RMSNorm(weights.tensor(f"{prefix}.ffn_norm.weight", (c.dim,)), c.norm_eps)
        gate, up = (weights.tensor(f"{prefix}.feed_forward.{w}.weight", (c.intermediate, c.dim)) for w in ("w1", "w3"))
        self._gate_up = Linear(torch.cat((gate, up)))
        self._down = _linear(weights, f"{prefix}.feed_forward.w2", c.dim, c.intermediate, False)

    def __call__(self, hidden: torch.Tensor, rotary: PairRotary, rows: torch.Tensor, attend: Attend) -> torch.Tensor:
        """[T, dim], overwritten."""
        hidden += self._attention(self._attention_norm(hidden), rotary, rows, attend)
        hidden += self._down(silu_mul(self._gate_up(self._ffn_norm(hidden))))
        return hidden


class SlowTransformer:
    """A Backbone (see `interfaces`) that also knows which tokens a FrameHead may emit.

    Where the fast transformer reads the state before the final norm, that is what `forward` returns, and the logits
    apply the norm.
    """

    def __init__(self, config: DualARConfig, weights: Weights, max_context: int | None = None) -> None:
        c, names = config.slow, config.names
        self.vocab_size = config.vocab_size
        self.max_context = min(max_context or config.max_context, config.max_context)
        self.eos_token_ids: tuple[int, ...] = (config.end_id,)
        self.dtype = weights.dtype
        self.kv_layout = (KVShape(c.num_kv_heads, c.head_dim, c.head_dim),) * c.num_layers
        self.semantic = config.semantic
        self.num_codebooks = config.num_codebooks
        self.codebook_size = config.codebook_size
        self._embedding = weights.tensor(f"{names.slow}embeddings.weight", (config.vocab_size, c.dim))
        self._codebooks = weights.tensor(
            f"{names.codebooks}.weight", (config.num_codebooks * config.codebook_size, c.dim)
        )
        self._offsets = torch.arange(config.num_codebooks, device=weights.device) * config.codebook_size
        self._scale = (config.num_codebooks + 1) ** -0.5 if config.rescaled else 1.0
        self._rotary = PairRotary(c.rope_base, c.head_dim, self.max_context, weights.device)
        self._blocks = [Block(weights, f"{names.slow}layers.{layer}", c) for layer in range(c.num_layers)]
        self._spec = AttentionSpec(scale=c.head_dim**-0.5)
        self._norm = RMSNorm(weights.tensor(f"{names.slow}norm.weight", (c.dim,)), c.norm_eps)
        self._normed = config.fast_reads_normed
        output = f"{names.slow}output.weight"
        if config.tied:
            weights.ignore(output)  # some checkpoints store it all the same
        self._head = self._embedding if config.tied else weights.tensor(output, (config.vocab_size, c.dim))
        self._frame_head = torch.cat(
            (self._head[config.semantic.start : config.semantic.stop], self._head[[config.end_id]])
        )

    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        """int64 [T, K + 1] -> [T, dim]."""
        ids = inputs[:, 0]
        hidden = F.embedding(ids, self._embedding)
        framed = F.embedding_bag(inputs[:, 1:] + self._offsets, self._codebooks, mode="sum").add_(hidden)
        is_frame = (ids >= self.semantic.start) & (ids < self.semantic.stop)
        return torch.where(is_frame[:, None], framed * self._scale, hidden)

    def forward(self, hidden: torch.Tensor, batch: Batch, attention: AttentionBackend) -> torch.Tensor:
        """[T, dim] (overwritten) -> [T, dim]."""
        rows = self._rotary.rows(batch.positions)
        for layer, block in enumerate(self._blocks):

            def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int = layer) -> torch.Tensor:
                return attention.attend(q, k, v, layer, self._spec)

            hidden = block(hidden, self._rotary, rows, attend)
        return self._norm(hidden) if self._normed else hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, dim] -> float32 [S, vocab]."""
        return self._logits(hidden, self._head)

    def frame_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of what may follow, [S, dim] -> float32 [S, number of semantic tokens + 1]: those in order, then the end."""
        return self._logits(hidden, self._frame_head)

    def _logits(self, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden if self._normed else self._norm(hidden), head).float()


class FastCache:
    """Keys and values of the fast transformer for one frame each of S sequences, in one piece."""

    def __init__(self, config: StackConfig, size: int, positions: int, like: torch.Tensor) -> None:
        self._size = size
        self._group = config.num_heads // config.num_kv_heads
        shape = (2, config.num_layers, size, positions, config.num_kv_heads, config.head_dim)
        self._kv = like.new_empty(shape)
        self.length = 0  # positions in it

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Store and attend for the n positions from `length` on: q, k, v [S * n, heads, head_dim] -> like q.

        mask: bool [group * n, length + n], or None if all is seen.
        """
        kv_heads, dim = k.shape[1:]
        n = len(q) // self._size
        keys, values = self._kv[:, layer, :, : self.length + n]
        keys[:, self.length :] = k.view(self._size, n, kv_heads, dim)
        values[:, self.length :] = v.view(self._size, n, kv_heads, dim)
        # The heads that share a KV head are to it like so many queries more.
        q = q.view(self._size, n, kv_heads, self._group, dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
        out = F.scaled_dot_product_attention(q, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask)
        return out.view(self._size, kv_heads, self._group, n, dim).permute(0, 3, 1, 2, 4).reshape(len(k), -1, dim)


class FastTransformer:
    """Goes through the K positions of a frame, for many sequences at once.

    Position 0 is the slow transformer's state, position k + 1 is code k; what it says at position k is about code k.
    """

    def __init__(self, config: DualARConfig, weights: Weights) -> None:
        c, prefix = config.fast, config.names.fast
        self._config = c
        self._positions = config.num_codebooks
        wide = c.dim != config.slow.dim
        self._project = _linear(weights, f"{prefix}project_in", c.dim, config.slow.dim, True) if wide else None
        self._embedding = weights.tensor(f"{prefix}embeddings.weight", (config.codebook_size, c.dim))
        self._rotary = PairRotary(c.rope_base, c.head_dim, self._positions, weights.device)
        self._rows = self._rotary.rows(torch.arange(self._positions, device=weights.device))
        self._blocks = [Block(weights, f"{prefix}layers.{layer}", c) for layer in range(c.num_layers)]
        self._norm = RMSNorm(weights.tensor(f"{prefix}norm.weight", (c.dim,)), c.norm_eps)
        self._output = _linear(weights, f"{prefix}output", config.codebook_size, c.dim, False)
        causal = torch.ones(2, 2, dtype=torch.bool, device=weights.device).tril()
        self._first_mask = causal.repeat(c.num_heads // c.num_kv_heads, 1)

    def start(self, hidden: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, FastCache]:
        """Positions 0 and 1 together: the slow states [S, slow dim] and codes 0, int64 [S].

        Returns the logits of code 1, float32 [S, codebook size], and the cache to go on with.
        """
        hidden = hidden if self._project is None else self._project(hidden)
        cache = FastCache(self._config, len(codes), self._positions, hidden)
        both = torch.stack((hidden, F.embedding(codes, self._embedding)), dim=1)
        return self._run(both.flatten(0, 1), 2, cache, self._first_mask), cache

    def step(self, codes: torch.Tensor, cache: FastCache) -> torch.Tensor:
        """The next position: codes int64 [S] -> logits of the code after, float32 [S, codebook size]."""
        return self._run(F.embedding(codes, self._embedding), 1, cache, None)

    def _run(self, hidden: torch.Tensor, n: int, cache: FastCache, mask: torch.Tensor | None) -> torch.Tensor:
        """n positions of each sequence, [S * n, dim] -> logits of the last."""
        rows = self._rows[cache.length : cache.length + n]
        if n > 1:
            rows = rows.repeat(len(hidden) // n, 1, 1)
        for layer, block in enumerate(self._blocks):

            def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int = layer) -> torch.Tensor:
                return cache.attend(q, k, v, layer, mask)

            hidden = block(hidden, self._rotary, rows, attend)
        cache.length += n
        return self._output(self._norm(hidden[n - 1 :: n])).float()


def _linear(weights: Weights, name: str, out_features: int, in_features: int, bias: bool) -> Linear:
    weight = weights.tensor(f"{name}.weight", (out_features, in_features))
    return Linear(weight, weights.tensor(f"{name}.bias", (out_features,)) if bias else None)
