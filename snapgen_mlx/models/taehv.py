"""The decoder of TAEHV, a tiny video autoencoder (madebyollin/taehv), for one image.

Its file for Wan 2.1, taew2.1, decodes Qwen-Image's latents as well. A latent becomes four frames,
of which the last is the image; only what that frame needs is computed. A block also sees what the
block before saw one frame earlier, and nothing (zeros) at the first frame.
"""

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from ..config import ConfigMixin
from ..device import on_gpu
from .sizes import weight_bytes
from .tiny_decoder import upsample_nearest

CHANNELS = (256, 128, 64, 64)  # channels of the three stages and of the layer that gives pixels
# Numbers held for each position of the last stage, at four times the latent's sides (measured).
FLOATS = 4000
LIMIT = 3.0  # largest value of a latent; tanh bends values towards it


def evaluated(x: mx.array) -> mx.array:
    """x, before more is computed: MLX would hold the unfolded inputs of many convolutions."""
    mx.eval(x)
    return x


@dataclass
class TAEHVConfig(ConfigMixin):
    """Sizes; a latent is normalised as that of ``VAEConfig`` with its own means and deviations."""

    image_channels: ClassVar[int] = 3
    downsampling: ClassVar[int] = 8
    always_float32: ClassVar[bool] = False
    latent_channels: int = 16

    def decoding_bytes(self, h: int, w: int, tile: int, size: int) -> int:
        """Predicted bytes of activations: a block of the last stage with its unfolded convolutions.

        A GPU does not unfold them and counts half (an estimate).

        Args:
            h: rows of the latent.
            w: columns of the latent.
            tile: not used.
            size: bytes of a number.
        """
        return size * 16 * h * w * FLOATS // (2 if on_gpu() else 1)


class MemoryBlock(nn.Module):
    """A residual block of three convolutions on the frame and the one before it."""

    def __init__(self, channels: int):
        super().__init__()
        relu = nn.ReLU()
        first = nn.Conv2d(2 * channels, channels, 3, padding=1)
        second, third = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.conv = [first, relu, second, relu, third]

    def __call__(self, x: mx.array, past: mx.array | None = None) -> mx.array:
        """x, past (B, H, W, C); past: what the block saw one frame earlier."""
        first, relu, second, _, third = self.conv
        if past is None:  # a convolution of zeros is left out
            h = mx.conv2d(x, first.weight[..., : x.shape[-1]], padding=1) + first.bias
        else:
            h = first(mx.concatenate([x, past], axis=-1))
        return relu(third(relu(second(relu(h)))) + x)


class Grow(nn.Module):
    """A frame's channels to those of ``frames`` frames, the earliest first."""

    def __init__(self, channels: int, frames: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels * frames, 1, bias=False)


class TAEHVDecoder(nn.Module):
    def __init__(self, config: TAEHVConfig):
        super().__init__()
        self.config = config
        # As in the original's list, where layers without weights have a place too.
        self.decoder = [nn.Identity(), nn.Conv2d(config.latent_channels, CHANNELS[0], 3, padding=1)]
        self.decoder.append(nn.ReLU())
        for i, frames in enumerate((1, 2, 2)):
            self.decoder += [MemoryBlock(CHANNELS[i]) for _ in range(3)]
            self.decoder += [nn.Identity(), Grow(CHANNELS[i], frames)]
            conv = nn.Conv2d(CHANNELS[i], CHANNELS[i + 1], 3, padding=1, bias=False)
            self.decoder.append(conv)
        self.decoder += [nn.ReLU(), nn.Conv2d(CHANNELS[-1], config.image_channels, 3, padding=1)]

    def __call__(self, latents: mx.array) -> mx.array:
        """Normalised latents (B, h, w, C) -> images (B, 8h, 8w, 3), about in [0, 1]."""
        d = self.decoder
        x = nn.relu(d[1](LIMIT * mx.tanh(latents / LIMIT)))
        for block in d[3:6]:
            x = evaluated(block(x))
        x = evaluated(d[8](d[7].conv(upsample_nearest(x))))
        for block in d[9:12]:
            x = evaluated(block(x))
        # Two frames from here on: each block of the later one sees what the earlier one's saw.
        past, x = mx.split(d[13].conv(upsample_nearest(x)), 2, axis=-1)
        past, x = evaluated(d[14](past)), evaluated(d[14](x))
        for block in d[15:18]:
            past, x = evaluated(block(past)), evaluated(block(x, past))
        last = d[19].conv.weight[CHANNELS[2] :]  # of its two frames
        x = evaluated(d[20](mx.conv2d(upsample_nearest(x), last)))
        return d[22](nn.relu(x))

    @property
    def decoder_bytes(self) -> int:
        return weight_bytes(self)

    def decode(self, latents: mx.array, tile: int | None = None) -> mx.array:
        """Decode normalised latents.

        Args:
            latents: (B, h, w, C).
            tile: not used, because decoding needs little memory.

        Returns:
            Images (B, 8h, 8w, 3) in [-1, 1].
        """
        return 2 * mx.clip(self(latents.astype(self.decoder[1].bias.dtype)), 0, 1) - 1
