"""Scenes that the judge learns from: pictures of 128x128 with what stands where in them.

Of the plain ones two in three are scenes of the world; in the others things stand anywhere, turned
and in any size. One in eight passes through the autoencoder, at half its resolution, where it blurs
twice as much. Crowded ones teach names: they hold five times as many things for the same time.
"""

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from recipes.embedded.colors import COLORS, recolor
from recipes.embedded.scenes import BACKGROUNDS, KINDS, SIZE, Scene, Thing, World, flatten
from recipes.embedded.sprites import STYLES
from snapgen_mlx.files import atomic_write
from snapgen_mlx.models.detector import LABELS, SIDE

NAMES = LABELS["name"] - 1  # names that are told apart; NAMES itself stands for all others
MOST = 16  # things in a picture
BATCH = 64
WHITE_WEIGHT = 5  # times as often as another colour: on white it differs by a few levels only
# name, style, colour (-1: the drawing's own), left, top, right, bottom in pixels
LABEL = np.dtype(
    [("name", "i2"), ("style", "i1"), ("color", "i1"), ("box", "f4", 4), ("there", "?")]
)


class Labels:
    """Numbers for the names, styles and colours of things."""

    def __init__(self, world: World):
        self.names, self.styles, self.colors = world.things, list(STYLES), sorted(COLORS)
        if len(self.names) != NAMES:
            raise AssertionError(f"{len(self.names)} things; detector.py has {NAMES}")
        by_label = {world._label(name): name for name in self.names}
        self.number = {name: i for i, name in enumerate(self.names)}
        self.number |= {label: self.number[name] for label, name in by_label.items()}
        # What could as well be called by a thing's name is nothing that the judge can learn.
        words = {name: set(name.split()) for name in self.names}
        self.others = [
            c
            for c in world.sprites.concepts
            if c.label not in self.number
            and not any(w <= set(c.label.split()) for w in words.values())
        ]

    def row(self, things: list[Thing]) -> np.ndarray:
        """The labels (MOST,) of a picture of 256 pixels a side."""
        out = np.zeros(MOST, LABEL)
        for label, thing in zip(out, things, strict=False):
            label["name"] = self.number.get(thing.name, NAMES)
            label["style"] = self.styles.index(thing.style)
            label["color"] = self.colors.index(thing.color) if thing.color else -1
            label["box"] = np.array(thing.box) * SIDE / SIZE
            label["there"] = True
        return out


def halved(image: np.ndarray) -> np.ndarray:
    """Premultiplied RGBA (256, 256, 4) -> (128, 128, 4)."""
    x = image.astype(np.float32).reshape(SIDE, 2, SIDE, 2, 4).mean((1, 3))
    return np.rint(x).astype(np.uint8)


def _usable(labels: Labels, scene: Scene) -> bool:
    """A scene of one concept that could have a thing's name teaches something wrong."""
    known = labels.number.keys() | {c.label for c in labels.others}
    return all(t.name in known for t in scene.things)


def scattered(world: World, labels: Labels, rng: random.Random) -> tuple[np.ndarray, list[Thing]]:
    """Things anywhere: premultiplied RGBA (128, 128, 4), and what it shows (256 pixels a side)."""
    canvas = np.zeros((SIDE, SIDE, 4), np.float32)
    background = rng.choice(sorted(BACKGROUNDS)) if rng.random() < 0.3 else None
    if background:
        canvas[:] = (*BACKGROUNDS[background], 255)
    things, boxes = [], []
    count = rng.choices((1, 2, 3, 4, 5, 6), (3, 4, 3, 3, 1, 1))[0]
    same = count > 1 and rng.random() < 0.4
    for _ in range(count):
        if not (same and things):
            kind = _any_thing(world, labels, rng, background)
        most = (116, 84, 64, 56, 50, 44)[count - 1]
        for _ in range(20):  # looks for a free place
            side = rng.uniform(24, most)
            x, y = rng.uniform(0, SIDE - side), rng.uniform(0, SIDE - side)
            box = (x, y, x + side, y + side)
            if all(_overlap(box, other) < 0.1 for other in boxes):
                break
        else:
            continue
        boxes.append(box)
        thing = Thing(kind.name, kind.style, kind.color)
        angle = rng.uniform(-25, 25) if rng.random() < 0.5 else 0
        thing.box = _paste(canvas, world, thing, round(x), round(y), round(side), angle)
        things.append(thing)
    return np.rint(canvas).astype(np.uint8), things


def crowded(world: World, labels: Labels, seed: str) -> tuple[np.ndarray, np.ndarray]:
    """A picture of up to 16 things in rows, (128, 128, 4), and its labels (MOST,)."""
    rng = random.Random(seed)
    canvas = np.zeros((SIDE, SIDE, 4), np.float32)
    background = rng.choice(sorted(BACKGROUNDS)) if rng.random() < 0.3 else None
    if background:
        canvas[:] = (*BACKGROUNDS[background], 255)
    rows = rng.choices((2, 3, 4), (2, 3, 2))[0]
    cell, things = SIDE / rows, []
    for place in range(rows * rows):
        if rng.random() < 0.08:
            continue
        thing = _any_thing(world, labels, rng, background)
        side = rng.uniform(0.72, 1.05) * cell
        x, y = (
            min(max(i * cell + rng.uniform(0, cell - side), 0), SIDE - side)
            for i in divmod(place, rows)
        )
        angle = rng.uniform(-20, 20) if rng.random() < 0.3 else 0
        thing.box = _paste(canvas, world, thing, round(x), round(y), round(side), angle)
        things.append(thing)
    return np.rint(canvas).astype(np.uint8), labels.row(things)


def _any_thing(world: World, labels: Labels, rng: random.Random, background: str | None) -> Thing:
    if rng.random() < 0.2:
        concept = rng.choice(labels.others)
        name, styles = concept.label, concept.styles
    else:
        name = rng.choice(world.things)
        styles = world._styles(name)
    style = "3d" if rng.random() < 0.3 and "3d" in styles else rng.choice(sorted(styles))
    colors = [c for c in sorted(COLORS) if c != background]
    weights = [WHITE_WEIGHT if c == "white" else 1 for c in colors]
    color = rng.choices(colors, weights)[0] if rng.random() < 0.5 else None
    return Thing(name, style, color)


def _overlap(a, b) -> float:
    """The common part of two boxes, of the smaller one."""
    sides = [max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return sides[0] * sides[1] / min(areas)


def _paste(canvas, world: World, thing: Thing, x: int, y: int, n: int, angle: float):
    """Draw a turned thing into a square of n pixels; its box, 256 pixels a side."""
    sprite = Image.fromarray(world.sprites.sprite(world._label(thing.name), thing.style))
    picture = sprite.convert("RGBa").resize((n, n), Image.Resampling.BICUBIC, reducing_gap=2)
    if thing.color:
        straight = recolor(np.asarray(picture.convert("RGBA")), thing.color)
        picture = Image.fromarray(straight).convert("RGBa")
    if angle:
        bands = [b.rotate(angle, Image.Resampling.BILINEAR) for b in picture.split()]
        picture = Image.merge("RGBA", bands)
    small = np.asarray(picture)[: SIDE - y, : SIDE - x].astype(np.float32)
    part = canvas[y : y + n, x : x + n]
    part *= 1 - small[..., 3:] / 255
    part += np.minimum(small, small[..., 3:])
    rows, columns = np.nonzero(small[..., 3] > 24)
    ends = x + columns.min(), y + rows.min(), x + columns.max() + 1, y + rows.max() + 1
    return tuple(float(e) * SIZE / SIDE for e in ends)


def plain(world: World, labels: Labels, seed: str) -> tuple[np.ndarray, np.ndarray]:
    """One picture, premultiplied RGBA (128, 128, 4), and its labels (MOST,)."""
    rng = random.Random(seed)
    if rng.random() < 1 / 3:
        image, things = scattered(world, labels, rng)
        return image, labels.row(things)
    kinds = [k for k in KINDS if k != "character"]
    while True:
        kind = rng.choices(kinds, (3, 2, 4, 2, 2, 2))[0]
        split = "heldout" if kind != "single" and rng.random() < 0.1 else "train"
        scene = world.scene(rng, split, kind)
        if _usable(labels, scene):
            return halved(scene.image), labels.row(scene.things)


@torch.no_grad()
def through(autoencoder, images: np.ndarray) -> np.ndarray:
    """Premultiplied RGBA (N, H, W, 4) uint8 through the autoencoder and back."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    x = autoencoder.decode(autoencoder.encode(x.contiguous(memory_format=torch.channels_last)))
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return np.minimum(x, x[..., 3:])


def save(world: World, autoencoder, folder: Path, counts: dict[str, int]) -> None:
    """Write so many "plain" and "crowded" scenes to ``folder``; what is there is not made again."""
    labels = Labels(world)
    folder.mkdir(parents=True, exist_ok=True)
    for kind, count in counts.items():
        make = {"plain": plain, "crowded": crowded}[kind]
        for start in range(0, count, BATCH):
            file = folder / f"{kind}-{start:06d}.npz"
            if file.exists():
                continue
            made = [make(world, labels, f"judge/{i}") for i in range(start, start + BATCH)]
            images = np.stack([image for image, _ in made])
            if kind == "plain":
                images[::8] = through(autoencoder, images[::8])
            with atomic_write(file) as temporary, open(temporary, "wb") as f:
                np.savez(f, pictures=flatten(images), labels=np.stack([row for _, row in made]))


def load(folder: Path, kind: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, 128, 128, 3) uint8 on white and labels (N, MOST) that ``save`` wrote."""
    files = [folder / f"{kind}-{start:06d}.npz" for start in range(0, count, BATCH)]
    parts = [np.load(file) for file in files]
    return tuple(np.concatenate([part[k] for part in parts]) for k in ("pictures", "labels"))
