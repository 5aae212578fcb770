"""Pack a trained MODEL for shipping: 6 bits for most of the transformer, 8 where low bits show.

    python -m benchmarks.embedded.pack MODEL OUT [--bits 6]

Groups of 32, since every slice of a packed axis is a multiple of it; the autoencoder in float16.
"""

import argparse
import shutil
from pathlib import Path

import mlx.core as mx

from snapgen_mlx.convert.transformer import bits as layer_bits
from snapgen_mlx.files import atomic_folder
from snapgen_mlx.weights import load_config, load_tensors, save_tensors, write_json

GROUP = 32


def pack_transformer(source: Path, out: Path, bits: int) -> None:
    tensors = {}
    quantization = {"group_size": GROUP, "bits": bits}
    for key, a in load_tensors(source).items():
        layer = key.removesuffix(".weight")
        if layer == key or a.ndim != 2 or a.shape[-1] % GROUP:
            tensors[key] = a.astype(mx.float16)
            continue
        own = layer_bits(layer, bits)
        names = (f"{layer}.weight", f"{layer}.scales", f"{layer}.biases")
        tensors |= zip(names, mx.quantize(a.astype(mx.float16), GROUP, own), strict=True)
        if own != bits:
            quantization[layer] = {"group_size": GROUP, "bits": own}
    write_json(out / "config.json", {**load_config(source), "quantization": quantization})
    save_tensors(out, tensors)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=6)
    args = parser.parse_args()
    with atomic_folder(args.out) as out:
        config = load_config(args.model)
        write_json(out / "config.json", {**config, "source": {"name": "embedded"}})
        pack_transformer(args.model / "transformer", out / "transformer", args.bits)
        vae = {k: a.astype(mx.float16) for k, a in load_tensors(args.model / "vae").items()}
        save_tensors(out / "vae", vae)
        shutil.copy(args.model / "vae" / "config.json", out / "vae")
        shutil.copytree(args.model / "text_encoder", out / "text_encoder")
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"{args.out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
