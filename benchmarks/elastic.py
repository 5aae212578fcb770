"""Elastic against standalone training, in small (the paper's Table 1).

    python -m benchmarks.elastic DATA OUT [--seeds 3] [--steps 400] [--arms elastic] [--fine-tune]

DATA is the folder that ``recipes.embedded.data`` writes; the embedded model's autoencoder and
text encoder read it. Each arm trains a transformer once per seed: all from the same weights, on
the same batches, noise and timesteps, for the same number of steps. It is a small one, from random
weights; with --fine-tune it is the embedded model's own, from its weights as shipped.

- ``elastic``: all widths in one run;
- ``standalone-WIDTH``: one width as a model of its own, from its slice of the same weights;
- ``unscaled``: elastic without adaptive scaling; ``undistilled``: elastic without L_dist (Eq. 5).

Printed, and written to OUT/results.json with every figure behind it: each width's validation loss
(averaged weights, fixed noise) and its difference from standalone training, and the bytes of
weights and optimizer and the seconds of one elastic run against the three standalone ones. The
runs lie in OUT/ARM-SEED; what is done is not done again. --arms names the elastic ones to train.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from snapgen_mlx.cli.arguments import encoded
from snapgen_mlx.config import DiTConfig
from snapgen_mlx.files import write_json
from snapgen_mlx.hub import embedded_model
from snapgen_mlx.loading import load_dit_config, load_float_supernet
from snapgen_mlx.models.elastic import random_supernet, slice_flat
from snapgen_mlx.training.data import LatentDataset
from snapgen_mlx.training.elastic_trainer import ElasticOptions, ElasticTrainer
from snapgen_mlx.training.encoding import encode_data
from snapgen_mlx.training.loop import LOG, RunOptions, fixed_batches, train
from snapgen_mlx.training.pictures import read_folder

WIDTHS = ["tiny", "small", "full"]
STANDALONE = [f"standalone-{name}" for name in WIDTHS]
ELASTIC = {"elastic": {}, "unscaled": {"adaptive": False}, "undistilled": {"distill": 0.0}}
ROUNDS = 15  # of timing; the median counts


def geometry(hidden: int) -> DiTConfig:
    """Of the paper's widths, with ``hidden`` channels in 8 heads and four layers.

    It reads and predicts what the embedded model does: the same texts, latents and patches.
    """
    own = load_dit_config(embedded_model())
    ends = dict(in_channels=own.in_channels, patch_size=own.patch_size, text_dims=own.text_dims)
    sizes = dict(hidden_size=hidden, head_dim=hidden // 8, num_heads=8, num_kv_heads=8)
    return DiTConfig(
        **ends, **sizes, cross_kv_heads=4, caption_dim=hidden, layers=[1, 2, 1], bna_blocks=4
    )


def read_data(data: Path, cache: Path) -> list[LatentDataset]:
    """The pictures to train on and the held-out ones, as latents with captions."""

    def encode():
        sets.extend((yield from encode_data(embedded_model(), parts, cache)))

    sets: list[LatentDataset] = []
    parts = [read_folder(data / part) for part in ("train", "heldout")]
    for record in encode():
        print(encoded(record), flush=True)
    return sets


def make_trainer(arm: str, config: DiTConfig, params: dict, options: dict) -> ElasticTrainer:
    """Of one arm, from the supernet ``params``."""
    if arm in STANDALONE:
        index = STANDALONE.index(arm)
        config, params = config.variant(index), slice_flat(params, config, index)
    return ElasticTrainer(config, params, ElasticOptions(**options, **ELASTIC.get(arm, {})))


def validation_losses(run: Path) -> dict[str, float]:
    """Loss by width of a run that is done."""
    last = json.loads((run / LOG).read_text().splitlines()[-1])
    return {k.split("/")[1]: v for k, v in last.items() if k.startswith("val/")}


def state_bytes(trainer: ElasticTrainer) -> int:
    """Bytes of weights and optimizer state."""
    kept = ("params/", "opt/")
    return sum(a.nbytes for k, a in trainer.state().items() if k.startswith(kept))


def seconds_per_step(trainers: dict[str, ElasticTrainer], data, batch: int) -> dict[str, float]:
    """Median seconds of a step, for an elastic trainer over one step with each subnet.

    The trainers take turns, so that whatever else runs on the machine slows all alike.
    """
    rng = np.random.default_rng(0)
    x0, text, masks = data.batch(rng, batch)
    seconds = {arm: [] for arm in trainers}
    for _ in range(1 + ROUNDS):
        for arm, trainer in trainers.items():
            noise, _ = trainer.draw(rng, mx.random.key(0), x0.shape)
            steps = [[i] for i in range(trainer.full)] or [[], []]
            started = time.perf_counter()
            for subnets in steps:
                trainer.step(x0, text, masks, noise, subnets)
            seconds[arm].append((time.perf_counter() - started) / len(steps))
    # The first round compiles.
    return {arm: float(np.median(s[1:])) for arm, s in seconds.items()}


def cost(config: DiTConfig, params: dict, options: dict, data: LatentDataset, batch: int) -> dict:
    """Bytes of weights and optimizer state, and seconds per step, of elastic and standalone."""
    trainers = {a: make_trainer(a, config, params, options) for a in ["elastic", *STANDALONE]}
    size = {arm: state_bytes(trainer) for arm, trainer in trainers.items()}
    return {"bytes": size, "seconds": seconds_per_step(trainers, data, batch)}


def cost_lines(size: dict, seconds: dict) -> list[str]:
    """An elastic run against the three standalone ones, in bytes and in seconds."""
    tiny, small, full = (seconds[arm] for arm in STANDALONE)
    m = (tiny + small) / 2 / full
    expected = (1 + m) / (1 + 2 * m)
    time_ratio = seconds["elastic"] / (tiny + small + full)
    size_ratio = size["elastic"] / sum(size[arm] for arm in STANDALONE)
    return [
        f"Weights and optimizer: {size_ratio:.3f} of the three standalone runs'.",
        f"Time: {time_ratio:.3f} of theirs; (1+m)/(1+2m) = {expected:.3f} with m = {m:.3f}, "
        f"so {100 * (time_ratio / expected - 1):+.1f} %.",
    ]


def table(losses: dict[str, list[dict]], before: dict[str, float]) -> list[str]:
    """Rows of validation losses by arm: mean ± standard deviation over seeds, and the mean
    difference from the standalone run of the same seed; ``before``, those of trained weights."""
    alone = {name: np.array([r[name] for r in losses[f"standalone-{name}"]]) for name in WIDTHS}
    rows = [["", *WIDTHS]]
    if before:
        rows.append(["before", *(f"{before[name]:.4f}" for name in WIDTHS)])
    rows.append(["standalone", *(f"{a.mean():.4f} ± {a.std():.4f}" for a in alone.values())])
    for arm in [arm for arm in ELASTIC if arm in losses]:
        row = [arm]
        for name, a in alone.items():
            own = np.array([r[name] for r in losses[arm]])
            worse = 100 * (own / a - 1)
            row.append(
                f"{own.mean():.4f} ± {own.std():.4f} ({worse.mean():+.2f} ± {worse.std():.2f} %)"
            )
        rows.append(row)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--hidden", type=int, default=96, help="channels of the small model, a multiple of 32"
    )
    parser.add_argument("--learning-rate", type=float, help="3e-3, or 5e-4 with --fine-tune")
    parser.add_argument("--arms", nargs="+", choices=ELASTIC, default=list(ELASTIC))
    parser.add_argument("--fine-tune", action="store_true", help="from the embedded model")
    args = parser.parse_args()

    if args.fine_tune:
        rate = 5e-4
        config, params = load_float_supernet(embedded_model())
    else:
        rate = 3e-3
        config = geometry(args.hidden)
    options = {"learning_rate": args.learning_rate or rate, "steps": args.steps}
    options["warmup"] = min(100, args.steps // 10)
    data, held_out = read_data(args.data, args.out / "cache")
    losses = {arm: [] for arm in [*STANDALONE, *args.arms]}
    for seed in range(args.seeds):
        if not args.fine_tune:
            mx.random.seed(seed)
            params = random_supernet(config)
        for arm in losses:
            run = args.out / f"{arm}-{seed}"
            trainer = make_trainer(arm, config, params, options)
            each = dict(log_every=max(args.steps // 10, 1), validate_every=args.steps)
            of_run = RunOptions(batch=args.batch, seed=seed, **each)
            for record in train(trainer, data, run, of_run, held_out):
                print(arm, seed, f"step {record['step']}", flush=True)
            losses[arm].append(validation_losses(run))

    before = {}
    if args.fine_tune:
        trainer = make_trainer("elastic", config, params, options)
        found = trainer.validate(list(fixed_batches(held_out, args.batch)))
        before = {k.removeprefix("val/"): v for k, v in found.items()}
    costs = args.out / "cost.json"
    if not costs.exists():
        write_json(costs, cost(config, params, options, data, args.batch))
    costs = json.loads(costs.read_text())
    lines = [*table(losses, before), "", *cost_lines(costs["bytes"], costs["seconds"])]
    print("\n".join(lines))
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    of = {k: str(v) for k, v in vars(args).items()}
    results = {"machine": machine, **of, "before": before, "losses": losses, **costs}
    write_json(args.out / "results.json", results)


if __name__ == "__main__":
    main()
