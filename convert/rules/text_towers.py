"""Text towers of language models: names of any of their checkpoints to mlx-lm's."""

import mlx.core as mx

from ...models.gemma_text import GemmaText
from ...models.language_model import text_keys
from ...models.qwen_text import QwenText
from ...tensors.stream import COPY, Step
from ...tensors.weights import parameter_shapes
from .interface import Drop


class LanguageModelRules:
    """Rules of one kind of text tower.

    Args:
        network: its class in MLX.
        model_type: in the MLX model's config.json.
    """

    def __init__(self, network: type[GemmaText] | type[QwenText], model_type: str):
        self.network, self.model_type = network, model_type

    def config(self, source: dict) -> dict:
        return source.get("text_config", source) | {"model_type": self.model_type}

    def shapes(self, source: dict) -> dict[str, tuple]:
        return parameter_shapes(self.network(self.config(source)))

    def route(self, key: str) -> dict[str, Step] | Drop:
        if names := list(text_keys({key: None})):
            return {names[0]: COPY}
        return Drop("the LM head, not called" if "lm_head" in key else "the image tower")

    def back(self, key: str, a: mx.array) -> tuple[str, mx.array]:
        return key, a

    def group_size(self, source: dict) -> int:
        return 64

    def bits(self, path: str, bits: int) -> int:
        return bits


GEMMA = LanguageModelRules(GemmaText, "gemma3_text")
QWEN = LanguageModelRules(QwenText, "qwen2_5_vl_text")
