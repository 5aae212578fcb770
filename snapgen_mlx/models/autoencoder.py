"""The small autoencoder of the embedded model: 8x, 16 latent channels, separable convolutions."""

from dataclasses import dataclass, field
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn

from .tiny_decoder import SeparableBlock, TinyDecoder, TinyDecoderConfig, space_to_depth


@dataclass
class SnapGenAutoencoderConfig:
    """Widths in the order the data meets them; ``latents_mean``/``latents_std`` per channel."""

    latent_channels: int = 16
    encoder_channels: tuple[int, ...] = (64, 128)
    decoder_channels: tuple[int, ...] = (192, 96)
    blocks: int = 2
    expansion: int = 2
    patch: int = 4
    latents_mean: list[float] = field(default_factory=lambda: [0.0] * 16)
    latents_std: list[float] = field(default_factory=lambda: [1.0] * 16)

    @classmethod
    def from_dict(cls, d: dict) -> "SnapGenAutoencoderConfig":
        return cls(**{k: v for k, v in d.items() if k in cls.__dataclass_fields__})

    @property
    def downsampling(self) -> int:
        """Pixels per latent position and axis."""
        return self.patch * 2 ** (len(self.encoder_channels) - 1)


class Encoder(nn.Module):
    """The decoder's mirror image: patches, residual blocks, 2x2 windows to channels between."""

    def __init__(self, config: SnapGenAutoencoderConfig):
        super().__init__()
        self.patch = config.patch
        channels = config.encoder_channels
        self.conv_in = nn.Conv2d(3 * config.patch**2, channels[0], 3, padding=1)
        self.stages = [
            [SeparableBlock(c, config.expansion) for _ in range(config.blocks)] for c in channels
        ]
        # Window concat and Linear = a 2x2 stride-2 convolution, whose gradient is slow on CPU.
        self.downsamplers = [nn.Linear(4 * a, b) for a, b in pairwise(channels)]
        self.conv_out = nn.Conv2d(channels[-1], config.latent_channels, 3, padding=1)

    def __call__(self, images):
        x = self.conv_in(space_to_depth(images, self.patch))
        for i, stage in enumerate(self.stages):
            if i:
                x = self.downsamplers[i - 1](space_to_depth(x, 2))
            for block in stage:
                x = block(x)
        return self.conv_out(nn.relu(x))


class SnapGenAutoencoder(nn.Module):
    def __init__(self, config: SnapGenAutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = TinyDecoder(
            TinyDecoderConfig(
                config.latent_channels,
                config.decoder_channels,
                config.blocks,
                config.expansion,
                config.patch,
            )
        )

    def __call__(self, images: mx.array) -> tuple[mx.array, mx.array]:
        """Images (B, H, W, 3) -> (reconstruction, not clamped; raw latents): for training."""
        latents = self.encoder(images)
        return self.decoder(latents), latents

    def encode(self, images: mx.array) -> mx.array:
        """Images (B, H, W, 3) in [-1, 1] -> normalised latents (B, H/8, W/8, C)."""
        mean, std = mx.array(self.config.latents_mean), mx.array(self.config.latents_std)
        return (self.encoder(images) - mean) / std

    def decode(self, latents: mx.array) -> mx.array:
        """Normalised latents (B, h, w, C) -> images (B, 8h, 8w, 3) in [-1, 1]."""
        mean, std = mx.array(self.config.latents_mean), mx.array(self.config.latents_std)
        return mx.clip(self.decoder(latents * std + mean), -1, 1)
