"""The building blocks of decoders, as plain callables: a decode step on a CPU has no time for anything heavier."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ar_core.parallel import Parallel

_ROWS_AT_ONCE = 16

# [T, in] -> [T, out]
Product = Callable[[torch.Tensor], torch.Tensor]


class Linear:
    """y = x W^T + b with W [out, in]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        # In oneDNN's own layout a bfloat16 weight is read twice as fast; a float32 one is not.
        self._prepacked = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and multiplies_bfloat16()
        self._weight = prepack(weight) if self._prepacked else weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._prepacked:
            return multiply_prepacked(x, self._weight, self._bias)
        return F.linear(x, self._weight, self._bias)


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products in bfloat16."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def prepack(weight: torch.Tensor) -> torch.Tensor:
    """W [out, in] on a CPU in oneDNN's own layout, which only `multiply_prepacked` understands."""
    rows = 16  # of activations: what the layout is chosen for, though it serves any number
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return packed


def multiply_prepacked(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b, [T, in] -> [T, out]."""
    rows = x.shape[0]
    # oneDNN prepares and remembers a product for every number of rows: milliseconds and memory for each.
    missing = -rows % _ROWS_AT_ONCE if rows > _ROWS_AT_ONCE else 0
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return y[:rows] if missing else y


class BiasedProduct:
    """A product without a bias of its own, and a bias."""

    def __init__(self, product: Product, bias: torch.Tensor) -> None:
        self._product = product
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x).add_(self._bias)


class ReducedProduct:
    """A product over this rank's share of the inputs, summed over all ranks; the bias is added once."""

    def __init__(self, product: Product, bias: torch.Tensor | None, parallel: Parallel) -> None:
        self._product = product
        self._bias = bias
        self._parallel = parallel

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self._parallel.sum(self._product(x))
        return y if self._bias is None else y.add_(self._bias)


class RMSNorm:
    """x / rms(x) * weight over the last dimension, computed in float32.

    weight is [n], or [heads, n] for x [T, heads, n].
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self._weight32 = weight.float()
        self._twice = torch.cat((self._weight32, self._weight32), -1)
        self._eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cuda":
            if self._weight.ndim == 1:
                return F.rms_norm(x, x.shape[-1:], self._weight, self._eps)
            return F.rms_norm(x, x.shape[-1:], None, self._eps) * self._weight
        # On a CPU rms_norm is a dozen passes. layer_norm is one, and of [x, -x], whose mean is 0, it divides by
        # the same root.
        n = x.shape[-1]
        if self._weight.ndim == 1:
            return torch.layer_norm(torch.cat((x, -x), -1), (2 * n,), self._twice, None, self._eps)[..., :n]
        x32 = x.float()
        return (F.layer_norm(torch.cat((x32, -x32), -1), (2 * n,), eps=self._eps)[..., :n] * self._weight32).to(x.dtype)


class Rotary:
    """Rotary position embedding of heads whose pairs are (i, i + head_dim / 2), with head_dim / 2 frequencies."""

    def __init__(
        self, frequencies: torch.Tensor, scale: float, max_context: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        angles = torch.arange(max_context, dtype=torch.float32)[:, None] * frequencies.float().cpu()
        cos, sin = angles.cos() * scale, angles.sin() * scale
        # The first half is turned by minus the second: the sign sits in the table.
        self._cos = torch.cat((cos, cos), -1)[:, None].to(dtype).to(device)  # [max_context, 1, dim]
        self._sin = torch.cat((-sin, sin), -1)[:, None].to(dtype).to(device)
        self._half = len(frequencies)

    def rows(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """What `apply` needs for positions int64 [T]: cos and sin [T, 1, dim]."""
        return self._cos[positions].to(dtype), self._sin[positions].to(dtype)

    def apply(self, x: torch.Tensor, rows: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[T, heads, dim] -> the same, rotated."""
        cos, sin = rows
        return torch.addcmul(x * cos, x.roll(self._half, -1), sin)


class PairRotary:
    """Rotary position embedding of heads whose pairs are (2 i, 2 i + 1), turned in float32.

    The cosines and sines are rounded to bfloat16 whatever the model computes in: the dual-AR models were trained so.
    """

    def __init__(self, base: float, head_dim: int, max_context: int, device: torch.device) -> None:
        frequencies = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angles = torch.arange(max_context, dtype=torch.float32)[:, None] * frequencies
        table = torch.stack((angles.cos(), angles.sin()), -1).bfloat16().float()
        self._table = torch.view_as_complex(table)[:, None].to(device)  # [max_context, 1, head_dim / 2]

    def rows(self, positions: torch.Tensor) -> torch.Tensor:
        """What `apply` needs for positions int64 [T]: complex64 [T, 1, head_dim / 2]."""
        return self._table[positions]

    def apply(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[T, heads, head_dim] -> the same, rotated."""
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * rows).flatten(-2).to(x.dtype)


def rotary_frequencies(config: PreTrainedConfig, dim: int) -> tuple[torch.Tensor, float]:
    """float32 [dim / 2], and what cos and sin are multiplied by."""
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [T, 2 n], gates first: [T, n]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
