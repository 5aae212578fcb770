"""Gemma 3 as a text encoder: mlx-lm's layers under a forward pass with a padding mask."""

import resource
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import mlx.core as mx
import mlx.nn as nn

from ..errors import SnapGenError
from .sizes import encoding_bytes, weight_bytes

# What a config.json leaves out means transformers' defaults, which are not mlx-lm's.
DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
}
UNSUPPORTED = (
    "attention_bias",
    "attn_logit_softcapping",
    "use_bidirectional_attention",
)


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


def text_config(config: dict) -> dict:
    """mlx-lm's arguments from a config.json: text-only or multimodal, old or new RoPE keys.

    Raises SnapGenError for what mlx-lm's layers do not compute.
    """
    text = DEFAULTS | config.get("text_config", config) | {"model_type": "gemma3_text"}
    for key in UNSUPPORTED:
        if text.get(key):
            raise SnapGenError(f"Gemma config: {key} = {text[key]!r} is not supported")
    if rope := text.get("rope_parameters"):
        full, sliding = rope.get("full_attention", {}), rope.get("sliding_attention", {})
        text["rope_theta"] = full.get("rope_theta", 1e6)
        text["rope_local_base_freq"] = sliding.get("rope_theta", 1e4)
        text["rope_scaling"] = full if full.get("rope_type", "default") != "default" else None
    text["sliding_window_pattern"] = (
        text.get("sliding_window_pattern") or text.get("_sliding_window_pattern") or 6
    )
    if kinds := text.get("layer_types"):
        full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        period = full[0] + 1 if full else len(kinds) + 1
        if full != list(range(period - 1, len(kinds), period)):
            raise SnapGenError("Gemma config: layer_types is not one full layer in every n")
        text["sliding_window_pattern"] = period
    return text


def text_keys(tensors: dict) -> dict:
    """Rename the keys of any Gemma 3 checkpoint to ``model.*``; drop vision tower and LM head."""
    out = {}
    for key, a in tensors.items():
        path = key.removeprefix("language_model.").replace("model.language_model.", "model.", 1)
        if path.startswith(("embed_tokens.", "layers.", "norm.")):
            path = f"model.{path}"
        vision = ("vision_tower.", "multi_modal_projector.")
        if not path.removeprefix("model.").startswith((*vision, "lm_head.")):
            out[path] = a
    return out


class GemmaText(nn.Module):
    name = "gemma"
    max_tokens = 256

    def __init__(
        self,
        config: dict,
        tokenizer: Callable[[str], list[int]] | None = None,
        dtype: mx.Dtype = mx.float32,
    ):
        """config: the dictionary of a config.json; tokenizer: text -> ids; dtype, of states."""
        super().__init__()
        gemma3 = import_mlx_lm("models.gemma3_text")
        args = gemma3.ModelArgs.from_dict(text_config(config))
        self.args = args
        self.model = gemma3.Gemma3Model(args)
        self._tokenize = tokenizer
        self._dtype = dtype

    @property
    def nbytes(self) -> int:
        return weight_bytes(self)

    def encoding_bytes(self) -> int:
        a = self.args
        return encoding_bytes(
            a.num_attention_heads, a.hidden_size, a.intermediate_size, self.max_tokens
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

    def __call__(self, ids: mx.array, mask: mx.array) -> mx.array:
        """Ids and mask of valid tokens (B, L) -> last hidden states after the norm (B, L, dim).

        Padding may stand on either side; its own states mean nothing.
        """
        create_mask = import_mlx_lm("models.base").create_causal_mask
        L = ids.shape[1]
        # A padding token sees itself, or its softmax would have no term and spread NaN.
        keys = mask[:, None, None] | mx.eye(L, dtype=mx.bool_)
        full = create_mask(L) & keys
        sliding = create_mask(L, window_size=self.args.sliding_window) & keys
        # In bfloat16 the factor is rounded as well, as in the original.
        h = self.model.embed_tokens(ids).astype(self._dtype)
        h = h * mx.array(self.args.hidden_size**0.5, self._dtype)
        for layer in self.model.layers:
            h = layer(h, sliding if layer.self_attn.is_sliding else full)
        return self.model.norm(h)

    def encode(self, texts: list[str]) -> tuple[mx.array, mx.array]:
        """States (B, L, dim) and mask (B, L) of the raw texts, at most 256 tokens each."""
        assert self._tokenize is not None
        rows = [self._tokenize(text)[: self.max_tokens] for text in texts]
        longest = max(len(row) for row in rows)
        ids = mx.array([row + [0] * (longest - len(row)) for row in rows])
        mask = mx.arange(longest) < mx.array([len(row) for row in rows])[:, None]
        return self(ids, mask), mask
