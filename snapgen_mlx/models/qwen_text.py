"""Qwen2.5-VL's language tower as a text encoder, in the form in which Qwen-Image asks it.

The layers are mlx-lm's. For text alone its three-part rotary positions are ordinary ones.
"""

import mlx.core as mx

from ..errors import SnapGenError
from .language_model import LanguageModel, Tokenizer, import_mlx_lm

# What Qwen-Image says to the language model around the text; states of what comes before the text
# are not read.
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
UNREAD = 34  # tokens
# What a config.json leaves out means transformers' defaults, which are not mlx-lm's.
DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}


def text_config(config: dict) -> dict:
    """mlx-lm's arguments from a config.json: of the whole model or the tower, new or old keys.

    Raises SnapGenError for what mlx-lm's layers do not compute.
    """
    text = DEFAULTS | config.get("text_config", config) | {"model_type": "qwen2"}
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "mrope"):
        raise SnapGenError(f"Qwen2.5-VL config: rope_type = {kind!r} is not supported")
    if text.get("use_sliding_window"):
        raise SnapGenError("Qwen2.5-VL config: use_sliding_window = True is not supported")
    if text.get("hidden_act", "silu") != "silu":
        raise SnapGenError(
            f"Qwen2.5-VL config: hidden_act = {text['hidden_act']!r} is not supported"
        )
    theta = rope.get("rope_theta") or text.get("rope_theta") or 1e6
    return text | {"rope_theta": theta, "rope_scaling": None}


class QwenText(LanguageModel):
    name = "qwen"
    max_tokens = 512  # that are read; the longest text of diffusers' pipeline

    def __init__(
        self, config: dict, tokenizer: Tokenizer | None = None, dtype: mx.Dtype = mx.float32
    ):
        """config: the dictionary of a config.json; tokenizer: text -> ids; dtype, of states."""
        qwen2 = import_mlx_lm("models.qwen2")
        args = qwen2.ModelArgs.from_dict(text_config(config))
        super().__init__(args, qwen2.Qwen2Model(args), tokenizer, dtype)

    def __call__(self, ids: mx.array) -> mx.array:
        """Ids (B, L) -> last hidden states after the norm (B, L, dim).

        Attention is causal: padding on the right changes no state of a text.
        """
        embeddings = self.model.embed_tokens(ids).astype(self._dtype)
        return self.model(ids, input_embeddings=embeddings)

    def token_count(self, text: str) -> int:
        return super().token_count(TEMPLATE.format(text)) - UNREAD

    def encode(self, texts: list[str]) -> tuple[mx.array, mx.array]:
        """States (B, L, dim) and mask (B, L) of the texts within the template, from the text on."""
        texts = [TEMPLATE.format(text) for text in texts]
        ids, mask = self.tokenize(texts, UNREAD + self.max_tokens)
        return self(ids)[:, UNREAD:], mask[:, UNREAD:]
