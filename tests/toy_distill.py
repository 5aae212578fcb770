"""The toy problem for distillation in four steps: a narrow width learns from the full one.

python -m tests.toy_distill RUN STEPS SAVE_MINUTES trains it in the folder RUN and prints records.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

from snapgen_mlx.lora import Update
from snapgen_mlx.models.dit import DiT
from snapgen_mlx.models.elastic import slice_flat
from snapgen_mlx.training.data import LatentDataset
from snapgen_mlx.training.kdmd import KDMDOptions, KDMDTrainer
from snapgen_mlx.training.loop import train
from snapgen_mlx.training.lora_training import SCALE, attach_lora, lora_params
from snapgen_mlx.training.teacher import ModelTeacher
from snapgen_mlx.training.watch import SEEDS, Watch

from .toy import PROMPTS, toy_config, toy_data, toy_options, toy_params, toy_trainer

RANK = 3


class ToyVAE:
    """Shows the first three channels of a latent."""

    def decode(self, z, tile=None):
        return z[..., :3] / 2


def toy_model(index: int, seed: int = 0, params: dict | None = None) -> DiT:
    """One width of a toy supernet, random unless its parameters are given."""
    config = toy_config()
    dit = DiT(config.variant(index))
    own = slice_flat(params or toy_params(config, seed), config, index)
    dit.load_weights(list(own.items()), strict=True)
    return dit


def trained_params(steps: int) -> dict[str, mx.array]:
    """A toy supernet whose full width has learned its data."""
    trainer, data = toy_trainer(steps=steps, learning_rate=2e-2, ema=0.9), toy_data()
    for step in range(steps):
        x0, text, masks = data.batch(np.random.default_rng(step), 16, 0.1)
        noise, _ = trainer.draw(np.random.default_rng(step), mx.random.key(step), x0.shape)
        trainer.step(x0, text, masks, noise, [])
    return trainer.weights.mean


def random_lora(config, seed: int = 5) -> dict[str, mx.array]:
    """Matrices of which B is not zero."""
    params = lora_params(config, RANK, seed)
    keys = mx.random.split(mx.random.key(seed), len(params))
    return {
        k: 0.05 * mx.random.normal(a.shape, key=key) if k.endswith("lora_b") else a
        for (k, a), key in zip(params.items(), keys, strict=True)
    }


def updates(params: dict[str, mx.array]) -> dict[str, Update]:
    layers = {k.rpartition(".")[0] for k in params}
    return {p: Update(params[f"{p}.lora_a"], SCALE * params[f"{p}.lora_b"]) for p in sorted(layers)}


def toy_teacher(seed: int = 0) -> ModelTeacher:
    full = toy_model(2, seed)
    return ModelTeacher(full, updates(random_lora(full.config)))


def toy_kdmd(watch=None, params: dict | None = None, **options) -> KDMDTrainer:
    """The narrowest width of a random supernet or, of one that is given, the full width."""
    dit = toy_model(2 if params else 0, params=params)
    attach_lora(dit, lora_params(dit.config, RANK))
    teacher = ModelTeacher(toy_model(2, params=params)) if params else toy_teacher()
    defaults = dict(learning_rate=1e-3, steps=30, warmup=0, lora=RANK, average_from=10)
    return KDMDTrainer(dit, teacher, KDMDOptions(**defaults | options), watch=watch)


def toy_pictures() -> LatentDataset:
    """Captions to watch a run by, each with its seeds in a row."""
    data = toy_data(len(PROMPTS))
    rows = [i for i in range(len(PROMPTS)) for _ in range(SEEDS)]
    return LatentDataset(
        [data.latents[i] for i in rows], [data.captions[i] for i in rows], data.encoders
    )


def toy_kdmd_run(run, steps: int, trainer=None, **options):
    """Records of a run on toy data, with its pictures watched."""
    trainer = trainer or toy_kdmd(Watch(ToyVAE(), run / "grids"), steps=steps)
    return train(trainer, toy_data(), run, toy_options(text_dropout=0.0, **options), toy_pictures())


if __name__ == "__main__":
    run, steps, minutes = sys.argv[1:]
    for record in toy_kdmd_run(Path(run), int(steps), save_minutes=float(minutes)):
        print(json.dumps(record), flush=True)
