"""The judge's two networks: where things are in a picture, and what each of them is.

They are trained in PyTorch (``benchmarks/judge``); here normalisation is folded into the weights.
"""

import mlx.core as mx
import mlx.nn as nn

from .tiny_decoder import space_to_depth, upsample_nearest

SIDE, GRID = 128, 16  # pixels of a picture's side, cells of the maps' side
PATCH, KERNEL = 4, 5
CHANNELS, DEPTHS = (48, 96, 192), (2, 3, 2)  # depths: middle, coarse, fused
# Channels of the maps: whether a thing's middle is here; its box (offset of the middle from the
# cell's, logarithm of the sizes, in cells).
MAPS = {"thing": 1, "box": 4}
CROP = 48  # pixels of a crop's side
CROP_DEPTHS = (2, 3)
# What is said of a crop; the last name stands for all that has no name here.
LABELS = {"name": 157, "color": 10, "style": 4}


def _depthwise(x: mx.array, weight: mx.array) -> mx.array:
    margin, (H, W) = KERNEL // 2, x.shape[1:3]
    if mx.default_device() == mx.gpu:
        return mx.conv2d(x, weight, padding=margin, groups=x.shape[-1])
    # As in tiny_decoder.py: on a CPU sums of shifted inputs are faster.
    x = mx.pad(x, [(0, 0), (margin, margin), (margin, margin), (0, 0)])
    shifts = [x[:, i : i + H, j : j + W] for i in range(KERNEL) for j in range(KERNEL)]
    taps = weight.reshape(-1, KERNEL**2).T
    first, *others = (shift * tap for shift, tap in zip(shifts, taps, strict=True))
    return sum(others, start=first)


class Depthwise(nn.Module):
    """Depthwise convolution with zero padding: x (B, H, W, C)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = mx.zeros((channels, KERNEL, KERNEL, 1))
        self.bias = mx.zeros((channels,))

    def __call__(self, x):
        return _depthwise(x, self.weight) + self.bias


class Block(nn.Module):
    """x + (depthwise, wider, narrower)."""

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = Depthwise(channels)
        self.wider = nn.Linear(channels, 2 * channels)
        self.narrower = nn.Linear(2 * channels, channels)

    def __call__(self, x):
        return x + self.narrower(nn.relu(self.wider(self.depthwise(x))))


def _blocks(channels: int, depth: int) -> list[Block]:
    return [Block(channels) for _ in range(depth)]


class Detector(nn.Module):
    """Pictures (B, 128, 128, 3) in [0, 1] -> (maps (B, 16, 16, 5), features (B, C))."""

    def __init__(self):
        super().__init__()
        fine, middle, coarse = CHANNELS
        self.stem = nn.Conv2d(3 * PATCH**2, fine, 3, padding=1)
        self.to_middle = nn.Linear(4 * fine, middle)
        self.middle = _blocks(middle, DEPTHS[0])
        self.to_coarse = nn.Linear(4 * middle, coarse)
        self.coarse = _blocks(coarse, DEPTHS[1])
        self.from_coarse = nn.Linear(coarse, middle)
        self.fused = _blocks(middle, DEPTHS[2])
        self.widen = nn.Linear(middle, coarse)
        self.head = nn.Linear(coarse, sum(MAPS.values()))

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        x = nn.relu(self.stem(space_to_depth(x - 0.5, PATCH)))
        x = nn.relu(self.to_middle(space_to_depth(x, 2)))
        for block in self.middle:
            x = block(x)
        y = nn.relu(self.to_coarse(space_to_depth(x, 2)))
        for block in self.coarse:
            y = block(y)
        x = nn.relu(x + upsample_nearest(self.from_coarse(y)))
        for block in self.fused:
            x = block(x)
        return self.head(nn.relu(self.widen(x))), y.mean((1, 2))


class Recognizer(nn.Module):
    """Crops (B, 48, 48, 3) in [0, 1] -> logits (B, labels) of names, colours and styles."""

    def __init__(self):
        super().__init__()
        fine, middle, coarse = CHANNELS
        self.stem = nn.Conv2d(12, fine, 3, padding=1)
        self.to_middle = nn.Linear(4 * fine, middle)
        self.middle = _blocks(middle, CROP_DEPTHS[0])
        self.to_coarse = nn.Linear(4 * middle, coarse)
        self.coarse = _blocks(coarse, CROP_DEPTHS[1])
        self.head = nn.Linear(coarse, sum(LABELS.values()))

    def __call__(self, x: mx.array) -> mx.array:
        x = nn.relu(self.stem(space_to_depth(x - 0.5, 2)))
        x = nn.relu(self.to_middle(space_to_depth(x, 2)))
        for block in self.middle:
            x = block(x)
        x = nn.relu(self.to_coarse(space_to_depth(x, 2)))
        for block in self.coarse:
            x = block(x)
        return self.head(nn.relu(x).mean((1, 2)))


class JudgeNetworks(nn.Module):
    """Both, as they are stored."""

    def __init__(self):
        super().__init__()
        self.detector, self.recognizer = Detector(), Recognizer()
