"""Folders to models: the transformer, whole or one width of it, and the autoencoder."""

from pathlib import Path

import mlx.core as mx

from .config import ConfigMixin, DiTConfig
from .device import compute_dtype, on_metal
from .errors import SnapGenError
from .layout import load_config
from .lora import add_lora, load_lora
from .models.autoencoder import (
    SnapGenAutoencoder,
    SnapGenAutoencoderConfig,
    StickerAutoencoder,
    StickerAutoencoderConfig,
)
from .models.dit import DiT
from .models.elastic import random_supernet, slice_flat
from .models.interfaces import Autoencoder, AutoencoderConfig
from .models.vae import AutoencoderKLQwenImage, VAEConfig
from .tensors.affine import dequantize, quantize_like
from .tensors.weights import assign, load_tensors, parameter_shapes

# By the _class_name of their config.json: the class and its configuration.
AUTOENCODERS: dict[str, tuple[type, type[ConfigMixin]]] = {
    "SnapGenAutoencoder": (SnapGenAutoencoder, SnapGenAutoencoderConfig),
    "StickerAutoencoder": (StickerAutoencoder, StickerAutoencoderConfig),
    "AutoencoderKLQwenImage": (AutoencoderKLQwenImage, VAEConfig),
}


def load_dit_config(folder) -> DiTConfig:
    """The transformer's configuration of a model folder."""
    return DiTConfig.from_dict(load_config(Path(folder) / "transformer"))


def load_supernet(folder) -> tuple[DiTConfig, dict[str, mx.array]]:
    """Configuration and flat parameters of a transformer folder, unsliced and as stored."""
    folder = Path(folder)
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    return DiTConfig.from_dict(load_config(folder)), load_tensors(folder)


def load_float_supernet(folder) -> tuple[DiTConfig, dict[str, mx.array]]:
    """``load_supernet`` of a quantized model, such as the embedded one, as the floats it stands
    for."""
    config, params = load_supernet(folder)
    return config, dequantize(params, {k: a.shape for k, a in random_supernet(config).items()})


def load_dit(folder, variant: str | None = None, dtype: mx.Dtype | None = None, loras=()) -> DiT:
    """Load one width of a transformer.

    Args: folder, a model folder or its ``transformer/``; variant, a name of ``config.variants``
        (the widest when None); dtype of the weights (default: see ``compute_dtype``); loras, pairs
        (LoRA file, scale).
    Returns a ``DiT`` with its ``config``; nothing but headers is read before it is evaluated.
    Raises UsageError for an unknown variant, SnapGenError for damaged or foreign files.
    """
    config, tensors = load_supernet(folder)
    index = config.variant_index(variant or config.variants[-1])
    dit = DiT(config.variant(index) if len(config.widths) > 1 else config)
    tensors = slice_flat(tensors, config, index)
    dtype = dtype or compute_dtype()
    if on_metal():
        quantize_like(dit, tensors)
    else:  # quantized matmuls crawl on a CPU
        tensors = dequantize(tensors, parameter_shapes(dit))
    # Packed weights are integers and stay as they are.
    tensors = {k: a if a.dtype == mx.uint32 else a.astype(dtype) for k, a in tensors.items()}
    assign(dit, tensors, folder)
    for path, scale in loras:
        add_lora(dit, load_lora(path, config, index, scale, base=folder))
    return dit


def load_vae_config(folder) -> AutoencoderConfig:
    """The configuration of a model folder's autoencoder, whichever it is."""
    folder = Path(folder) / "vae"
    return build_autoencoder(load_config(folder), folder / "config.json").config


def load_vae(folder) -> Autoencoder:
    """The autoencoder of a model folder, whichever it is."""
    folder = Path(folder) / "vae"
    vae = build_autoencoder(load_config(folder), folder / "config.json")
    dtype = mx.float32 if vae.config.always_float32 else compute_dtype()
    assign(vae, {k: a.astype(dtype) for k, a in load_tensors(folder).items()}, folder)
    return vae


def build_autoencoder(config: dict, where="config.json") -> Autoencoder:
    """The network of the configuration in ``where``, with random weights that are not computed."""
    name = config.get("_class_name")
    if name not in AUTOENCODERS:
        raise SnapGenError(f"{where}: unknown autoencoder {name!r}")
    model_class, config_class = AUTOENCODERS[name]
    return model_class(config_class.from_dict(config))
