"""Random checkpoints in which no parameter is at its neutral value, and their MLX layouts."""

import mlx.core as mx
import torch

from .torch_dit import SnapGenPPTransformer2DModel


def random_state_dict(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """A float32 state_dict with every value random, scaled so that activations stay of order 1."""
    with torch.device("meta"):
        shapes = SnapGenPPTransformer2DModel(config).state_dict()
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for key, value in shapes.items():
        noise = torch.randn(value.shape, generator=generator)
        if "norm" in key and key.endswith("weight"):
            noise = 1 + 0.2 * noise
        elif "scale_shift_table" in key:
            noise = 0.3 * noise
        elif key == "text_embed.null":
            pass
        elif key.endswith("bias"):
            noise = 0.3 * noise
        elif "kv_compress" in key:  # (K, D out, D in, 2, 2)
            noise = noise / value[0, 0].numel() ** 0.5
        else:
            noise = noise / value[0].numel() ** 0.5
        out[key] = noise
    return out


def to_mlx(sd: dict[str, torch.Tensor]) -> dict[str, mx.array]:
    """The same keys with MLX layouts: channels last in both kinds of convolution."""
    out = {}
    for key, value in sd.items():
        if key == "patch_embed.proj.weight":  # OIHW -> (O, kh, kw, I)
            value = value.permute(0, 2, 3, 1)
        elif "kv_compress" in key:  # (K, D out, D in, 2, 2) -> (K, D out, 2, 2, D in)
            value = value.permute(0, 1, 3, 4, 2)
        out[key] = mx.array(value.detach().contiguous().numpy())
    return out
