"""diffusers' Qwen-Image VAE as a 2-D network."""

import mlx.core as mx

from ...loading import build_autoencoder
from ...models.vae import VAEConfig
from ...tensors.stream import COPY, Step
from ...tensors.weights import parameter_shapes
from .interface import CHANNELS_LAST, Drop, channels_first

# For a single image a causal convolution is a 2-D one with its last temporal slice.
LAST_SLICE = Step("last temporal slice, OIHW -> OHWI", lambda a: a[:, :, -1].transpose(0, 2, 3, 1))
GAMMA = Step("flatten", lambda a: a.reshape(-1))


def config(source: dict) -> dict:
    return {k: v for k, v in source.items() if k != "_diffusers_version"}


def shapes(source: dict) -> dict[str, tuple]:
    return parameter_shapes(build_autoencoder(source))


def _is_2d(key: str) -> bool:
    return ".resample." in key or ".attentions." in key


def route(key: str) -> dict[str, Step] | Drop:
    if ".time_conv." in key:
        return Drop("never called for one image")
    if key.endswith(".gamma"):
        return {key: GAMMA}
    if key.endswith(".bias"):
        return {key: COPY}
    return {key: CHANNELS_LAST if _is_2d(key) else LAST_SLICE}


def back(key: str, a: mx.array) -> tuple[str, mx.array]:
    """The PyTorch key and layout; temporal slices that no image uses are zero."""
    if key.endswith(".gamma"):
        return key, a.reshape(-1, *(1, 1) if _is_2d(key) else (1, 1, 1))
    if key.endswith(".bias"):
        return key, a
    a = channels_first(a)
    if _is_2d(key):
        return key, a
    causal = [(0, 0), (0, 0), (a.shape[-1] - 1, 0), (0, 0), (0, 0)]
    return key, mx.pad(a[:, :, None], causal)


def time_convs(source: dict) -> dict[str, tuple]:
    """Keys and shapes of the layers that a video needs and an image does not."""
    c = VAEConfig.from_dict(source)
    temporal = source.get("temperal_downsample", [False, True, True])
    out: dict[str, tuple[int, ...]] = {}
    for level, is_temporal in enumerate(temporal):
        if not is_temporal:
            continue
        # Upsamplers stand in mirrored order; theirs doubles the channels, into two frames.
        up = len(temporal) - 1 - level
        down_dim, up_dim = (c.base_dim * c.dim_mult[i] for i in (level, len(temporal) - up))
        index = (level + 1) * (c.num_res_blocks + 1) - 1
        names = {
            f"encoder.down_blocks.{index}.time_conv": (down_dim, down_dim),
            f"decoder.up_blocks.{up}.upsamplers.0.time_conv": (2 * up_dim, up_dim),
        }
        for name, (rows, columns) in names.items():
            out[f"{name}.weight"], out[f"{name}.bias"] = (rows, columns, 3, 1, 1), (rows,)
    return out
