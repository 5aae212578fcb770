"""Four steps against many (the paper's Fig. 8, in small).

    python -m benchmarks.few_steps [-m MODEL] [--prompts 96] [--first 0] [--json FILE]

Every width of MODEL (the embedded one by default) draws the same prompts of the judge from the same
noise: with the base in 28 guided steps and in as many as its config.json says, with its LoRA for
four steps, and with the base in four, guided and not. Printed for each are

- the shares of right pictures in GenEval's six tasks, their mean, and that as a share of the mean
  after 28 steps;
- the width's parameters (the paper's Table 2);
- the Fréchet distance to real scenes, in the judge's features; it compares only pictures of the
  same prompts;
- seconds a picture, without encoding the text and decoding.
"""

import argparse
import json
from pathlib import Path

from snapgen_mlx.cli.judging import TITLES
from snapgen_mlx.files import write_json
from snapgen_mlx.geneval import TASKS
from snapgen_mlx.pipeline import Pipeline

from .judged import Judged

WAYS = {  # the first is what the others are shares of
    "base, 28 steps, guided": {"base": True, "steps": 28},
    "base, its own steps, guided": {"base": True},
    "distilled, 4 steps": {"base": False},
    "base, 4 steps, guided": {"base": True, "steps": 4},
    "base, 4 steps": {"base": True, "steps": 4, "guidance": 1.0},
}


def headline() -> str:
    titles = ["", *TITLES, "overall", "of 28 steps", "parameters", "Fréchet", "s"]
    return f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|"


def line(title: str, found: dict, many: float) -> str:
    """A row; ``many`` is the overall share after 28 steps."""
    shares = (found[task] for task in (*TASKS, "overall"))
    cells = ["-" if share is None else f"{100 * share:.1f} %" for share in shares]
    cells.append(f"{found['overall'] / many:.3f}" if many else "-")
    cells.append(f"{found['parameters'] / 1e6:.2f} M")
    cells += [f"{found['frechet']:.2f}", f"{found['seconds']:.3f}"]
    return f"| {title} | {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", help="[default: the embedded one]")
    parser.add_argument("--prompts", type=int, default=96, help="of the judge, a picture each")
    parser.add_argument("--first", type=int, default=0, help="of its prompts to leave out")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    pipes = {base: Pipeline.load(args.model, base=base) for base in (True, False)}
    base, distilled = pipes.values()
    variants = base.dit_config.variants
    for variant in variants:
        distilled.switch(variant)
        if not distilled.few_steps:
            raise SystemExit(f"{distilled.folder} has no LoRA for few steps of {variant}")
    judged, results = Judged(args.first, args.prompts), {}
    own = base.settings("any")
    head = judged.head(base) | {"own steps": own.steps, "guidance": own.guidance}
    print(f"{json.dumps(head)}\n\n{headline()}", flush=True)
    for variant in variants:
        results[variant] = {}
        for way, given in WAYS.items():
            given = dict(given)
            pipe = pipes[given.pop("base")]
            pipe.switch(variant)
            found = judged(pipe, **given) | {"parameters": pipe.memory.parameters(variant)}
            results[variant][way] = found
            many = next(iter(results[variant].values()))["overall"]
            print(line(f"{variant}: {way}", found, many), flush=True)
    if args.json:
        write_json(args.json, head | {"results": results})


if __name__ == "__main__":
    main()
