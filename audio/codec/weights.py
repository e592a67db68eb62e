"""Codec weights on disk: the released `codec.pth`, and safetensors with the same names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from audio.codec.codec import Codec
from audio.codec.config import CodecConfig
from audio.codec.layers import CausalConv, CausalUpsample, ConvNeXt, Snake
from audio.codec.quantizer import ResidualQuantizer
from audio.codec.transformer import Block, RMSNorm

_FILES = ("codec.pth", "codec.safetensors")
# Suffixes of a weight's length and its direction.
_WEIGHT_NORMS = (
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ("weight_g", "weight_v"),
)
_LISTED = 8  # names in an error before "and n more"
_DERIVED = ("freqs_cis", "causal_mask")  # tables that some files hold and that the sizes imply
# The files' names for parts of the codec, which they sort by when they were added rather than by what they do.
_PARTS = {
    "encoder.convolutions": "encoder.block",
    "encoder.downsample": "quantizer.downsample",
    "encoder.transformer": "quantizer.pre_module",
    "decoder.transformer": "quantizer.post_module",
    "decoder.upsample": "quantizer.upsample",
    "decoder.convolutions": "decoder.model",
}


class CodecWeightError(ValueError):
    """A file's tensors are not those of the codec."""


@dataclass(frozen=True)
class _Place:
    """A tensor of the file and the parameter it belongs to: flipping `view` along `flips` and reshaping gives it."""

    name: str
    view: torch.Tensor
    shape: tuple[int, ...]
    flips: tuple[int, ...] = ()

    def load(self, stored: torch.Tensor) -> None:
        self.view.copy_(stored.reshape(self.view.shape).flip(self.flips))

    def stored(self) -> torch.Tensor:
        return self.view.flip(self.flips).reshape(self.shape).contiguous()


def load_codec(source: Path, device: torch.device, dtype: torch.dtype) -> Codec:
    """What `Codec.load` says."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype is {dtype}; a codec runs in torch.float32 or torch.bfloat16")
    file = _weights_file(source)
    tensors = _fold_weight_norm(_read(file))
    sizes = file.with_suffix(".json")
    codec = Codec(CodecConfig.read(sizes) if sizes.exists() else CodecConfig())
    with torch.no_grad():
        _fill(codec, tensors, file)
    codec.to(device)
    codec.decoder.to(dtype)
    if dtype == torch.float32 and device.type == "cpu":
        codec.encoder.double()
    return codec.eval()


def save_codec(codec: Codec, folder: Path) -> None:
    """Write `codec.safetensors` and `codec.json`, which `Codec.load` reads, into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "codec.json").write_text(json.dumps(codec.config.to_dict(), indent=1) + "\n")
    with torch.no_grad():
        save_file({place.name: place.stored().cpu() for place in _places(codec)}, folder / "codec.safetensors")


def _weights_file(source: Path) -> Path:
    if source.is_file():
        return source
    for name in _FILES:
        if (source / name).is_file():
            return source / name
    raise FileNotFoundError(f"{source} is no codec file and no folder with {' or '.join(_FILES)}")


def _read(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise CodecWeightError(f"{file} is no file of plain tensors: {error}") from error
    found = found.get("state_dict", found)
    # A training checkpoint holds the codec as one of several networks.
    if any(name.startswith("generator.") for name in found):
        found = {name: tensor for name, tensor in found.items() if name.startswith("generator.")}
    return {name.removeprefix("generator."): tensor for name, tensor in found.items()}


def _fold_weight_norm(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights stored as a length for each first index and a direction, multiplied out."""
    folded = dict(tensors)
    for length, direction in _WEIGHT_NORMS:
        for name in tensors:
            base = name.removesuffix(length)
            if base != name and base + direction in tensors:
                g, v = folded.pop(name), folded.pop(base + direction)
                folded[base + "weight"] = torch._weight_norm(v, g, 0)
    return folded


def _fill(codec: Codec, tensors: dict[str, torch.Tensor], file: Path) -> None:
    problems = []
    places = {place.name: place for place in _places(codec)}
    for name, place in places.items():
        if name not in tensors:
            problems.append(f"{name} is missing")
        elif tuple(tensors[name].shape) != place.shape:
            problems.append(f"{name} is {list(tensors[name].shape)}, not {list(place.shape)}")
        else:
            place.load(tensors[name])
    extra = sorted(name for name in set(tensors) - set(places) if not name.endswith(_DERIVED))
    problems += [f"{name} is not part of this codec" for name in extra]
    if problems:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise CodecWeightError(f"{file} does not fit its sizes: {'; '.join(problems[:_LISTED])}{more}")


def _places(codec: Codec) -> Iterator[_Place]:
    """Where each tensor of a file without weight norm belongs."""
    for path, module in codec.named_modules():
        for ours, theirs in _PARTS.items():
            if path.startswith(ours):
                path = theirs + path[len(ours) :]
        yield from _places_of(path, module)


def _places_of(path: str, module: nn.Module) -> Iterator[_Place]:
    if isinstance(module, CausalConv):
        yield _place(f"{path}.conv.weight", module.weight.transpose(1, 2))
        yield _place(f"{path}.conv.bias", module.bias)
    elif isinstance(module, CausalUpsample):
        yield _upsample(f"{path}.conv.weight", module)
        yield _place(f"{path}.conv.bias", module.bias)
    elif isinstance(module, Snake):
        yield _place(f"{path}.alpha", module.alpha[None, :, None])
    elif isinstance(module, ConvNeXt):
        yield _place(f"{path}.dwconv.conv.weight", module.weight.unsqueeze(1))
        yield _place(f"{path}.dwconv.conv.bias", module.bias)
        yield _place(f"{path}.gamma", module.gamma)
    elif isinstance(module, Block):
        yield _place(f"{path}.attention_layer_scale.gamma", module.attention_layer_scale)
        yield _place(f"{path}.ffn_layer_scale.gamma", module.ffn_layer_scale)
    elif isinstance(module, ResidualQuantizer):
        yield from _quantizer(module)
    elif isinstance(module, nn.Linear | nn.LayerNorm | RMSNorm):
        for name, parameter in module.named_parameters():
            yield _place(f"{path}.{name}", parameter)


def _place(name: str, view: torch.Tensor) -> _Place:
    return _Place(name, view, tuple(view.shape))


def _upsample(name: str, layer: CausalUpsample) -> _Place:
    """A transposed kernel [in, out, taps * stride], whose last taps speak of the oldest inputs; ours come first."""
    rows, taps, inputs = layer.weight.shape
    view = layer.weight.view(layer.stride, -1, taps, inputs).permute(3, 1, 2, 0)  # [in, out, taps, stride]
    return _Place(name, view, (inputs, rows // layer.stride, taps * layer.stride), flips=(2,))


def _quantizer(quantizer: ResidualQuantizer) -> Iterator[_Place]:
    for k, (first, size) in enumerate(zip(quantizer.offsets.tolist(), quantizer.sizes)):
        path = "quantizer.semantic_quantizer.quantizers.0" if k == 0 else f"quantizer.quantizer.quantizers.{k - 1}"
        yield _place(f"{path}.in_proj.weight", quantizer.in_proj[k].unsqueeze(2))
        yield _place(f"{path}.in_proj.bias", quantizer.in_bias[k])
        yield _place(f"{path}.out_proj.weight", quantizer.out_proj[k].unsqueeze(2))
        yield _place(f"{path}.out_proj.bias", quantizer.out_bias[k])
        yield _place(f"{path}.codebook.weight", quantizer.codebooks[first : first + size])
