"""CLIP's text tower, from transformers' layout or open_clip's (TinyCLIP's GitHub files)."""

import re
from functools import partial

import mlx.core as mx

from ...models.clip_text import CLIPText, CLIPTextConfig
from ...tensors.stream import COPY, Step
from ...tensors.weights import parameter_shapes
from .interface import Drop

NOT_TEXT = {
    "vision_model.": "the image tower",
    "visual.": "the image tower",
    "visual_projection.": "the image tower",
    "_image_encoder.": "the image tower",
    "text_projection": "a projection into the joint space, behind the states",
    "logit_scale": "of the contrastive loss",
    "_logit_scale": "of the contrastive loss",
    "embeddings.position_ids": "a buffer, 0 to 76",
    "attn_mask": "a buffer, the causal mask",
}
OPEN_CLIP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
OPEN_CLIP_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)")
OPEN_CLIP_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def take_third(i: int, a: mx.array) -> mx.array:
    return mx.split(a, 3)[i]


# The fused query, key and value projection of torch.nn.MultiheadAttention.
THIRDS = [Step(f"third {i} of 3", partial(take_third, i)) for i in range(3)]


def config(source: dict) -> dict:
    """transformers' text config out of a text, a whole CLIP's or an open_clip config."""
    source = source.get("model_cfg", source)
    if "text_cfg" in source:
        text = source["text_cfg"]
        source = {
            "vocab_size": text.get("vocab_size", 49408),
            "hidden_size": text["width"],
            "intermediate_size": int(text.get("mlp_ratio", 4) * text["width"]),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text.get("context_length", 77),
            "hidden_act": "quick_gelu" if source.get("quick_gelu") else "gelu",
        }
    return source.get("text_config", source) | {"model_type": "clip_text_model"}


def shapes(source: dict) -> dict[str, tuple]:
    model = CLIPText(CLIPTextConfig.from_dict(config(source)))
    return parameter_shapes(model)


def route(key: str) -> dict[str, Step] | Drop:
    for start, reason in NOT_TEXT.items():
        if key.startswith(start):
            return Drop(reason)
    if key in OPEN_CLIP:
        return {OPEN_CLIP[key]: COPY}
    if match := OPEN_CLIP_LAYER.fullmatch(key):
        layer, part, name = match.groups()
        path = f"encoder.layers.{layer}"
        if part == "attn.in_proj":
            projections = zip("qkv", THIRDS, strict=True)
            return {f"{path}.self_attn.{p}_proj.{name}": third for p, third in projections}
        return {f"{path}.{OPEN_CLIP_PARTS.get(part, part)}.{name}": COPY}
    return {key: COPY}


def back(key: str, a: mx.array) -> tuple[str, mx.array]:
    return f"text_model.{key}", a
