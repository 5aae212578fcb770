"""Floating-point operations of the networks: products of matrices alone, two for each
multiply-add."""

import math

from .config import DiTConfig
from .memory import attention_scores
from .models.dit import DiT
from .models.vae import AutoencoderKLQwenImage, VAEConfig
from .tensors.weights import flat_parameters

# What is computed once for a picture and not in each step.
_ONCE = ("text_embed.", "time_embed.")


def step_flops(config: DiTConfig, size: tuple[int, int], text_tokens: int) -> int:
    """Of one width's evaluation on one latent (h, w), with its conditions computed before."""
    tokens = math.prod(size) // config.patch_size**2
    coarse = tokens // 4 if config.downsample else tokens
    positions = {"down": tokens, "mid": coarse, "up": tokens, "patch_embed": tokens}
    positions |= {"downsample": coarse, "upsample": coarse, "final": tokens}
    total = 0
    for path, a in flat_parameters(DiT(config)).items():
        is_text = ".cross.to_k." in path or ".cross.to_v." in path
        if a.ndim < 2 or path.startswith(_ONCE) or is_text or "scale_shift_table" in path:
            continue
        n = positions[path.partition(".")[0]]
        total += 2 * a.size * (n // 4 if ".kv_compress." in path else n)
    for stage, layers in enumerate(config.layers):
        n = (tokens, coarse, tokens)[stage]
        scores = attention_scores(config, stage, n) + n * (text_tokens + 1)  # and the null token
        total += layers * 4 * config.head_dim * config.num_heads * scores
    return total


def decoder_flops(config: VAEConfig, h: int, w: int) -> int:
    """Of decoding one latent (h, w) whole by the Qwen-Image VAE."""
    vae, area = AutoencoderKLQwenImage(config), h * w
    total = 4 * area**2 * config.base_dim * config.dim_mult[-1]  # attention of the middle block
    for path, a in flat_parameters(vae).items():
        if a.ndim < 4 or not path.startswith(("decoder.", "post_quant_conv.")):
            continue
        level = 0
        if ".up_blocks." in path:  # an upsampler's convolution runs at the next block's size
            level = int(path.split(".")[2]) + (".upsamplers." in path)
        elif ".conv_out." in path:
            level = len(config.dim_mult) - 1
        total += 2 * a.size * area * 4**level
    return total
