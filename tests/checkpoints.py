"""Complete tiny checkpoints, saved by the original PyTorch classes."""

import json

import torch
from diffusers import AutoencoderKLQwenImage
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Gemma3TextConfig,
    Gemma3TextModel,
)

from .reference.weights import random_state_dict

DIT = {
    "_class_name": "SnapGenPPTransformer2DModel",
    "in_channels": 4,
    "patch_size": 2,
    "hidden_size": 256,
    "head_dim": 16,
    "num_heads": 16,
    "num_kv_heads": 8,
    "cross_kv_heads": 4,
    "caption_dim": 64,
    "text_dims": {"clip": 32, "gemma": 32},
    "layers": [1, 2, 1],
    "ffn_ratio": [4, 3, 4],
    "bna_blocks": 4,
    "bna_radius": 1,
    "rope_theta": 10000,
    "widths": [0.375, 0.5, 1.0],
}
VAE = dict(
    base_dim=8,
    z_dim=4,
    dim_mult=[1, 2, 4, 4],
    num_res_blocks=1,
    attn_scales=[],
    temperal_downsample=[False, True, True],
    latents_mean=[0.3, -0.2, 0.1, 0.5],
    latents_std=[2.0, 1.5, 0.7, 3.0],
)
GEMMA = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=7,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=4,
    max_position_embeddings=64,
    query_pre_attn_scalar=16,
)
SHARD = 1_000_000  # bytes; the transformer's float32 weights make several


def randomise(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim < 2 else p[0].numel() ** -0.5))
    return model.eval()


def clip_tokenizer() -> CLIPTokenizer:
    letters = sorted(ByteLevel.alphabet())
    words = letters + [c + "</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])


def gemma_tokenizer() -> Tokenizer:
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "a", "smiling", "cat", "red", "rocket"]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


def clip_model(**changes) -> CLIPTextModel:
    tokenizer = clip_tokenizer()
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.eos_token_id, **ids, **sizes)
    return randomise(CLIPTextModel(CLIPTextConfig(**{**config, **changes})), 1)


def gemma_model(**changes) -> Gemma3TextModel:
    return randomise(Gemma3TextModel(Gemma3TextConfig(**{**GEMMA, **changes})), 2)


def vae_model() -> AutoencoderKLQwenImage:
    return randomise(AutoencoderKLQwenImage(**VAE), 3)


def save_sharded(state: dict, folder, stem="diffusion_pytorch_model", size=SHARD):
    """safetensors shards of at most ``size`` bytes, with their index."""
    parts, used = [{}], 0
    for key, a in state.items():
        if parts[-1] and used + a.nbytes > size:
            parts.append({})
            used = 0
        parts[-1][key] = a.contiguous()
        used += a.nbytes
    names = [f"{stem}-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name, {"format": "pt"})
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def save_checkpoint(folder, dtype=torch.float32, dit=DIT) -> dict[str, torch.Tensor]:
    """A whole diffusers-style checkpoint; returns the transformer's state_dict."""
    state = {k: v.to(dtype) for k, v in random_state_dict(dit, seed=7).items()}
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(dit))
    save_sharded(state, folder / "transformer")
    vae_model().to(dtype).save_pretrained(folder / "vae")
    clip_model().to(dtype).save_pretrained(folder / "text_encoder")
    gemma_model().to(dtype).save_pretrained(folder / "text_encoder_2")
    clip_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "tokenizer_2").mkdir()
    gemma_tokenizer().save(str(folder / "tokenizer_2" / "tokenizer.json"))
    index = {
        "_class_name": "SnapGenPPPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "SnapGenPPTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "Gemma3TextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "GemmaTokenizer"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.5}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return state
