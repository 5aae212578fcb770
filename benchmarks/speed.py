"""Seconds and memory of the embedded model: ``python -m benchmarks.speed [-m MODEL]``.

Import + load in a fresh process; then one picture by each variant, warm: four network evaluations
(4 steps without guidance) and decoding, and the model's own default steps and guidance.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time

FRESH = """
import time; t = time.perf_counter()
import mlx.core as mx
from snapgen_mlx import Pipeline
pipe = Pipeline.load({model!r})
mx.eval(pipe.dit.parameters(), pipe.vae.parameters())
print(time.perf_counter() - t)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model")
    args = parser.parse_args()
    load = [
        float(subprocess.check_output([sys.executable, "-c", FRESH.format(model=args.model)]))
        for _ in range(3)
    ]

    import mlx.core as mx

    from snapgen_mlx import Pipeline

    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    result = {"machine": machine, "device": str(mx.default_device())}
    result["import and load, s"] = round(min(load), 2)
    for variant in ("tiny", "small", "full"):
        pipe = Pipeline.load(args.model, variant)
        row = result[variant] = {}
        for name, given in (("4 evaluations", {"steps": 4, "guidance": 1.0}), ("defaults", {})):
            pipe.generate("a red apple", **given)
            mx.reset_peak_memory()
            seconds = []
            for seed in range(5):
                started = time.perf_counter()
                pipe.generate("a red apple", seed=seed, **given)
                seconds.append(time.perf_counter() - started)
            row[f"{name}, s"] = round(sorted(seconds)[2], 3)
            row[f"{name}, peak MB"] = round(mx.get_peak_memory() / 1e6, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result["process, peak MB"] = round(peak / (1e6 if sys.platform == "darwin" else 1e3))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
