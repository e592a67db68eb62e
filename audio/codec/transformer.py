"""A causal transformer that sees a window of the past."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from audio.codec.config import TransformerConfig
from audio.codec.history import History, Tail
from audio.codec.layers import Layer, widened

_FIRST_POSITIONS = 4096


class RotaryTable(nn.Module):
    """Cosines and sines of the angles that positions are turned by, rounded to bfloat16 as in the released models."""

    rows: torch.Tensor

    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        self._head_dim = head_dim
        self._base = base
        self.register_buffer("rows", self._compute(_FIRST_POSITIONS), persistent=False)  # [positions, dim / 2, 2]

    def reserve(self, positions: int) -> None:
        """Make room for positions below `positions`. Doubles, so that streams of any length seldom move the table."""
        have = len(self.rows)
        if positions > have:
            while have < positions:
                have *= 2
            self.rows = self._compute(have).to(self.rows.device)

    def _compute(self, positions: int) -> torch.Tensor:
        exponents = torch.arange(0, self._head_dim, 2, dtype=torch.float32, device="cpu") / self._head_dim
        angles = torch.outer(torch.arange(positions, dtype=torch.float32, device="cpu"), 1.0 / self._base**exponents)
        turns = torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(turns).to(torch.bfloat16)


def rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turn each pair of adjacent elements of x [B, T, heads, dim] by turns [B or 1, T, 1, dim / 2, 2], in float32."""
    even, odd = widened(x).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turns.unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; the root in float32 or better."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self._eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = widened(x)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._eps)).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Heads that look at the last `window_size` positions, their own included."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self._heads = config.n_head
        self._head_dim = config.head_dim
        self._window = config.window_size
        width = config.n_head * config.head_dim
        self.wqkv = nn.Linear(config.dim, 3 * width, bias=False)
        self.wo = nn.Linear(width, config.dim, bias=False)
        self.keys = Tail(config.window_size - 1, width)
        self.values = Tail(config.window_size - 1, width)

    def forward(
        self, x: torch.Tensor, turns: torch.Tensor, visible: list[torch.Tensor], history: History
    ) -> torch.Tensor:
        batch, length, _ = x.shape
        qk, v = self.wqkv(x).split((2 * self._heads * self._head_dim, self._heads * self._head_dim), -1)
        q, k = rotate(qk.view(batch, length, 2 * self._heads, self._head_dim), turns).chunk(2, 2)
        k = history.extend(self.keys, k.flatten(2))
        v = history.extend(self.values, v)
        q, k, v = (t.reshape(batch, -1, self._heads, self._head_dim).transpose(1, 2) for t in (q, k, v))
        y = torch.cat([self._attend(q, k, v, i, mask) for i, mask in enumerate(visible)], 2)
        return self.wo(y.transpose(1, 2).flatten(2))

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int, mask: torch.Tensor
    ) -> torch.Tensor:
        first = block * self._window
        rows = slice(first, first + self._window)
        columns = slice(first, first + mask.shape[-1])
        return F.scaled_dot_product_attention(q[:, :, rows], k[:, :, columns], v[:, :, columns], attn_mask=mask)


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.dim, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Attention and feed-forward, each normed before and scaled after."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.attention_layer_scale = nn.Parameter(torch.full((config.dim,), 1e-2))
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.ffn_layer_scale = nn.Parameter(torch.full((config.dim,), 1e-2))

    def forward(
        self, x: torch.Tensor, turns: torch.Tensor, visible: list[torch.Tensor], history: History
    ) -> torch.Tensor:
        attended = self.attention(self.attention_norm(x), turns, visible, history)
        x = torch.addcmul(x, self.attention_layer_scale, attended)
        return torch.addcmul(x, self.ffn_layer_scale, self.feed_forward(self.ffn_norm(x)))


class WindowTransformer(Layer):
    """[B, T, dim] -> [B, T, dim]; `steps_per_frame` rows belong to one frame, which is how it knows its positions."""

    def __init__(self, config: TransformerConfig, steps_per_frame: int) -> None:
        super().__init__()
        self._window = config.window_size
        self._steps_per_frame = steps_per_frame
        self.rotary = RotaryTable(config.head_dim, config.rope_base)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def reserve(self, frames: int) -> None:
        """Make room for streams of up to `frames` frames."""
        self.rotary.reserve(frames * self._steps_per_frame)

    def forward(self, x: torch.Tensor, history: History) -> torch.Tensor:
        length = x.shape[1]
        start = None if history.frames is None else history.frames * self._steps_per_frame
        steps = torch.arange(length, device=x.device)
        if start is None:
            self.rotary.reserve(length)
        positions = steps[None] if start is None else start[:, None] + steps
        turns = self.rotary.rows[positions].unsqueeze(2)
        visible = self._visible(length, start, x.device)
        for layer in self.layers:
            x = layer(x, turns, visible, history)
        return self.norm(x)

    def _visible(self, length: int, start: torch.Tensor | None, device: torch.device) -> list[torch.Tensor]:
        """For each block of up to a window of queries, which of the keys from window - 1 before it on each sees.

        bool [B or 1, 1, queries, window - 1 + queries]. Keys before position 0 are never seen. Blocks keep the cost of
        a long sound proportional to its length.
        """
        window = self._window
        queries = torch.arange(min(length, window), device=device)[:, None]
        keys = torch.arange(window - 1 + min(length, window), device=device)
        band = ((keys >= queries) & (keys < queries + window))[None, None]
        masks = []
        for first in range(0, length, window):
            size = min(window, length - first)
            mask = band[:, :, :size, : window - 1 + size]
            if first < window:  # otherwise the whole band lies after position 0
                before = window - 1 - first
                begun = keys >= before if start is None else keys >= (before - start)[:, None]
                mask = mask & begun.view(-1, 1, 1, len(keys))[..., : window - 1 + size]
            masks.append(mask)
        return masks
