"""Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen2.5 and Qwen3: one decoder, and what differs as configuration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig

from ar_core.attention.base import AttentionBackend, AttentionSpec
from ar_core.batch import Batch
from ar_core.interfaces import KVShape
from ar_core.layers import Linear, RMSNorm, Rotary, rotary_frequencies, silu_mul
from ar_core.parallel import Parallel
from ar_core.weights import Weights

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """What the family's members differ in."""

    vocab_size: int
    dim: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    windows: tuple[int | None, ...]  # by layer
    max_context: int

    @staticmethod
    def of(config: PreTrainedConfig) -> LlamaConfig:
        """Raises ValueError for what the family's members do not have."""
        if config.hidden_act not in ("silu", "swish"):  # two names of one function
            raise ValueError(f"hidden_act is {config.hidden_act!r}; a model of type {config.model_type} must have silu")
        bias = config.model_type in ("llama", "qwen3") and config.attention_bias
        return LlamaConfig(
            vocab_size=config.vocab_size,
            dim=config.hidden_size,
            intermediate=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            norm_eps=config.rms_norm_eps,
            qkv_bias=bias or config.model_type == "qwen2",
            out_bias=bias,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=config.model_type == "qwen3",
            tied=bool(config.tie_word_embeddings),
            windows=_windows(config),
            max_context=config.max_position_embeddings,
        )


def _windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


class Attention:
    def __init__(self, weights: Weights, prefix: str, layer: int, config: LlamaConfig) -> None:
        c, parallel = config, weights.parallel
        self._layer = layer
        self._heads = parallel.share(c.num_heads, "the number of heads")
        self._kv_heads = parallel.share(c.num_kv_heads, "the number of KV heads")
        self._head_dim = c.head_dim
        self._spec = AttentionSpec(scale=c.head_dim**-0.5, window=c.windows[layer])
        sizes = [c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.head_dim]
        names = [f"{prefix}.{part}_proj" for part in "qkv"]
        self._qkv = weights.column_linear(names, sizes, c.dim, c.qkv_bias)
        self._out = weights.row_linear(f"{prefix}.o_proj", c.dim, c.num_heads * c.head_dim, c.out_bias)
        self._norm = self._qk_norm(weights, prefix, c) if c.qk_norm else None

    def _qk_norm(self, weights: Weights, prefix: str, c: LlamaConfig) -> RMSNorm:
        """One norm for q's and k's heads, which lie side by side: each head has its row of weights."""
        q, k = (weights.tensor(f"{prefix}.{part}_norm.weight", (c.head_dim,)) for part in "qk")
        return RMSNorm(torch.cat((q.expand(self._heads, -1), k.expand(self._kv_heads, -1))), c.norm_eps)

    def __call__(
        self, x: torch.Tensor, rotary: Rotary, rows: tuple[torch.Tensor, torch.Tensor], attention: AttentionBackend
    ) -> torch.Tensor:
        qkv = self._qkv(x).view(x.shape[0], -1, self._head_dim)
        qk, v = qkv[:, : -self._kv_heads], qkv[:, -self._kv_heads :]
        if self._norm is not None:
            qk = self._norm(qk)
        qk = rotary.apply(qk, rows)
        q, k = qk[:, : self._heads], qk[:, self._heads :]
        return self._out(attention.attend(q, k, v, self._layer, self._spec).reshape(x.shape[0], -1))


class Block:
    def __init__(self, weights: Weights, layer: int, c: LlamaConfig) -> None:
        prefix = f"model.layers.{layer}"
        self._attention_norm = RMSNorm(weights.tensor(f"{prefix}.input_layernorm.weight", (c.dim,)), c.norm_eps)
        self._attention = Attention(weights, f"{prefix}.self_attn", layer, c)
        self._mlp_norm = RMSNorm(weights.tensor(f"{prefix}.post_attention_layernorm.weight", (c.dim,)), c.norm_eps)
        names = [f"{prefix}.mlp.{part}_proj" for part in ("gate", "up")]
        self._gate_up = weights.column_linear(names, [c.intermediate] * 2, c.dim, c.mlp_bias)
        self._down = weights.row_linear(f"{prefix}.mlp.down_proj", c.dim, c.intermediate, c.mlp_bias)

    def __call__(
        self, hidden: torch.Tensor, rotary: Rotary, rows: tuple[torch.Tensor, torch.Tensor], attention: AttentionBackend
    ) -> torch.Tensor:
        """[T, dim], overwritten."""
        hidden += self._attention(self._attention_norm(hidden), rotary, rows, attention)
        hidden += self._down(silu_mul(self._gate_up(self._mlp_norm(hidden))))
        return hidden


class Llama:
    """A Backbone (see `interfaces`)."""

    def __init__(
        self,
        config: PreTrainedConfig,
        weights: Weights,
        *,
        eos_token_ids: tuple[int, ...],
        max_context: int | None = None,
        rope_factors: torch.Tensor | None = None,
    ) -> None:
        c = LlamaConfig.of(config)
        self._parallel: Parallel = weights.parallel
        self.vocab_size = c.vocab_size
        self.max_context = min(max_context or c.max_context, c.max_context)
        self.eos_token_ids = eos_token_ids
        self.dtype = weights.dtype
        self._hidden_dtype = weights.hidden_dtype
        kv_heads = self._parallel.share(c.num_kv_heads, "the number of KV heads")
        self.kv_layout = (KVShape(kv_heads, c.head_dim, c.head_dim),) * c.num_layers
        self._embedding = weights.tensor("model.embed_tokens.weight", (c.vocab_size, c.dim))
        frequencies, scale = rotary_frequencies(config, c.head_dim)
        if rope_factors is not None:
            frequencies = frequencies / rope_factors
        self._rotary = Rotary(frequencies, scale, self.max_context, weights.device, weights.dtype)
        self._blocks = [Block(weights, layer, c) for layer in range(c.num_layers)]
        self._norm = RMSNorm(weights.tensor("model.norm.weight", (c.dim,)), c.norm_eps)
        if c.tied:
            weights.ignore("lm_head.weight")  # some checkpoints store it all the same
        head = self._embedding if c.tied else weights.tensor("lm_head.weight", (c.vocab_size, c.dim))
        self._head = Linear(self._parallel.slice(head, 0).contiguous())

    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        """int64 [T, 1] -> [T, dim]."""
        return F.embedding(inputs[:, 0], self._embedding)

    def forward(self, hidden: torch.Tensor, batch: Batch, attention: AttentionBackend) -> torch.Tensor:
        """[T, dim] (overwritten) -> [T, dim], after the final norm."""
        hidden = hidden.to(self._hidden_dtype(len(batch.positions)))
        rows = self._rotary.rows(batch.positions, hidden.dtype)
        for block in self._blocks:
            hidden = block(hidden, self._rotary, rows, attention)
        return self._norm(hidden).to(self.dtype)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, dim] -> float32 [S, vocab]."""
        return self._parallel.gather(self._head(hidden)).float()
