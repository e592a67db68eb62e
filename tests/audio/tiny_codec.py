"""The tiny codec of tests/data/s2-tiny, and what the family's reference computes with it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from audio.codec import Codec

FOLDER = Path(__file__).parents[1] / "data" / "s2-tiny"


@cache
def tiny_codec() -> Codec:
    return Codec.load(FOLDER)


@cache
def golden() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "codec-golden.safetensors")


def greedy_speech(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [K, T] that the tiny speech model emits greedily, and their samples. name: "ref" or "noref"."""
    frames = load_file(FOLDER / "golden.safetensors")[f"frames_{name}"]
    return frames[:, 1:].T, load_file(FOLDER / "speech.safetensors")[f"audio_{name}"]


def some_codes(frames: int, seed: int = 0) -> torch.Tensor:
    """Codes [K, frames], different for each seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(
        [torch.randint(0, n, (frames,), generator=generator) for n in tiny_codec().config.codebook_sizes]
    )


def some_sound(samples: int, seed: int = 0) -> torch.Tensor:
    """Samples [samples] of a few gliding tones and noise."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(samples) / tiny_codec().config.sample_rate
    pitches = 100 + 400 * torch.rand(3, 1, generator=generator)
    tones = torch.sin(6.2832 * pitches * time * (1 + time)).sum(0)
    return 0.1 * tones + 0.02 * torch.randn(samples, generator=generator)
