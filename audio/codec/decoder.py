"""Latents to samples."""

from __future__ import annotations

import torch

from audio.codec.config import CodecConfig
from audio.codec.history import History
from audio.codec.layers import CausalConv, CausalUpsample, Chain, ConvNeXt, Layer, Residual, Snake
from audio.codec.transformer import WindowTransformer


class Decoder(Layer):
    """Latents [B, T, latent] -> samples in -1 to 1 [B, T * frame_size, 1]."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        latent, width = config.latent_dim, config.decoder_dim
        self.transformer = WindowTransformer(config.transformer, 1)
        self.upsample = Chain(
            *(
                Chain(CausalUpsample(latent, latent, factor, factor), ConvNeXt(latent))
                for factor in reversed(config.downsample_factor)
            )
        )
        stages: list[Layer] = [CausalConv(latent, width, 7)]
        for rate in config.decoder_rates:
            stages.append(DecoderStage(width, rate))
            width //= 2
        stages += [Snake(width), CausalConv(width, 1, 7)]
        self.convolutions = Chain(*stages)

    def forward(self, x: torch.Tensor, history: History) -> torch.Tensor:
        x = self.upsample(self.transformer(x, history), history)
        return torch.tanh(self.convolutions(x, history))


class DecoderStage(Layer):
    """[B, T, width] -> [B, T * rate, width / 2]"""

    def __init__(self, width: int, rate: int) -> None:
        super().__init__()
        residuals = (Residual(width // 2, dilation) for dilation in (1, 3, 9))
        self.block = Chain(Snake(width), CausalUpsample(width, width // 2, 2 * rate, rate), *residuals)

    def forward(self, x: torch.Tensor, history: History) -> torch.Tensor:
        return self.block(x, history)
