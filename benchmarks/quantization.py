"""Mixed bits beside uniform ones, before and after tuning, as a Markdown table.

    python -m benchmarks.quantization DATA OUT [-m MODEL] [--count 200] [--tune 100]

MODEL is a float model (runs/embedded/model by default), DATA the folder that
``recipes.embedded.data`` writes. Every row is a model that ``quantize`` wrote to OUT, or MODEL
itself. Bits are the average over the weights of the transformer's Linear layers; bits on disk
count its file with scales, biases, palettes and all that stays in 16 bits. PSNR is of the latents
against MODEL's from the same noise, in dB: of the full width after the first and the last step,
and of every width after the last, on prompts that neither chose bits nor tuned. Recall of known
drawings, as in ``benchmarks.recall``: share of COUNT held-out phrasings whose picture is nearest to
the right concept, and among the nearest five. All is of the models as ``generate`` uses them: in
four steps where MODEL has few-step LoRAs.

Recipes called "at the size of" another row have as many bytes; rows "tuned" are the row before
them after TUNE steps. What is in OUT already is not made again.
"""

import argparse
import json
import platform
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from benchmarks.recall import read_rows
from snapgen_mlx.config import DiTConfig
from snapgen_mlx.evaluation import ranks, shares
from snapgen_mlx.files import folder_bytes, write_json
from snapgen_mlx.layout import COMPONENTS, load_config
from snapgen_mlx.quantization.backends import backend_of
from snapgen_mlx.quantization.calibration import Calibration, load_widths
from snapgen_mlx.quantization.quantize import quantize
from snapgen_mlx.quantization.recipe import (
    Recipe,
    design,
    quantizable,
    uniform,
)
from snapgen_mlx.quantization.sensitivity import measure
from snapgen_mlx.tensors.weights import load_infos
from snapgen_mlx.training.data import encode_images
from snapgen_mlx.training.pictures import read_folder

PAPER = 4.3  # bits


class Recall:
    """The gallery of real pictures and the prompts whose pictures are looked up in it."""

    def __init__(self, model: Path, data: Path, count: int):
        examples = [e for part in ("train", "heldout") for e in read_folder(data / part)]
        pipe = load_widths(model)[-1]
        s = pipe.settings("any")
        real = encode_images(pipe.vae, [e.file for e in examples], (s.height, s.width))
        self.real, self.concepts = real.reshape(len(real), -1), [e.concept for e in examples]
        rows = read_rows(data / "phrasings.jsonl")
        rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:count]]
        self.wanted = [row["concept"] for row in rows]
        self.prompts = Calibration.from_model(model, [row["text"] for row in rows], seed=2)

    def __call__(self, model: Path) -> dict[str, dict]:
        """Shares by width."""
        out = {}
        for pipe in load_widths(model):
            latents = np.array(self.prompts.latents(pipe)[1]).reshape(len(self.wanted), -1)
            out[pipe.variant] = shares(ranks(latents, self.wanted, self.real, self.concepts))
            pipe.free("dit")
        return out


def recipes(config: DiTConfig, shapes: dict, found: dict, backend: str) -> dict[str, Recipe]:
    """The rows of a backend by their titles."""
    make = partial(design, config, shapes, found)
    rows = {
        "uniform 8": uniform(config, shapes, 8),
        "uniform 4": uniform(config, shapes, 4),
        "density, at the size of uniform 4": make(4),
        f"mse {PAPER}": make(PAPER, "mse"),
        f"density {PAPER}": make(PAPER),
    }
    if backend == "palette":  # a scale and a bias for 32 weights are a bit for each
        rows[f"density, at the size of affine's {PAPER}"] = make(PAPER + 1)
    return rows


HEADER = """\
| | bits | on disk | transformer, MB | model, MB | PSNR, first | last step | recall, % | in 5, % |
|---|---|---|---|---|---|---|---|---|"""


def line(title: str, row: dict) -> str:
    part, psnr, recall = row["parts"]["transformer"], row["psnr"], row["recall"]
    widest = list(recall)[-1]
    last = " / ".join(f"{p['last step']:.1f}" for p in psnr.values())
    cells = [
        title,
        f"{row['bits']:.2f}",
        f"{part['bits_per_weight']:.2f}",
        f"{part['bytes'] / 1e6:.2f}",
        f"{row['bytes'] / 1e6:.2f}",
        f"{psnr[widest]['first step']:.1f}" if psnr else "",
        last,
        *(" / ".join(f"{100 * a[k]:.1f}" for a in recall.values()) for k in ("top1", "top5")),
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
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("-m", "--model", type=Path, default=Path("runs/embedded/model"))
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--tune", type=int, default=100, help="steps")
    parser.add_argument("--backends", nargs="+", default=["affine", "palette"])
    args = parser.parse_args()

    config = DiTConfig.from_dict(load_config(args.model / "transformer"))
    recall = Recall(args.model, args.data, args.count)
    path = args.out / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {}

    def row(title: str, make, folder: Path) -> None:
        if title not in results:
            results[title] = make() | {"recall": recall(folder)}
            write_json(path, results)
        print(line(title, results[title]), flush=True)

    s = load_widths(args.model)[-1].settings("any")
    print(
        f"{args.model.name}, {s.steps} steps, guidance {s.guidance:g}; recall of {args.count} "
        f"pictures; {platform.system()} {platform.machine()}\n\n{HEADER}"
    )
    row("float", partial(float_row, args.model), args.model)
    for backend in args.backends:
        form = backend_of(backend, config)
        shapes = quantizable(config, form.group)
        kept = args.out / f"{backend}.sensitivity.json"
        found = measure(args.model, form, Calibration.from_model(args.model), kept)
        for i, (title, recipe) in enumerate(recipes(config, shapes, found, backend).items()):
            for steps in (0, args.tune):
                folder = args.out / (f"{backend}-{i}" + "-tuned" * bool(steps))
                make = partial(quantize, args.model, folder, backend=backend, recipe=recipe)
                row(
                    f"{backend}: {title}" + ", tuned" * bool(steps),
                    partial(make, tuning=steps),
                    folder,
                )


if __name__ == "__main__":
    main()
