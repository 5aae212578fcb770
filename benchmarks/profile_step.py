"""Where the time of a step goes, by operation: ``python -m benchmarks.profile_step``.

Every operation is evaluated alone and timed as it is called, so that MLX can fuse and overlap
nothing: the sum is somewhat more than a whole step, whose seconds stand beside it. GFLOP/s of the
products stand beside those of two large matrices, measured before and after.
"""

import argparse
import math
import os
import platform
import statistics
import time
from collections import defaultdict
from contextlib import ExitStack
from unittest import mock

import mlx.core as mx
import mlx.nn as nn

from snapgen_mlx.config import DiTConfig
from snapgen_mlx.device import matmul_speed
from snapgen_mlx.models import attention, dit

from .shapes import TEXT, evaluation

LAYERS = {
    "to_q": "attention, projections",
    "to_k": "attention, projections",
    "to_v": "attention, projections",
    "to_out": "attention, projections",
    "head_gate": "attention, projections",
    "fc1": "feed-forward",
    "fc2": "feed-forward",
    "skip_proj": "skips, windows, patches",
    "proj": "skips, windows, patches",
}


class Profile:
    """Seconds, calls and operations by kind."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.flops: dict[str, float] = defaultdict(float)
        self._stack = ExitStack()

    def watch(self, owner, name: str, kind, flops=lambda *_: 0) -> None:
        """Time a function of arrays; ``kind`` and ``flops`` get its result and arguments."""
        call = getattr(owner, name)

        def watched(*args, **kwargs):
            mx.eval([a for a in args if isinstance(a, mx.array)])
            started = time.perf_counter()
            y = call(*args, **kwargs)
            mx.eval(y)
            label = kind(*args) if callable(kind) else kind
            self.seconds[label] += time.perf_counter() - started
            self.calls[label] += 1
            self.flops[label] += flops(y, *args)
            return y

        self._stack.enter_context(mock.patch.object(owner, name, watched))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stack.close()


def attention_kind(q, k, *_) -> str:
    """Which attention has these queries and keys."""
    if k.shape[2] == TEXT + 1:  # and the null token
        return "attention to the text"
    if k.shape[2] == q.shape[2]:
        return "attention, dense"
    return "attention, far" if q.shape[2] == 4 * k.shape[2] else "attention, near"


def names(model: nn.Module) -> dict[int, str]:
    return {id(m): path.rpartition(".")[2] for path, m in model.named_modules()}


def profile(run, model: dit.DiT) -> Profile:
    """One evaluation of ``model`` by ``run``."""
    known = names(model)

    def layer(y, self, x):
        return 2 * y.size * math.prod(self.weight.shape[1:])

    def scores(y, q, k, *_):
        return 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]

    with Profile() as found:
        found.watch(nn.Linear, "__call__", lambda self, x: LAYERS[known[id(self)]], layer)
        found.watch(nn.Conv2d, "__call__", "skips, windows, patches", layer)
        found.watch(attention, "sdpa", attention_kind, scores)
        flops = lambda y, *_: 2 * y.size * 4 * y.shape[-1]  # noqa: E731
        found.watch(attention.Filter, "__call__", "keys and values compressed", flops)
        found.watch(nn.LayerNorm, "__call__", "norms of queries and keys")
        found.watch(attention, "apply_rope", "RoPE")
        found.watch(attention, "_mix", "mixed branches of ASSA")
        found.watch(dit, "modulate", "norms and modulation")
        found.watch(dit, "_add_gated", "gates and residuals")
        found.watch(dit, "gelu_tanh", "GELU")
        run()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", default="small", choices=["full", "small", "tiny"])
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    config = DiTConfig.from_preset(args.geometry)
    if len(config.widths) > 1:
        config = config.variant(len(config.widths) - 1)
    run, model = evaluation(config, args.size)
    rates = [matmul_speed(2048)]
    whole, profiles = [], []
    run()
    for _ in range(args.rounds):
        started = time.perf_counter()
        run()
        whole.append(time.perf_counter() - started)
        profiles.append(profile(run, model))
    rates.append(matmul_speed(2048))
    rate = statistics.median(rates)
    kinds = profiles[0].seconds
    seconds = {k: statistics.median(p.seconds[k] for p in profiles) for k in kinds}
    total, step = sum(seconds.values()), statistics.median(whole)
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    print(
        f"{args.geometry} at {args.size}², float32, {mx.default_device()}; {machine}\n\n"
        "| operation | calls | seconds | of all | GFLOP | GFLOP/s | of large products |\n"
        "|---|---|---|---|---|---|---|"
    )
    first = profiles[0]
    for kind in sorted(seconds, key=seconds.get, reverse=True):
        work = first.flops[kind] / 1e9
        speed = work / seconds[kind]
        products = [f"{work:.1f}", f"{speed:.0f}", f"{100 * speed / rate:.0f} %"]
        cells = [kind, str(first.calls[kind]), f"{seconds[kind]:.3f}"]
        cells += [f"{100 * seconds[kind] / total:.1f} %", *(products if work else [""] * 3)]
        print(f"| {' | '.join(cells)} |")
    work = sum(first.flops.values()) / 1e9
    print(
        f"\nSum of the operations: {total:.2f} s. A whole step: {step:.2f} s, {work:.0f} GFLOP, "
        f"{work / step:.0f} GFLOP/s: {100 * work / step / rate:.0f} % of the {rate:.0f} of large "
        "products."
    )


if __name__ == "__main__":
    main()
