"""Folders to models: the transformer, whole or one width of it, and the autoencoder."""

from pathlib import Path

import mlx.core as mx

from .config import QWEN_IMAGE, ConfigMixin, DiTConfig, QwenImageConfig, TransformerConfig
from .device import DTYPES, inference_dtype, on_gpu, wide
from .errors import SnapGenError, UsageError, shown
from .hub import local_path
from .layout import TINY_DECODER, load_config
from .lora import add_lora, load_lora, load_updates
from .models.autoencoder import (
    SnapGenAutoencoder,
    SnapGenAutoencoderConfig,
    StickerAutoencoder,
    StickerAutoencoderConfig,
)
from .models.dit import DiT
from .models.elastic import random_supernet, slice_flat
from .models.interfaces import Autoencoder, AutoencoderConfig, Decoder
from .models.qwen_image import QwenImage
from .models.taehv import TAEHVConfig, TAEHVDecoder
from .models.tiny_decoder import TinyDecoder, TinyDecoderConfig
from .models.vae import AutoencoderKLQwenImage, VAEConfig
from .tensors.affine import cast_floats, dequantize, quantize_like
from .tensors.weights import assign, load_tensors, parameter_shapes

TINY_DECODERS: dict[str, tuple[type, type[ConfigMixin]]] = {
    "TAEHVDecoder": (TAEHVDecoder, TAEHVConfig),
    "TinyDecoder": (TinyDecoder, TinyDecoderConfig),
}
Transformer = DiT | QwenImage  # each is asked in the same way

# By the _class_name of their config.json: the class and its configuration.
AUTOENCODERS: dict[str, tuple[type, type[ConfigMixin]]] = {
    "SnapGenAutoencoder": (SnapGenAutoencoder, SnapGenAutoencoderConfig),
    "StickerAutoencoder": (StickerAutoencoder, StickerAutoencoderConfig),
    "AutoencoderKLQwenImage": (AutoencoderKLQwenImage, VAEConfig),
}


def load_dit_config(folder) -> DiTConfig:
    """The transformer's configuration of a model folder."""
    return DiTConfig.from_dict(load_config(Path(folder) / "transformer"))


def given_dtype(dtype: mx.Dtype | None) -> mx.Dtype:
    """The type to compute with: what was given, or ``inference_dtype``."""
    if dtype is not None and not (isinstance(dtype, mx.Dtype) and dtype in DTYPES.values()):
        raise UsageError(f"dtype must be one of mlx.core, as mx.float16, not {shown(dtype)}")
    return dtype or inference_dtype()


def lora_pairs(loras) -> list[tuple[str | Path, float]]:
    """LoRAs as they were given, checked. Raises UsageError unless they are pairs (file, scale)."""
    try:
        pairs = [(path, float(scale)) for path, scale in loras]
        if not all(isinstance(path, str | Path) for path, _ in pairs):
            raise ValueError
    except (TypeError, ValueError, OverflowError) as e:
        raise UsageError(f"LoRAs are a list of pairs (file, scale), not {shown(loras)}") from e
    return pairs


def load_supernet(folder) -> tuple[DiTConfig, dict[str, mx.array]]:
    """Configuration and flat parameters of a transformer folder, unsliced and as stored."""
    folder = local_path(folder)
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
        (the widest when None); dtype of the weights (default: ``inference_dtype``); loras, pairs
        (LoRA file, scale).
    Returns a ``DiT`` with its ``config``; nothing but headers is read before it is evaluated.
    Raises UsageError for an unknown variant, SnapGenError for damaged or foreign files.
    """
    dtype = given_dtype(dtype)
    config, tensors = load_supernet(folder)
    index = config.variant_index(config.variants[-1] if variant is None else variant)
    dit = DiT(config.variant(index) if len(config.widths) > 1 else config)
    _fill(dit, slice_flat(tensors, config, index), dtype, folder)
    for path, scale in lora_pairs(loras):
        add_lora(dit, load_lora(path, config, index, scale, base=folder))
    return dit


def load_qwen_image(
    folder, loras=(), read_once: bool = False, dtype: mx.Dtype | None = None
) -> QwenImage:
    """Load Qwen-Image's transformer; its LoRAs stay beside the weights.

    Args: folder, a model folder or its ``transformer/``; loras, pairs (LoRA file, scale);
        read_once, see ``QwenImage``; dtype of the weights, float16 being too narrow for them.
    """
    folder = Path(folder)
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    model = QwenImage(QwenImageConfig.from_dict(load_config(folder)), read_once)
    shapes = layer_shapes(parameter_shapes(model))
    updates = [load_updates(path, shapes, scale) for path, scale in lora_pairs(loras)]
    _fill(model, load_tensors(folder), wide(dtype), folder)
    for update in updates:
        add_lora(model, update, fuse=False)
    return model


def layer_shapes(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """{path: (out, in)} of the Linear layers among a model's parameters."""
    return {
        key.removesuffix(".weight"): (shape[0], shape[1])
        for key, shape in shapes.items()
        if key.endswith(".weight") and len(shape) == 2
    }


def _fill(model: Transformer, tensors: dict[str, mx.array], dtype: mx.Dtype, where: Path) -> None:
    """Give a model its weights as they are computed with on this machine, lazily."""
    if on_gpu():
        quantize_like(model, tensors)
    else:  # quantized matmuls crawl on a CPU
        tensors = dequantize(tensors, parameter_shapes(model))
    assign(model, cast_floats(tensors, dtype), where)


def load_transformer_config(folder) -> TransformerConfig:
    """The transformer's configuration of a model folder, whichever it is."""
    config = load_config(Path(folder) / "transformer")
    is_qwen = config.get("_class_name") == QWEN_IMAGE
    return QwenImageConfig.from_dict(config) if is_qwen else DiTConfig.from_dict(config)


def load_transformer(
    folder, variant: str | None = None, loras=(), dtype: mx.Dtype | None = None
) -> Transformer:
    """The transformer of a model folder at one width, whichever it is; see ``load_dit``."""
    if isinstance(load_transformer_config(folder), QwenImageConfig):
        return load_qwen_image(folder, loras, dtype=dtype)
    return load_dit(folder, variant, dtype, loras)


def load_vae_config(folder) -> AutoencoderConfig:
    """The configuration of a model folder's autoencoder, whichever it is."""
    folder = Path(folder) / "vae"
    return build_autoencoder(load_config(folder), folder / "config.json").config


def load_vae(folder, dtype: mx.Dtype | None = None) -> Autoencoder:
    """The autoencoder of a model folder, whichever it is."""
    folder = Path(folder) / "vae"
    vae = build_autoencoder(load_config(folder), folder / "config.json")
    dtype = mx.float32 if vae.config.always_float32 else dtype or inference_dtype()
    assign(vae, {k: a.astype(dtype) for k, a in load_tensors(folder).items()}, folder)
    return vae


def build_autoencoder(config: dict, where="config.json") -> Autoencoder:
    """The network of the configuration in ``where``, with random weights that are not computed."""
    name = config.get("_class_name")
    if name not in AUTOENCODERS:
        raise SnapGenError(f"{where}: unknown autoencoder {name!r}")
    model_class, config_class = AUTOENCODERS[name]
    return model_class(config_class.from_dict(config))


def load_tiny_decoder(folder, dtype: mx.Dtype | None = None) -> Decoder:
    """The tiny decoder of a model folder. Raises UsageError where there is none."""
    path = Path(folder) / TINY_DECODER
    if not path.is_dir():
        raise UsageError(
            f"{folder} has no tiny decoder; add one: snapgen-mlx convert {folder} "
            "--tiny-decoder taew2_1.pth"
        )
    config = load_config(path)
    name = config.get("_class_name")
    if name not in TINY_DECODERS:
        raise SnapGenError(f"{path / 'config.json'}: unknown decoder {name!r}")
    model_class, config_class = TINY_DECODERS[name]
    decoder = model_class(config_class.from_dict(config))
    return assign(decoder, cast_floats(load_tensors(path), dtype or inference_dtype()), path)
