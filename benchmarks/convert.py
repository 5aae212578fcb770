"""Seconds, MB/s and peak memory of conversion, on a random float32 checkpoint of full geometry.

    python -m benchmarks.convert --geometry full --dir /tmp/bench

Each run is a process of its own, so that its peak is its own; the baseline is what a process
takes that only imports. Source files are in the page cache, as just written.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx

from snapgen_mlx.config import DiTConfig
from snapgen_mlx.convert.rules.transformer import back
from snapgen_mlx.models.elastic import random_supernet
from snapgen_mlx.tensors.safetensors_io import write_tensors

SHARD_BYTES = 1 << 30
MODES = {"as it is": {}, "bfloat16": {"dtype": "bfloat16"}, "4 bits": {"quantize": 4}}
RUN = """
import json, resource, sys
import mlx.core as mx
from snapgen_mlx.convert.to_mlx import convert
options = json.loads(sys.argv[3])
if "dtype" in options:
    options["dtype"] = getattr(mx, options["dtype"])
if sys.argv[1]:
    convert(sys.argv[1], sys.argv[2], **options)
try:  # on Linux, ru_maxrss would count what the parent process had before
    status = open("/proc/self/status").read()
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
except FileNotFoundError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def write_checkpoint(folder: Path, geometry: str) -> int:
    """A sharded PyTorch-contract transformer with random weights; returns its bytes."""
    config = DiTConfig.from_preset(geometry)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    parts, size, total = [[]], 0, 0
    for key, a in random_supernet(config).items():
        if size + a.nbytes > SHARD_BYTES:
            parts.append([])
            size = 0
        target, lazy = back(key, a)
        parts[-1].append((target, lazy.shape))
        size, total = size + a.nbytes, total + a.nbytes
    weight_map = {}
    for i, part in enumerate(parts, 1):
        name = f"diffusion_pytorch_model-{i:05}-of-{len(parts):05}.safetensors"
        tensors = ((key, mx.random.normal(shape) * 0.02) for key, shape in part)
        infos = {key: (mx.float32, shape) for key, shape in part}
        write_tensors(folder / name, infos, tensors, "pt")
        weight_map |= dict.fromkeys(infos, name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total


def run(source: str, dest: str, options: dict) -> tuple[float, int]:
    """Seconds and peak resident bytes of one conversion in a process of its own."""
    start = time.perf_counter()
    command = [sys.executable, "-c", RUN, source, dest, json.dumps(options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return time.perf_counter() - start, int(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", default="full", choices=["full", "small", "tiny", "embedded"])
    parser.add_argument("--dir", help="where to write [default: a temporary folder]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as work:
        source = Path(work) / "transformer"
        total = write_checkpoint(source, args.geometry)
        idle, baseline = run("", "", {})
        print(
            f"{args.geometry}: {total / 1e6:.0f} MB of float32; a process that only imports takes "
            f"{idle:.1f} s and {baseline / 1e6:.0f} MB\n"
        )
        print("| mode | s | MB/s | peak MB | of the checkpoint | written MB |")
        print("|---|---|---|---|---|---|")
        for mode, options in MODES.items():
            dest = Path(work) / mode.replace(" ", "-")
            seconds, peak = run(str(source), str(dest), options)
            written = sum(p.stat().st_size for p in dest.rglob("*.safetensors"))
            rate = total / 1e6 / (seconds - idle)
            figures = f"{seconds:.1f} | {rate:.0f} | {peak / 1e6:.0f} | {peak / total:.1%}"
            print(f"| {mode} | {figures} | {written / 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    main()
