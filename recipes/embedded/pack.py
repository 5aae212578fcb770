"""The embedded model in few bits, as the package contains it.

    python -m recipes.embedded.pack MODEL FOUR_BITS OUT

MODEL is the float model with its few-step LoRAs. FOUR_BITS is what `snapgen-mlx convert
--quantize 4` made of the same checkpoint: its transformer and its text encoder are taken. The
autoencoder and the LoRAs get palettes of 8 bits.
"""

import argparse
import functools
import shutil
import sys
from pathlib import Path

from snapgen_mlx.digest import base_digest
from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.files import atomic_folder, write_json
from snapgen_mlx.layout import FORMAT
from snapgen_mlx.lora import copy_few_step_loras
from snapgen_mlx.quantization.backends import Palette
from snapgen_mlx.quantization.quantize import other_part, short_lora
from snapgen_mlx.tensors.stream import verify, write_components
from snapgen_mlx.vocabulary import FILE

from ..command import command
from .things import THINGS

SAMPLING = {"steps": 12, "guidance": 3.0, "shift": 3.0, "size": 256}  # of the base


def pack(model: Path, four_bits: Path, out: Path) -> None:
    """Write the folder ``out``, which must not exist, whole or not at all.

    Raises SnapGenError for two models of different weights.
    """
    base = base_digest(four_bits)
    if base_digest(model) != base:
        raise SnapGenError(f"{model} and {four_bits} were not made from the same checkpoint")
    form = Palette()
    with atomic_folder(out) as folder:
        for name in ("transformer", "text_encoder"):
            shutil.copytree(four_bits / name, folder / name)
        parts = [other_part(model / "vae", form)]
        write_components(folder, parts)
        copy_few_step_loras(model, folder, functools.partial(short_lora, form=form))
        write_json(folder / FILE, sorted(THINGS))
        head = {**FORMAT, "sampling": SAMPLING, "source": {"name": "embedded"}, "base": base}
        write_json(folder / "config.json", head)
        verify(folder, parts)


@command
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="float model with few_step/")
    parser.add_argument("four_bits", type=Path, help="the same model in 4 bits")
    parser.add_argument("out", type=Path, help="folder to make")
    args = parser.parse_args(argv)
    pack(args.model, args.four_bits, args.out)


if __name__ == "__main__":
    sys.exit(main())
