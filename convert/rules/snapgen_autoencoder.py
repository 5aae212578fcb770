"""The small autoencoders: convolutions transposed, nothing else."""

import mlx.core as mx
from mlx.utils import tree_flatten

from ...loading import build_autoencoder
from ...tensors.stream import Step
from .interface import channels_first

LAYOUT = Step("channels last", lambda a: a.transpose(0, 2, 3, 1) if a.ndim == 4 else a)


def config(source: dict) -> dict:
    return source


def shapes(source: dict) -> dict[str, tuple]:
    return {k: a.shape for k, a in tree_flatten(build_autoencoder(source).parameters())}


def route(key: str) -> dict[str, Step]:
    return {key: LAYOUT}


def back(key: str, a: mx.array) -> tuple[str, mx.array]:
    return key, channels_first(a) if a.ndim == 4 else a
