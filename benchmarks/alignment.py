"""Does the picture show what was asked? Nearest real picture in autoencoder latents.

    python -m benchmarks.alignment DATA [-m MODEL] [--count 200] [--json FILE]

DATA is the folder that ``benchmarks.embedded.data`` writes. For each variant, pictures of held-out
phrasings, and of held-out (concept, style) pairs, are compared with all real pictures of DATA by
squared distance of their latents; a picture's concepts are ranked by their nearest real picture.
Printed: share with the prompted concept first, and among the first five; chance; and the ceiling,
real held-out pictures sent through the autoencoder.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from snapgen_mlx.pipeline import Pipeline
from snapgen_mlx.sampling import denoise, schedule
from snapgen_mlx.training.data import encode_images

BATCH = 50


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def gallery(vae, data: Path) -> tuple[np.ndarray, list[str]]:
    """Flat latents (N, D) of all real pictures and their concepts."""
    latents, concepts = [], []
    for part in ("train", "heldout"):
        rows = read_rows(data / part / "metadata.jsonl")
        latents.append(encode_images(vae, [data / part / r["file_name"] for r in rows], (128, 128)))
        concepts += [r["concept"] for r in rows]
    latents = np.concatenate(latents)
    return latents.reshape(len(latents), -1), concepts


def ranks(latents: np.ndarray, wanted: list[str], real: np.ndarray, concepts: list[str]):
    """Rank (from 0) of each picture's wanted concept among all concepts."""
    names = sorted(set(concepts))
    column = np.array([names.index(c) for c in concepts])
    out = []
    for z, want in zip(latents, wanted, strict=True):
        distance = ((real - z) ** 2).sum(1)
        nearest = np.full(len(names), np.inf)
        np.minimum.at(nearest, column, distance)
        out.append(int((nearest < nearest[names.index(want)]).sum()))
    return np.array(out)


def generate_latents(pipe: Pipeline, prompts: list[str], steps: int, guidance: float, shift: float):
    """Latents (N, D) of prompts, picture i from seed 0's noise number i."""
    out = []
    for i in range(0, len(prompts), BATCH):
        texts = prompts[i : i + BATCH]
        text, masks = pipe.encode(texts)
        noise = mx.random.normal((len(texts), 16, 16, 16), key=mx.random.key(i))
        for step in denoise(pipe.dit, noise, text, masks, schedule(steps, shift), guidance):
            mx.eval(step.x)
        out.append(np.array(step.x).reshape(len(texts), -1))
    return np.concatenate(out)


def shares(r: np.ndarray) -> dict:
    return {"top1": float((r < 1).mean()), "top5": float((r < 5).mean()), "pictures": len(r)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("-m", "--model")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--variants", nargs="+", default=["tiny", "small", "full"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    pipe = Pipeline.load(args.model)
    real, concepts = gallery(pipe.vae, args.data)
    n = len(set(concepts))
    rng = np.random.default_rng(0)
    phrasings = read_rows(args.data / "phrasings.jsonl")
    pairs = read_rows(args.data / "heldout" / "metadata.jsonl")
    sets = {
        name: [rows[i] for i in rng.permutation(len(rows))[: args.count]]
        for name, rows in (("phrasings", phrasings), ("pairs", pairs))
    }
    result = {"machine": f"{platform.system()} {platform.machine()}", "concepts": n}
    result["chance"] = {"top1": 1 / n, "top5": min(5 / n, 1)}

    images = [args.data / "heldout" / r["file_name"] for r in sets["pairs"]]
    z = mx.array(encode_images(pipe.vae, images, (128, 128)))
    again = [pipe.vae.encode(pipe.vae.decode(z[i : i + BATCH])) for i in range(0, len(z), BATCH)]
    again = np.array(mx.concatenate(again)).reshape(len(z), -1)
    wanted = [r["concept"] for r in sets["pairs"]]
    result["ceiling"] = shares(ranks(again, wanted, real, concepts))

    for variant in args.variants:
        pipe = Pipeline.load(args.model, variant)
        s = pipe.settings("-", steps=args.steps, guidance=args.guidance)
        result |= {"steps": s.steps, "guidance": s.guidance}
        result[variant] = {}
        for name, rows in sets.items():
            started = time.perf_counter()
            prompts = [r["text"] for r in rows]
            latents = generate_latents(pipe, prompts, s.steps, s.guidance, s.shift)
            r = ranks(latents, [row["concept"] for row in rows], real, concepts)
            result[variant][name] = shares(r)
            result[variant][name]["seconds"] = round(time.perf_counter() - started, 1)
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
