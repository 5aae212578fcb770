"""Which rules are a checkpoint's, and which folder it has in a model, by its config.json."""

from typing import NamedTuple

from ...errors import SnapGenError
from . import (
    clip,
    qwen_transformer,
    qwen_vae,
    snapgen_autoencoder,
    taehv_decoder,
    transformer,
)
from .interface import Rules
from .text_towers import GEMMA, QWEN


class Kind(NamedTuple):
    """A model that can be a part of SnapGen++."""

    folder: str
    rules: Rules | None  # None: the same on both sides
    library: str  # of its PyTorch class
    model: str
    tokenizer: str | None = None  # class


KINDS = {
    "SnapGenPPTransformer2DModel": Kind(
        "transformer", transformer, "snapgen_mlx", "SnapGenPPTransformer2DModel"
    ),
    "QwenImageTransformer2DModel": Kind(
        "transformer", qwen_transformer, "diffusers", "QwenImageTransformer2DModel"
    ),
    "AutoencoderKLQwenImage": Kind("vae", qwen_vae, "diffusers", "AutoencoderKLQwenImage"),
    "SnapGenAutoencoder": Kind("vae", snapgen_autoencoder, "snapgen_mlx", "SnapGenAutoencoder"),
    "StickerAutoencoder": Kind("vae", snapgen_autoencoder, "snapgen_mlx", "StickerAutoencoder"),
    "TAEHVDecoder": Kind("tiny_decoder", taehv_decoder, "taehv", "TAEHV"),
    "clip_text_model": Kind("text_encoder", clip, "transformers", "CLIPTextModel", "CLIPTokenizer"),
    "gemma3_text": Kind(
        "text_encoder_2", GEMMA, "transformers", "Gemma3TextModel", "GemmaTokenizer"
    ),
    "qwen2_5_vl_text": Kind(
        "text_encoder", QWEN, "transformers", "Qwen2_5_VLTextModel", "Qwen2Tokenizer"
    ),
    "static_text": Kind("text_encoder", None, "snapgen_mlx", "StaticText"),
    "word_transformer": Kind("text_encoder", None, "snapgen_mlx", "WordTransformer"),
}
# Whole models, with image towers.
ALIASES = {"clip": "clip_text_model", "gemma3": "gemma3_text", "qwen2_5_vl": "qwen2_5_vl_text"}


def kind_of(config: dict, where) -> Kind:
    """Raises SnapGenError for a config of no model that is part of SnapGen++."""
    name = config.get("_class_name") or config.get("model_type")
    if isinstance(name, str) and ALIASES.get(name, name) in KINDS:
        return KINDS[ALIASES.get(name, name)]
    open_clip = config.get("model_cfg", config)
    if isinstance(open_clip, dict) and "text_cfg" in open_clip:
        return KINDS["clip_text_model"]
    raise SnapGenError(
        f"{where} is of {name or 'an unknown model'}, which is not a part of SnapGen++"
    )
