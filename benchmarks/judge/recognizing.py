"""Teaching the recognizer what a thing is, on crops of scenes."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from snapgen_mlx.judge import MARGIN
from snapgen_mlx.models.detector import CROP, LABELS, SIDE

from .detecting import Sets, spoil
from .network import Recognizer
from .scenes import NAMES

BATCH = {"plain": 24, "crowded": 40}  # things
OTHER_WEIGHT = 0.3  # what has no name here is one name of hundreds of drawings


def crops(x: Tensor, box: np.ndarray, rng: np.random.Generator | None = None) -> Tensor:
    """Square crops (B, 3, CROP, CROP) around a box (B, 4), in pixels, of each picture (B, 3, S, S).

    With ``rng`` they are moved, larger or smaller, turned and mirrored, as boxes are never exact.
    """
    size = box[:, 2:] - box[:, :2]
    side = MARGIN * size.max(1)
    middle, angle = (box[:, :2] + box[:, 2:]) / 2, np.zeros(len(box))
    mirror = np.ones(len(box))
    if rng is not None:
        middle = middle + rng.uniform(-0.08, 0.08, middle.shape) * size.max(1, keepdims=True)
        side = side * np.exp(rng.uniform(-0.1, 0.16, len(side)))
        turned = rng.random(len(box)) < 0.4
        angle = np.where(turned, np.deg2rad(rng.uniform(-12, 12, len(box))), 0)
        mirror = np.where(rng.random(len(box)) < 0.15, -1, 1)
    cos, sin = side / SIDE * np.cos(angle), side / SIDE * np.sin(angle)
    middle = middle * 2 / SIDE - 1
    rows = np.stack([mirror * cos, -sin, middle[:, 0], mirror * sin, cos, middle[:, 1]], 1)
    theta = torch.tensor(rows.reshape(-1, 2, 3), dtype=torch.float32)
    grid = F.affine_grid(theta, [len(x), 3, CROP, CROP], False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def losses(model: Recognizer, x: Tensor, target: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means over a batch."""
    logits = model(x).split(list(LABELS.values()), 1)
    out = {}
    for (name, size), part in zip(LABELS.items(), logits, strict=True):
        weight = torch.ones(size)
        if name == "name":
            weight[NAMES] = OTHER_WEIGHT
        known = target[name] >= 0
        out[name] = F.cross_entropy(part[known], target[name][known], weight)
    right = logits[0].argmax(1) == target["name"]
    return out | {"right": right[target["name"] < NAMES].float().mean()}


def batch(sets: Sets, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Crops and labels of a step, which depend on its number alone."""
    rng = np.random.default_rng((2, step))
    chosen = []
    for kind, part in BATCH.items():
        pictures, labels = sets[kind]
        rows = rng.integers(0, len(pictures), part)
        places = [rng.choice(np.flatnonzero(there)) for there in labels["there"][rows]]
        chosen.append((pictures[rows], labels[rows, places]))
    pixels, labels = (np.concatenate(pair) for pair in zip(*chosen, strict=True))
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    x = spoil(crops(x, labels["box"].astype(np.float64), rng), rng)
    return x, {k: torch.from_numpy(labels[k].astype(np.int64)) for k in LABELS}
