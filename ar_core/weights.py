"""Where a model's tensors come from: safetensors, GGUF (`gguf_weights.py`), or a random generator.

A model takes its tensors by name and shape while it builds itself; what is missing or misshapen is collected
and reported at the end, all at once.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from ar_core.layers import BiasedProduct, Linear, Product, ReducedProduct
from ar_core.parallel import Parallel

_LISTED = 8  # names in an error before "and n more"


class WeightError(ValueError):
    """A checkpoint's tensors are not those of the model."""


class Weights(ABC):
    """Tensors by the names that transformers gives them, converted to `dtype` on `device`."""

    def __init__(self, device: torch.device, dtype: torch.dtype, parallel: Parallel) -> None:
        self.device = device
        self.dtype = dtype
        self.parallel = parallel
        # What a step's hidden states are computed in, by its number of positions.
        self.hidden_dtype: Callable[[int], torch.dtype] = lambda rows: dtype
        self._taken: set[str] = set()
        self._problems: list[str] = []

    @abstractmethod
    def names(self) -> set[str]:
        """All tensors of the checkpoint that a model could need."""

    @abstractmethod
    def read(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """A tensor as stored, on the CPU or on `device`; `shape` is what a random one should have."""

    def tensor(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """The named tensor. If it is missing or misshapen that is noted for `finish`, and zeros stand in."""
        self._taken.add(name)
        if name not in self.names():
            self._problems.append(f"{name} is missing")
        else:
            found = self.read(name, shape)
            if list(found.shape) == list(shape):
                return found.to(self.device, self.dtype)
            self._problems.append(f"{name} is {list(found.shape)}, not {list(shape)}")
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)

    def column_linear(self, names: Sequence[str], sizes: Sequence[int], in_features: int, bias: bool) -> Product:
        """Several layers of one input as one product, outputs side by side; each rank computes its share of each."""
        weights = [self.tensor(f"{n}.weight", (size, in_features)) for n, size in zip(names, sizes, strict=True)]
        weight = torch.cat([self.parallel.slice(w, 0) for w in weights])
        return Linear(weight, self._column_bias(names, sizes) if bias else None)

    def row_linear(self, name: str, out_features: int, in_features: int, bias: bool) -> Product:
        """A layer whose inputs are shared out; the ranks' results are summed."""
        weight = self.parallel.slice(self.tensor(f"{name}.weight", (out_features, in_features)), 1)
        added = self.tensor(f"{name}.bias", (out_features,)) if bias else None
        if self.parallel.size == 1:
            return Linear(weight, added)
        return ReducedProduct(Linear(weight.contiguous()), added, self.parallel)

    def ignore(self, name: str) -> None:
        """A tensor that may be there and is not needed."""
        self._taken.add(name)

    def finish(self) -> None:
        """Raise WeightError if tensors were missing, misshapen or left over."""
        extra = sorted(name for name in self.names() - self._taken if not name.endswith("rotary_emb.inv_freq"))
        problems = self._problems + [f"{name} is not part of this model" for name in extra]
        if problems:
            more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
            raise WeightError(f"the checkpoint does not fit its configuration: {'; '.join(problems[:_LISTED])}{more}")

    def _column_bias(self, names: Sequence[str], sizes: Sequence[int]) -> torch.Tensor:
        biases = [self.tensor(f"{name}.bias", (size,)) for name, size in zip(names, sizes, strict=True)]
        return torch.cat([self.parallel.slice(b, 0) for b in biases])


def with_bias(product: Product, bias: torch.Tensor | None) -> Product:
    return product if bias is None else BiasedProduct(product, bias)


class SafetensorsWeights(Weights):
    """A folder with `model.safetensors`, or with shards and `model.safetensors.index.json`."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, parallel: Parallel) -> None:
        super().__init__(device, dtype, parallel)
        files = _safetensors_files(folder)
        self._files = [safe_open(file, framework="pt", device="cpu") for file in files]
        self._where = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 - not a dict

    def names(self) -> set[str]:
        return set(self._where)

    def read(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        tensor: torch.Tensor = self._where[name].get_tensor(name)
        return tensor


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    else:
        files = [folder / "model.safetensors"]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {', '.join(missing)}; weights must be safetensors, or load_format dummy"
        )
    return files


class DummyWeights(Weights):
    """Random weights of whatever shape the model asks for: the same ones each time."""

    def __init__(self, device: torch.device, dtype: torch.dtype, parallel: Parallel) -> None:
        super().__init__(device, dtype, parallel)
        self._generator = torch.Generator(device).manual_seed(0)

    def names(self) -> set[str]:
        return set(self._taken)

    def read(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=self.dtype, device=self.device)
        values = torch.empty(*shape, dtype=self.dtype, device=self.device)
        return values.normal_(std=0.02, generator=self._generator)
