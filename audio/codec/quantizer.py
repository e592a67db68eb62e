"""Latents to codes and back: factorised residual vector quantisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from audio.codec.layers import widened


@dataclass(frozen=True)
class Quantized:
    """What quantising latents [B, T, latent] gave."""

    codes: torch.Tensor  # int64 [B, T, K]
    latent: torch.Tensor  # [B, T, latent]: the codes' own; gradients pass straight through to the input
    commitment_loss: torch.Tensor  # []: how far the projected latents lie from their entries
    codebook_loss: torch.Tensor  # []: the same distance, to be closed by moving the entries


class ResidualQuantizer(nn.Module):
    """K codebooks, each on what the ones before left over (Zeghidour et al., 2021).

    A codebook looks in a space of few dimensions, by direction alone (Yu et al., 2021): a latent is projected down, the
    entry with the largest cosine is taken, and projected up again. The first codebook is the semantic one.
    """

    offsets: torch.Tensor
    last: torch.Tensor

    def __init__(self, latent: int, sizes: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.codebooks = nn.Parameter(torch.randn(sum(sizes), dim))  # one under the other
        self.in_proj = nn.Parameter(torch.randn(len(sizes), dim, latent) * latent**-0.5)
        self.in_bias = nn.Parameter(torch.zeros(len(sizes), dim))
        self.out_proj = nn.Parameter(torch.randn(len(sizes), latent, dim) * dim**-0.5)
        self.out_bias = nn.Parameter(torch.zeros(len(sizes), latent))
        ends = torch.tensor(sizes).cumsum(0)
        self.register_buffer("offsets", ends - torch.tensor(sizes), persistent=False)  # [K]
        self.register_buffer("last", torch.tensor(sizes) - 1, persistent=False)  # [K]

    def encode(self, latent: torch.Tensor) -> torch.Tensor:
        """[B, T, latent] -> codes int64 [B, T, K], reckoned in the latents' dtype."""
        left, codes = latent, []
        for k in range(len(self.sizes)):
            code = self._nearest(k, F.linear(left, self.in_proj[k].to(left.dtype), self.in_bias[k].to(left.dtype)))
            entry = self._entries(k)[code].to(left.dtype)
            left = left - F.linear(entry, self.out_proj[k].to(left.dtype), self.out_bias[k].to(left.dtype))
            codes.append(code)
        return torch.stack(codes, -1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes int [B, T, K] -> [B, T, latent]. A code beyond its codebook's entries means the nearest of them."""
        entries = F.embedding(torch.minimum(codes.clamp_min(0), self.last) + self.offsets, self.codebooks)
        # The sum over k of out_proj[k] entry[k], as one product.
        weight = self.out_proj.transpose(0, 1).flatten(1)
        return F.linear(entries.flatten(2), weight, self.out_bias.sum(0))

    def forward(self, latent: torch.Tensor, n_codebooks: int | None = None) -> Quantized:
        """Quantise for training, by the first `n_codebooks` codebooks or all of them."""
        left, total, codes = latent, torch.zeros_like(latent), []
        commitment = codebook = latent.new_zeros(())
        for k in range(n_codebooks or len(self.sizes)):
            projected = F.linear(left, self.in_proj[k], self.in_bias[k])
            code = self._nearest(k, projected)
            entry = self._entries(k)[code]
            commitment = commitment + F.mse_loss(projected, entry.detach())
            codebook = codebook + F.mse_loss(entry, projected.detach())
            passed = projected + (entry - projected).detach()
            found = F.linear(passed, self.out_proj[k], self.out_bias[k])
            left = left - found
            total = total + found
            codes.append(code)
        return Quantized(torch.stack(codes, -1), total, commitment, codebook)

    def _entries(self, k: int) -> torch.Tensor:
        first = sum(self.sizes[:k])
        return self.codebooks[first : first + self.sizes[k]]

    def _nearest(self, k: int, projected: torch.Tensor) -> torch.Tensor:
        projected = widened(projected)
        directions = F.normalize(self._entries(k).to(projected.dtype), dim=-1)
        return F.linear(F.normalize(projected, dim=-1), directions).argmax(-1)
