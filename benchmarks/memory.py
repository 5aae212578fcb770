"""Predicted and measured peaks of memory: ``python -m benchmarks.memory``.

Nine settings, three widths at three sizes, and training at each size, of a random model that has
the shape of the full geometry with fewer channels and layers. Exit code 1 if a prediction is
further from the measurement than --within. ``snapgen-mlx bench`` prints both for a model of your
own.
"""

import argparse
import dataclasses
import gc
import os
import platform
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np

from snapgen_mlx import Pipeline
from snapgen_mlx.config import DiTConfig
from snapgen_mlx.files import write_json
from snapgen_mlx.layout import FORMAT
from snapgen_mlx.models.elastic import random_supernet
from snapgen_mlx.models.vae import AutoencoderKLQwenImage, VAEConfig
from snapgen_mlx.tensors.weights import flat_parameters, save_tensors
from snapgen_mlx.training.elastic_trainer import ElasticOptions
from snapgen_mlx.training.finetune import make_trainer
from snapgen_mlx.training.training_memory import TrainingMemory

BATCH = 2
TEXT = 77  # tokens of a training caption


def write_model(folder: Path, hidden: int, channels: int) -> None:
    heads = hidden // 64
    sizes = {"hidden_size": hidden, "num_heads": heads, "num_kv_heads": heads}
    shared = {"caption_dim": hidden, "text_dims": {"clip": 512}, "layers": [2, 3, 2]}
    config = DiTConfig(**sizes, **shared)
    write_json(folder / "config.json", {**FORMAT, "sampling": {"steps": 1, "size": 256}})
    save_tensors(folder / "transformer", random_supernet(config))
    write_json(folder / "transformer" / "config.json", config.to_dict())
    vae = VAEConfig(base_dim=channels)
    save_tensors(folder / "vae", flat_parameters(AutoencoderKLQwenImage(vae)))
    name = {"_class_name": "AutoencoderKLQwenImage"}
    write_json(folder / "vae" / "config.json", name | dataclasses.asdict(vae))


def settle() -> int:
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    return mx.get_active_memory()


def drawing(folder: Path, variant: str, size: int) -> dict[str, tuple[int, int]]:
    """Predicted and measured bytes of each phase."""
    before = settle()
    pipe = Pipeline.load(folder, variant)
    s = pipe.settings("a", width=size, height=size, steps=2, guidance=1.0)
    predicted = pipe.memory.predict(variant, pipe.request(s))
    mx.eval(pipe.vae.decoder.parameters(), pipe.vae.post_quant_conv.parameters())
    mx.reset_peak_memory()
    for step in pipe.stream(s):  # noqa: B007
        pass
    found = {"denoise": (predicted.denoise, mx.get_peak_memory() - before)}
    mx.reset_peak_memory()
    pipe.decode(step.x)
    return found | {"decode": (predicted.decode, mx.get_peak_memory() - before)}


def training(folder: Path, size: int, options: ElasticOptions) -> tuple[int, int]:
    """Predicted and measured bytes of a step of the widest and the narrowest width."""
    before = settle()
    trainer = make_trainer(folder, options, 0)
    config, latent = trainer.config, size // 8
    rng = np.random.default_rng(0)
    x0 = mx.array(rng.standard_normal((BATCH, latent, latent, 16), dtype=np.float32))
    text = {"clip": mx.zeros((BATCH, TEXT, 512))}
    noise, _ = trainer.draw(rng, mx.random.key(0), x0.shape)
    batch = x0, text, {"clip": mx.ones((BATCH, TEXT), mx.bool_)}, noise, [0]
    trainer.step(*batch)
    mx.clear_cache()
    mx.reset_peak_memory()
    trainer.step(*batch)
    predictor = TrainingMemory.from_model(folder)
    predictor = dataclasses.replace(predictor, size=(latent, latent), text_tokens=TEXT + 1)
    assert predictor.config == config
    return predictor.peak(options, BATCH), mx.get_peak_memory() - before


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512, help="channels, a multiple of 512")
    parser.add_argument("--channels", type=int, default=32, help="of the VAE, which has 96")
    parser.add_argument("--sizes", type=int, nargs=3, default=[256, 512, 768])
    parser.add_argument("--within", type=float, default=15.0, help="per cent")
    parser.add_argument("--no-training", action="store_true", help="it compiles for minutes")
    args = parser.parse_args()
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    print(f"{args.hidden} channels, float32, {mx.default_device()}; {machine}\n")
    print("| what | pixels | predicted, MB | measured, MB | ratio |\n|---|---|---|---|---|")
    worst = 0.0

    def show(what: str, size: int, predicted: int, measured: int) -> None:
        nonlocal worst
        ratio = predicted / measured
        worst = max(worst, abs(ratio - 1))
        cells = [what, f"{size}²", f"{predicted / 1e6:.0f}", f"{measured / 1e6:.0f}"]
        print(f"| {' | '.join([*cells, f'{ratio:.2f}'])} |", flush=True)

    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_model(folder, args.hidden, args.channels)
        for variant in DiTConfig().variants:
            for size in args.sizes:
                for phase, pair in drawing(folder, variant, size).items():
                    show(f"{variant}, {phase}", size, *pair)
        if not args.no_training:
            for size in args.sizes:
                options = ElasticOptions()
                show(f"training, batch {BATCH}", size, *training(folder, size, options))
    print(f"\nThe worst prediction is {100 * worst:.0f} % from the measured peak.")
    sys.exit(worst > args.within / 100)


if __name__ == "__main__":
    main()
