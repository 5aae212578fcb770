"""A sheet of 48 prompts by the three variants, all from seed 0: ``python -m benchmarks.sheet OUT``.

Nothing is picked: the prompts stand below, several of them phrased as no training caption is.
"""

import argparse
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from snapgen_mlx.files import atomic_write
from snapgen_mlx.pipeline import Pipeline

PROMPTS = """
a smiling cat; a happy kitty; a red apple; a rocket; a slice of pizza; a green book
a sad face; a laughing face; a crying face; a face with sunglasses; a dog; a cute puppy
a lion; a panda; a frog; a penguin; an owl; a butterfly
a red heart; a yellow star; the sun; a full moon; a snowman; a rainbow
a hamburger; a cup of coffee; a birthday cake; an ice cream; a strawberry; a banana
a car; a bicycle; an airplane; a sailboat; a house; a castle
a guitar; a soccer ball; a trophy; a key; a light bulb; a camera
a sunflower; a cactus; a christmas tree; a flat icon of a rocket; a flat icon of a cat; a tulip
"""
CELL, COLUMNS, LABEL = 96, 12, 26


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("-m", "--model")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    args = parser.parse_args()
    prompts = [p.strip() for p in PROMPTS.replace("\n", ";").split(";") if p.strip()]
    variants = ["tiny", "small", "full"]
    rows = len(prompts) // COLUMNS
    height = LABEL + len(variants) * CELL
    sheet = Image.new("RGB", (COLUMNS * CELL, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, prompt in enumerate(prompts):
        x, y = i % COLUMNS * CELL, i // COLUMNS * height
        draw.text((x + 3, y + 2), "\n".join(textwrap.wrap(prompt, 15)[:2]), "black", font_size=10)
    for v, variant in enumerate(variants):
        pipe = Pipeline.load(args.model, variant)
        for i, prompt in enumerate(prompts):
            image = pipe.generate(prompt, seed=0, steps=args.steps, guidance=args.guidance)
            x, y = i % COLUMNS * CELL, i // COLUMNS * height + LABEL + v * CELL
            sheet.paste(image.resize((CELL, CELL), Image.Resampling.LANCZOS), (x, y))
    with atomic_write(args.out) as tmp:
        sheet.save(tmp, quality=88)
    print(f"{len(prompts)} prompts x {variants}, {np.array(sheet).shape[:2]} pixels: {args.out}")


if __name__ == "__main__":
    main()
