"""Whether inpainting draws the prompted thing: ``python -m benchmarks.editing``.

A mask covers a picture but for its border, and the prompt asks for another thing. The judge
says whether it finds that thing in the result. The floor is the same question for the picture
before; the ceiling is a picture of the thing that was drawn from nothing.
"""

import argparse
import itertools

import numpy as np
from PIL import Image

from snapgen_mlx.geneval import THRESHOLD
from snapgen_mlx.hub import resolve_model
from snapgen_mlx.judge import Judge
from snapgen_mlx.pipeline import Pipeline
from snapgen_mlx.vocabulary import known_words

BORDER = 1 / 16  # part of the side that the mask leaves as it is


def border_mask(size: tuple[int, int]) -> Image.Image:
    """White but for a border."""
    width, height = size
    left, top = round(BORDER * width), round(BORDER * height)
    mask = Image.new("L", size, 0)
    mask.paste(255, (left, top, width - left, height - top))
    return mask


def compare(pipe: Pipeline, judge: Judge, names: list[str]) -> dict[str, float]:
    """Shares of things found, and pixels that changed outside the mask.

    Args:
        pipe: draws and edits.
        judge: looks.
        names: things; each is painted over the one before it.
    """
    drawn = {name: pipe.generate(f"a {name}", seed=0) for name in names}
    hits = {"before": 0, "edited": 0, "drawn": 0}
    changed = 0
    pairs = list(itertools.pairwise([names[-1], *names]))
    for old, new in pairs:
        picture = drawn[old].convert("RGB")
        mask = border_mask(picture.size)
        edited = pipe.edit(f"a {new}", picture, mask, seed=1).convert("RGB")
        outside = np.array(mask) == 0
        changed += int((np.array(edited) != np.array(picture)).any(axis=2)[outside].sum())
        looked = judge.look([picture, edited, drawn[new]])
        for key, seen in zip(hits, looked, strict=True):
            hits[key] += any(t.name == new and t.score > THRESHOLD for t in seen.things)
    return {key: n / len(pairs) for key, n in hits.items()} | {"changed outside": changed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", help="model folder (default: the embedded model)")
    parser.add_argument("--count", type=int, default=60, help="things")
    args = parser.parse_args()
    judge = Judge.load()
    known = set(known_words(resolve_model(args.model)))
    names = [name for name in judge.labels["name"] if name in known][: args.count]
    for variant in ("tiny", "small", "full"):
        found = compare(Pipeline.load(args.model, variant), judge, names)
        print(variant, {key: round(value, 3) for key, value in found.items()}, flush=True)


if __name__ == "__main__":
    main()
