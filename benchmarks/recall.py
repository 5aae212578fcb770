"""Recall of known drawings: does a model draw what it has seen, in the same place?

    python -m benchmarks.recall DATA [-m MODEL] [--lora FILE] [--count 200] [--json FILE]

DATA is the folder that ``recipes.embedded.data`` writes. As ``snapgen-mlx eval``, but pictures
are drawn from held-out phrasings, and from held-out (concept, style) pairs, and compared with all
real pictures of DATA, by autoencoder latents. Printed for each variant: share with the prompted
concept first, and among the first five; of phrasings also by their kind ("template": other words
around a known caption; "words": other words for the thing), of pairs also with concept and style
right together. Then chance; the ceiling, real held-out pictures sent through the autoencoder; and
the same moved by six pixels: they show the same and fail, so this is no measure of composing.
``benchmarks/judge`` has one.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from snapgen_mlx.evaluation import chance, draw_latents, ranks, shares
from snapgen_mlx.pipeline import Pipeline
from snapgen_mlx.training.data import encode_images
from snapgen_mlx.training.pictures import read_folder

BATCH = 50


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("-m", "--model")
    parser.add_argument("--lora")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--variants", nargs="+", default=["tiny", "small", "full"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    pipe = Pipeline.load(args.model)
    examples = [e for part in ("train", "heldout") for e in read_folder(args.data / part)]
    latents = encode_images(pipe.vae, [e.file for e in examples], (128, 128))
    real, concepts = latents.reshape(len(latents), -1), [e.concept for e in examples]
    n = len(set(concepts))
    rng = np.random.default_rng(0)
    phrasings = read_rows(args.data / "phrasings.jsonl")
    pairs = read_rows(args.data / "heldout" / "metadata.jsonl")
    sets = {
        name: [rows[i] for i in rng.permutation(len(rows))[: args.count]]
        for name, rows in (("phrasings", phrasings), ("pairs", pairs))
    }
    result = {"machine": f"{platform.system()} {platform.machine()}", "concepts": n}
    result["chance"] = chance(n)

    z = mx.array(latents[-len(pairs) :])
    again = [pipe.vae.encode(pipe.vae.decode(z[i : i + BATCH])) for i in range(0, len(z), BATCH)]
    again = np.array(mx.concatenate(again)).reshape(len(z), -1)
    result["ceiling"] = shares(ranks(again, concepts[-len(z) :], real, concepts))
    held = [e.file for e in examples[-len(pairs) :]]
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in held])
    x = mx.array(np.roll(pixels, 6, axis=2)).astype(mx.float32) / 127.5 - 1
    moved = [pipe.vae.encode(x[i : i + BATCH]) for i in range(0, len(x), BATCH)]
    moved = np.array(mx.concatenate(moved)).reshape(len(x), -1)
    result["moved"] = shares(ranks(moved, concepts[-len(z) :], real, concepts))
    train = read_rows(args.data / "train" / "metadata.jsonl")
    drawings = [f"{row['concept']} {row['style']}" for row in (*train, *pairs)]

    for variant in args.variants:
        loras = [(args.lora, 1.0)] if args.lora else []
        pipe = Pipeline.load(args.model, variant, loras=loras)
        result[variant] = {}
        for name, rows in sets.items():
            started = time.perf_counter()
            jobs = [
                pipe.settings(row["text"], seed=i, steps=args.steps, guidance=args.guidance)
                for i, row in enumerate(rows)
            ]
            result |= {"steps": jobs[0].steps, "guidance": jobs[0].guidance}
            pipe.prepare(jobs)
            latents = draw_latents(pipe, jobs)
            wanted = [row["concept"] for row in rows]
            found = shares(ranks(latents, wanted, real, concepts))
            for kind in sorted({row["kind"] for row in rows if "kind" in row}):
                of_kind = [i for i, row in enumerate(rows) if row["kind"] == kind]
                theirs = [wanted[i] for i in of_kind]
                found[kind] = shares(ranks(latents[of_kind], theirs, real, concepts))
            if name == "pairs":
                both = [f"{row['concept']} {row['style']}" for row in rows]
                found["with_style"] = shares(ranks(latents, both, real, drawings))
            seconds = round(time.perf_counter() - started, 1)
            result[variant][name] = found | {"pictures": len(jobs), "seconds": seconds}
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
