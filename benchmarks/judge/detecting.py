"""Teaching the detector where things are, on pictures that are changed every time."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from snapgen_mlx.models.detector import GRID, MAPS, SIDE

from .network import Detector
from .scenes import LABEL

BATCH = {"plain": 10, "crowded": 6}
CELL = SIDE / GRID  # pixels
LEAST_SEEN = 0.5  # of a thing: what is cut off further is neither asked for nor forbidden
Sets = dict[str, tuple[np.ndarray, np.ndarray]]  # pictures and labels of plain and crowded scenes


def warp(x: Tensor, labels: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
    """Pictures (B, 3, S, S) moved, scaled, turned and mirrored, and their labels."""
    B, labels = len(x), labels.copy()
    scale = np.exp(rng.uniform(math.log(0.72), math.log(1.12), B))
    angle = np.deg2rad(np.where(rng.random(B) < 0.3, rng.uniform(-10, 10, B), 0))
    mirror = np.where(rng.random(B) < 0.15, -1, 1)
    still = rng.random(B) < 0.25  # scenes as they are
    scale, angle = np.where(still, 1, scale), np.where(still, 0, angle)
    shift = np.where(still[:, None], 0, rng.uniform(-0.28, 0.28, (B, 2)))  # of 2, the whole side
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    # from a place in the source to one in the result, both in -1 to 1
    forward = np.stack([np.stack([mirror * cos, -sin], 1), np.stack([mirror * sin, cos], 1)], 1)
    back = np.linalg.inv(forward)
    theta = np.concatenate([back, -(back @ shift[:, :, None])], 2)
    grid = F.affine_grid(torch.tensor(theta, dtype=torch.float32), list(x.shape), False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    box = labels["box"] * 2 / SIDE - 1
    middle, half = (box[..., :2] + box[..., 2:]) / 2, (box[..., 2:] - box[..., :2]) / 2
    middle = np.einsum("bij,bnj->bni", forward, middle) + shift[:, None]
    # Things are rounder than their boxes: turned a little, they grow by half as much.
    straight = np.abs(np.diagonal(forward, axis1=1, axis2=2))[:, None] * half
    half = 0.5 * straight + 0.5 * np.einsum("bij,bnj->bni", np.abs(forward), half)
    whole = np.concatenate([middle - half, middle + half], -1)
    box = whole.clip(-1, 1)
    area = (box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1])
    full = (whole[..., 2] - whole[..., 0]) * (whole[..., 3] - whole[..., 1])
    labels["box"] = (box + 1) * SIDE / 2
    labels["there"] &= area > 1e-3
    labels["name"][area < LEAST_SEEN * full] = -1  # cut off
    return x, labels


def spoil(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Blur, noise, coarser pixels, and a little of other brightness and tint."""
    B = len(x)

    def some(share: float) -> Tensor:
        return torch.tensor(rng.random((B, 1, 1, 1)) < share)

    def between(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.tensor(rng.uniform(low, high, (B, channels, 1, 1)), dtype=torch.float32)

    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.where(some(0.3), torch.lerp(x, soft, between(0.3, 1)), x)
    coarse = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    x = torch.where(some(0.12), coarse, x)
    # Hardly brighter: what is white on white would vanish.
    tinted = (x - 0.5) * between(0.85, 1.02) * between(0.96, 1.02, 3) + 0.5 + between(-0.05, 0)
    x = torch.where(some(0.4), tinted, x)
    noise = torch.tensor(rng.standard_normal(x.shape, np.float32)) * between(0, 0.06)
    return torch.where(some(0.3), x + noise, x).clamp(0, 1)


def targets(labels: np.ndarray) -> dict[str, Tensor]:
    """What the maps should be.

    Returns:
        thing (B, G, G), 1 at the middles; free (B, G, G), how much a cell may be punished for a
        thing; owner (B, G, G), the row of the nearest thing, and near (B, G, G), the weight that
        it teaches with; box (B, N, 4), middles and sizes in cells; name (B, N), -1 for none.
    """
    fields = {k: torch.from_numpy(np.ascontiguousarray(labels[k])) for k in LABEL.names}
    box, there, name = fields["box"] / CELL, fields["there"], fields["name"].long()
    middle, size = (box[..., :2] + box[..., 2:]) / 2, box[..., 2:] - box[..., :2]
    places = torch.arange(GRID) + 0.5
    dx, dy = places - middle[..., :1], places - middle[..., 1:]  # (B, N, G)
    distance = dx[:, :, None] ** 2 + dy[..., None] ** 2
    deviation = (0.14 * size.clamp(min=0.1).prod(-1).sqrt()).clamp(min=0.7)[..., None, None]
    hill = torch.exp(-distance / (2 * deviation**2)) * there[..., None, None]
    near, owner = hill.max(1)
    at = middle.long().clamp(0, GRID - 1)
    thing = torch.zeros(len(box), GRID, GRID)
    sure = there & (name >= 0)
    rows = torch.arange(len(box))[:, None].expand_as(sure)
    thing[rows[sure], at[..., 1][sure], at[..., 0][sure]] = 1
    free = (1 - near) ** 4
    unsure = there & (name < 0)
    inside = (dx.abs() < size[..., :1] / 2)[:, :, None] & (dy.abs() < size[..., 1:] / 2)[..., None]
    free = free * ~(inside & unsure[..., None, None]).any(1)
    return {
        "thing": thing,
        "free": free,
        "owner": owner,
        "near": torch.where(near > 0.3, near, 0),
        "box": torch.cat([middle, size], -1),
        "name": torch.where(there, name, -1),
    }


def losses(model: Detector, x: Tensor, target: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means over the things of a batch."""
    inside, _ = model.inside(x)
    maps, guess = model.head(inside), model.guess(inside)
    score, boxes = maps.split(list(MAPS.values()), 1)
    thing, free = target["thing"], target["free"]
    error = F.binary_cross_entropy_with_logits(score[:, 0], thing, reduction="none")
    weight = torch.where(thing > 0, 1.0, free)
    out = {"thing": (error * weight).sum() / thing.sum().clamp(min=1)}
    owner = target["owner"].flatten(1)
    name = target["name"].gather(1, owner)
    near = target["near"].flatten(1) * (name >= 0)
    total = near.sum().clamp(min=1)
    error = F.cross_entropy(guess.flatten(2), name.clamp(min=0), reduction="none")
    out["name"] = (error * near).sum() / total
    box = target["box"].gather(1, owner[..., None].expand(-1, -1, 4))  # (B, cells, 4)
    cells = torch.arange(GRID) + 0.5
    cells = torch.stack(torch.meshgrid(cells, cells, indexing="xy"), -1).flatten(0, 1)
    wanted = torch.cat([box[..., :2] - cells, box[..., 2:].clamp(min=0.1).log()], -1)
    error = F.smooth_l1_loss(boxes.flatten(2).mT, wanted, reduction="none", beta=0.1)
    out["box"] = (error.sum(-1) * near).sum() / total
    return out


def batch(sets: Sets, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Pictures and targets of a step, which depend on its number alone."""
    rng = np.random.default_rng((1, step))
    chosen = []
    for kind, part in BATCH.items():
        pictures, labels = sets[kind]
        rows = np.sort(rng.choice(len(pictures), part, replace=False))
        chosen.append((pictures[rows], labels[rows]))
    pixels, labels = (np.concatenate(pair) for pair in zip(*chosen, strict=True))
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    x, moved = warp(x, labels, rng)
    return spoil(x, rng), targets(moved)
