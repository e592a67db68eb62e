"""Samples to latents."""

from __future__ import annotations

import torch

from audio.codec.config import CodecConfig, TransformerConfig
from audio.codec.history import History
from audio.codec.layers import CausalConv, Chain, ConvNeXt, Layer, Residual, Snake
from audio.codec.transformer import WindowTransformer


class Encoder(Layer):
    """Samples [B, T * frame_size, 1] -> latents [B, T, latent]."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        width = config.encoder_dim
        steps_per_frame = config.frame_size
        stages: list[Layer] = [CausalConv(1, width, 7)]
        for rate, layers in zip(config.encoder_rates, config.encoder_transformer_layers):
            steps_per_frame //= rate
            stages.append(EncoderStage(config, width, rate, layers, steps_per_frame))
            width *= 2
        stages += [Snake(width), CausalConv(width, config.latent_dim, 3)]
        self.convolutions = Chain(*stages)
        self.downsample = Chain(
            *(
                Chain(CausalConv(config.latent_dim, config.latent_dim, factor, factor), ConvNeXt(config.latent_dim))
                for factor in config.downsample_factor
            )
        )
        self.transformer = WindowTransformer(config.transformer, 1)

    def forward(self, x: torch.Tensor, history: History) -> torch.Tensor:
        return self.transformer(self.downsample(self.convolutions(x, history), history), history)


class EncoderStage(Layer):
    """[B, T, width] -> [B, T / rate, 2 width]"""

    def __init__(self, config: CodecConfig, width: int, rate: int, layers: int, steps_per_frame: int) -> None:
        super().__init__()
        stage: list[Layer] = [Residual(width, dilation) for dilation in (1, 3, 9)]
        stage += [Snake(width), CausalConv(width, 2 * width, 2 * rate, rate)]
        if layers:
            stage.append(WindowTransformer(_transformer(config, 2 * width, layers), steps_per_frame))
        self.block = Chain(*stage)

    def forward(self, x: torch.Tensor, history: History) -> torch.Tensor:
        return self.block(x, history)


def _transformer(config: CodecConfig, width: int, layers: int) -> TransformerConfig:
    head_dim = config.transformer.head_dim
    if width % head_dim:
        raise ValueError(f"an encoder stage of width {width} cannot have a transformer with heads of {head_dim}")
    return TransformerConfig(
        window_size=config.encoder_window_size,
        n_layer=layers,
        n_head=width // head_dim,
        dim=width,
        intermediate_size=3 * width,
        head_dim=head_dim,
    )
