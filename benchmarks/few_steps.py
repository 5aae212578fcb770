"""Four steps against many (the paper's Fig. 8, in small).

    python -m benchmarks.few_steps DATA -m MODEL [--count 300] [--grid FILE.png] [--json FILE]

DATA is the folder that ``recipes.embedded.data`` writes; MODEL holds a LoRA for few steps of
each width (docs/distillation.md). Every width draws the same held-out phrasings, and all held-out
(concept, style) pairs thrice, from the same noise in four ways: 28 guided steps of the base, 4
steps of the distilled model, and 4 steps of the base, guided and not. Printed for each:

- the share of pictures whose nearest real picture is of the prompted concept, and whose nearest
  five concepts hold it (``snapgen_mlx.evaluation``), as a share of the 28 steps' in brackets; of
  phrasings and of pairs;
- the Fréchet distance of latents of the phrasings to all real pictures', on their 64 leading
  principal components;
- seconds per picture, without encoding the text and decoding.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from snapgen_mlx.evaluation import chance, draw_latents, ranks, shares
from snapgen_mlx.files import atomic_write, write_json
from snapgen_mlx.pipeline import Pipeline
from snapgen_mlx.training.data import encode_images
from snapgen_mlx.training.pictures import read_folder
from snapgen_mlx.training.report import picture_grid

from .recall import read_rows

COMPONENTS = 64
PAIR_SEEDS = 3
STEPS = 28
WAYS = {
    "base, 28 steps, guided": {"base": True, "steps": STEPS},
    "distilled, 4 steps": {"base": False},
    "base, 4 steps, guided": {"base": True, "steps": 4},
    "base, 4 steps": {"base": True, "steps": 4, "guidance": 1.0},
}
SHOWN = 8  # pictures a row of the grid


class Frechet:
    """Distance of Gaussians fitted to latents (N, D), on principal components of ``real`` ones."""

    def __init__(self, real: np.ndarray, components: int = COMPONENTS):
        self.centre = real.mean(axis=0)
        _, _, axes = np.linalg.svd(real - self.centre, full_matrices=False)
        self.axes = axes[: min(components, len(real) - 1)]
        self.real = self._fit(real)

    def _fit(self, latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        z = (latents - self.centre) @ self.axes.T
        return z.mean(axis=0), np.cov(z, rowvar=False)

    def __call__(self, latents: np.ndarray) -> float:
        """|m - m'|² + tr(C + C' - 2 (C C')^½) of ``latents`` (N, D) and the real ones."""
        (m, c), (m2, c2) = self._fit(latents), self.real
        root = np.sqrt(np.linalg.eigvals(c @ c2).real.clip(0)).sum()
        return float(((m - m2) ** 2).sum() + np.trace(c) + np.trace(c2) - 2 * root)


class Evaluation:
    """Measures pictures of ``count`` held-out phrasings, and of each held-out pair ``pair_seeds``
    times, against all real pictures of a data folder."""

    def __init__(self, data: Path, model, count: int, pair_seeds: int = 0):
        pipe = Pipeline.load(model)
        s = pipe.settings("any")
        examples = [e for part in ("train", "heldout") for e in read_folder(data / part)]
        real = encode_images(pipe.vae, [e.file for e in examples], (s.height, s.width))
        self.concepts = [e.concept for e in examples]
        self.shape, self.real = real.shape[1:], real.reshape(len(real), -1)
        self.frechet = Frechet(self.real)
        rows = read_rows(data / "phrasings.jsonl")
        self.rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:count]]
        self.pairs = read_rows(data / "heldout" / "metadata.jsonl") * pair_seeds

    def __call__(self, pipe: Pipeline, **given) -> tuple[dict, np.ndarray]:
        """Figures of what ``pipe`` draws with the settings ``given``, and the latents (N, D)."""
        rows, n = self.rows + self.pairs, len(self.rows)
        jobs = [pipe.settings(row["text"], seed=i, **given) for i, row in enumerate(rows)]
        pipe.prepare(jobs)
        draw_latents(pipe, jobs[:1])  # loads the weights
        started = time.perf_counter()
        latents = draw_latents(pipe, jobs)
        seconds = (time.perf_counter() - started) / len(jobs)
        found = ranks(latents, [row["concept"] for row in rows], self.real, self.concepts)
        figures = shares(found[:n]) | {"frechet": self.frechet(latents[:n]), "seconds": seconds}
        if self.pairs:
            figures["pairs"] = shares(found[n:])
        return figures, latents


def table(results: dict) -> list[str]:
    lines = ["| | nearest | in five | pairs, nearest | in five | Fréchet | s |"]
    lines.append("|---" * 7 + "|")
    for width, ways in results.items():
        first = next(iter(ways.values()))
        for way, r in ways.items():
            cells = [
                f"{100 * a[k]:.1f} % ({a[k] / max(b[k], 1e-9):.3f})"
                for a, b in ((r, first), (r["pairs"], first["pairs"]))
                for k in ("top1", "top5")
            ]
            cells += [f"{r['frechet']:.1f}", f"{r['seconds']:.3f}"]
            lines.append(f"| {width}: {way} | {' | '.join(cells)} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("-m", "--model")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--variants", nargs="+", default=["tiny", "small", "full"])
    parser.add_argument("--grid", type=Path, help="picture of some of them")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    evaluation = Evaluation(args.data, args.model, args.count, PAIR_SEEDS)
    results, pictures = {}, {}
    for variant in args.variants:
        results[variant] = {}
        for way, given in WAYS.items():
            given = dict(given)
            pipe = Pipeline.load(args.model, variant, base=given.pop("base"))
            if not (pipe.base or pipe.few_steps):
                raise SystemExit(f"{pipe.folder} has no LoRA for few steps of {variant}")
            found, latents = evaluation(pipe, **given)
            results[variant][way] = found
            some = mx.array(latents[:SHOWN].reshape(-1, 1, *evaluation.shape))
            pictures[f"{variant}: {way}"] = [pipe.decode(z) for z in some]
            print(f"{variant}: {way}", json.dumps(found), flush=True)
    print("\n".join(table(results)))
    if args.grid:
        prompts = [row["text"] for row in evaluation.rows[:SHOWN]]
        with atomic_write(args.grid) as tmp:
            picture_grid(pictures, prompts).save(tmp, quality=90)
    if args.json:
        concepts = len(set(evaluation.concepts))
        head = {"machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"}
        head |= {"pictures": len(evaluation.rows), "of pairs": len(evaluation.pairs)}
        head |= {"real pictures": len(evaluation.real)}
        head |= {"concepts": concepts, "chance": chance(concepts)}
        write_json(args.json, head | {"results": results})


if __name__ == "__main__":
    main()
