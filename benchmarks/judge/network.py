"""The judge's networks in PyTorch, for training; ``export`` folds them into the MLX ones' weights.

Blocks are separable: on a CPU they train three times as fast as full convolutions.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from snapgen_mlx.files import atomic_write
from snapgen_mlx.models.detector import (
    CHANNELS,
    CROP_DEPTHS,
    DEPTHS,
    KERNEL,
    LABELS,
    MAPS,
    PATCH,
)

# What makes logits as sure as they are right: factors, and what is added to a thing's.
THING, THING_MORE, NAMES = 1.5, 0.8, 2.0


class Conv(nn.Sequential):
    """A convolution and its normalisation, which ``export`` folds into one convolution."""

    def __init__(self, a: int, b: int, kernel: int = 1, groups: int = 1):
        conv = nn.Conv2d(a, b, kernel, padding=kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(b))

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight, (out, in) or (out, kernel, kernel, in), and bias (out,), as MLX has them."""
        conv, norm = self
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        weight = conv.weight * scale[:, None, None, None]
        return as_mlx(weight), norm.bias - norm.running_mean * scale


def as_mlx(weight: Tensor) -> Tensor:
    """A convolution's weight (out, in, kernel, kernel) in MLX's layout; kernel 1 is a Linear."""
    return weight.flatten(1) if weight.shape[-1] == 1 else weight.permute(0, 2, 3, 1).contiguous()


class Block(nn.Module):
    """x + (depthwise, wider, narrower)."""

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = Conv(channels, channels, KERNEL, channels)
        self.wider = Conv(channels, 2 * channels)
        self.narrower = Conv(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrower(F.relu(self.wider(self.depthwise(x))))


def _blocks(channels: int, depth: int) -> nn.ModuleList:
    return nn.ModuleList(Block(channels) for _ in range(depth))


class Detector(nn.Module):
    """Pictures (B, 3, 128, 128) in [0, 1] -> (maps (B, 5, 16, 16), features (B, C)).

    ``guess`` tells names from the maps alone: it only serves the training, so that the features
    mean something.
    """

    def __init__(self):
        super().__init__()
        fine, middle, coarse = CHANNELS
        self.stem = Conv(3 * PATCH**2, fine, 3)
        self.to_middle = Conv(4 * fine, middle)
        self.middle = _blocks(middle, DEPTHS[0])
        self.to_coarse = Conv(4 * middle, coarse)
        self.coarse = _blocks(coarse, DEPTHS[1])
        self.from_coarse = Conv(coarse, middle)
        self.fused = _blocks(middle, DEPTHS[2])
        self.widen = Conv(middle, coarse)
        self.head = nn.Conv2d(coarse, sum(MAPS.values()), 1)
        self.guess = nn.Conv2d(coarse, LABELS["name"], 1)
        nn.init.constant_(self.head.bias[0], -4.0)  # few places are a thing's middle

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps, y = self.inside(x)
        return self.head(maps), y.mean((2, 3))

    def inside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the heads read (B, C, 16, 16), and the coarse map (B, C, 8, 8)."""
        x = F.relu(self.stem(windows(x - 0.5, PATCH)))
        x = F.relu(self.to_middle(windows(x, 2)))
        for block in self.middle:
            x = block(x)
        y = F.relu(self.to_coarse(windows(x, 2)))
        for block in self.coarse:
            y = block(y)
        x = F.relu(x + F.interpolate(self.from_coarse(y), scale_factor=2))
        for block in self.fused:
            x = block(x)
        return F.relu(self.widen(x)), y


class Recognizer(nn.Module):
    """Crops (B, 3, 48, 48) in [0, 1] -> logits (B, labels)."""

    def __init__(self):
        super().__init__()
        fine, middle, coarse = CHANNELS
        self.stem = Conv(12, fine, 3)
        self.to_middle = Conv(4 * fine, middle)
        self.middle = _blocks(middle, CROP_DEPTHS[0])
        self.to_coarse = Conv(4 * middle, coarse)
        self.coarse = _blocks(coarse, CROP_DEPTHS[1])
        self.head = nn.Linear(coarse, sum(LABELS.values()))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(windows(x - 0.5, 2)))
        x = F.relu(self.to_middle(windows(x, 2)))
        for block in self.middle:
            x = block(x)
        x = F.relu(self.to_coarse(windows(x, 2)))
        for block in self.coarse:
            x = block(x)
        return self.head(F.relu(x).mean((2, 3)))


class JudgeNetworks(nn.Module):
    def __init__(self):
        super().__init__()
        self.detector, self.recognizer = Detector(), Recognizer()


def windows(x: Tensor, size: int) -> Tensor:
    """(B, C, size H, size W) -> (B, size * size * C, H, W), channel fastest."""
    B, C, H, W = x.shape
    x = x.reshape(B, C, H // size, size, W // size, size).permute(0, 3, 5, 1, 2, 4)
    x = x.reshape(B, size * size * C, H // size, W // size)
    return x.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def folded(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the MLX module of the same name."""
    out = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv):
            out[f"{name}.weight"], out[f"{name}.bias"] = module.folded()
        elif name.endswith("head"):
            weight = module.weight if module.weight.ndim == 2 else as_mlx(module.weight)
            out |= {f"{name}.weight": weight, f"{name}.bias": module.bias}
    return {k: tensor.detach() for k, tensor in out.items()}


@torch.no_grad()
def unfold(model: nn.Module, arrays: dict[str, Tensor]) -> None:
    """Give a network weights that ``folded`` made; in evaluation mode it then computes the same."""
    for name, module in model.named_modules():
        weight, bias = (arrays.get(f"{name}.{part}") for part in ("weight", "bias"))
        if weight is None:
            continue
        weight = weight.float()
        if isinstance(module, Conv):
            conv, norm = module
            if weight.ndim == 4:
                weight = weight.permute(0, 3, 1, 2)
            conv.weight.copy_(weight.reshape(conv.weight.shape))
            norm.weight.fill_((1 + norm.eps) ** 0.5)  # of a running variance of 1
            norm.bias.copy_(bias)
        else:
            module.weight.copy_(weight.reshape(module.weight.shape))
            module.bias.copy_(bias)


@torch.no_grad()
def calibrate(model: JudgeNetworks, back: bool = False) -> None:
    """Make the scores as sure as they are right, in place; or undo it.

    Pictures that are changed as in training are harder than those that are judged. The factors
    are from real scenes of other seeds than those of the ceilings.
    """
    thing, names, n = model.detector.head, model.recognizer.head, LABELS["name"]
    power, bias = -1 if back else 1, thing.bias[0]
    thing.weight[0] *= THING**power
    thing.bias[0] = (bias - THING_MORE) / THING if back else THING * bias + THING_MORE
    names.weight[:n] *= NAMES**power
    names.bias[:n] *= NAMES**power


def export(model: JudgeNetworks, path: Path) -> None:
    """Write the folded weights in float16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        save_file({k: t.half().contiguous() for k, t in folded(model).items()}, temporary)
