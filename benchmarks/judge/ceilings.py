"""How good the judge itself is: its scores of pictures that are right.

    python -m benchmarks.judge.ceilings SPRITES VAE

Real scenes of the prompts, from seeds that it never saw: as they are; through the autoencoder;
moved by a tenth of their side. Writes what `snapgen-mlx eval` prints beside its own figures to
``snapgen_mlx/assets/judge``: these scores, the Frechet distance of real scenes to other ones, and
their diversity. The floor is real scenes of other prompts of the same task.
"""

import argparse
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from recipes.command import command
from recipes.embedded.autoencoder import load_autoencoder
from recipes.embedded.scenes import SIZE, VARIED, World, flatten
from snapgen_mlx.cli.judging import headline, row
from snapgen_mlx.files import atomic_write, write_json
from snapgen_mlx.geneval import TASKS, Prompt, Score, correct
from snapgen_mlx.judge import (
    FOLDER,
    REAL,
    STATISTICS,
    Judge,
    Looked,
    diversity,
    frechet,
    protocol,
)
from snapgen_mlx.scoring import STYLE

from .prompts import SIZES, real_scene
from .scenes import through

SEEDS = 4  # pictures of a prompt
DECODED = 276  # prompts, half of GenEval's: the autoencoder takes most of the time
CHUNK = 64
Change = Callable[[np.ndarray, random.Random], np.ndarray]


def moved(image: np.ndarray, rng: random.Random) -> np.ndarray:
    """A scene (256, 256, 4) moved by a tenth of its side, to one of four sides."""
    n, sides = round(SIZE / 10), [(1, 0), (-1, 0), (0, 1), (0, -1)]
    dy, dx = rng.choice(sides)
    padded = np.pad(image, ((n, n), (n, n), (0, 0)), mode="edge")
    return padded[n - n * dy : n - n * dy + SIZE, n - n * dx : n - n * dx + SIZE]


def looked(
    judge: Judge, world: World, prompts: list[Prompt], name: str, change: Change | None = None
) -> Iterator[Looked]:
    """What the judge says of a real scene of each prompt."""
    for start in range(0, len(prompts), CHUNK):
        pictures = []
        for i, prompt in enumerate(prompts[start : start + CHUNK], start):
            image = real_scene(world, prompt, f"{name}/{i}").image
            if change:
                image = change(image, random.Random(f"{name}/{i}/change"))
            pictures.append(Image.fromarray(flatten(image)))
        yield from judge.look(pictures)


def scored(prompts: list[Prompt], looks: list[Looked]) -> Score:
    score = Score()
    for prompt, look in zip(prompts, looks, strict=True):
        score.add(prompt, correct(prompt, look.things))
    return score


@command
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sprites", type=Path, help="folder of recipes.embedded.sprites")
    parser.add_argument("vae", type=Path, help="folder of recipes.embedded.autoencoder")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="pictures of a prompt (4)")
    parser.add_argument("--dry-run", action="store_true", help="only print")
    args = parser.parse_args(argv)
    world, autoencoder = World.load(args.sprites, VARIED), load_autoencoder(args.vae)
    judge, prompts = Judge.load(), protocol()

    def decoded(image, _):
        return through(autoencoder, image[None])[0]

    count = sum(p.task in SIZES for p in prompts)
    real, rows = [], []
    print(headline(), flush=True)

    def show(title: str, score: Score) -> None:
        shares = {task: score.share(task) for task in (*TASKS, STYLE)}
        rows.append((title, shares | {"overall": score.overall()}))
        print(row(*rows[-1]), flush=True)

    for seed in range(args.seeds):
        real.append(list(looked(judge, world, prompts, f"real/{seed}")))
    everything = scored(prompts * args.seeds, [look for looks in real for look in looks])
    show("real scenes", everything)
    for title, change, n in (("moved by 10 %", moved, None), ("autoencoder", decoded, DECODED)):
        looks = list(looked(judge, world, prompts[:n], "real/0", change))
        show(title, scored(prompts[:n], looks))
    others = {task: [i for i, p in enumerate(prompts) if p.task == task] for task in SIZES}
    wrong = [
        real[0][others[p.task][others[p.task].index(i) - 1]] for i, p in enumerate(prompts[:count])
    ]
    show("other prompts", scored(prompts[:count], wrong))

    features = [np.stack([look.features for look in looks[:count]]) for looks in real]
    together = np.concatenate(features)
    mean, covariance = together.mean(0), np.cov(together, rowvar=False)
    floors = []
    for seed in range(args.seeds):
        again = looked(judge, world, prompts[:count], f"again/{seed}")
        floors.append(np.stack([look.features for look in again]))
    floors = [
        frechet(np.concatenate(floors[:n]), mean, covariance) for n in range(1, args.seeds + 1)
    ]
    spread = diversity(list(np.stack(features, 1))) if args.seeds > 1 else None
    print("Frechet distance of real scenes, by pictures of a prompt:", floors)
    print("diversity of real scenes:", spread)
    if args.dry_run:
        return
    figures = {"shares": dict(rows), "floors": floors, "diversity": spread, "prompts": count}
    write_json(FOLDER / REAL, figures)
    with atomic_write(FOLDER / STATISTICS) as temporary:
        arrays = {"mean": mean, "covariance": covariance}
        save_file({k: a.astype(np.float32) for k, a in arrays.items()}, temporary)


if __name__ == "__main__":
    sys.exit(main())
