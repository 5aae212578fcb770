"""The embedded model's autoencoder in PyTorch: RGBA pictures to a much smaller grid and back.

    python -m recipes.embedded.autoencoder WORLD OUT [--factor 16|8] [--channels N] [--steps N]

Trains on scenes of the world and writes ``OUT/config.json`` and
``OUT/diffusion_pytorch_model.safetensors``, which `snapgen-mlx convert` reads as a ``vae/`` folder.
Goes on from the state in ``OUT/run``. With --decoder-only the encoder in OUT stays as it is, so
that latents made with it stay valid, and its decoder is trained further on whole pictures.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.files import atomic_write

from ..command import command

WEIGHTS = "diffusion_pytorch_model.safetensors"
CLASS = "StickerAutoencoder"


@dataclass
class Config:
    """Stages from the picture's side to the latents'; each next one halves the resolution.

    The first ``plain_stages`` have full 3x3 convolutions, the others separable ones: where
    channels are many, these need a tenth of the weights.
    """

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
        for name in ("channels", "encoder_blocks", "decoder_blocks"):
            setattr(self, name, tuple(getattr(self, name)))  # JSON has lists
        self.latents_mean = self.latents_mean or [0.0] * self.latent_channels
        self.latents_std = self.latents_std or [1.0] * self.latent_channels

    @property
    def factor(self) -> int:
        """Pixels per latent position and axis."""
        return self.patch * 2 ** (len(self.channels) - 1)


# By pixels per latent position and axis. At 8 the coarsest stage is left out, and the grid has four
# times the positions: 8 channels hold as many numbers as 32 at 16.
GEOMETRIES = {
    16: Config(),
    8: Config(latent_channels=8, channels=(96, 192), encoder_blocks=(1, 2), decoder_blocks=(2, 3)),
}


# Inside the networks pictures are (B, H, W, C): then Linear and LayerNorm act on the last axis, and
# a convolution's (B, C, H, W) view of them is already in PyTorch's channels_last layout.


class Conv(nn.Conv2d):
    def __init__(self, a: int, b: int, groups: int = 1):
        super().__init__(a, b, 3, padding=1, groups=groups, bias=groups == 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Norm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        # Autocast would make it float32, at three times the cost of the whole block's rest.
        with torch.autocast("cpu", enabled=False):
            dtype = x.dtype
            return F.layer_norm(
                x, self.normalized_shape, self.weight.to(dtype), self.bias.to(dtype), self.eps
            )


class PlainBlock(nn.Module):
    """x + two 3x3 convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = Norm(channels)
        self.conv1, self.conv2 = Conv(channels, channels), Conv(channels, channels)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(self.norm(x))))


class SeparableBlock(nn.Module):
    """x + (depthwise, pointwise) twice."""

    def __init__(self, channels: int, expansion: int):
        super().__init__()
        hidden = channels * expansion
        self.norm = Norm(channels)
        self.dw1, self.pw1 = Conv(channels, channels, channels), nn.Linear(channels, hidden)
        self.dw2, self.pw2 = Conv(hidden, hidden, hidden), nn.Linear(hidden, channels)
        nn.init.zeros_(self.pw2.weight)
        nn.init.zeros_(self.pw2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pw2(self.dw2(F.relu(self.pw1(self.dw1(self.norm(x))))))


def space_to_depth(x: Tensor, patch: int) -> Tensor:
    """(B, patch H, patch W, C) -> (B, H, W, patch * patch * C), channel fastest."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // patch, patch, W // patch, patch, C).transpose(2, 3)
    return x.reshape(B, H // patch, W // patch, patch**2 * C)


def depth_to_space(x: Tensor, patch: int) -> Tensor:
    """(B, H, W, patch * patch * C) -> (B, patch H, patch W, C), channel fastest."""
    B, H, W, C = x.shape
    x = x.reshape(B, H, W, patch, patch, C // patch**2).transpose(2, 3)
    return x.reshape(B, H * patch, W * patch, C // patch**2)


def _stages(config: Config, blocks: tuple[int, ...]) -> list[nn.ModuleList]:
    """One list of blocks for every stage, from the picture's side."""
    return [
        nn.ModuleList(
            PlainBlock(c) if i < config.plain_stages else SeparableBlock(c, config.expansion)
            for _ in range(n)
        )
        for i, (c, n) in enumerate(zip(config.channels, blocks, strict=True))
    ]


class Encoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        channels = config.channels
        self.patch = config.patch
        self.conv_in = Conv(config.image_channels * config.patch**2, channels[0])
        self.stages = nn.ModuleList(_stages(config, config.encoder_blocks))
        self.downsamplers = nn.ModuleList(nn.Linear(4 * a, b) for a, b in pairwise(channels))
        self.conv_out = Conv(channels[-1], config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(space_to_depth(x, self.patch))
        for i, stage in enumerate(self.stages):
            if i:
                x = self.downsamplers[i - 1](space_to_depth(x, 2))
            for block in stage:
                x = block(x)
        return self.conv_out(F.relu(x))


class Decoder(nn.Module):
    """The encoder's mirror image."""

    def __init__(self, config: Config):
        super().__init__()
        channels = config.channels[::-1]
        self.patch = config.patch
        self.conv_in = Conv(config.latent_channels, channels[0])
        self.stages = nn.ModuleList(_stages(config, config.decoder_blocks)[::-1])
        self.upsamplers = nn.ModuleList(nn.Linear(a, 4 * b) for a, b in pairwise(channels))
        self.conv_out = Conv(channels[-1], config.image_channels * config.patch**2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for i, stage in enumerate(self.stages):
            if i:
                x = depth_to_space(self.upsamplers[i - 1](x), 2)
            for block in stage:
                x = block(x)
        return depth_to_space(self.conv_out(F.relu(x)), self.patch)


class Autoencoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def _statistics(self) -> list[Tensor]:
        pair = self.config.latents_mean, self.config.latents_std
        device = next(self.parameters()).device
        return [torch.tensor(values, device=device).reshape(1, -1, 1, 1) for values in pair]

    def encode(self, images: Tensor) -> Tensor:
        """Premultiplied RGBA (B, 4, H, W) in [-1, 1] -> normalised latents (B, C, h, w)."""
        mean, std = self._statistics()
        return (self.encoder(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).float() - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, h, w) -> premultiplied RGBA (B, 4, H, W) in [-1, 1]."""
        mean, std = self._statistics()
        images = self.decoder((latents * std + mean).permute(0, 2, 3, 1))
        return images.permute(0, 3, 1, 2).float().clamp(-1, 1)


def load_autoencoder(folder) -> Autoencoder:
    """The autoencoder that `save_autoencoder` wrote to ``folder``, in evaluation mode.

    Raises:
        SnapGenError: when a file is missing or damaged, or does not fit its config.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        names = Config.__dataclass_fields__
        model = Autoencoder(Config(**{k: v for k, v in config.items() if k in names}))
        model.load_state_dict(load_file(folder / WEIGHTS))
    except Exception as e:
        reason = str(e).splitlines()[0]
        raise SnapGenError(f"{folder} holds no whole {CLASS} of this version: {reason}") from e
    return model.eval()


def save_autoencoder(model: Autoencoder, folder) -> None:
    """Write ``config.json`` and the weights to ``folder``, each whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / WEIGHTS) as tmp:
        save_file({k: t.detach().contiguous() for k, t in model.state_dict().items()}, tmp)
    with atomic_write(folder / "config.json") as tmp:
        config = {"_class_name": CLASS, **asdict(model.config)}
        tmp.write_text(json.dumps(config, indent=2) + "\n")


@command
def main(argv=None) -> None:
    from .autoencoder_training import DECODER, JOINT, measure, scene_pool, train

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("world", type=Path, help="folder that recipes.embedded.sprites made")
    parser.add_argument("out", type=Path)
    parser.add_argument("--factor", type=int, choices=GEOMETRIES, default=16)
    parser.add_argument("--channels", type=int, help="of the latents (default: 16, or 8 at 8)")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--decoder-only", action="store_true")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    options = DECODER if args.decoder_only else JOINT
    if args.decoder_only:
        model = load_autoencoder(args.out)
    else:
        sizes = asdict(GEOMETRIES[args.factor]) | {"latents_mean": [], "latents_std": []}
        sizes |= {"latent_channels": args.channels} if args.channels else {}
        model = Autoencoder(Config(**sizes))
    images = scene_pool(args.world, "train", 6000, args.out / "train.npy")
    heldout = scene_pool(args.world, "heldout", 256, args.out / "heldout.npy")
    for record in train(model, images, args.out, options, args.steps):
        print(" ".join(f"{k} {v:.4g}" for k, v in record.items()), flush=True)
    print("held out:", *(f"{k} {v:.4g}" for k, v in measure(model, heldout).items()))


if __name__ == "__main__":
    sys.exit(main())
