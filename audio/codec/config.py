"""The sizes of a codec."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from math import prod
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TransformerConfig:
    """A causal transformer of which each position sees itself and the `window_size - 1` before it."""

    window_size: int = 128
    n_layer: int = 8
    n_head: int = 16
    dim: int = 1024
    intermediate_size: int = 3072
    head_dim: int = 64
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _positive("transformer.", self, ("window_size", "n_head", "dim", "intermediate_size", "head_dim"))
        if self.head_dim % 2:
            raise ValueError(f"transformer.head_dim is {self.head_dim}; rotary pairs need an even number")


@dataclass(frozen=True)
class CodecConfig:
    """A codec of the S2 family; the defaults are the released one's: 44.1 kHz, 21.5 frames per second, 10 codes.

    The encoder halves the sound's rate by `encoder_rates` and `downsample_factor`; the decoder raises it again by
    `downsample_factor` and `decoder_rates`. Widths double with each encoder stage from `encoder_dim` and halve with
    each decoder stage from `decoder_dim`. `n_codebooks` counts the residual codebooks; one semantic one comes before.
    """

    sample_rate: int = 44_100  # Hz
    encoder_dim: int = 64
    encoder_rates: tuple[int, ...] = (2, 4, 8, 8)
    encoder_transformer_layers: tuple[int, ...] = (0, 0, 0, 4)
    encoder_window_size: int = 512
    decoder_dim: int = 1536
    decoder_rates: tuple[int, ...] = (8, 8, 4, 2)
    n_codebooks: int = 9
    codebook_size: int = 1024
    codebook_dim: int = 8
    semantic_codebook_size: int = 4096
    downsample_factor: tuple[int, ...] = (2, 2)
    latent_dim: int = 1024
    transformer: TransformerConfig = field(default_factory=TransformerConfig)

    def __post_init__(self) -> None:
        _positive("", self, ("sample_rate", "encoder_dim", "decoder_dim", "codebook_size", "semantic_codebook_size"))
        _positive("", self, ("n_codebooks", "codebook_dim", "latent_dim", "encoder_window_size"))
        if len(self.encoder_transformer_layers) != len(self.encoder_rates):
            raise ValueError(
                f"encoder_transformer_layers has {len(self.encoder_transformer_layers)} numbers; "
                f"it needs one for each of the {len(self.encoder_rates)} encoder_rates"
            )
        if prod(self.encoder_rates) != prod(self.decoder_rates):
            raise ValueError(
                f"encoder_rates {self.encoder_rates} make {prod(self.encoder_rates)} samples per latent and "
                f"decoder_rates {self.decoder_rates} make {prod(self.decoder_rates)}; they must be equal"
            )
        if self.decoder_dim % (1 << len(self.decoder_rates)):
            raise ValueError(
                f"decoder_dim is {self.decoder_dim}; it must halve {len(self.decoder_rates)} times, "
                "once for each of the decoder_rates"
            )
        if self.transformer.dim != self.latent_dim:
            raise ValueError(f"transformer.dim is {self.transformer.dim}; it must be latent_dim, {self.latent_dim}")

    @property
    def frame_size(self) -> int:
        """Samples per frame."""
        return prod(self.encoder_rates) * prod(self.downsample_factor)

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.frame_size

    @property
    def num_codebooks(self) -> int:
        """Codes per frame."""
        return 1 + self.n_codebooks

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Entries of each codebook, the semantic one first."""
        return (self.semantic_codebook_size, *[self.codebook_size] * self.n_codebooks)

    @staticmethod
    def read(path: Path) -> CodecConfig:
        """The sizes in a JSON file, the released codec's where it gives none. Raises ValueError for unknown keys."""
        return CodecConfig.from_dict(json.loads(path.read_text()))

    @staticmethod
    def from_dict(values: dict[str, Any]) -> CodecConfig:
        """The sizes in a dictionary such as `to_dict` makes."""
        values = dict(values)
        transformer = _build(TransformerConfig, values.pop("transformer", {}), "transformer.")
        return _build(CodecConfig, values, "", transformer=transformer)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold of it."""
        return asdict(self)


def _build(kind: Any, values: dict[str, Any], prefix: str, **more: Any) -> Any:
    known = [f.name for f in fields(kind)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(
            f"unknown codec setting {', '.join(prefix + name for name in unknown)}; known are {', '.join(known)}"
        )
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}, **more)


def _positive(prefix: str, record: Any, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(record, name) < 1:
            raise ValueError(f"{prefix}{name} is {getattr(record, name)}; it must be at least 1")
