"""Products with weights at 4 bits against those with the weights that they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from ar_core.quantized import GROUP, Packed4Linear, read_q4

KINDS = ["Q4_0", "Q4_1"]


def blocks(kind: str, rows: int, columns: int, offset: float = 0.0) -> tuple[np.ndarray, torch.Tensor]:
    """Blocks [rows, bytes], and the weights float32 [rows, columns] that they stand for."""
    values = np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32) + offset
    stored = quantize(values, GGMLQuantizationType[kind])
    return stored, torch.from_numpy(dequantize(stored, GGMLQuantizationType[kind]).copy())


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_read_exactly(kind: str) -> None:
    stored, weight = blocks(kind, 7, 96, offset=0.5)
    q, d, m = read_q4(stored, kind)
    assert (q.shape, d.shape, m.shape) == ((7, 96), (7, 3), (7, 3))
    assert q.dtype == torch.uint8 and q.max() == 15 and q.min() == 0
    read = d[..., None] * q.view(7, 3, GROUP).float() + m[..., None]
    torch.testing.assert_close(read.view(7, 96), weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep_unpacked", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (96, 160), (544, 576)])
@pytest.mark.parametrize("new", [1, 2, 8, 9, 33])
def test_products_are_those_of_the_weights_but_for_rounding(
    kind: str, keep_unpacked: bool, rows: int, columns: int, new: int
) -> None:
    stored, weight = blocks(kind, rows, columns, offset=0.2 if kind == "Q4_1" else 0.0)
    linear = Packed4Linear(*read_q4(stored, kind), keep_unpacked=keep_unpacked)
    assert (linear.out_features, linear.in_features) == (rows, columns)
    x = torch.randn(new, columns, generator=torch.Generator().manual_seed(new)).bfloat16()
    got, right = linear(x), x.double() @ weight.double().T
    assert got.dtype == torch.bfloat16 and got.shape == (new, rows)
    assert (got.double() - right).norm() < 2**-8 * right.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_and_many_agree(kind: str) -> None:
    """A prompt's rows go one way and a decoded row the other; both must stand for the same weights."""
    stored, _ = blocks(kind, 64, 256)
    linear = Packed4Linear(*read_q4(stored, kind), keep_unpacked=True)
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    many = linear(x).float()
    few = torch.cat([linear(x[i : i + 1]) for i in range(40)]).float()
    assert (many - few).norm() < 2**-8 * many.norm()
