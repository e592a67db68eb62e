"""The codec's layers. Sound is [B, T, channels] throughout: convolutions become one matrix product over rows that
overlap in memory, upsampling becomes a reshape, and a transformer needs no transposing."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from audio.codec.history import History, Tail

# Above this many numbers, rows copied side by side for one matrix product no longer fit a CPU's caches.
_UNFOLDED_LIMIT = 1 << 20


def widened(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or in float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


class Layer(nn.Module):
    """A module that sees the past of its input: forward(x [B, T, in], history) -> [B, T', out]."""

    def forward(self, x: torch.Tensor, history: History) -> torch.Tensor:
        raise NotImplementedError


class Chain(Layer):
    """Layers one after the other."""

    def __init__(self, *layers: Layer) -> None:
        super().__init__()
        for index, layer in enumerate(layers):
            self.add_module(str(index), layer)

    def forward(self, x: torch.Tensor, history: History) -> torch.Tensor:
        for layer in self._modules.values():
            x = layer(x, history)  # type: ignore[misc]
        return x


class CausalConv(Layer):
    """A convolution whose last tap is the newest row of its stride: [B, T, in] -> [B, T / stride, out].

    T must be a multiple of stride.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, kernel, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.stride = stride
        self.dilation = dilation
        self.tail = Tail((kernel - 1) * dilation + 1 - stride, inputs)
        _initialise(self.weight)

    def forward(self, x: torch.Tensor, history: History) -> torch.Tensor:
        return _convolve(history.extend(self.tail, x), self.weight, self.bias, self.stride, self.dilation)


class CausalUpsample(Layer):
    """A transposed convolution that answers each row with `stride` rows: [B, T, in] -> [B, T * stride, out].

    Its kernel is a whole number of strides, so the rows that it makes at one step depend on the last kernel / stride
    inputs only: it is a plain convolution whose outputs are `stride` rows side by side.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(stride * outputs, kernel // stride, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.stride = stride
        self.tail = Tail(kernel // stride - 1, inputs)
        _initialise(self.weight)

    def forward(self, x: torch.Tensor, history: History) -> torch.Tensor:
        batch, length, _ = x.shape
        y = _convolve(history.extend(self.tail, x), self.weight, self.bias.repeat(self.stride), 1, 1)
        return y.view(batch, length * self.stride, -1)


def _initialise(weight: torch.Tensor) -> None:
    # A third of the variance that would keep the signal's: residual units add theirs to what they pass on.
    nn.init.normal_(weight, std=(3 * weight[0].numel()) ** -0.5)


def _convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, stride: int, dilation: int) -> torch.Tensor:
    """[B, T, in] * [out, kernel, in] -> [B, steps, out], as many steps as fit.

    The weight's layout is both that of a matrix for rows side by side and that of a channels-last kernel.
    """
    _, kernel, inputs = weight.shape
    batch, length, _ = x.shape
    steps = (length - (kernel - 1) * dilation - 1) // stride + 1
    if kernel in (stride, 1):
        return F.linear(x.reshape(batch, steps, kernel * inputs), weight.flatten(1), bias)
    if x.is_cuda or torch.is_grad_enabled() or batch * steps * kernel * inputs > _UNFOLDED_LIMIT:
        pixels = x.transpose(1, 2).unsqueeze(2)  # [B, in, 1, T]
        filters = weight.transpose(1, 2).unsqueeze(2)  # [out, in, 1, kernel]
        # TensorFloat-32, which cuDNN takes for float32 unless told otherwise, would be an error of one in a thousand.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            y = F.conv2d(pixels, filters, bias, stride=(1, stride), dilation=(1, dilation))
        return y.squeeze(2).transpose(1, 2).contiguous()
    rows = x.as_strided((batch, steps, kernel, inputs), (x.stride(0), stride * inputs, dilation * inputs, 1))
    return F.linear(rows.reshape(batch, steps, kernel * inputs), weight.flatten(1), bias)


class Snake(Layer):
    """x + sin(alpha x)^2 / alpha, with an alpha for each channel (Ziyin et al., 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor, history: History) -> torch.Tensor:
        if x.is_cuda and x.dtype != torch.float64 and not torch.is_grad_enabled():
            from audio.codec.snake import fused_snake  # Triton is not made for every machine

            return fused_snake(x, self.alpha)
        sine = torch.sin_(x * self.alpha)
        return torch.addcdiv(x, sine.square(), self.alpha + 1e-9)


class Residual(Layer):
    """x + conv(snake(dilated conv(snake(x))))."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.block = Chain(
            Snake(width), CausalConv(width, width, 7, dilation=dilation), Snake(width), CausalConv(width, width, 1)
        )

    def forward(self, x: torch.Tensor, history: History) -> torch.Tensor:
        return x + self.block(x, history)


class ConvNeXt(Layer):
    """A residual block: a depthwise convolution, then two products (Liu et al., 2022); made causal."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width, 7), 1 / 7))
        self.bias = nn.Parameter(torch.zeros(width))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))
        self.tail = Tail(6, width)

    def forward(self, x: torch.Tensor, history: History) -> torch.Tensor:
        windows = history.extend(self.tail, x).unfold(1, 7, 1)  # [B, T, width, 7]
        y = self.norm((windows * self.weight).sum(-1) + self.bias)
        return torch.addcmul(x, self.gamma, self.pwconv2(F.gelu(self.pwconv1(y))))
