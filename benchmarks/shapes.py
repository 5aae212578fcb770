"""What the transformer's shape costs, each as one table with ratios:

    python -m benchmarks.shapes ablation          the paper's variants A to D (Fig. 3)
    python -m benchmarks.shapes tokens            ASSA and dense attention from 512² to 2048² pixels
    python -m benchmarks.shapes neighbourhood     blocks B and radius r of ASSA (supplement D)

Weights are random. The contestants of a table take turns, so that whatever else runs on the machine
slows all alike; the first round warms up. "cost" is seconds over counted operations, as a part of
the first row's: above 1, an operation costs more than there. --loss also trains each
neighbourhood on the same toy pictures, in which far and near tokens matter.
"""

import argparse
import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from snapgen_mlx.config import DiTConfig
from snapgen_mlx.device import usable_memory
from snapgen_mlx.flops import step_flops
from snapgen_mlx.memory import attention_scores
from snapgen_mlx.models.dit import DiT
from snapgen_mlx.models.elastic import random_supernet
from snapgen_mlx.models.sizes import parameter_count
from snapgen_mlx.training.elastic_trainer import ElasticOptions, ElasticTrainer

TEXT = 77  # tokens
DENSE = ["dense", "dense", "dense"]
PLAIN = {"attention": DENSE, "mid_skips": False, "num_kv_heads": 1, "ffn_ratio": [3, 3, 3]}
STAGES = {"layers": [6, 14, 8]}
ABLATION = {
    "A: dense, one stage": PLAIN | {"downsample": False, "layers": [0, 28, 0]},
    "B: three stages": PLAIN | STAGES,
    "C: ASSA": PLAIN | STAGES | {"attention": ["assa", "dense", "assa"]},
    "D: skips, heads, wider, moved layers": {},
}
NEIGHBOURHOODS = [(blocks, radius) for blocks in (4, 8, 16, 32) for radius in (0, 1, 2)]


def evaluation(config: DiTConfig, size: int) -> tuple[Callable[[], None], DiT]:
    """A step on a picture of ``size`` pixels a side, with its conditions computed before, and its
    network of random weights."""
    dit = DiT(config)
    dit.final.proj.weight = mx.random.normal(dit.final.proj.weight.shape) * 0.02
    name, dim = next(iter(config.text_dims.items()))
    condition = dit.condition_text({name: mx.random.normal((1, TEXT, dim))}, None, 1)
    times = dit.condition_time(mx.array([0.5]))
    x = mx.random.normal((1, size // 8, size // 8, config.in_channels))
    mx.eval(dit.parameters(), condition.keys_values, condition.mask, x)
    return lambda: mx.eval(dit.denoise(x, times, condition)), dit


def take_turns(work: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(1 + rounds):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def table(configs: dict[str, DiTConfig], size: int, rounds: int) -> list[list[str]]:
    """A row for each: parameters, operations, seconds, and ratios to the first."""
    work = {name: evaluation(config, size)[0] for name, config in configs.items()}
    seconds = take_turns(work, rounds)
    side = size // 8
    flops = {name: step_flops(c, (side, side), TEXT) for name, c in configs.items()}
    first = next(iter(configs))
    rows = []
    for name, config in configs.items():
        time_ratio, work_ratio = seconds[name] / seconds[first], flops[name] / flops[first]
        cells = [f"{parameter_count(DiT(config)) / 1e6:.0f} M", f"{flops[name] / 1e9:.1f}"]
        cells += [f"{seconds[name]:.3g}", f"{time_ratio:.2f}", f"{time_ratio / work_ratio:.2f}"]
        rows.append([name, *cells])
    return rows


HEAD = ["", "parameters", "GFLOP", "seconds", "time", "cost"]


def print_rows(rows: list[list[str]]) -> None:
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def ablation(base: DiTConfig, args) -> None:
    print_rows([HEAD, ["---"] * len(HEAD)])
    configs = {k: dataclasses.replace(base, **change) for k, change in ABLATION.items()}
    print_rows(table(configs, args.sizes[0], args.rounds))


def scores_fit(config: DiTConfig, n: int) -> bool:
    """Whether two copies of the first stage's scores over n tokens fit into memory."""
    return 8 * config.num_heads * attention_scores(config, 0, n) < usable_memory()


def tokens(base: DiTConfig, args) -> None:
    """One layer in each stage: the whole network differs only by a factor.

    "-" stands for what does not fit into memory.
    """
    base = dataclasses.replace(base, layers=[1, 1, 1])
    head = ["pixels", "tokens", "ASSA, s", "dense, s", "ASSA, µs a token", "dense, µs a token"]
    print_rows([[*head, "ASSA / dense", "of operations"], ["---"] * (len(head) + 2)])
    for size in args.sizes:
        both = {"assa": base, "dense": dataclasses.replace(base, attention=DENSE)}
        n = (size // 8 // base.patch_size) ** 2
        fitting = {name: config for name, config in both.items() if scores_fit(config, n)}
        work = {name: evaluation(config, size)[0] for name, config in fitting.items()}
        seconds = take_turns(work, args.rounds)
        flops = {k: step_flops(c, (size // 8, size // 8), TEXT) for k, c in both.items()}
        times = [seconds.get(name) for name in both]
        cells = [f"{size}²", str(n), *(f"{s:.3g}" if s else "-" for s in times)]
        cells += [f"{1e6 * s / n:.3g}" if s else "-" for s in times]
        ratio = f"{seconds['assa'] / seconds['dense']:.2f}" if all(times) else "-"
        print_rows([[*cells, ratio, f"{flops['assa'] / flops['dense']:.2f}"]])


def neighbourhood(base: DiTConfig, args) -> None:
    base = dataclasses.replace(base, layers=[1, 1, 1])
    configs = {
        f"B {blocks}, r {radius}": dataclasses.replace(base, bna_blocks=blocks, bna_radius=radius)
        for blocks, radius in NEIGHBOURHOODS
    }
    rows = table(configs, args.sizes[0], args.rounds)
    head = HEAD
    if args.loss:
        mx.disable_compile()  # which would take longer than so small a training
        head = [*HEAD, "validation loss"]
        for row, (blocks, radius) in zip(rows, NEIGHBOURHOODS, strict=True):
            row.append(f"{validation_loss(blocks, radius, args.steps):.4f}")
    print_rows([head, ["---"] * len(head), *rows])


def toy_pictures(rng: np.random.Generator, count: int, side: int = 16) -> mx.array:
    """Latents (count, side, side, 4): a plane wave that spans the picture, times small squares."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    waves = rng.uniform(0.2, 0.8, (2, count, 1, 1)).astype(np.float32)
    far = np.sin(waves[0] * x + waves[1] * y)
    near = rng.choice([-1.0, 1.0], (count, side // 2, side // 2)).repeat(2, 1).repeat(2, 2)
    channels = [far, near * far, near, -far]
    return mx.array(np.stack(channels, axis=-1).astype(np.float32))


def validation_loss(blocks: int, radius: int, steps: int) -> float:
    """Of a small model with this neighbourhood, trained from the same start as all others."""
    mx.random.seed(0)
    sizes = {"hidden_size": 64, "head_dim": 16, "num_heads": 4, "num_kv_heads": 4}
    text = {"cross_kv_heads": 4, "caption_dim": 32, "text_dims": {"none": 8}}
    config = DiTConfig(
        **sizes, **text, in_channels=4, patch_size=1, layers=[1, 1, 1], ffn_ratio=[2, 2, 2],
        bna_blocks=blocks, bna_radius=radius, widths=[1.0],
    )  # fmt: skip
    options = ElasticOptions(learning_rate=2e-3, warmup=20, steps=steps)
    trainer = ElasticTrainer(config, random_supernet(config), options)
    for step in range(steps):
        x0 = toy_pictures(np.random.default_rng(step), 8)
        noise, _ = trainer.draw(np.random.default_rng(step), mx.random.key(step), x0.shape)
        trainer.step(x0, {}, {}, noise, [])
    held_out = toy_pictures(np.random.default_rng(10**6), 64)
    eps = mx.random.normal(held_out.shape, key=mx.random.key(1))
    losses = trainer.validate([(held_out, eps, mx.linspace(0.05, 0.95, 64), {}, {})])
    return next(iter(losses.values()))


TABLES = {"ablation": ablation, "tokens": tokens, "neighbourhood": neighbourhood}
SIZES = {"ablation": [512], "tokens": [512, 1024, 1536, 2048], "neighbourhood": [1024]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--geometry", default="tiny", choices=["full", "small", "tiny"])
    parser.add_argument("--sizes", type=int, nargs="+", help="pixels a side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loss", action="store_true", help="neighbourhood: train each one")
    parser.add_argument("--steps", type=int, default=100, help="of these trainings")
    args = parser.parse_args()
    args.sizes = args.sizes or SIZES[args.table]
    base = DiTConfig.from_preset(args.geometry)
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    size = f", {args.sizes[0]}²" if args.table != "tokens" else ""
    print(f"{args.geometry}{size}, float32, {mx.default_device()}; {machine}\n")
    TABLES[args.table](base, args)


if __name__ == "__main__":
    main()
