"""A sheet of prompts by the three variants, all from seed 0: ``python -m benchmarks.sheet OUT``.

Nothing is picked. ``--prompts benchmarks/prompts/varied.txt`` draws what a newcomer may ask for.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

from recipes.command import command
from snapgen_mlx.errors import UsageError
from snapgen_mlx.files import atomic_write
from snapgen_mlx.pipeline import Pipeline
from snapgen_mlx.training.report import picture_grid

PROMPTS = Path(__file__).parent / "prompts" / "composed.txt"
VARIANTS = ["tiny", "small", "full"]
CELL, COLUMNS = 96, 12


def read_prompts(file: Path) -> list[str]:
    """The prompts of a text file, a line each; lines that begin with # name what follows."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as e:
        raise UsageError(f"cannot read {file}: {e}") from e
    return [line for line in lines if line.strip() and not line.startswith("#")]


@command
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("-m", "--model")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="text file, a prompt a line")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    args = parser.parse_args(argv)
    prompts = read_prompts(args.prompts)
    pictures = {}
    for variant in VARIANTS:
        pipe = Pipeline.load(args.model, variant)
        how = {"seed": 0, "steps": args.steps, "guidance": args.guidance}
        images = [pipe.generate(prompt, **how) for prompt in prompts]
        size = (CELL, CELL)
        pictures[variant] = [i.resize(size, Image.Resampling.LANCZOS) for i in images]
    bands = []
    for i in range(0, len(prompts), COLUMNS):
        rows = {variant: images[i : i + COLUMNS] for variant, images in pictures.items()}
        bands.append(picture_grid(rows, prompts[i : i + COLUMNS]))
    sheet = Image.new("RGB", (bands[0].width, sum(band.height for band in bands)), "white")
    top = 0
    for band in bands:
        sheet.paste(band, (0, top))
        top += band.height
    with atomic_write(args.out) as tmp:
        sheet.save(tmp, quality=88)
    print(f"{len(prompts)} prompts x {VARIANTS}, {sheet.width}x{sheet.height} pixels: {args.out}")


if __name__ == "__main__":
    sys.exit(main())
