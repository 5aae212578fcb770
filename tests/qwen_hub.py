"""A tiny Qwen-Image as it lies on the Hub, saved by the original classes, and a Lightning LoRA."""

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

# 64 channels, so that matrices can be quantized.
TRANSFORMER = dict(
    patch_size=2,
    in_channels=16,
    out_channels=4,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=4,
    joint_attention_dim=64,
    axes_dims_rope=(8, 4, 4),
)
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
MODULES = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")]
MODULES += [f"attn.add_{name}_proj" for name in "qkv"]
MODULES += [f"{stream}_mlp.net.{end}" for stream in ("img", "txt") for end in ("0.proj", "2")]


def randomise(model, scale: float = 1.0):
    """Give every parameter random values, norms and biases too."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim == 1 else scale * p[0].numel() ** -0.5))
    return model.eval()


def qwen_tokenizer() -> Qwen2Tokenizer:
    words = sorted(ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "cat")]
    words += ["".join(pair) for pair in merges]
    tokenizer = Qwen2Tokenizer(vocab={w: i for i, w in enumerate(words)}, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def qwen_text_encoder(tokenizer, dim: int = 64) -> Qwen2_5_VLForConditionalGeneration:
    sizes = dict(hidden_size=dim, intermediate_size=64, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, vocab_size=len(tokenizer) + 5)
    sections = [dim // 4 // 2 // 4, dim // 4 // 2 // 4, dim // 4 // 4]
    rope = {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e6}
    vision = dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=16, out_hidden_size=dim)
    text = sizes | {"rope_parameters": rope, "rms_norm_eps": 1e-6}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return randomise(Qwen2_5_VLForConditionalGeneration(config))


def qwen_pipeline(seed: int = 0, **transformer) -> QwenImagePipeline:
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=randomise(AutoencoderKLQwenImage(**VAE)),
        text_encoder=qwen_text_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=randomise(QwenImageTransformer2DModel(**(TRANSFORMER | transformer))),
    )


def save_qwen(folder, seed: int = 0, **transformer):
    """Write the pipeline, its transformer in several shards; returns the folder."""
    pipeline = qwen_pipeline(seed, **transformer)
    pipeline.save_pretrained(folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    pipeline.transformer.save_pretrained(folder / "transformer", max_shard_size="300KB")
    return folder


def save_lightning(path, seed: int = 1, rank: int = 4, alpha: float | None = 2.0, layers: int = 3):
    """Write a LoRA in the published form: 12 modules of each block, alpha beside each pair."""
    torch.manual_seed(seed)
    d, tensors = 64, {}
    for i in range(layers):
        for module in MODULES:
            name = f"transformer_blocks.{i}.{module}"
            rows = 4 * d if module.endswith("0.proj") else d
            columns = 4 * d if module.endswith("net.2") else d
            tensors[f"{name}.lora_down.weight"] = torch.randn(rank, columns) * columns**-0.5
            tensors[f"{name}.lora_up.weight"] = torch.randn(rows, rank) * 0.3
            if alpha is not None:
                tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path
