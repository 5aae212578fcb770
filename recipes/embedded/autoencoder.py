"""Train the embedded model's autoencoder: DATA (ImageFolder) -> OUT (a ``vae/`` folder).

python -m recipes.embedded.autoencoder DATA RUN OUT [--steps N] [--decoder-only]

Resumes from RUN. With --decoder-only the encoder in OUT stays as it is and its decoder is trained
further on whole pictures.
"""

import argparse
import dataclasses
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from recipes.embedded.autoencoder_training import AutoencoderTraining, train_autoencoder
from snapgen_mlx.models.autoencoder import SnapGenAutoencoder, SnapGenAutoencoderConfig
from snapgen_mlx.weights import assign, load_config, load_tensors, save_tensors, write_json


def load_images(folder: Path) -> np.ndarray:
    return np.stack(
        [np.asarray(Image.open(p).convert("RGB")) for p in sorted(folder.glob("*.png"))]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=AutoencoderTraining.steps)
    parser.add_argument("--decoder-only", action="store_true")
    args = parser.parse_args()

    options = AutoencoderTraining(steps=args.steps)
    mx.random.seed(0)
    config = SnapGenAutoencoderConfig()
    if args.decoder_only:
        options = dataclasses.replace(
            options, decoder_only=True, crop=128, batch=6, learning_rate=5e-4, ema=0.99
        )
        config = SnapGenAutoencoderConfig.from_dict(load_config(args.out))
    model = SnapGenAutoencoder(config)
    if args.decoder_only:
        assign(model, load_tensors(args.out), args.out)
    images = load_images(args.data / "train")
    for record in train_autoencoder(model, images, args.run, options):
        print(" ".join(f"{k} {v:.4g}" for k, v in record.items()), flush=True)

    errors = []
    for image in load_images(args.data / "heldout"):
        x = mx.array(image[None]).astype(mx.float32) / 127.5 - 1
        errors.append((model.decode(model.encode(x)) - x).square().mean().item())
    print(f"held-out PSNR {-10 * np.log10(np.mean(errors) / 4):.2f} dB on {len(errors)} images")
    config = {"_class_name": "SnapGenAutoencoder", **dataclasses.asdict(model.config)}
    write_json(args.out / "config.json", config)
    save_tensors(args.out, dict(tree_flatten(model.parameters())))


if __name__ == "__main__":
    main()
