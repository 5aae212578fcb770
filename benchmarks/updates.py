"""What surrounds a training step: ``python -m benchmarks.updates [--arrays N]``.

Adam in one compiled kernel for each array beside MLX's own, and a state file that is hashed as it
is written beside one that is read again for its hash. They take turns; medians and ranges.
"""

import argparse
import hashlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim

from snapgen_mlx.files import file_sha256
from snapgen_mlx.tensors.safetensors_io import write_tensors
from snapgen_mlx.training.optimizer import Adam

SIDE = 2048


def arrays(count: int) -> dict[str, mx.array]:
    return {f"{i}.weight": mx.random.normal((SIDE, SIDE)) for i in range(count)}


def updates(optimizer, count: int):
    """A function that makes one update of `count` arrays."""
    params, grads = arrays(count), arrays(count)
    optimizer.init(params)
    mx.eval(params, grads, optimizer.state)

    def update() -> None:
        nonlocal params
        params = optimizer.apply_gradients(dict(grads), params)
        mx.eval(params, optimizer.state)

    return update


def saves(folder: Path, count: int, again: bool):
    """A function that writes `count` arrays and returns when their hash is known."""
    state, file = arrays(count), folder / "state.safetensors"
    mx.eval(state)
    infos = {k: (a.dtype, a.shape) for k, a in state.items()}

    def save() -> None:
        digest = None if again else hashlib.sha256()
        write_tensors(file, infos, state.items(), digest=digest)
        if again:
            file_sha256(file)

    return save


def compare(contestants: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in turns, after a round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, run in contestants.items():
            started = time.perf_counter()
            run()
            if i:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def show(seconds: dict[str, list[float]]) -> None:
    for name, taken in seconds.items():
        print(f"| {name} | {statistics.median(taken):.2f} | {min(taken):.2f} to {max(taken):.2f} |")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arrays", type=int, default=16, help=f"of {SIDE}x{SIDE} float32 numbers")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    print("| | median, s | range |\n|---|---|---|")
    betas = [0.9, 0.99]
    adams = {
        "Adam, MLX's": optim.Adam(1e-4, betas, bias_correction=True),
        "Adam, one kernel an array": Adam(1e-4, betas, bias_correction=True),
    }
    show(compare({k: updates(a, args.arrays) for k, a in adams.items()}, args.rounds))
    with tempfile.TemporaryDirectory() as folder:
        ways = {"a state, read again for its hash": True, "a state, hashed as it is written": False}
        kinds = {k: saves(Path(folder), args.arrays, again) for k, again in ways.items()}
        show(compare(kinds, args.rounds))


if __name__ == "__main__":
    sys.exit(main())
