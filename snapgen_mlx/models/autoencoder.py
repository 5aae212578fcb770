"""Small autoencoders: of the embedded model (RGB), and of transparent stickers (RGBA)."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from ..config import ConfigMixin
from ..errors import SnapGenError
from .sizes import weight_bytes
from .tiny_decoder import (
    SeparableBlock,
    TinyDecoder,
    TinyDecoderConfig,
    depth_to_space,
    space_to_depth,
)


@dataclass
class SnapGenAutoencoderConfig(ConfigMixin):
    """Widths in the order the data meets them; ``latents_mean``/``latents_std`` per channel."""

    image_channels: ClassVar[int] = 3
    # Its few convolutions cost nothing in float32, and white stays white.
    always_float32: ClassVar[bool] = True

    latent_channels: int = 16
    encoder_channels: tuple[int, ...] = (64, 128)
    decoder_channels: tuple[int, ...] = (192, 96)
    blocks: int = 2
    expansion: int = 2
    patch: int = 4
    latents_mean: list[float] = field(default_factory=lambda: [0.0] * 16)
    latents_std: list[float] = field(default_factory=lambda: [1.0] * 16)

    @property
    def downsampling(self) -> int:
        """Pixels per latent position and axis."""
        return self.patch * 2 ** (len(self.encoder_channels) - 1)

    def decoding_bytes(self, h: int, w: int, tile: int, size: int) -> int:
        """Never tiled."""
        stages = [
            4**stage * channels * (18 + 4 * self.expansion)
            for stage, channels in enumerate(self.decoder_channels)
        ]
        return 4 * h * w * (max(stages) + 60 * 4 ** (len(stages) - 1))

    def encoding_bytes(self, h: int, w: int, size: int) -> int:
        """At the widest stage."""
        positions = h * w * 4 ** (len(self.encoder_channels) - 1)
        stages = [
            channels / 4**level * (14 + 5.5 * self.expansion)
            for level, channels in enumerate(self.encoder_channels)
        ]
        return int(4 * positions * max(stages))


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

    @property
    def encoder_bytes(self) -> int:
        return weight_bytes(self, "encoder.")

    @property
    def decoder_bytes(self) -> int:
        return weight_bytes(self, "decoder.")

    def __call__(self, images: mx.array) -> tuple[mx.array, mx.array]:
        """Images (B, H, W, 3) -> (reconstruction, not clamped; raw latents): for training."""
        latents = self.encoder(images)
        return self.decoder(latents), latents

    def encode(self, images: mx.array) -> mx.array:
        """Images (B, H, W, 3) in [-1, 1] -> normalised latents (B, H/8, W/8, C)."""
        mean, std = mx.array(self.config.latents_mean), mx.array(self.config.latents_std)
        return (self.encoder(images) - mean) / std

    def decode(self, latents: mx.array, tile: int | None = None) -> mx.array:
        """Decode normalised latents.

        Args:
            latents: (B, h, w, C).
            tile: not used, because pictures are small.

        Returns:
            Images (B, 8h, 8w, 3) in [-1, 1].
        """
        mean, std = mx.array(self.config.latents_mean), mx.array(self.config.latents_std)
        return mx.clip(self.decoder(latents * std + mean), -1, 1)


@dataclass
class StickerAutoencoderConfig(ConfigMixin):
    """Stages from the picture's side to the latents'; each next one halves the resolution.

    The first ``plain_stages`` have full 3x3 convolutions, the others separable ones: where
    channels are many, these need a tenth of the weights.
    """

    always_float32: ClassVar[bool] = True
    image_channels: int = 4
    latent_channels: int = 16
    channels: tuple[int, ...] = (96, 192, 384)
    encoder_blocks: tuple[int, ...] = (1, 2, 2)
    decoder_blocks: tuple[int, ...] = (2, 2, 3)
    plain_stages: int = 2
    expansion: int = 2
    patch: int = 4
    latents_mean: list[float] = field(default_factory=list)
    latents_std: list[float] = field(default_factory=list)

    def __post_init__(self):
        self.latents_mean = self.latents_mean or [0.0] * self.latent_channels
        self.latents_std = self.latents_std or [1.0] * self.latent_channels

    @classmethod
    def from_dict(cls, d: dict) -> Self:
        """Raises SnapGenError when the sizes do not belong together."""
        config = super().from_dict(d)
        stages, blocks = len(config.channels), (config.encoder_blocks, config.decoder_blocks)
        if not stages or any(len(counts) != stages for counts in blocks):
            raise SnapGenError(f"autoencoder: {stages} stages of channels, blocks of {blocks}")
        for name in ("latents_mean", "latents_std"):
            if len(getattr(config, name)) != config.latent_channels:
                raise SnapGenError(
                    f"autoencoder: {name} is not of {config.latent_channels} channels"
                )
        return config

    @property
    def downsampling(self) -> int:
        """Pixels per latent position and axis."""
        return self.patch * 2 ** (len(self.channels) - 1)

    def decoding_bytes(self, h: int, w: int, tile: int, size: int) -> int:
        """Never tiled. Full convolutions unfold their input (on a CPU), and MLX prepares the last
        ones before the first of them is done."""
        unfolded, widest = 9 * self.channels[0] * 4 ** (len(self.channels) - 1), 0
        for stage, channels in enumerate(self.channels[::-1]):
            level, values = len(self.channels) - 1 - stage, 4**stage * channels
            if level < self.plain_stages:
                unfolded += 18 * self.decoder_blocks[level] * values
            else:
                widest = max(widest, (18 + 4 * self.expansion) * values)
        return 4 * h * w * (unfolded + widest)

    def encoding_bytes(self, h: int, w: int, size: int) -> int:
        """At the widest stage, or at the unfolded input."""
        positions = h * w * 4 ** (len(self.channels) - 1)
        stages = [20.0 * self.image_channels * self.patch**2]
        for level, channels in enumerate(self.channels):
            each = 44 if level < self.plain_stages else 14 + 5.5 * self.expansion
            stages.append(channels / 4**level * each)
        return int(4 * positions * max(stages))


class PlainBlock(nn.Module):
    """x + two 3x3 convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def __call__(self, x):
        return x + self.conv2(nn.relu(self.conv1(self.norm(x))))


class LayerNormSeparableBlock(SeparableBlock):
    def __init__(self, channels: int, expansion: int):
        super().__init__(channels, expansion)
        self.norm = nn.LayerNorm(channels)


def _stages(config: StickerAutoencoderConfig, blocks: tuple[int, ...]) -> list[list[nn.Module]]:
    """One list of blocks for every stage, from the picture's side."""
    return [
        [
            PlainBlock(c)
            if i < config.plain_stages
            else LayerNormSeparableBlock(c, config.expansion)
            for _ in range(n)
        ]
        for i, (c, n) in enumerate(zip(config.channels, blocks, strict=True))
    ]


class StickerEncoder(nn.Module):
    def __init__(self, config: StickerAutoencoderConfig):
        super().__init__()
        channels = config.channels
        self.patch = config.patch
        self.conv_in = nn.Conv2d(config.image_channels * config.patch**2, channels[0], 3, padding=1)
        self.stages = _stages(config, config.encoder_blocks)
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


class StickerDecoder(nn.Module):
    """The encoder's mirror image."""

    def __init__(self, config: StickerAutoencoderConfig):
        super().__init__()
        channels = config.channels[::-1]
        self.patch = config.patch
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.stages = _stages(config, config.decoder_blocks)[::-1]
        self.upsamplers = [nn.Linear(a, 4 * b) for a, b in pairwise(channels)]
        pixels = config.image_channels * config.patch**2
        self.conv_out = nn.Conv2d(channels[-1], pixels, 3, padding=1)

    def __call__(self, latents):
        x = self.conv_in(latents)
        for i, stage in enumerate(self.stages):
            if i:
                x = depth_to_space(self.upsamplers[i - 1](x), 2)
            for block in stage:
                x = block(x)
        return depth_to_space(self.conv_out(nn.relu(x)), self.patch)


class StickerAutoencoder(nn.Module):
    """The autoencoder of transparent pictures: RGBA with premultiplied alpha."""

    def __init__(self, config: StickerAutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = StickerEncoder(config), StickerDecoder(config)

    @property
    def encoder_bytes(self) -> int:
        return weight_bytes(self, "encoder.")

    @property
    def decoder_bytes(self) -> int:
        return weight_bytes(self, "decoder.")

    def encode(self, images: mx.array) -> mx.array:
        """Premultiplied images (B, H, W, 4) in [-1, 1] -> normalised latents (B, h, w, C)."""
        mean, std = mx.array(self.config.latents_mean), mx.array(self.config.latents_std)
        return (self.encoder(images) - mean) / std

    def decode(self, latents: mx.array, tile: int | None = None) -> mx.array:
        """Decode normalised latents.

        Args:
            latents: (B, h, w, C).
            tile: not used, because pictures are small.

        Returns:
            Images (B, H, W, 4) in [-1, 1], premultiplied by alpha.
        """
        mean, std = mx.array(self.config.latents_mean), mx.array(self.config.latents_std)
        return mx.clip(self.decoder(latents * std + mean), -1, 1)
