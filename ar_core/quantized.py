"""Linear layers whose weights stay at 4 bits in memory, on a CPU.

torch's packed product reads weights in groups of 32 inputs, each with a bfloat16 scale and offset, which is
what GGUF's Q4_0 and Q4_1 hold. It is the quickest for a few rows of activations; for more, a product with unpacked
weights is.
"""

from __future__ import annotations

import numpy as np
import torch

from ar_core.layers import multiply_prepacked, prepack

GROUP = 32
# Rows of activations up to which the packed product is quicker, as it reads so much less. Measured on 2 cores, for all
# products of a model of 135 million weights: 7 ms against 25 at one row, 18 against 35 at eight, 30 against 43 at
# sixteen, 63 against 58 at thirty-two.
_FEW_ROWS = 24


def hidden_dtype(rows: int) -> torch.dtype:
    """What a step's hidden states are best kept in for `Packed4Linear`, if its weights are unpacked too."""
    return torch.bfloat16 if rows <= _FEW_ROWS else unpacked_dtype()


def unpacked_dtype() -> torch.dtype:
    """What this CPU multiplies many rows in most quickly.

    Only a matrix unit (AMX) makes that bfloat16: products of vectors take half the time in float32.
    """
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32


class Packed4Linear:
    """y = x W^T with W [out, in] as 4-bit integers q, scales d and offsets m by group: W = d q + m.

    q: uint8 [out, in], 0 to 15. d, m: [out, in / 32]. x is bfloat16 or float32, and y is what x is. With
    `keep_unpacked` a copy of W serves many rows at four or eight times the memory; without it the packed product
    serves all.
    """

    def __init__(self, q: torch.Tensor, d: torch.Tensor, m: torch.Tensor, *, keep_unpacked: bool) -> None:
        self.out_features, self.in_features = q.shape
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 1)
        # The product counts q from 8.
        self._scales = torch.stack([d, m + 8 * d], dim=-1).transpose(0, 1).to(torch.bfloat16).contiguous()
        self._multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        self._unpacked = prepack(self._unpack(q)) if keep_unpacked else None

    def _unpack(self, q: torch.Tensor) -> torch.Tensor:
        scale, zero = self._scales.transpose(0, 1).float().unbind(-1)
        groups = q.view(self.out_features, -1, GROUP).float() - 8
        return (groups * scale[..., None] + zero[..., None]).view_as(q).to(unpacked_dtype())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._unpacked is not None and x.shape[0] > _FEW_ROWS:
            return multiply_prepacked(x.to(self._unpacked.dtype), self._unpacked).to(x.dtype)
        x16 = x.to(torch.bfloat16).contiguous()
        return self._multiply(x16, self._packed, GROUP, self._scales).to(x.dtype)


def read_q4(blocks: np.ndarray, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """GGUF's Q4_0 or Q4_1 blocks, uint8 [out, bytes], as q uint8 [out, in], d and m float32 [out, in / 32]."""
    size = 18 if kind == "Q4_0" else 20
    groups = blocks.reshape(blocks.shape[0], -1, size)
    d = groups[..., :2].copy().view(np.float16)[..., 0].astype(np.float32)
    m = -8 * d if kind == "Q4_0" else groups[..., 2:4].copy().view(np.float16)[..., 0].astype(np.float32)
    nibbles = groups[..., size - 16 :]
    q = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
    return torch.from_numpy(q.reshape(len(q), -1)), torch.from_numpy(d), torch.from_numpy(m)
