"""Train the judge, or train it further: under 30 minutes of two cores.

    python -m benchmarks.judge.train SPRITES VAE OUT

SPRITES and VAE are folders of ``recipes.embedded.sprites`` and ``recipes.embedded.autoencoder``.
OUT keeps the scenes and the states; a second call goes on where the first one stopped. At the end
the weights are written to ``snapgen_mlx/assets/judge``. No generated picture is ever looked at.
With --further the shipped networks, or those that are named, are trained from their weights.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from recipes.command import command
from recipes.embedded.autoencoder import load_autoencoder
from recipes.embedded.scenes import VARIED, World
from snapgen_mlx.files import atomic_write, write_json
from snapgen_mlx.judge import FOLDER, NAMES_FILE
from snapgen_mlx.tensors.weights import SINGLE as WEIGHTS

from . import detecting, recognizing
from .muon import optimizers
from .network import JudgeNetworks, calibrate, export, unfold
from .scenes import Labels, load, save

SCENES = {"plain": 6144, "crowded": 4096}
STEPS = {"detector": 1000, "recognizer": 900}
LESSONS = {"detector": detecting, "recognizer": recognizing}
# Of the shipped networks: steps, and Adam's learning rate.
FURTHER = {"detector": (500, 5e-4), "recognizer": (1500, 1e-3)}
WARMUP = 30  # steps
LOG_EVERY, SAVE_EVERY = 50, 100  # steps


def learn(
    model: nn.Module, lesson, sets: detecting.Sets, optimizers: list, steps: range, save=None
) -> Iterator[dict[str, float]]:
    """Train a network; yields its losses now and then.

    Args:
        lesson: module with ``batch`` and ``losses``.
        steps: numbers of the steps that are left; the learning rates fall to 0 at their end.
        save: is called with the number of steps done, now and then and at the end.
    """
    sums, started = {}, time.monotonic()
    for step in steps:
        found = lesson.losses(model, *lesson.batch(sets, step))
        model.zero_grad()
        sum(value for value in found.values() if value.requires_grad).backward()
        for optimizer in optimizers:
            share = min((step + 1) / WARMUP, 1 - step / steps.stop)
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * share
            optimizer.step()
        for name, value in found.items():
            sums[name] = sums.get(name, 0) + value.item()
        done = step + 1
        if save and (done % SAVE_EVERY == 0 or done == steps.stop):
            save(done)
        if done % LOG_EVERY == 0:
            means = {name: value / LOG_EVERY for name, value in sums.items()}
            yield {"step": done, **means, "seconds": (time.monotonic() - started) / LOG_EVERY}
            sums, started = {}, time.monotonic()


def train(
    model: nn.Module, lesson, sets: detecting.Sets, path: Path, steps: int
) -> Iterator[dict[str, float]]:
    """Train a network up to a step, from its state at ``path``; yields its losses now and then."""
    both = optimizers(model.to(memory_format=torch.channels_last))
    done = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(both, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        done = state["step"]

    def save(step: int) -> None:
        with atomic_write(path) as temporary:
            kept = [optimizer.state_dict() for optimizer in both]
            torch.save({"model": model.state_dict(), "optimizers": kept, "step": step}, temporary)

    yield from learn(model.train(), lesson, sets, both, range(done, steps), save)


def train_further(
    model: nn.Module, lesson, sets: detecting.Sets, steps: int, rate: float
) -> Iterator[dict[str, float]]:
    """Train a shipped network; its normalisation stays as it was folded."""
    adam = torch.optim.AdamW(model.parameters(), rate, (0.9, 0.99), weight_decay=0.0)
    yield from learn(model.eval(), lesson, sets, [adam], range(steps))


@command
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sprites", type=Path, help="folder of recipes.embedded.sprites")
    parser.add_argument("vae", type=Path, help="folder of recipes.embedded.autoencoder")
    parser.add_argument("out", type=Path, help="folder of the scenes and of the states")
    parser.add_argument("--further", choices=LESSONS, nargs="*", help="shipped networks to train")
    args = parser.parse_args(argv)
    world, autoencoder = World.load(args.sprites, VARIED), load_autoencoder(args.vae)
    save(world, autoencoder, args.out / "scenes", SCENES)
    sets = {kind: load(args.out / "scenes", kind, n) for kind, n in SCENES.items()}
    torch.manual_seed(0)
    networks = JudgeNetworks()
    further = args.further is not None
    if further:
        unfold(networks, load_file(FOLDER / WEIGHTS))
        calibrate(networks, back=True)
        nn.init.zeros_(networks.detector.guess.weight)  # it is not shipped
    for name in args.further or LESSONS:
        network, lesson = getattr(networks, name), LESSONS[name]
        if further:
            records = train_further(network, lesson, sets, *FURTHER[name])
        else:
            records = train(network, lesson, sets, args.out / f"{name}.pt", STEPS[name])
        for record in records:
            print(name, *(f"{k} {v:.4g}" for k, v in record.items()), flush=True)
    calibrate(networks)
    export(networks.eval(), FOLDER / WEIGHTS)
    labels = Labels(world)
    names = {"name": labels.names, "color": labels.colors, "style": labels.styles}
    write_json(FOLDER / NAMES_FILE, names)


if __name__ == "__main__":
    sys.exit(main())
