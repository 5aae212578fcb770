"""K-DMD against DMD alone and knowledge distillation alone, at every width, untuned.

    python -m benchmarks.distillation DATA OUT -m MODEL --few-step-lora FILE [--seeds 2]

DATA is the folder that ``recipes.embedded.data`` writes; FILE makes the full width of MODEL a
4-step teacher (docs/distillation.md). Each loss distils each width into four steps once per seed,
with the same learning rate, rank, batches and number of the student's updates; DMD and K-DMD also
train a critic. The runs lie in OUT/LOSS-WIDTH-SEED; the same command goes on where it was
interrupted. Printed, and written to OUT/results.json: the figures of ``benchmarks.few_steps``, mean
and standard deviation over seeds; a run that its monitors ended counts as failed.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np

from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.files import write_json
from snapgen_mlx.hub import resolve_model
from snapgen_mlx.pipeline import Pipeline
from snapgen_mlx.sampling import FEW_STEPS
from snapgen_mlx.training.few_steps import distill_few_steps
from snapgen_mlx.training.kdmd import KDMDOptions
from snapgen_mlx.training.loop import RunOptions
from snapgen_mlx.training.output import LORA
from snapgen_mlx.training.pictures import read_folder
from snapgen_mlx.training.teacher import load_teacher

from .few_steps import Evaluation

LOSSES = ("kdmd", "dmd", "kd")
FIGURES = {"top1": "nearest, %", "top5": "in five, %", "frechet": "Fréchet"}


def run(model, teacher, examples, output: Path, variant: str, options, kdmd: KDMDOptions) -> dict:
    """Distil a width, and say how long it took or why it failed."""
    started = time.perf_counter()
    try:
        for record in distill_few_steps(model, variant, teacher, examples, output, options, kdmd):
            if "step" in record:
                print(output.name, f"step {record['step']}", flush=True)
    except SnapGenError as e:
        return {"failed": str(e)}
    return {"seconds of training": time.perf_counter() - started}


def table(results: dict[str, dict]) -> list[str]:
    """A row per loss and width, mean ± standard deviation over the seeds that did not fail."""
    lines = [f"| | {' | '.join(FIGURES.values())} | failed |", "|---" * (len(FIGURES) + 2) + "|"]
    groups = {}
    for name, result in results.items():
        groups.setdefault(name.rpartition("-")[0], []).append(result)
    for name, found in groups.items():
        sound = [r for r in found if "failed" not in r]
        cells = []
        for figure in FIGURES:
            values = np.array([r[figure] for r in sound]) * (100 if figure != "frechet" else 1)
            cells.append(f"{values.mean():.1f} ± {values.std():.1f}" if sound else "")
        lines.append(
            f"| {name} | {' | '.join(cells)} | {len(found) - len(sound)} of {len(found)} |"
        )
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("-m", "--model")
    parser.add_argument("--few-step-lora", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--variants", nargs="+", default=["tiny", "small", "full"])
    parser.add_argument("--steps", type=int, default=300, help="of the critic")
    parser.add_argument("--critic-steps", type=int, default=2, help="to one of the student")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--count", type=int, default=200, help="pictures to measure")
    args = parser.parse_args()

    model = resolve_model(args.model)
    teacher = load_teacher(model, model, args.few_step_lora)
    evaluation = Evaluation(args.data, model, args.count)
    examples = read_folder(args.data / "train")
    results = {}
    for variant in args.variants:
        for loss in LOSSES:
            kdmd = KDMDOptions(args.learning_rate, steps=args.steps, loss=loss, lora=args.rank)
            kdmd.critic_steps = args.critic_steps
            if loss == "kd":  # which updates the student at every step
                for name in ("steps", "warmup", "average_from"):
                    setattr(kdmd, name, getattr(kdmd, name) // kdmd.critic_steps)
            for seed in range(args.seeds):
                name = f"{loss}-{variant}-{seed}"
                done = args.out / name / "result.json"
                if not done.exists():
                    options = RunOptions(args.batch, text_dropout=0.0, seed=seed)
                    options.validate_every = 100
                    result = run(model, teacher, examples, args.out / name, variant, options, kdmd)
                    if "failed" not in result:
                        loras = [(args.out / name / LORA, 1.0)]
                        pipe = Pipeline.load(model, variant, base=True, loras=loras)
                        result |= evaluation(pipe, **FEW_STEPS)[0]
                    write_json(done, result)
                results[name] = json.loads(done.read_text())
    print("\n".join(table(results)))
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    of = {k: str(v) for k, v in vars(args).items()}
    write_json(args.out / "results.json", {"machine": machine, **of, "results": results})


if __name__ == "__main__":
    main()
