"""A width for each step: time against quality, and the frontier.

    python -m benchmarks.widths [-m MODEL] [--prompts 48] [--first 96] [--plot FILE] [--json FILE]

Every schedule of 1 to 4 steps in which no width comes after a wider one draws the same prompts of
the judge from the same noise; the figures are as of ``benchmarks.few_steps``. On a frontier is a
schedule than which no other is both faster and better: more pictures are right, or they are nearer
to real scenes by Fréchet distance. By default these are not the prompts that ``few_steps`` scores:
whoever chooses a schedule by them can still be scored on the others.
"""

import argparse
import json
import math
from itertools import combinations_with_replacement
from pathlib import Path

from snapgen_mlx.files import atomic_write, write_json
from snapgen_mlx.pipeline import Pipeline

from .judged import Judged

MOST = 4  # steps of a schedule


def schedules(names: list[str], most: int) -> list[str]:
    """Variants of 1 to so many steps, narrow widths first: "tiny:1", ..., "tiny:1,full:3"."""
    out = []
    for steps in range(1, most + 1):
        for widths in combinations_with_replacement(names, steps):
            counts = {name: widths.count(name) for name in names if name in widths}
            out.append(",".join(f"{name}:{count}" for name, count in counts.items()))
    return out


# What counts as better, by figure: 1 for larger, -1 for smaller.
BETTER = {"overall": 1, "frechet": -1}
TITLES = {"overall": "overall", "frechet": "Fréchet"}


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
    lines = ["| schedule | s | overall | Fréchet | on the frontier of |", "|---" * 5 + "|"]
    for name, r in results.items():
        cells = [f"{r['seconds']:.3f}", f"{100 * r['overall']:.1f} %", f"{r['frechet']:.2f}"]
        mark = ", ".join(TITLES[key] for key in BETTER if name in best[key])
        lines.append(f"| {name} | {' | '.join(cells)} | {mark} |")
    return lines


def plot(results: dict[str, dict], path: Path) -> None:
    """Time against both figures: single widths, mixed ones, and the frontiers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    labels = {"overall": "right pictures, %", "frechet": "Fréchet distance to real scenes"}
    for axes, (key, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        factor = 100 if key == "overall" else 1
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
    parser.add_argument("-m", "--model", help="[default: the embedded one]")
    parser.add_argument("--prompts", type=int, default=48, help="of the judge, a picture each")
    parser.add_argument("--first", type=int, default=96, help="of its prompts to leave out")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    judged, pipe, results = Judged(args.first, args.prompts), Pipeline.load(args.model), {}
    for variant in schedules(pipe.dit_config.variants, MOST):
        pipe.switch(variant)
        results[variant] = judged(pipe)
        print(variant, json.dumps(results[variant]), flush=True)
    head = judged.head(pipe)
    print("\n".join([json.dumps(head), "", *table(results)]))
    if args.plot:
        plot(results, args.plot)
    if args.json:
        write_json(args.json, head | {"results": results})


if __name__ == "__main__":
    main()
