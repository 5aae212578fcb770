"""Sprites: every concept in every style as an RGBA picture, in one file that is mapped.

    python -m recipes.embedded.sprites OUT [--cache DIR]

Needs ``npm`` (it fetches five pinned packages once into the cache) and ``resvg-py``.
"""

import argparse
import dataclasses
import json
import multiprocessing
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.files import atomic_folder

from ..command import command
from .concepts import join_key, select
from .data import phrasings
from .packages import fetch_all, load_drawings, load_words, rasterise

SIZE = 256  # pixels; the longer side of a sprite's visible part
STYLES = ("3d", "gradient", "flat", "cartoon")
RASTER = 296  # pixels: most drawings fill 7/8 of their box
LEAST_ALPHA = 24  # of 255: fainter pixels are not part of what is seen


@dataclass(frozen=True)
class Concept:
    """One thing that can be drawn.

    Attributes:
        key: code points of its emoji, such as "1f34e".
        label: its name, without an article.
        emoji: its character.
        phrases: other texts that single it out.
        held_phrases: such texts that no training caption uses.
        styles: its rows in the file of sprites, by style.
    """

    key: str
    label: str
    emoji: str
    phrases: list[str]
    held_phrases: list[str]
    styles: dict[str, int]


class Sprites:
    """The folder that this module writes.

    Attributes:
        concepts: all concepts, in a fixed order.
        by_label: the same by their label.
    """

    def __init__(self, pixels: np.ndarray, concepts: list[Concept]):
        self.pixels, self.concepts = pixels, concepts
        self.by_label = {c.label: c for c in concepts}

    @classmethod
    def load(cls, folder) -> "Sprites":
        """Map a folder's sprites. Raises SnapGenError when it is missing or damaged."""
        folder = Path(folder)
        try:
            rows = json.loads((folder / "concepts.json").read_text("utf-8"))
            pixels = np.load(folder / "sprites.npy", mmap_mode="r")
            concepts = [Concept(**row) for row in rows]
        except (OSError, ValueError, TypeError) as e:
            raise SnapGenError(
                f"{folder} holds no sprites ({e}); make it: python -m recipes.embedded.sprites"
            ) from e
        if len(pixels) != sum(len(c.styles) for c in concepts):
            raise SnapGenError(f"{folder} is damaged; delete it and make it again")
        return cls(pixels, concepts)

    def sprite(self, label: str, style: str) -> np.ndarray:
        """Straight RGBA (SIZE, SIZE, 4) uint8, the visible part centred."""
        return self.pixels[self.by_label[label].styles[style]]


def framed(image: Image.Image) -> Image.Image:
    """The visible part of an RGBA picture, its longer side scaled to SIZE, centred.

    Scaled with premultiplied alpha, so that hidden colours do not bleed into the edges.
    """
    box = image.getchannel("A").point(lambda a: 255 * (a > LEAST_ALPHA)).getbbox()
    image = image.crop(box).convert("RGBa")
    scale = SIZE / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    image = image.resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(image, ((SIZE - size[0]) // 2, (SIZE - size[1]) // 2))
    return canvas


def _picture(drawing: bytes | str) -> np.ndarray:
    return np.asarray(framed(rasterise(drawing, RASTER)))


def build(out: Path, cache: Path) -> list[Concept]:
    """Write the sprites of all concepts to ``out``, which must not exist yet."""
    archives = fetch_all(cache)
    drawings = load_drawings(archives)
    records = load_words(archives["words"])
    emoji = {join_key(r["hexcode"]): r["emoji"] for r in records}
    chosen = [
        c for c in select(records) if sum(c["concept"] in drawings[style] for style in STYLES) >= 2
    ]
    phrases, held = phrasings(chosen)
    held_by_key: dict[str, list[str]] = {}
    for row in held:
        if row["kind"] == "words":
            held_by_key.setdefault(row["concept"], []).append(row["text"])
    found, concepts = [], []
    for c in chosen:
        key, styles = c["concept"], {}
        for style in STYLES:
            if key in drawings[style]:
                styles[style] = len(found)
                found.append(drawings[style][key])
        concepts.append(
            Concept(key, c["label"], emoji[key], phrases[key], held_by_key.get(key, []), styles)
        )
    with multiprocessing.Pool() as pool:
        pictures = pool.map(_picture, found, chunksize=16)
    with atomic_folder(out) as folder:
        np.save(folder / "sprites.npy", np.stack(pictures))
        rows = [dataclasses.asdict(c) for c in concepts]
        (folder / "concepts.json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    return concepts


@command
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--cache", type=Path, help="where packages are kept (default: beside)")
    args = parser.parse_args(argv)
    concepts = build(args.out, args.cache or args.out.parent / "cache")
    print(f"{len(concepts)} concepts, {sum(len(c.styles) for c in concepts)} sprites")


if __name__ == "__main__":
    sys.exit(main())
