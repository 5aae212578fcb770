"""The Qwen-Image VAE as a 2-D network: for one image its causal 3-D convolutions are 2-D ones."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from ..config import ConfigMixin
from ..device import on_gpu, on_metal
from ..errors import SnapGenError, UsageError
from .convolution import UNFOLDED, Conv3x3
from .sizes import weight_bytes
from .tiny_decoder import upsample_nearest

# Attention scores computed at once: 64 MB in float32.
SCORES = 1 << 24


@dataclass
class VAEConfig(ConfigMixin):
    """The keys of diffusers' ``AutoencoderKLQwenImage`` that matter to a single image."""

    image_channels: ClassVar[int] = 3
    always_float32: ClassVar[bool] = False
    base_dim: int = 96
    z_dim: int = 16
    dim_mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])
    num_res_blocks: int = 2
    attn_scales: list[float] = field(default_factory=list)
    # fmt: off
    latents_mean: list[float] = field(default_factory=lambda: [
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ])
    latents_std: list[float] = field(default_factory=lambda: [
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    ])
    # fmt: on

    def __post_init__(self):
        if self.attn_scales:
            raise SnapGenError("VAE config: attn_scales must be empty, as in Qwen-Image's own VAE")
        if not len(self.latents_mean) == len(self.latents_std) == self.z_dim:
            raise SnapGenError(f"VAE config: latents_mean and latents_std need {self.z_dim} values")

    @property
    def downsampling(self) -> int:
        """Pixels per latent position and axis."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def latent_channels(self) -> int:
        return self.z_dim

    def decoding_bytes(self, h: int, w: int, tile: int, size: int) -> int:
        """Bytes of activations of the decoder.

        These are the middle block on the whole latent, with the attention scores of some rows, and
        then two neighbouring parts of the up blocks on the largest tile. On a CPU the unfolded
        inputs of 16 and of 18 convolutions count, and are limited. On Metal the convolutions of
        the up blocks do not unfold their input and count half (an estimate).

        Args:
            h: rows of the latent.
            w: columns of the latent.
            tile: latent positions on a side.
            size: bytes of a number.
        """
        decoder = Decoder(self)
        dims = [self.base_dim * m for m in self.dim_mult[::-1]]
        tile = min(tile, max(h, w))
        parts, scale, largest = [], 1, 0
        for dim, block, halo in zip(dims, decoder.up_blocks, decoder.halos(), strict=True):
            area = 1
            for n in (h, w):
                area *= min(scale * tile + 2 * halo, scale * n)
            parts.append(area * dim * (12 + 12.2 * len(block.resnets)))
            largest = max(largest, area * dim)
            if block.upsamplers:
                parts.append(area * dim * 42)
                scale *= 2
        up = max(map(sum, pairwise(parts)))
        latent = h * w * dims[0]
        middle = 40 * latent
        if on_metal():
            up /= 2
        elif not on_gpu():
            up = min(up, 5.4 * largest + 18 * UNFOLDED)
            middle = min(middle, 10 * latent + 16 * UNFOLDED)
        middle += min((h * w) ** 2, SCORES)
        pixels = 2 * 3 * h * w * scale**2
        return int(size * (max(middle, up) + latent + pixels))

    def encoding_bytes(self, h: int, w: int, size: int) -> int:
        """Bytes of activations of the encoder.

        These are 57 numbers for each channel of the widest stage, mostly of unfolded convolutions.
        A CPU needs 10, and the unfolded input of 12 convolutions, which is limited. On Metal the
        57 count half (an estimate).

        Args:
            h: rows of the latent.
            w: columns of the latent.
            size: bytes of a number.
        """
        scale = 2 ** (len(self.dim_mult) - 1)
        stages = [self.base_dim * m / 4**level for level, m in enumerate(self.dim_mult)]
        widest = h * w * scale**2 * max(stages)
        numbers = 57 * widest
        if on_metal():
            numbers /= 2
        elif not on_gpu():
            numbers = min(numbers, 10 * widest + 12 * UNFOLDED)
        return int(size * numbers)


class Norm(nn.Module):
    """x / max(|x|, 1e-12) * sqrt(C) * gamma over the channels: an RMS norm with a tiny epsilon."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = mx.ones((dim,))
        self._eps = 1e-24 / dim

    def __call__(self, x):
        return mx.fast.rms_norm(x, self.gamma, self._eps)


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.norm1 = Norm(in_dim)
        self.conv1 = Conv3x3(in_dim, out_dim)
        self.norm2 = Norm(out_dim)
        self.conv2 = Conv3x3(out_dim, out_dim)
        if in_dim != out_dim:
            self.conv_shortcut = nn.Conv2d(in_dim, out_dim, 1)

    def __call__(self, x):
        h = self.conv1(nn.silu(self.norm1(x)))
        h = self.conv2(nn.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if "conv_shortcut" in self else x)


class AttentionBlock(nn.Module):
    """Global self-attention with a single head as wide as the channels."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = Norm(dim)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def __call__(self, x):
        B, H, W, C = x.shape
        qkv = self.to_qkv(self.norm(x)).reshape(B, 1, H * W, 3 * C)
        q, k, v = mx.split(qkv, 3, axis=-1)
        # No fused kernel takes so wide a head: the scores of a few rows at a time are held.
        rows = max(SCORES // (B * H * W), 1)
        chunks = []
        for i in range(0, H * W, rows):
            part = q[:, :, i : i + rows]
            part = mx.fast.scaled_dot_product_attention(part, k, v, scale=C**-0.5, mask=None)
            if rows < H * W:
                mx.eval(part)  # left to itself, MLX would hold the scores of all of them
            chunks.append(part)
        return x + self.proj(mx.concatenate(chunks, axis=2).reshape(B, H, W, C))


class MidBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.resnets = [ResidualBlock(dim, dim), ResidualBlock(dim, dim)]
        self.attentions = [AttentionBlock(dim)]

    def __call__(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.resample = [nn.Identity(), nn.Conv2d(dim, dim, 3, stride=2)]

    def __call__(self, x):
        return self.resample[1](mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))


class Upsample(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.resample = [nn.Identity(), Conv3x3(dim, dim // 2)]

    def __call__(self, x):
        return self.resample[1](upsample_nearest(x))


class UpBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int, resnets: int, upsample: bool):
        super().__init__()
        dims = [in_dim] + [out_dim] * resnets
        self.resnets = [ResidualBlock(a, out_dim) for a in dims[:-1]]
        self.upsamplers = [Upsample(out_dim)] if upsample else []

    def __call__(self, x):
        for layer in self.resnets + self.upsamplers:
            x = layer(x)
        return x


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        dim = config.base_dim
        self.conv_in = Conv3x3(3, dim)
        self.down_blocks: list[nn.Module] = []
        for level, mult in enumerate(config.dim_mult):
            for _ in range(config.num_res_blocks):
                self.down_blocks.append(ResidualBlock(dim, config.base_dim * mult))
                dim = config.base_dim * mult
            if level < len(config.dim_mult) - 1:
                self.down_blocks.append(Downsample(dim))
        self.mid_block = MidBlock(dim)
        self.norm_out = Norm(dim)
        self.conv_out = Conv3x3(dim, 2 * config.z_dim)

    def __call__(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(nn.silu(self.norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [config.base_dim * m for m in config.dim_mult[::-1]]
        self.conv_in = Conv3x3(config.z_dim, dims[0])
        self.mid_block = MidBlock(dims[0])
        # An upsampler halves the channels, so every block but the first starts from half.
        in_dims = [dims[0]] + [d // 2 for d in dims[:-1]]
        self.up_blocks = [
            UpBlock(a, b, config.num_res_blocks + 1, upsample=level < len(dims) - 1)
            for level, (a, b) in enumerate(zip(in_dims, dims, strict=True))
        ]
        self.norm_out = Norm(dims[-1])
        self.conv_out = Conv3x3(dims[-1], 3)

    def __call__(self, z, tile: int | None = None):
        _, H, W, _ = z.shape
        x = self.mid_block(self.conv_in(z))
        if tile is None or tile >= max(H, W):
            return self._up(x, (0, H), (0, W))
        mx.eval(x)
        rows = []
        for top in range(0, H, tile):
            row = []
            for left in range(0, W, tile):
                part = self._up(x, (top, min(top + tile, H)), (left, min(left + tile, W)))
                mx.eval(part)  # one tile's activations at a time
                row.append(part)
            rows.append(mx.concatenate(row, axis=2))
        return mx.concatenate(rows, axis=1)

    def halos(self) -> list[int]:
        """Positions that each up block needs around a tile, at its own input's resolution."""
        halo = 1  # conv_out
        halos = []
        for block in reversed(self.up_blocks):
            if block.upsamplers:
                halo = (halo + 1 + 1) // 2  # its convolution, then half of it rounded up
            halo += 2 * len(block.resnets)
            halos.append(halo)
        return halos[::-1]

    def _up(self, x, rows: tuple[int, int], cols: tuple[int, int]):
        """Decode the latent positions rows x cols of x (B, H, W, C), the whole latent.

        Before each block x is cut to what the rest of the network needs around the wanted part.
        Cuts never pass the image's border, so that zero padding stands where the network has it:
        the result equals that part of the whole image.
        """
        size, origin, wanted = list(x.shape[1:3]), [0, 0], [rows, cols]
        for block, halo in zip(self.up_blocks, self.halos(), strict=True):
            x, origin = _cut(x, origin, wanted, halo, size)
            x = block(x)
            if block.upsamplers:
                size, origin = [2 * n for n in size], [2 * n for n in origin]
                wanted = [(2 * start, 2 * stop) for start, stop in wanted]
        x = self.conv_out(nn.silu(self.norm_out(x)))
        return _cut(x, origin, wanted, 0, size)[0]


def _cut(x, origin, wanted, halo: int, size):
    """The wanted rows and columns of x with a halo around them, and where that part begins."""
    (top, bottom), (left, right) = (
        (max(start - halo, 0), min(stop + halo, n))
        for (start, stop), n in zip(wanted, size, strict=True)
    )
    y, z = origin
    return x[:, top - y : bottom - y, left - z : right - z], [top, left]


class AutoencoderKLQwenImage(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    @property
    def encoder_bytes(self) -> int:
        return weight_bytes(self, ("encoder.", "quant_conv."))

    @property
    def decoder_bytes(self) -> int:
        return weight_bytes(self, ("decoder.", "post_quant_conv."))

    def encode(self, images: mx.array) -> mx.array:
        """Images (B, H, W, 3) in [-1, 1] -> normalised latents (B, H/8, W/8, C), no sampling."""
        x = self.quant_conv(self.encoder(images.astype(self.quant_conv.weight.dtype)))
        mean, std = mx.array(self.config.latents_mean), mx.array(self.config.latents_std)
        return (x[..., : self.config.z_dim].astype(mx.float32) - mean) / std

    def decode(self, latents: mx.array, tile: int | None = None) -> mx.array:
        """Decode normalised latents.

        Args:
            latents: (B, h, w, C).
            tile: side in latent positions of the parts that the upsampling layers take one at a
                time. Each part has the margin that its receptive field needs, so the image is the
                same, and the memory does not grow with it.

        Returns:
            Images (B, 8h, 8w, 3) in [-1, 1].

        Raises:
            UsageError: the tile is below 1.
        """
        if tile is not None and tile < 1:
            raise UsageError(f"tile is {tile}; it must be at least 1 latent position")
        mean, std = mx.array(self.config.latents_mean), mx.array(self.config.latents_std)
        z = (latents * std + mean).astype(self.post_quant_conv.weight.dtype)
        return mx.clip(self.decoder(self.post_quant_conv(z), tile), -1, 1)
