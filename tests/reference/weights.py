"""Random checkpoints in which no parameter is at its neutral value, and their MLX layouts."""

import mlx.core as mx
import torch

from .torch_dit import SnapGenPPTransformer2DModel


def random_state_dict(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """A float32 state_dict with every value random, scaled so that activations stay of order 1.

    What goes into a norm next is small, so that the norm's eps is seen.
    """
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
        if "patch_embed" in key or ".to_q" in key or ".to_k" in key:
            noise = 0.05 * noise
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


def random_inputs(config: dict, size: tuple[int, int], batch: int, seed: int = 0) -> tuple:
    """x (B, C, H, W) for a latent of `size`, t, text and masks of every encoder of `config`.

    The first sample's t is 0, the last one's 1. The first token of a text is valid, the rest of
    it at random: padding may lie anywhere. Texts are small, so that their norm's eps is seen.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config["in_channels"], *size, generator=generator)
    t = torch.linspace(0, 1, batch) if batch > 1 else torch.tensor([0.7])
    text, masks = {}, {}
    for length, (name, dim) in enumerate(config["text_dims"].items(), start=5):
        text[name] = 0.05 * torch.randn(batch, length, dim, generator=generator)
        masks[name] = torch.rand(batch, length, generator=generator) < 0.6
        masks[name][:, 0] = True
    return x, t, text, masks


def inputs_to_mlx(x, t, text, masks) -> tuple:
    """The same inputs for the MLX model: x (B, H, W, C)."""
    to = lambda value: mx.array(value.numpy())  # noqa: E731
    text, masks = ({name: to(value) for name, value in d.items()} for d in (text, masks))
    return to(x.permute(0, 2, 3, 1).contiguous()), to(t), text, masks
