"""A toy problem for the elastic trainer: two prompts, two latents, three widths.

python -m tests.toy RUN STEPS SAVE_MINUTES trains it in the folder RUN and prints the records.
"""

import json
import sys

import mlx.core as mx
import numpy as np

from snapgen_mlx.config import DiTConfig
from snapgen_mlx.models.elastic import random_supernet
from snapgen_mlx.training.data import LatentDataset
from snapgen_mlx.training.elastic_trainer import ElasticOptions, ElasticTrainer
from snapgen_mlx.training.loop import RunOptions, train

PROMPTS = ["a cat", "a dog"]


def toy_config(**changes) -> DiTConfig:
    sizes = dict(in_channels=4, patch_size=1, hidden_size=32, head_dim=4, num_heads=8)
    heads = dict(num_kv_heads=8, cross_kv_heads=2, caption_dim=16, text_dims={"toy": 8})
    depth = dict(layers=[1, 0, 0], downsample=False, ffn_ratio=[2, 2, 2], bna_blocks=4)
    return DiTConfig(**{**sizes, **heads, **depth, **changes})


def toy_params(config: DiTConfig, seed: int = 0) -> dict[str, mx.array]:
    """A flat supernet whose output and isolated parameters are random too."""
    mx.random.seed(seed)
    params = random_supernet(config)
    shape = params["final.proj.weight"].shape
    return params | {"final.proj.weight": 0.1 * mx.random.normal(shape)}


class ToyText:
    name = "toy"

    def encode(self, texts):
        rows = mx.array([PROMPTS.index(text) for text in texts])
        states = mx.random.normal((len(PROMPTS), 3, 8), key=mx.random.key(7))
        return states[rows], mx.ones((len(texts), 3), mx.bool_)


def toy_data(n: int = 16, seed: int = 0) -> LatentDataset:
    """Each prompt has its own latent, with a little noise."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((2, 4, 4, 4))
    rows = np.arange(n) % 2
    latents = centres[rows] + 0.1 * rng.standard_normal((n, 4, 4, 4))
    return LatentDataset(latents.astype(np.float32), [[PROMPTS[i]] for i in rows], [ToyText()])


def toy_trainer(config=None, steps: int = 30, learning_rate: float = 3e-3, **options):
    config = config or toy_config()
    options = dict(warmup=3, ema=0.95) | options
    elastic = ElasticOptions(learning_rate, steps=steps, **options)
    return ElasticTrainer(config, toy_params(config), elastic)


def toy_options(**options) -> RunOptions:
    return RunOptions(**dict(batch=4, log_every=2, validate_every=8, save_minutes=1e9) | options)


def toy_run(run, steps: int, learning_rate: float = 3e-3, **options):
    """Records of a run on toy data, with validation."""
    trainer = toy_trainer(steps=steps, learning_rate=learning_rate)
    return train(trainer, toy_data(), run, toy_options(**options), toy_data(6, seed=1))


if __name__ == "__main__":
    for record in toy_run(sys.argv[1], int(sys.argv[2]), save_minutes=float(sys.argv[3])):
        print(json.dumps(record), flush=True)
