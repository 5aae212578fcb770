"""Qwen2.5-VL's language tower: names of any of its checkpoints to mlx-lm's."""

import mlx.core as mx

from ...models.language_model import text_keys
from ...models.qwen_text import QwenText, text_config
from ...tensors.stream import COPY, Step
from ...tensors.weights import parameter_shapes
from .interface import Drop


def config(source: dict) -> dict:
    text_config(source)
    return source.get("text_config", source) | {"model_type": "qwen2_5_vl_text"}


def shapes(source: dict) -> dict[str, tuple]:
    return parameter_shapes(QwenText(config(source)))


def route(key: str) -> dict[str, Step] | Drop:
    if names := list(text_keys({key: None})):
        return {names[0]: COPY}
    return Drop("the LM head, not called" if "lm_head" in key else "the image tower")


def back(key: str, a: mx.array) -> tuple[str, mx.array]:
    return key, a


def group_size(source: dict) -> int:
    return 64


def bits(path: str, bits: int) -> int:
    return bits
