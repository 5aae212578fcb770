"""K-DMD against DMD alone and knowledge distillation alone, by distance to the guided teacher.

    python -m benchmarks.distillation PROMPTS OUT -m MODEL [--seeds 5]

First the full width of MODEL is distilled by DMD alone; its LoRA is the 4-step teacher of the rest.
Then each loss distils each width into four steps, once per seed, with the same learning rate, rank,
batches and number of the student's updates; "dmd, time" has as many as fit into the time that
K-DMD took, and "kdmd, balanced" scales the gradients of its losses to one norm. PROMPTS, one in a
line, are what all of them learn from. They are scored on other prompts, the judge's. The runs lie
in OUT/LOSS-WIDTH-SEED; the same command goes on where it was interrupted. Printed, and written to
OUT/results.json, mean and standard deviation over seeds:

- Fréchet and energy distance of the latents to the guided teacher's of the same prompts from other
  noise. The floor is the guided teacher from the noise that the students have.
- error: squared distance to the guided teacher's picture of the same noise, where two of its
  pictures of a prompt have 1.
- judge: the judge's overall score. The ceiling is the guided teacher's.

A run that its monitors ended counts as failed.
"""

import argparse
import os
import platform
import time
from pathlib import Path

import numpy as np

from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.evaluation import draw_latents
from snapgen_mlx.files import read_json, write_json
from snapgen_mlx.hub import resolve_model
from snapgen_mlx.judge import frechet
from snapgen_mlx.loading import load_transformer_config
from snapgen_mlx.pipeline import Pipeline
from snapgen_mlx.sampling import FEW_STEPS
from snapgen_mlx.training.few_steps import distill_few_steps
from snapgen_mlx.training.kdmd import KDMDOptions
from snapgen_mlx.training.loop import RunOptions
from snapgen_mlx.training.output import LORA
from snapgen_mlx.training.teacher import load_teacher

from .judged import Judged, without_judged

EQUAL_TIME = "dmd, time"
BALANCED = "kdmd, balanced"
LOSSES = ("kd", "dmd", "kdmd", BALANCED, EQUAL_TIME)  # the last one needs the times before it
COMPONENTS = 64
FIGURES = {"frechet": "Fréchet", "energy": "energy", "error": "error", "judge": "judge"}


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """|x_i - y_j| of rows, as a part of the root of their length."""
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return np.sqrt(squares.clip(0) / x.shape[1])


def energy(x: np.ndarray, y: np.ndarray) -> float:
    """Energy distance of two samples (N, D), without the distance of a row to itself."""
    within = [distances(a, a).sum() / (len(a) * (len(a) - 1)) for a in (x, y)]
    return float(2 * distances(x, y).mean() - sum(within))


class Frechet:
    """Distance of Gaussians fitted to latents (N, D), on principal components of ``real`` ones."""

    def __init__(self, real: np.ndarray, components: int = COMPONENTS):
        self.centre = real.mean(axis=0)
        _, _, axes = np.linalg.svd(real - self.centre, full_matrices=False)
        self.axes = axes[: min(components, len(real) - 1)]
        z = self._components(real)
        self.mean, self.covariance = z.mean(axis=0), np.cov(z, rowvar=False)

    def _components(self, latents: np.ndarray) -> np.ndarray:
        return (latents - self.centre) @ self.axes.T

    def __call__(self, latents: np.ndarray) -> float:
        """Of ``latents`` (N, D) and the real ones."""
        return frechet(self._components(latents), self.mean, self.covariance)


class Against:
    """Measures pictures against those that the guided full width draws of the same prompts."""

    def __init__(self, model: Path, widest: str, count: int):
        self.model, self.judged = model, Judged(0, count)
        pipe = Pipeline.load(model, widest, base=True)
        self.own, self.other = (self._draw(pipe, first, {}) for first in (0, count))
        self.frechet = Frechet(self.other)
        self.apart = ((self.own - self.other) ** 2).mean()
        self.floor = self.figures(pipe, self.own) | {"error": None}

    def _draw(self, pipe: Pipeline, first: int, given: dict) -> np.ndarray:
        return draw_latents(pipe, self.judged.jobs(pipe, first, **given))

    def figures(self, pipe: Pipeline, latents: np.ndarray) -> dict[str, float]:
        """Of latents (N, D), drawn from the seeds 0 to N - 1."""
        return {
            "frechet": self.frechet(latents),
            "energy": energy(latents, self.other),
            "error": float(((latents - self.own) ** 2).mean() / self.apart),
            "judge": self.judged.figures(pipe, latents)["overall"],
        }

    def student(self, variant: str, lora: Path) -> dict[str, float]:
        pipe = Pipeline.load(self.model, variant, base=True, loras=[(lora, 1.0)])
        return self.figures(pipe, self._draw(pipe, 0, dict(FEW_STEPS)))


def distil(model, teacher, prompts, output: Path, variant: str, seed: int, o, kdmd) -> dict:
    """Distil a width, and say how long it took or why it failed."""
    options = RunOptions(o.batch, text_dropout=0.0, seed=seed)
    options.validate_every = 100
    started = time.perf_counter()
    try:
        for record in distill_few_steps(model, variant, teacher, prompts, output, options, kdmd):
            if "step" in record:
                shown = {k: round(v, 3) for k, v in record.items() if k.startswith("val/")}
                print(output.name, f"step {record['step']}", shown or "", flush=True)
    except SnapGenError as e:
        return {"failed": str(e)}
    return {"seconds of training": time.perf_counter() - started}


def plan(loss: str, updates: int, o) -> KDMDOptions:
    """Options of a run with so many updates of the student."""
    kdmd = KDMDOptions(o.learning_rate, loss=loss.partition(",")[0], lora=o.rank)
    kdmd.critic_steps, kdmd.balance = o.critic_steps, loss == BALANCED
    kdmd.steps = updates * kdmd.turns
    kdmd.average_from = kdmd.steps // 2
    kdmd.warmup = min(kdmd.warmup, updates // 2) * kdmd.turns
    return kdmd


def table(floor: dict, results: dict[str, dict]) -> list[str]:
    """A row per loss and width, mean ± standard deviation over the seeds that did not fail."""
    lines = [f"| | {' | '.join(FIGURES.values())} | s | failed |"]
    lines.append("|---" * (len(FIGURES) + 3) + "|")
    cells = [f"{floor[k]:.3g}" if floor[k] is not None else "" for k in FIGURES]
    lines.append(f"| guided teacher | {' | '.join(cells)} | | |")
    groups: dict[str, list] = {}
    for name, result in results.items():
        groups.setdefault(name.rpartition("-")[0], []).append(result)
    for name, found in groups.items():
        sound = [r for r in found if "failed" not in r]
        cells = []
        for figure in (*FIGURES, "seconds of training"):
            values = np.array([r[figure] for r in sound])
            cells.append(f"{values.mean():.3g} ± {values.std():.2g}" if sound else "")
        failed = len(found) - len(sound)
        lines.append(f"| {name} | {' | '.join(cells)} | {failed} of {len(found)} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("-m", "--model")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--variants", nargs="+", default=["tiny", "small"])
    parser.add_argument("--teacher-updates", type=int, default=400, help="of the 4-step teacher")
    parser.add_argument("--updates", type=int, default=150, help="of each student")
    parser.add_argument("--critic-steps", type=int, default=5, help="to one of the student")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--count", type=int, default=200, help="pictures to measure")
    args = parser.parse_args()

    model = resolve_model(args.model)
    lines = args.prompts.read_text("utf-8").splitlines()
    prompts = without_judged([line for line in lines if line.strip()])
    widest = load_transformer_config(model).variants[-1]
    against = Against(model, widest, args.count)
    few = args.out / "teacher" / LORA
    if not few.exists():
        kdmd = plan("dmd", args.teacher_updates, args)
        guided = load_teacher(model, model)
        made = distil(model, guided, prompts, few.parent, widest, 0, args, kdmd)
        if "failed" in made:
            raise SystemExit(f"the 4-step teacher: {made['failed']}")
        write_json(few.with_name("result.json"), made)
    about = few.with_name("result.json")
    write_json(about, read_json(about) | against.student(widest, few))
    results = {f"teacher-{widest}-0": read_json(about)}
    teacher = load_teacher(model, model, few)
    for variant in args.variants:
        for seed in range(args.seeds):
            for loss in LOSSES:
                name = f"{loss}-{variant}-{seed}".replace(", ", "-")
                done = args.out / name / "result.json"
                if not done.exists():
                    updates = args.updates
                    if loss == EQUAL_TIME:
                        pair = [results[f"{other}-{variant}-{seed}"] for other in ("kdmd", "dmd")]
                        took = [r["seconds of training"] for r in pair if "failed" not in r]
                        if len(took) == 2:
                            updates = max(round(updates * took[0] / took[1]), updates)
                    run = args.out / name
                    kdmd = plan(loss, updates, args)
                    result = distil(model, teacher, prompts, run, variant, seed, args, kdmd)
                    if "failed" not in result:
                        result |= {"updates": updates} | against.student(variant, run / LORA)
                    write_json(done, result)
                results[name] = read_json(done)
    print("\n".join(table(against.floor, results)))
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    of = {k: str(v) for k, v in vars(args).items()}
    head = {"machine": machine, **of, "floor": against.floor}
    write_json(args.out / "results.json", head | {"results": results})


if __name__ == "__main__":
    main()
