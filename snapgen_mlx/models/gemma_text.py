"""Gemma 3 as a text encoder: mlx-lm's layers under a forward pass with a padding mask."""

import mlx.core as mx

from ..errors import SnapGenError
from .language_model import LanguageModel, Tokenizer, import_mlx_lm

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


class GemmaText(LanguageModel):
    name = "gemma"
    max_tokens = 256

    def __init__(
        self, config: dict, tokenizer: Tokenizer | None = None, dtype: mx.Dtype = mx.float32
    ):
        """config: the dictionary of a config.json; tokenizer: text -> ids; dtype, of states."""
        gemma3 = import_mlx_lm("models.gemma3_text")
        args = gemma3.ModelArgs.from_dict(text_config(config))
        super().__init__(args, gemma3.Gemma3Model(args), tokenizer, dtype)

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
        ids, mask = self.tokenize(texts, self.max_tokens)
        return self(ids, mask), mask
