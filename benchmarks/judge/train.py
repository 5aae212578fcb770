"""Train the judge, or train it further: under 30 minutes of two cores.

    python -m benchmarks.judge.train SPRITES VAE OUT

SPRITES and VAE are folders of ``recipes.embedded.sprites`` and ``recipes.embedded.autoencoder``.
OUT keeps the scenes and the states; a second call goes on where the first one stopped. At the end
the weights are written to ``snapgen_mlx/assets/judge``. No generated picture is ever looked at.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from recipes.command import command
from recipes.embedded.autoencoder import load_autoencoder
from recipes.embedded.scenes import World
from snapgen_mlx.files import atomic_write, write_json
from snapgen_mlx.judge import FOLDER, NAMES_FILE
from snapgen_mlx.tensors.weights import SINGLE as WEIGHTS

from . import detecting, recognizing
from .muon import optimizers
from .network import JudgeNetworks, calibrate, export
from .scenes import Labels, load, save

SCENES = {"plain": 6144, "crowded": 3072}
STEPS = {"detector": 1000, "recognizer": 900}
LESSONS = {"detector": detecting, "recognizer": recognizing}
WARMUP = 30  # steps
LOG_EVERY, SAVE_EVERY = 50, 100  # steps


def train(
    model: nn.Module, lesson, sets: detecting.Sets, path: Path, steps: int
) -> Iterator[dict[str, float]]:
    """Train a network up to a step, from its state at ``path``; yields its losses now and then.

    Args:
        lesson: module with ``batch`` and ``losses``.
    """
    both = optimizers(model.to(memory_format=torch.channels_last))
    rates = [optimizer.param_groups[0]["lr"] for optimizer in both]
    step = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(both, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        step = state["step"]
    model.train()
    sums, started = {}, time.monotonic()
    while step < steps:
        found = lesson.losses(model, *lesson.batch(sets, step))
        model.zero_grad()
        sum(value for value in found.values() if value.requires_grad).backward()
        for optimizer, rate in zip(both, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * min((step + 1) / WARMUP, 1 - step / steps)
            optimizer.step()
        step += 1
        for name, value in found.items():
            sums[name] = sums.get(name, 0) + value.item()
        if step % SAVE_EVERY == 0 or step == steps:
            with atomic_write(path) as temporary:
                kept = [optimizer.state_dict() for optimizer in both]
                whole = {"model": model.state_dict(), "optimizers": kept, "step": step}
                torch.save(whole, temporary)
        if step % LOG_EVERY == 0:
            means = {name: value / LOG_EVERY for name, value in sums.items()}
            yield {"step": step, **means, "seconds": (time.monotonic() - started) / LOG_EVERY}
            sums, started = {}, time.monotonic()


@command
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sprites", type=Path, help="folder of recipes.embedded.sprites")
    parser.add_argument("vae", type=Path, help="folder of recipes.embedded.autoencoder")
    parser.add_argument("out", type=Path, help="folder of the scenes and of the states")
    args = parser.parse_args(argv)
    world, autoencoder = World.load(args.sprites), load_autoencoder(args.vae)
    save(world, autoencoder, args.out / "scenes", SCENES)
    sets = {kind: load(args.out / "scenes", kind, n) for kind, n in SCENES.items()}
    torch.manual_seed(0)
    networks = JudgeNetworks()
    for name, network in networks.named_children():
        path = args.out / f"{name}.pt"
        for record in train(network, LESSONS[name], sets, path, STEPS[name]):
            print(name, *(f"{k} {v:.4g}" for k, v in record.items()), flush=True)
    calibrate(networks)
    export(networks.eval(), FOLDER / WEIGHTS)
    labels = Labels(world)
    names = {"name": labels.names, "color": labels.colors, "style": labels.styles}
    write_json(FOLDER / NAMES_FILE, names)


if __name__ == "__main__":
    sys.exit(main())
