"""The SnapGen++ transformer: same names on both sides, two kinds of convolution transposed."""

import mlx.core as mx

from ...config import DiTConfig
from ...models import elastic
from ...tensors.stream import COPY, Step
from .interface import CHANNELS_LAST, Drop, channels_first

FILTERS = Step("KDIhw -> KDhwI", lambda a: a.transpose(0, 1, 3, 4, 2))
# Low bits in modulation, time, text input, gates and the final layer make noise that grows with
# the steps; together they are a few percent of the weights.
SENSITIVE = ("time_embed.", "text_embed.", "final.")


def config(source: dict) -> dict:
    return DiTConfig.from_dict(source).to_dict()


def shapes(source: dict) -> dict[str, tuple]:
    """Keys and shapes of the MLX parameters (of a supernet with all its banks)."""
    return {k: a.shape for k, a in elastic.random_supernet(DiTConfig.from_dict(source)).items()}


def route(key: str) -> dict[str, Step] | Drop:
    if key == "patch_embed.proj.weight":
        return {key: CHANNELS_LAST}
    return {key: FILTERS if ".kv_compress." in key else COPY}


def back(key: str, a: mx.array) -> tuple[str, mx.array]:
    """The PyTorch key and layout of an MLX parameter."""
    if key == "patch_embed.proj.weight":
        return key, channels_first(a)
    return key, a.transpose(0, 1, 4, 2, 3) if ".kv_compress." in key else a


def group_size(source: dict) -> int:
    return elastic.group_size(DiTConfig.from_dict(source))


def bits(path: str, bits: int) -> int:
    """Bits of a layer in a model of ``bits``."""
    sensitive = path.startswith(SENSITIVE) or path.endswith(".head_gate")
    return max(bits, 8) if sensitive else bits
