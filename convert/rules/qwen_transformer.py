"""diffusers' Qwen-Image transformer: the same names and layouts on both sides."""

import mlx.core as mx

from ...config import QWEN_IMAGE, QwenImageConfig
from ...models.qwen_image import QwenImage
from ...tensors.stream import COPY, Step
from ...tensors.weights import parameter_shapes
from .interface import Drop

STEPS = 50  # steps of the published model's own pipeline
# Low bits in modulation, time, input and output make noise that grows with the steps. Modulation
# is a third of the weights.
SENSITIVE = ("time_text_embed.", "norm_out.", "proj_out", "img_in", "txt_in")


def config(source: dict) -> dict:
    QwenImageConfig.from_dict(source)
    made = {k: v for k, v in source.items() if k != "_diffusers_version"}
    return made | {"_class_name": QWEN_IMAGE}


def shapes(source: dict) -> dict[str, tuple]:
    return parameter_shapes(QwenImage(QwenImageConfig.from_dict(source)))


def route(key: str) -> dict[str, Step] | Drop:
    return {key: COPY}


def back(key: str, a: mx.array) -> tuple[str, mx.array]:
    return key, a


def group_size(source: dict) -> int:
    return 64


def bits(path: str, bits: int) -> int:
    """Bits of a layer in a model of ``bits``."""
    sensitive = path.startswith(SENSITIVE) or path.endswith((".img_mod.1", ".txt_mod.1"))
    return max(bits, 8) if sensitive else bits
