"""Mixed bits beside uniform ones, before and after tuning, as a Markdown table.

    python -m benchmarks.quantization MODEL OUT [--prompts 96] [--tune 100]

MODEL is a float model. Every row is a model that ``quantize`` wrote to OUT, or MODEL itself. Bits
are the average over the weights of the transformer's Linear layers; bits on disk count its file
with scales, biases, palettes and all that stays in 16 bits. PSNR is of the latents against MODEL's
from the same noise, in dB: of the full width after the first and the last step, and of every width
after the last. What follows are the judge's figures of its first prompts, a picture each, at each
width: percent of right pictures in GenEval's six tasks, and their mean. All is of the models as
``generate`` uses them: in four steps where MODEL has few-step LoRAs.

Bits are chosen and tuned on prompts of other sets, without any of the judge's. Rows "tuned" are the
row before them after TUNE steps. What is in OUT already is not made again.
"""

import argparse
import json
from functools import partial
from math import prod
from pathlib import Path

from snapgen_mlx.cli.judging import TITLES
from snapgen_mlx.config import DiTConfig
from snapgen_mlx.files import folder_bytes, write_json
from snapgen_mlx.geneval import TASKS
from snapgen_mlx.layout import COMPONENTS, load_config
from snapgen_mlx.quantization.backends import backend_of
from snapgen_mlx.quantization.calibration import Calibration, load_widths
from snapgen_mlx.quantization.prompt_sets import BUILT_IN, PromptSets
from snapgen_mlx.quantization.quantize import quantize
from snapgen_mlx.quantization.recipe import Recipe, design, quantizable, uniform
from snapgen_mlx.quantization.sensitivity import measure
from snapgen_mlx.tensors.weights import load_infos

from .judged import Judged, without_judged

PAPER = 4.3  # bits
BACKENDS = ("affine", "palette")


def own_prompts() -> PromptSets:
    """The built-in sets without what the judge scores."""
    return PromptSets(*map(without_judged, BUILT_IN))


def judged_widths(judged: Judged, model: Path) -> dict[str, dict]:
    """The judge's figures by width."""
    out = {}
    for pipe in load_widths(model):
        out[pipe.variant] = judged(pipe)
        pipe.free("dit")
    return out


def recipes(config: DiTConfig, shapes: dict, found: dict) -> dict[str, Recipe]:
    """The rows of a backend by their titles."""
    return {
        "uniform 8": uniform(config, shapes, 8),
        "uniform 4": uniform(config, shapes, 4),
        f"mse {PAPER}": design(config, shapes, found, PAPER, "mse"),
        f"density {PAPER}": design(config, shapes, found, PAPER),
    }


def headline() -> str:
    sizes = ["bits", "on disk", "transformer, MB", "model, MB"]
    titles = ["", *sizes, "PSNR, first", "last step", *TITLES, "overall"]
    return f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|"


def line(title: str, row: dict) -> str:
    part, psnr, judged = row["parts"]["transformer"], row["psnr"], row["judged"]
    widest = list(judged)[-1]
    last = " / ".join(f"{p['last step']:.1f}" for p in psnr.values())
    shares = [[found[task] for found in judged.values()] for task in (*TASKS, "overall")]
    cells = [
        title,
        f"{row['bits']:.2f}",
        f"{part['bits_per_weight']:.2f}",
        f"{part['bytes'] / 1e6:.2f}",
        f"{row['bytes'] / 1e6:.2f}",
        f"{psnr[widest]['first step']:.1f}" if psnr else "",
        last,
        *(" / ".join("-" if s is None else f"{100 * s:.0f}" for s in each) for each in shares),
    ]
    return f"| {' | '.join(cells)} |"


def float_row(model: Path) -> dict:
    """The row of the model itself, as it is stored."""
    sizes = {name: folder_bytes(model / name) for name in COMPONENTS if (model / name).is_dir()}
    infos = load_infos(model / "transformer").values()
    bits = 8 * sum(i.nbytes for i in infos) / sum(prod(i.shape) for i in infos)
    part = {"bytes": sizes["transformer"], "bits_per_weight": bits}
    return {
        "bits": bits,
        "bytes": sum(sizes.values()),
        "parts": {"transformer": part},
        "psnr": {},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=int, default=96, help="of the judge, a picture each")
    parser.add_argument("--tune", type=int, default=100, help="steps")
    args = parser.parse_args()

    config = DiTConfig.from_dict(load_config(args.model / "transformer"))
    judged, sets = Judged(0, args.prompts), own_prompts()
    path = args.out / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {}

    def row(title: str, make, folder: Path) -> None:
        if title not in results:
            results[title] = make() | {"judged": judged_widths(judged, folder)}
            write_json(path, results)
        print(line(title, results[title]), flush=True)

    pipe = load_widths(args.model)[-1]
    s = pipe.settings("any")
    head = judged.head(pipe) | {"steps": s.steps, "guidance": s.guidance}
    print(f"{json.dumps(head)}\n\n{headline()}", flush=True)
    row("float", partial(float_row, args.model), args.model)
    for backend in BACKENDS:
        form = backend_of(backend, config)
        shapes = quantizable(config, form.group)
        kept = args.out / f"{backend}.sensitivity.json"
        found = measure(args.model, form, Calibration.from_model(args.model, sets.choose), kept)
        for i, (title, recipe) in enumerate(recipes(config, shapes, found).items()):
            for steps in (0, args.tune):
                folder = args.out / (f"{backend}-{i}" + "-tuned" * bool(steps))
                make = partial(quantize, args.model, folder, backend=backend, recipe=recipe)
                row(
                    f"{backend}: {title}" + ", tuned" * bool(steps),
                    partial(make, prompts=sets, tuning=steps),
                    folder,
                )


if __name__ == "__main__":
    main()
