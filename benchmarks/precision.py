"""What half precision does to pictures: ``python -m benchmarks.precision [-m MODEL]``.

Each width draws the same pictures with guidance in float32, float16 and bfloat16. Printed: peak
signal to noise of the latents against float32's, in dB, and how near the largest answer of any
layer comes to the largest float16. Types are the same on every device; speed is not measured here.
"""

import argparse
from contextlib import contextmanager
from unittest import mock

import mlx.core as mx
import mlx.nn as nn

from snapgen_mlx import Pipeline
from snapgen_mlx.device import DTYPES
from snapgen_mlx.quantization.calibration import psnr
from snapgen_mlx.sampling import last_step

LARGEST = 65504.0  # float16
PROMPTS = ("a smiling cat", "a red apple", "a rocket", "a dog", "a yellow star", "a house")


@contextmanager
def largest_answer():
    """A list that gets the largest magnitude of each answer of a Linear layer."""
    found: list[mx.array] = []
    call = nn.Linear.__call__

    def watched(self, x):
        y = call(self, x)
        found.append(mx.abs(y).max())
        return y

    with mock.patch.object(nn.Linear, "__call__", watched):
        yield found


def latents(pipe: Pipeline, count: int, steps: int) -> mx.array:
    """Of the first prompts, (count, h, w, C), drawn by the base with guidance 4."""
    jobs = [pipe.settings(p, seed=i, steps=steps, guidance=4.0) for i, p in enumerate(PROMPTS)]
    pipe.prepare(jobs[:count])
    return mx.concatenate([last_step(pipe.stream(job)).x for job in jobs[:count]])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model")
    parser.add_argument(
        "--count", type=int, default=2, choices=range(1, 1 + len(PROMPTS)), help="pictures"
    )
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    print("| width | float16, dB | bfloat16, dB | largest answer of a layer |\n|---|---|---|---|")
    for width in Pipeline.load(args.model).dit_config.variants:
        drawn = {}
        for name in ("float32", "float16", "bfloat16"):
            pipe = Pipeline.load(args.model, width, base=True, dtype=DTYPES[name])
            with largest_answer() as answers:
                drawn[name] = latents(pipe, args.count, args.steps)
            if name == "float32":
                largest = mx.stack(answers).max().item()
        cells = [f"{psnr(drawn[name], drawn['float32']):.1f}" for name in ("float16", "bfloat16")]
        share = f"{largest:.0f}, 1/{LARGEST / largest:.0f} of float16's range"
        print(f"| {width} | {' | '.join(cells)} | {share} |", flush=True)


if __name__ == "__main__":
    main()
