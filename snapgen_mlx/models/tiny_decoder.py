"""The tiny latent decoder: separable convolutions, no attention (SnapGen; layout is our choice)."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from ..config import ConfigMixin
from .sizes import weight_bytes

FLOATS = 950  # numbers held for each pixel, with 256 channels (measured)


@dataclass
class TinyDecoderConfig(ConfigMixin):
    """Stage widths from the latent's resolution up; each stage after the first doubles it.

    ``patch`` > 1 ends with ``patch`` x ``patch`` pixels per position instead of another stage.
    The image is ``2 ** (len(channels) - 1) * patch`` times the latent's size.
    """

    image_channels: ClassVar[int] = 3
    always_float32: ClassVar[bool] = False
    latent_channels: int = 16
    channels: tuple[int, ...] = (256, 256, 128, 32)
    blocks: int = 2
    expansion: int = 2
    patch: int = 1

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.channels) - 1) * self.patch

    def decoding_bytes(self, h: int, w: int, tile: int, size: int) -> int:
        return size * h * w * self.downsampling**2 * FLOATS * max(self.channels) // 256


def _shifts(x: mx.array):
    """The nine 3x3 neighbours of every position of x (B, H, W, C), zero outside."""
    H, W = x.shape[1:3]
    x = mx.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    return [x[:, i : i + H, j : j + W] for i in range(3) for j in range(3)]


@mx.compile
def _depthwise(x: mx.array, weight: mx.array) -> mx.array:
    if mx.default_device() == mx.gpu:
        return mx.conv2d(x, weight, padding=1, groups=x.shape[-1])
    # On CPU a grouped convolution unfolds its input; nine fused multiply-adds are 3x faster.
    taps = weight.reshape(-1, 9).T
    return sum(s * tap for s, tap in zip(_shifts(x), taps, strict=True))


@mx.custom_function
def depthwise3x3(x: mx.array, weight: mx.array) -> mx.array:
    """Depthwise 3x3 convolution with zero padding: x (B, H, W, C), weight (C, 3, 3, 1)."""
    return _depthwise(x, weight)


@depthwise3x3.vjp
def _depthwise3x3_vjp(primals, cotangent, _):
    # Autograd through nine slices would pad and add nine full arrays.
    x, weight = primals
    dw = mx.stack([(s * cotangent).sum((0, 1, 2)) for s in _shifts(x)], axis=-1)
    return _depthwise(cotangent, weight[:, ::-1, ::-1]), dw.reshape(weight.shape)


class Depthwise(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.weight = mx.random.uniform(-1 / 3, 1 / 3, (channels, 3, 3, 1))

    def __call__(self, x):
        return depthwise3x3(x, self.weight)


class SeparableBlock(nn.Module):
    """x + (depthwise, pointwise) twice. RMSNorm per position: cheap, and it has no batch state."""

    def __init__(self, channels: int, expansion: int):
        super().__init__()
        hidden = channels * expansion
        self.norm: nn.Module = nn.RMSNorm(channels, eps=1e-6)
        self.dw1 = Depthwise(channels)
        self.pw1 = nn.Linear(channels, hidden)
        self.dw2 = Depthwise(hidden)
        self.pw2 = nn.Linear(hidden, channels)

    def __call__(self, x):
        h = nn.relu(self.pw1(self.dw1(self.norm(x))))
        return x + self.pw2(self.dw2(h))


class Upsample(nn.Module):
    """Nearest x2 and a separable convolution; pointwise first, where it costs a quarter."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.pw = nn.Linear(in_channels, out_channels)
        self.dw = Depthwise(out_channels)

    def __call__(self, x):
        return self.dw(upsample_nearest(self.pw(x)))


def upsample_nearest(x: mx.array) -> mx.array:
    """Nearest x2: (B, H, W, C) -> (B, 2H, 2W, C)."""
    B, H, W, C = x.shape
    x = mx.broadcast_to(x[:, :, None, :, None], (B, H, 2, W, 2, C))
    return x.reshape(B, 2 * H, 2 * W, C)


def depth_to_space(x: mx.array, patch: int) -> mx.array:
    """(B, H, W, patch * patch * C) -> (B, patch H, patch W, C), channel fastest."""
    B, H, W, C = x.shape
    x = x.reshape(B, H, W, patch, patch, C // patch**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, H * patch, W * patch, C // patch**2)


def space_to_depth(x: mx.array, patch: int) -> mx.array:
    """(B, patch H, patch W, C) -> (B, H, W, patch * patch * C), channel fastest."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // patch, patch, W // patch, patch, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, H // patch, W // patch, patch**2 * C)


class TinyDecoder(nn.Module):
    def __init__(self, config: TinyDecoderConfig):
        super().__init__()
        self.config = config
        channels = config.channels
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.stages = [
            [SeparableBlock(c, config.expansion) for _ in range(config.blocks)] for c in channels
        ]
        self.upsamplers = [Upsample(a, b) for a, b in pairwise(channels)]
        self.conv_out = nn.Conv2d(channels[-1], 3 * config.patch**2, 3, padding=1)

    def __call__(self, latents: mx.array) -> mx.array:
        """Latents (B, h, w, C) -> images (B, H, W, 3), not clamped (what training compares)."""
        x = self.conv_in(latents)
        for i, stage in enumerate(self.stages):
            if i:
                x = self.upsamplers[i - 1](x)
            for block in stage:
                x = block(x)
        x = self.conv_out(nn.relu(x))
        return depth_to_space(x, self.config.patch) if self.config.patch > 1 else x

    @property
    def decoder_bytes(self) -> int:
        return weight_bytes(self)

    def decode(self, latents: mx.array, tile: int | None = None) -> mx.array:
        """Decode normalised latents.

        Args:
            latents: (B, h, w, C).
            tile: not used, because decoding needs little memory.

        Returns:
            Images (B, H, W, 3) in [-1, 1].
        """
        return mx.clip(self(latents.astype(self.conv_in.weight.dtype)), -1, 1)
