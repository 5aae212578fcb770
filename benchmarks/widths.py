"""A width for each step: time against quality, and the frontier.

    python -m benchmarks.widths DATA -m MODEL [--count 100] [--plot docs/widths.png] [--json FILE]

Every schedule of 1 to 4 steps in which no width comes after a wider one draws the same held-out
phrasings from the same noise; DATA and the figures are as of ``benchmarks.few_steps``. On a
frontier is a schedule than which no other is both faster and better: nearer to the prompts, or
nearer to real pictures by Fréchet distance. Blurred pictures of one step are near to the prompts
and far from real ones.
"""

import argparse
import json
import math
import os
import platform
from itertools import combinations_with_replacement
from pathlib import Path

from snapgen_mlx.files import atomic_write, write_json
from snapgen_mlx.pipeline import Pipeline

from .few_steps import Evaluation


def schedules(names: list[str], most: int) -> list[str]:
    """Variants of 1 to so many steps, narrow widths first: "tiny:1", ..., "tiny:1,full:3"."""
    out = []
    for steps in range(1, most + 1):
        for widths in combinations_with_replacement(names, steps):
            counts = {name: widths.count(name) for name in names if name in widths}
            out.append(",".join(f"{name}:{count}" for name, count in counts.items()))
    return out


# What counts as better, by figure: 1 for larger, -1 for smaller.
BETTER = {"top1": 1, "frechet": -1}
TITLES = {"top1": "nearest", "frechet": "Fréchet"}


def frontier(results: dict[str, dict], key: str) -> list[str]:
    """The schedules than which none is both as fast and better, the fastest first."""
    sign, best = BETTER[key], -math.inf
    out = []
    for name in sorted(results, key=lambda n: (results[n]["seconds"], -sign * results[n][key])):
        if sign * results[name][key] > best:
            out.append(name)
            best = sign * results[name][key]
    return out


def table(results: dict[str, dict]) -> list[str]:
    best = {key: frontier(results, key) for key in BETTER}
    lines = [
        "| schedule | s | nearest | in five | Fréchet | on the frontier of |",
        "|---" * 6 + "|",
    ]
    for name, r in results.items():
        cells = [f"{r['seconds']:.3f}", f"{100 * r['top1']:.1f} %", f"{100 * r['top5']:.1f} %"]
        mark = ", ".join(TITLES[key] for key in BETTER if name in best[key])
        lines.append(f"| {name} | {' | '.join(cells)} | {r['frechet']:.1f} | {mark} |")
    return lines


def plot(results: dict[str, dict], path: Path) -> None:
    """Time against both figures: single widths, mixed ones, and the frontiers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    labels = {"top1": "nearest picture is of the prompt, %", "frechet": "Fréchet distance"}
    for axes, (key, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        factor = 100 if key == "top1" else 1
        for kind, mixed in (("one width", False), ("several widths", True)):
            own = [r for name, r in results.items() if ("," in name) == mixed]
            x, y = [r["seconds"] for r in own], [factor * r[key] for r in own]
            axes.scatter(x, y, label=kind, marker="o" if mixed else "s")
        best = frontier(results, key)
        x, y = ([results[n][k] * f for n in best] for k, f in (("seconds", 1), (key, factor)))
        axes.plot(x, y, color="grey", linewidth=1, label="frontier")
        for name, a, b in zip(best, x, y, strict=True):
            axes.annotate(name, (a, b), fontsize=7, xytext=(3, 4), textcoords="offset points")
        axes.set_xlabel("seconds a picture, without text and decoding")
        axes.set_ylabel(label)
        axes.legend()
        if key == "frechet":
            axes.set_yscale("log")
    with atomic_write(path) as tmp:
        figure.savefig(tmp, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("-m", "--model")
    parser.add_argument("--count", type=int, default=100, help="pictures of a schedule")
    parser.add_argument("--steps", type=int, default=4, help="at most")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    evaluation = Evaluation(args.data, args.model, args.count)
    pipe = Pipeline.load(args.model)
    results = {}
    for variant in schedules(list(pipe.dit_config.variants), args.steps):
        pipe.switch(variant)
        results[variant], _ = evaluation(pipe)
        print(variant, json.dumps(results[variant]), flush=True)
    print("\n".join(table(results)))
    if args.plot:
        plot(results, args.plot)
    if args.json:
        machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
        write_json(args.json, {"machine": machine, "pictures": args.count, "results": results})


if __name__ == "__main__":
    main()
