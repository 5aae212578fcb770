"""Composed scenes with exact labels, after GenEval's six kinds, and characters.

    python -m recipes.embedded.scenes SPRITES OUT.png [--seed N] [--split heldout]

Writes a sheet of scenes and prints their captions. All chance comes from one generator, so a seed
gives the same scene everywhere.
"""

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ..command import command
from .captions import Captions
from .characters import character
from .colors import COLORS, recolor
from .concepts import with_article
from .layout import SIZE, Box, loose, tidy
from .sprites import STYLES, Sprites
from .things import OPPOSITE, RELATIONS, THINGS, article, held_out

KINDS = ("single", "two", "count", "color", "position", "attribution", "character")
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (30, 30, 34),
    "grey": (190, 190, 194),
    "red": (232, 96, 88),
    "orange": (250, 178, 96),
    "yellow": (250, 228, 130),
    "green": (150, 210, 140),
    "blue": (140, 190, 242),
    "purple": (182, 156, 230),
    "pink": (248, 190, 212),
}


@dataclass(frozen=True)
class Mix:
    """How often a world draws what, and where.

    Attributes:
        shares: of ``KINDS``, in their order.
        everyday: share of everyday things among single drawings; the others are of any concept.
        plain: share of 3D, the style of a caption that names none.
        layout: one of the functions of ``layout``.
    """

    shares: tuple[float, ...]
    everyday: float
    plain: float
    layout: Callable[..., list[Box]]


# The generator's: with little training, things that compose come before rare ones.
STICKERS = Mix((0.30, 0.12, 0.14, 0.14, 0.14, 0.10, 0.06), 0.75, 0.85, tidy)
# The generator's later: large drawings, each of several times as many patches; and what binds a
# place or a colour to one of two things, which is learned last.
LARGER = Mix((0.44, 0.05, 0.05, 0.18, 0.13, 0.12, 0.03), 0.9, 0.9, tidy)
# The judge's: it must know every thing in every style and place.
VARIED = Mix((0.34, 0.10, 0.14, 0.12, 0.14, 0.10, 0.06), 0.5, 0.7, loose)
COPIES = {"3d", "gradient", "flat"}  # drawn alike: a concept is held out in all of them or none


@dataclass
class Thing:
    """One thing in a picture.

    Attributes:
        name: its name in ``THINGS`` or a concept's label.
        style: one of ``STYLES``.
        color: a name of ``COLORS``, or None for the drawing's own colours.
        box: left, top, right, bottom in pixels.
    """

    name: str
    style: str
    color: str | None = None
    box: tuple[float, float, float, float] = (0, 0, 0, 0)


@dataclass
class Scene:
    """A picture and all that is known of it.

    Attributes:
        image: premultiplied RGBA (256, 256, 4) uint8.
        caption: what a user would type.
        kind: one of ``KINDS``.
        things: what it shows, in the caption's order.
        relation: one of ``RELATIONS`` from the first thing to the second, for "position".
        background: a name of ``BACKGROUNDS``, or None where it is transparent.
    """

    image: np.ndarray
    caption: str
    kind: str
    things: list[Thing] = field(default_factory=list)
    relation: str | None = None
    background: str | None = None


class World:
    """Everything that can be drawn: sprites, and the rules by which they are combined."""

    def __init__(self, sprites: Sprites, mix: Mix = STICKERS):
        self.sprites, self.mix = sprites, mix
        self.captions = Captions(sprites)
        self.things = sorted(THINGS)

    @classmethod
    def load(cls, folder, mix: Mix = STICKERS) -> "World":
        """The world of a folder that ``recipes.embedded.sprites`` wrote."""
        return cls(Sprites.load(folder), mix)

    def scene(self, rng: random.Random, split: str = "train", kind: str | None = None) -> Scene:
        """Draw one scene.

        Args:
            rng: the only source of chance.
            split: "train" holds no held-out combination; "heldout" holds one where its kind has
                combinations.
            kind: one of ``KINDS``; drawn by the mix when None.

        Returns:
            A scene with its exact labels.
        """
        kind = kind or rng.choices(KINDS, self.mix.shares)[0]
        if kind == "character":
            return self._character(rng, split)
        while True:
            things, relation = self._plan(rng, kind)
            if self._held(kind, things, relation) == (split == "heldout"):
                break
        return self.compose(rng, kind, things, relation, split)

    def compose(
        self,
        rng: random.Random,
        kind: str,
        things: list[Thing],
        relation: str | None = None,
        split: str = "train",
    ) -> Scene:
        """Place planned things on a canvas and caption them; sets their boxes."""
        background = rng.choice(sorted(BACKGROUNDS)) if rng.random() < 0.2 else None
        while background and background in {t.color for t in things}:  # red on red is not seen
            background = rng.choice(sorted(BACKGROUNDS))
        size_word = None
        if kind in ("single", "color") and rng.random() < 0.12:
            size_word = rng.choice(["small", "big"])
        boxes = self.mix.layout(rng, len(things), relation, size_word)
        canvas = np.zeros((SIZE, SIZE, 4), np.float32)
        if background:
            canvas[:] = (*BACKGROUNDS[background], 255)
        for thing, (x, y, side) in zip(things, boxes, strict=True):
            thing.box = self._paste(canvas, thing, x, y, side)
        image = np.rint(canvas).astype(np.uint8)
        caption = self.captions.scene(rng, kind, things, relation, background, size_word, split)
        return Scene(image, caption, kind, things, relation, background)

    def _plan(self, rng: random.Random, kind: str) -> tuple[list[Thing], str | None]:
        """What a scene shows, before it is placed."""
        style = "3d" if rng.random() < self.mix.plain else rng.choice(STYLES[1:])
        if kind == "single":
            if rng.random() < self.mix.everyday:
                return [self._thing(rng, style)], None
            concept = rng.choice(self.sprites.concepts)
            style = style if style in concept.styles else rng.choice(sorted(concept.styles))
            return [Thing(concept.label, style)], None
        if kind == "color":
            return [self._thing(rng, style, rng.choice(sorted(COLORS)))], None
        if kind == "count":
            color = rng.choice(sorted(COLORS)) if rng.random() < 0.25 else None
            thing = self._thing(rng, style, color)
            return [
                Thing(thing.name, thing.style, color) for _ in range(rng.choice((2, 3, 4)))
            ], None
        colored = kind == "attribution" or rng.random() < 0.15
        colors = rng.sample(sorted(COLORS), 2) if colored else (None, None)
        first = self._thing(rng, style, colors[0])
        while (second := self._thing(rng, style, colors[1])).name == first.name:
            pass
        second.style = first.style if first.style in self._styles(second.name) else second.style
        return [first, second], rng.choice(RELATIONS) if kind == "position" else None

    def _thing(self, rng, style: str, color: str | None = None) -> Thing:
        name = rng.choice(self.things)
        styles = self._styles(name)
        return Thing(name, style if style in styles else "3d", color)

    def _label(self, name: str) -> str:
        return THINGS.get(name, name)

    def _styles(self, name: str) -> dict[str, int]:
        return self.sprites.by_label[self._label(name)].styles

    def _held(self, kind: str, things: list[Thing], relation: str | None) -> bool:
        """Whether a plan holds a held-out combination."""
        names = [t.name for t in things]
        found = [self._drawing_held(t) for t in things]
        found += [held_out("color", *pair) for t in things for pair in self._colored(t)]
        if kind == "count":
            found.append(held_out("count", names[0], len(things)))
        elif len(set(names)) == 2:
            found.append(held_out("pair", *names))
            if relation:  # "a left of b" is "b right of a"
                first, second = names if names[0] < names[1] else names[::-1]
                seen = relation if first == names[0] else OPPOSITE[relation]
                found.append(held_out("relation", f"{first} {seen} {second}"))
        return any(found)

    def _colored(self, thing: Thing) -> list[tuple[str, str]]:
        """A thing and its colour; so is a concept such as "orange book"."""
        if thing.color:
            return [(thing.name, thing.color)]
        color, _, name = thing.name.partition(" ")
        return [(name, color)] if color in COLORS and name in THINGS else []

    def _drawing_held(self, thing: Thing) -> bool:
        """Concepts known in one family of styles are held out in the other.

        The everyday things stay drawn in 3D, the style of a prompt that names none.
        """
        label = self._label(thing.name)
        styles = set(self._styles(thing.name))
        if not (styles & COPIES and "cartoon" in styles):
            return False
        if thing.style == "cartoon":
            return held_out("drawing", label, "cartoon")
        everyday = thing.name in THINGS or label in THINGS.values()
        return (
            not everyday
            and not held_out("drawing", label, "cartoon")
            and held_out("drawing", label, "fluent")
        )

    def _paste(self, canvas: np.ndarray, thing: Thing, x: float, y: float, side: float):
        """Draw a thing into the square; returns the box of its visible part."""
        n, x, y = round(side), round(x), round(y)
        sprite = Image.fromarray(self.sprites.sprite(self._label(thing.name), thing.style))
        picture = sprite.convert("RGBa").resize((n, n), Image.Resampling.BICUBIC)
        if thing.color:
            straight = recolor(np.asarray(picture.convert("RGBA")), thing.color)
            picture = Image.fromarray(straight).convert("RGBa")
        small = np.asarray(picture)
        small = small[: SIZE - y, : SIZE - x].astype(np.float32)
        part = canvas[y : y + n, x : x + n]
        part *= 1 - small[..., 3:] / 255
        part += np.minimum(small, small[..., 3:])  # bicubic filters overshoot
        rows, columns = np.nonzero(small[..., 3] > 24)
        return (
            x + int(columns.min()),
            y + int(rows.min()),
            x + int(columns.max()) + 1,
            y + int(rows.max()) + 1,
        )

    def _character(self, rng: random.Random, split: str) -> Scene:
        picture, caption = character(rng, split)
        background = rng.choice(sorted(BACKGROUNDS)) if rng.random() < 0.2 else None
        canvas = np.zeros((SIZE, SIZE, 4), np.float32)
        if background:
            canvas[:] = (*BACKGROUNDS[background], 255)
            caption += f" on {article(background)} background"
        image = np.asarray(Image.fromarray(picture).convert("RGBa")).astype(np.float32)
        canvas = canvas * (1 - image[..., 3:] / 255) + image
        text = with_article(caption) if rng.random() < 0.8 else caption
        return Scene(np.rint(canvas).astype(np.uint8), text, "character", [], None, background)


def flatten(image: np.ndarray, color: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """Premultiplied RGBA (..., 4) uint8 over a plain colour -> RGB (..., 3) uint8."""
    alpha = image[..., 3:].astype(np.float32) / 255
    return np.rint(image[..., :3] + np.array(color) * (1 - alpha)).clip(0, 255).astype(np.uint8)


def sheet(scenes: list[Scene], columns: int = 8) -> Image.Image:
    """Scenes side by side, on a light grey that shows what is transparent."""
    rows = -(-len(scenes) // columns)
    out = Image.new("RGB", (columns * SIZE, rows * SIZE))
    for i, scene in enumerate(scenes):
        picture = Image.fromarray(flatten(scene.image, (236, 236, 240)))
        out.paste(picture, (i % columns * SIZE, i // columns * SIZE))
    return out


@command
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sprites", type=Path, help="folder of recipes.embedded.sprites")
    parser.add_argument("out", type=Path, help="PNG file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--split", choices=("train", "heldout"), default="train")
    parser.add_argument("--kind", choices=KINDS)
    args = parser.parse_args(argv)
    world = World.load(args.sprites)
    scenes = [
        world.scene(random.Random(f"{args.seed}/{i}"), args.split, args.kind)
        for i in range(args.count)
    ]
    sheet(scenes).save(args.out)
    for scene in scenes:
        print(f"{scene.kind:12}{scene.caption}")


if __name__ == "__main__":
    sys.exit(main())
