"""Scenes as latents with captions, in the shards that ``recipes.pretrain`` reads.

    python -m recipes.embedded.latents SPRITES VAE OUT --shards 0:16
    python -m recipes.embedded.latents SPRITES VAE OUT --heldout

Two of three shards after the first six have mostly large drawings, and more of places and of two
colours: these are learned last. A shard depends on its number alone, so more can be made at any
time, also while a training reads those that are there. What is there is not made again.
"""

import argparse
import hashlib
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from snapgen_mlx.errors import UsageError
from snapgen_mlx.files import atomic_write

from ..command import command
from ..precision import autocast
from .autoencoder import load_autoencoder
from .scenes import LARGER, World

SHARD = 4096  # scenes
FIXED = 1024  # scenes for validation, of held-out combinations and of others
BATCH = 32
FIRST = 6  # shards of all kinds of scenes


def encode(world: World, autoencoder, names: list[str], split: str) -> tuple[torch.Tensor, list]:
    """Latents (N, h, w, C) float16 and captions of the scenes whose seeds are ``names``.

    Single things have few pictures and many captions; a picture is encoded once.
    """
    captions, pictures = [], []
    latents: dict[bytes, torch.Tensor] = {}  # by the picture's digest
    waiting: dict[bytes, np.ndarray] = {}
    for i, name in enumerate(names, 1):
        scene = world.scene(random.Random(name), split)
        captions.append(scene.caption)
        pictures.append(digest := hashlib.sha1(scene.image.data).digest())
        if digest not in latents:
            waiting[digest] = scene.image
        if waiting and (len(waiting) == BATCH or i == len(names)):
            x = torch.from_numpy(np.stack(list(waiting.values())))
            x = x.permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.no_grad(), autocast():
                z = autoencoder.encode(x.contiguous(memory_format=torch.channels_last))
            latents |= zip(waiting, z.permute(0, 2, 3, 1).half(), strict=True)
            waiting = {}
    return torch.stack([latents[picture] for picture in pictures]), captions


def write(folder: Path, name: str, latents: torch.Tensor, captions: list[str]) -> None:
    """One shard; the file that a reader looks for last is complete when it appears."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / f"{name}.json") as tmp:
        tmp.write_text(json.dumps(captions, indent=0) + "\n", "utf-8")
    with atomic_write(folder / f"{name}.safetensors") as tmp:
        save_file({"latents": latents}, tmp)


def span(text: str) -> range:
    """'4:8' -> range(4, 8)."""
    first, _, last = text.partition(":")
    try:
        return range(int(first), int(last))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a span such as 0:16") from None


@command
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sprites", type=Path, help="folder of recipes.embedded.sprites")
    parser.add_argument("vae", type=Path, help="folder of recipes.embedded.autoencoder")
    parser.add_argument("out", type=Path, help="folder of shards")
    parser.add_argument("--shards", type=span, default=range(0), help="numbers, such as 0:16")
    parser.add_argument("--heldout", action="store_true", help="make the two shards for validation")
    args = parser.parse_args(argv)
    if not args.shards and not args.heldout:
        raise UsageError("say what to make: --shards 0:16, --heldout, or both")
    world, autoencoder = World.load(args.sprites), load_autoencoder(args.vae)
    larger = World(world.sprites, LARGER)
    fixed = [("validation", FIXED, "train"), ("heldout", FIXED, "heldout")]
    jobs = [(*job, world) for job in fixed] if args.heldout else []
    for i in args.shards:
        of = larger if i >= FIRST and i % 3 < 2 else world
        jobs.append((f"shard-{i:05d}", SHARD, "train", of))
    for name, size, split, of in jobs:
        if (args.out / f"{name}.safetensors").exists():
            continue
        seeds = [f"{name}/{i}" for i in range(size)]
        write(args.out, name, *encode(of, autoencoder, seeds, split))
        print(f"{name}: {size} scenes", flush=True)


if __name__ == "__main__":
    sys.exit(main())
