"""The codec: samples to frames of codes and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from audio.codec.config import CodecConfig
from audio.codec.decoder import Decoder
from audio.codec.encoder import Encoder
from audio.codec.history import Beginning, Carried, History, Plan
from audio.codec.quantizer import Quantized, ResidualQuantizer
from audio.codec.transformer import WindowTransformer

# Long sounds pass in pieces of this many frames with their history carried on, which changes nothing but the memory.
PIECE_FRAMES = 64


class Codec(nn.Module):
    """A causal codec of the S2 family."""

    def __init__(self, config: CodecConfig) -> None:
        """Random weights; `load` reads trained ones."""
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer = ResidualQuantizer(config.latent_dim, config.codebook_sizes, config.codebook_dim)
        self.decoder = Decoder(config)
        self.encoder_plan = Plan.of(self.encoder)
        self.decoder_plan = Plan.of(self.decoder)
        self._transformers = [layer for layer in self.modules() if isinstance(layer, WindowTransformer)]

    @staticmethod
    def load(source: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Codec:
        """The codec in a folder with `codec.pth` or `codec.safetensors`, or in such a file.

        Its sizes are in a JSON file of the same stem beside it; without one they are the released codec's. Raises
        FileNotFoundError if there is none, ValueError for another dtype than float32 and bfloat16, CodecWeightError
        (a ValueError) for tensors that are not those of the sizes.

        dtype is the decoder's, float32 or bfloat16. The encoder gets more digits: float64 on a CPU for float32, else
        float32. Its result is a choice between entries that can lie closer together than rounding errors do, and a
        sound must give the same codes whatever pieces it comes in.
        """
        from audio.codec.weights import load_codec

        return load_codec(Path(source), torch.device(device), dtype)

    @property
    def device(self) -> torch.device:
        return self.quantizer.codebooks.device

    @property
    def dtype(self) -> torch.dtype:
        """The decoder's."""
        return self.decoder.transformer.norm.weight.dtype

    @property
    def encoder_dtype(self) -> torch.dtype:
        """The encoder's; see `load`."""
        return self.encoder.transformer.norm.weight.dtype

    def frame_count(self, samples: int) -> int:
        """Frames of a sound of so many samples: its end is padded to a whole one."""
        return -(-samples // self.config.frame_size)

    def forward(self, wav: torch.Tensor) -> tuple[torch.Tensor, Quantized]:
        """For training: samples [B, T * frame_size] -> the same passed through the codec, and what quantising cost."""
        latent = self.encoder(wav.to(self.encoder_dtype).unsqueeze(2), Beginning())
        quantized = self.quantizer(latent.to(self.quantizer.codebooks.dtype))
        return self.decoder(quantized.latent.to(self.dtype), Beginning()).squeeze(2), quantized

    @torch.no_grad()
    def encode(self, wav: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Samples [B, S] in -1 to 1 at `config.sample_rate` -> codes int64 [B, K, T], T = frame_count(S).

        lengths int [B] says how many samples of each row count; those after are taken for zeros, and row b's codes are
        the first frame_count(lengths[b]). Raises ValueError for other shapes.
        """
        _check_wav(wav)
        wav = wav.to(self.device)
        if lengths is not None:
            wav = _silence_after(wav, lengths)
        frames = self.frame_count(wav.shape[1])
        size = self.config.frame_size
        wav = F.pad(wav, (0, frames * size - wav.shape[1]))
        codes = [
            self.encode_frames(wav[:, first * size : last * size], history)
            for first, last, history in self._pieces(self.encoder_plan, self.encoder_dtype, len(wav), frames)
        ]
        return torch.cat(codes, 2)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes, integers [B, K, T] -> samples float32 [B, T * frame_size] in -1 to 1.

        A code above its codebook's size means the last entry. Raises ValueError for other shapes, and for codes below 0
        unless they lie on a GPU, where looking would mean waiting; there they mean the first entry.
        """
        self.check_codes(codes, 3)
        codes = codes.to(self.device)
        if codes.shape[2] == 0:
            return torch.zeros(len(codes), 0, device=self.device)
        samples = [
            self.decode_frames(codes[:, :, first:last], history)
            for first, last, history in self._pieces(self.decoder_plan, self.dtype, len(codes), codes.shape[2])
        ]
        return torch.cat(samples, 1)

    def encode_frames(self, wav: torch.Tensor, history: History) -> torch.Tensor:
        """Samples [B, n * frame_size] that follow `history` -> codes int64 [B, K, n]."""
        latent = self.encoder(wav.to(self.encoder_dtype).unsqueeze(2), history)
        return self.quantizer.encode(latent).transpose(1, 2)

    def decode_frames(self, codes: torch.Tensor, history: History) -> torch.Tensor:
        """Codes [B, K, n] that follow `history` -> samples float32 [B, n * frame_size]."""
        latent = self.quantizer.decode(codes.transpose(1, 2)).to(self.dtype)
        return self.decoder(latent, history).squeeze(2).float()

    def reserve(self, frames: int) -> None:
        """Make room for streams of up to `frames` frames. Streams do it as they grow; a captured CUDA graph cannot."""
        for transformer in self._transformers:
            transformer.reserve(frames)

    def check_codes(self, codes: torch.Tensor, ndim: int) -> None:
        """Raises ValueError unless codes are integers [..., K, T] of so many dimensions."""
        shape, books = list(codes.shape), self.config.num_codebooks
        if codes.ndim != ndim or shape[-2] != books or codes.is_floating_point() or codes.dtype == torch.bool:
            wanted = f"[batch, {books}, frames]" if ndim == 3 else f"[{books}, frames]"
            raise ValueError(f"codes are {codes.dtype} {shape}; they must be integers {wanted}")
        if codes.device.type == "cpu" and codes.numel() and codes.min() < 0:
            raise ValueError(f"a code is {int(codes.min())}; codes must be at least 0")

    def _pieces(self, plan: Plan, dtype: torch.dtype, streams: int, frames: int) -> Iterator[tuple[int, int, History]]:
        """First and last frame of each piece of a sound, and the history to pass it with."""
        if frames <= PIECE_FRAMES:
            yield 0, frames, Beginning()
            return
        self.reserve(frames)
        history = Carried.start(plan, streams, self.device, dtype)
        for first in range(0, frames, PIECE_FRAMES):
            yield first, min(first + PIECE_FRAMES, frames), history
            history = history.advance(PIECE_FRAMES)


def _check_wav(wav: torch.Tensor) -> None:
    if wav.ndim != 2 or not wav.is_floating_point() or wav.shape[1] == 0:
        raise ValueError(f"wav is {wav.dtype} {list(wav.shape)}; it must be floats [batch, samples], not empty")


def _silence_after(wav: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    if list(lengths.shape) != [len(wav)] or lengths.is_floating_point():
        raise ValueError(f"lengths are {lengths.dtype} {list(lengths.shape)}; they must be integers [{len(wav)}]")
    if lengths.min() < 0 or lengths.max() > wav.shape[1]:
        raise ValueError(f"lengths are {lengths.tolist()}; they must be in 0 to {wav.shape[1]}, wav's samples")
    counts = torch.arange(wav.shape[1], device=wav.device) < lengths.to(wav.device)[:, None]
    return torch.where(counts, wav, 0.0)
