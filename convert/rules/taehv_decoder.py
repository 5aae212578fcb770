"""TAEHV's decoder, for one image: the names of its published files."""

from pathlib import Path

import mlx.core as mx

from ...errors import SnapGenError
from ...models.taehv import TAEHVConfig, TAEHVDecoder
from ...tensors.readers import Info
from ...tensors.stream import COPY, Step
from ...tensors.weights import parameter_shapes
from .interface import CHANNELS_LAST, Drop, channels_first

FIRST = "decoder.1.weight"  # (256, latent channels, 3, 3)


def described(infos: dict[str, Info], where: Path) -> dict:
    """The config.json that published files come without, from the tensors' shapes."""
    if FIRST not in infos:
        raise SnapGenError(f"{where} is not a file of TAEHV: it has no {FIRST}")
    return {"_class_name": "TAEHVDecoder", "latent_channels": infos[FIRST].shape[1]}


def config(source: dict) -> dict:
    return source


def shapes(source: dict) -> dict[str, tuple]:
    return parameter_shapes(TAEHVDecoder(TAEHVConfig.from_dict(source)))


def route(key: str) -> dict[str, Step] | Drop:
    if key.startswith("encoder."):
        return Drop("the encoder, not called")
    return {key: CHANNELS_LAST if key.endswith(".weight") else COPY}


def back(key: str, a: mx.array) -> tuple[str, mx.array]:
    return key, channels_first(a) if a.ndim == 4 else a
