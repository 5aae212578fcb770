"""What the text encoders whose layers are mlx-lm's have in common."""

import resource
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import mlx.core as mx
import mlx.nn as nn

from ..tensors.affine import answer_in_kind
from .sizes import encoding_bytes, weight_bytes

Tokenizer = Callable[[str], list[int]]
IMAGE_TOWERS = ("vision_tower.", "multi_modal_projector.", "visual.")


def import_mlx_lm(name: str) -> ModuleType:
    """Import a module of mlx-lm without its side effect on the limit of open files.

    Importing it takes over a second, and lowers the limit for good (or fails where the hard
    limit is below what it asks for).
    """
    set_limit = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        return import_module(f"mlx_lm.{name}")
    finally:
        resource.setrlimit = set_limit


def text_keys(tensors: dict) -> dict:
    """Rename a multimodal checkpoint's keys to ``model.*``; drop image tower and LM head."""
    out = {}
    for key, a in tensors.items():
        path = key.removeprefix("language_model.").replace("model.language_model.", "model.", 1)
        if path.startswith(("embed_tokens.", "layers.", "norm.")):
            path = f"model.{path}"
        if not path.removeprefix("model.").startswith((*IMAGE_TOWERS, "lm_head.")):
            out[path] = a
    return out


class LanguageModel(nn.Module):
    """A language model whose last hidden states are the states of a text.

    Args: args, mlx-lm's; model, its layers without the LM head; tokenizer: text -> ids; dtype, of
        states.
    """

    max_tokens: int

    def __init__(self, args, model: nn.Module, tokenizer: Tokenizer | None, dtype: mx.Dtype):
        super().__init__()
        self.args, self.model = args, model
        self._tokenizer, self._dtype = tokenizer, dtype

    @property
    def nbytes(self) -> int:
        return weight_bytes(self)

    def token_count(self, text: str) -> int:
        assert self._tokenizer is not None
        return len(self._tokenizer(text))

    def encoding_bytes(self) -> int:
        a = self.args
        return encoding_bytes(
            *(a.num_attention_heads, a.hidden_size, a.intermediate_size, self.max_tokens),
            self._dtype.size,
        )

    def quantize(self, quantization: dict, tensors: dict[str, mx.array]) -> None:
        """Make the layers that are stored quantized quantized ones.

        Args: quantization, of a config.json of mlx-lm; tensors, the weights by their keys here.
        """
        overrides = text_keys({f"{k}.": v for k, v in quantization.items() if isinstance(v, dict)})
        defaults = {k: v for k, v in quantization.items() if k in ("group_size", "bits", "mode")}

        def predicate(path, _):
            return f"{path}.scales" in tensors and overrides.get(f"{path}.", defaults)

        nn.quantize(self, **defaults, class_predicate=predicate)
        answer_in_kind(self)

    def tokenize(self, texts: list[str], most: int) -> tuple[mx.array, mx.array]:
        """Ids and mask (B, L) of texts, cut to ``most`` tokens and padded on the right."""
        assert self._tokenizer is not None
        rows = [self._tokenizer(text)[:most] for text in texts]
        longest = max(len(row) for row in rows)
        ids = mx.array([row + [0] * (longest - len(row)) for row in rows])
        return ids, mx.arange(longest) < mx.array([len(row) for row in rows])[:, None]
