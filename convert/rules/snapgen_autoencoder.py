"""The small autoencoders: convolutions transposed, nothing else."""

import mlx.core as mx

from ...loading import build_autoencoder
from ...tensors.stream import Step
from ...tensors.weights import parameter_shapes
from .interface import channels_first

LAYOUT = Step("channels last", lambda a: a.transpose(0, 2, 3, 1) if a.ndim == 4 else a)


def config(source: dict) -> dict:
    return source


def shapes(source: dict) -> dict[str, tuple]:
    return parameter_shapes(build_autoencoder(source))


def route(key: str) -> dict[str, Step]:
    return {key: LAYOUT}


def back(key: str, a: mx.array) -> tuple[str, mx.array]:
    return key, channels_first(a) if a.ndim == 4 else a
