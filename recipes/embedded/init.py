"""The untrained embedded model: VAE and TEXT_ENCODER folders and fresh weights -> OUT.

python -m recipes.embedded.init VAE TEXT_ENCODER OUT
"""

import argparse
import shutil
from pathlib import Path

import mlx.core as mx

from snapgen_mlx.config import DiTConfig
from snapgen_mlx.files import atomic_folder, write_json
from snapgen_mlx.layout import FORMAT
from snapgen_mlx.models.elastic import random_supernet
from snapgen_mlx.tensors.weights import save_tensors

SAMPLING = {"steps": 12, "guidance": 4.0, "shift": 3.0, "size": 128}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("vae", "text_encoder", "out"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    mx.random.seed(0)
    config = DiTConfig.from_preset("embedded")
    with atomic_folder(args.out) as out:
        head = {**FORMAT, "sampling": SAMPLING, "source": {"name": "embedded"}}
        write_json(out / "config.json", head)
        shutil.copytree(args.vae, out / "vae")
        shutil.copytree(args.text_encoder, out / "text_encoder")
        write_json(out / "transformer" / "config.json", config.to_dict())
        save_tensors(out / "transformer", random_supernet(config))


if __name__ == "__main__":
    main()
