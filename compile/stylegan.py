"""A StyleGAN2 generator in plain torch operations, written so that a graph with a dynamic batch can be exported.

Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN", arXiv:1912.04958. It differs from the
paper's own code in two places. The convolutions scale their input and output instead of their weights, which gives the
same numbers (section 2.2) without a grouped convolution whose groups are the batch. And a block enlarges before it
convolves, with bilinear weights (the [1, 3, 3, 1] filter of the paper), instead of a strided transposed convolution.
"""

from __future__ import annotations

import itertools
import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimize.errors import InputError

GAIN = math.sqrt(2)  # keeps the variance through a leaky ReLU
FIRST_SIZE = 4  # pixels a side of the learned constant


def leaky_relu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2) * GAIN


def upsample(x: Tensor) -> Tensor:
    """`[batch, channels, h, w]` -> `[batch, channels, 2h, 2w]`."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


class EqualizedLinear(nn.Module):
    """A linear layer whose weights are drawn from N(0, 1) and scaled when used: equalized learning rate.

    Karras et al. 2018, arXiv:1710.10196, section 4.1; `rate` is the multiplier of the learning rate (0.01 in the
    mapping network, appendix B of arXiv:1912.04958).
    """

    def __init__(self, inputs: int, outputs: int, bias: float = 0.0, rate: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.full((outputs,), bias / rate))
        self.rate = rate
        self.gain = rate / math.sqrt(inputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.gain, self.bias * self.rate)


class MappingNetwork(nn.Module):
    """`z [batch, z_dim]`, normalized to unit second moment, -> `w [batch, w_dim]`."""

    def __init__(self, z_dim: int, w_dim: int, num_layers: int) -> None:
        super().__init__()
        sizes = [z_dim] + [w_dim] * num_layers
        self.layers = nn.ModuleList(EqualizedLinear(a, b, rate=0.01) for a, b in itertools.pairwise(sizes))

    def forward(self, z: Tensor) -> Tensor:
        x = z * torch.rsqrt(z.square().mean(dim=1, keepdim=True) + 1e-8)
        for layer in self.layers:
            x = leaky_relu(layer(x))
        return x


class ModulatedConv(nn.Module):
    """A convolution of `[batch, inputs, h, w]` whose weights a style `w [batch, w_dim]` scales (section 2.2).

    Modulation (equation 1) is linear in the input channel, demodulation (equation 3) in the output channel, so both
    move from the weights to the activations.
    """

    def __init__(self, inputs: int, outputs: int, w_dim: int, kernel: int = 3, demodulate: bool = True) -> None:
        super().__init__()
        self.affine = EqualizedLinear(w_dim, inputs, bias=1.0)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.gain = 1 / math.sqrt(inputs * kernel * kernel)
        self.padding = kernel // 2
        self.demodulate = demodulate

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.affine(w)
        weight = self.weight * self.gain
        y = F.conv2d(x * style[:, :, None, None], weight, padding=self.padding)
        if not self.demodulate:
            return y
        scale = torch.rsqrt(F.linear(style.square(), weight.square().sum(dim=(2, 3))) + 1e-8)
        return y * scale[:, :, None, None]


class StyledLayer(nn.Module):
    """Modulated convolution, then noise and bias outside the style's reach, then leaky ReLU (section 2.1, figure 2)."""

    noise_const: Tensor

    def __init__(self, inputs: int, outputs: int, w_dim: int, size: int, seed: int) -> None:
        super().__init__()
        self.conv = ModulatedConv(inputs, outputs, w_dim)
        # its own generator: the same config is the same network, also when it is built on the meta device
        noise = torch.randn(size, size, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        self.register_buffer("noise_const", noise)
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        y = self.conv(x, w) + self.noise_const * self.noise_strength
        return leaky_relu(y + self.bias[:, None, None])


class ToRGB(nn.Module):
    """Features to image channels: a 1x1 modulated convolution without demodulation."""

    def __init__(self, inputs: int, img_channels: int, w_dim: int) -> None:
        super().__init__()
        self.conv = ModulatedConv(inputs, img_channels, w_dim, kernel=1, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(img_channels))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return cast(Tensor, self.conv(x, w) + self.bias[:, None, None])


class SynthesisBlock(nn.Module):
    """One resolution: enlarge, two styled layers, and its part of the image added to the smaller one's (section 4.1).

    The first block has one layer and nothing to enlarge.
    """

    def __init__(self, inputs: int, outputs: int, w_dim: int, size: int, img_channels: int) -> None:
        super().__init__()
        self.first = size == FIRST_SIZE
        if not self.first:
            self.conv0 = StyledLayer(inputs, outputs, w_dim, size, seed=2 * size)
        self.conv1 = StyledLayer(outputs, outputs, w_dim, size, seed=2 * size + 1)
        self.to_rgb = ToRGB(outputs, img_channels, w_dim)

    def forward(self, x: Tensor, image: Tensor | None, w: Tensor) -> tuple[Tensor, Tensor]:
        if not self.first:
            x = self.conv0(upsample(x), w)
        x = self.conv1(x, w)
        rgb = self.to_rgb(x, w)
        return x, rgb if image is None else upsample(image) + rgb


class StyleGAN2Generator(nn.Module):
    """`z [batch, z_dim]` -> `image [batch, img_channels, resolution, resolution]`, about -1 to 1 once it is trained.

    A block at `size` has `min(channel_base // size, channel_max)` channels; `num_layers` counts the mapping network's
    layers. There is no truncation and no mixing of styles: one w serves every layer.
    """

    def __init__(
        self,
        *,
        z_dim: int = 512,
        w_dim: int = 512,
        num_layers: int = 8,
        resolution: int = 256,
        channel_base: int = 16384,
        channel_max: int = 512,
        img_channels: int = 3,
    ) -> None:
        super().__init__()
        if resolution < 2 * FIRST_SIZE or resolution & (resolution - 1):
            raise InputError(
                "StyleGAN2Generator: no such resolution",
                got=resolution,
                expected=f"a power of two, at least {2 * FIRST_SIZE}",
            )
        sizes = [2**i for i in range(int(math.log2(FIRST_SIZE)), int(math.log2(resolution)) + 1)]
        channels = [min(channel_base // size, channel_max) for size in sizes]
        self.mapping = MappingNetwork(z_dim, w_dim, num_layers)
        self.const = nn.Parameter(torch.randn(channels[0], FIRST_SIZE, FIRST_SIZE))
        self.blocks = nn.ModuleList(
            SynthesisBlock(inputs, outputs, w_dim, size, img_channels)
            for inputs, outputs, size in zip([channels[0], *channels[:-1]], channels, sizes, strict=True)
        )

    def forward(self, z: Tensor) -> Tensor:
        w = self.mapping(z)
        x = self.const.expand(z.shape[0], -1, -1, -1)
        image: Tensor | None = None
        for block in self.blocks:
            x, image = block(x, image, w)
        return cast(Tensor, image)  # there is a first block
