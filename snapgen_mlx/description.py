"""What a model folder holds and needs, from its headers."""

from math import prod
from pathlib import Path

from .device import usable_memory
from .errors import SnapGenError
from .files import folder_bytes
from .layout import TINY_DECODER, TOKENIZERS, few_step_lora, load_config
from .loading import load_tiny_decoder, load_vae
from .memory import ModelMemory, Request
from .sampling import FEW_STEPS
from .settings import Settings
from .tensors.palette import float_shape
from .tensors.weights import load_infos
from .text_loading import load_text_encoders


def describe(folder) -> dict:
    """A model folder in words and numbers, fit for JSON; no weight is read.

    Returns:
        Bytes of the folder; ``source``; ``sampling`` of the base, and ``few_steps``; ``parts`` by
        their folders (``kind``, ``parameters``, ``bits_per_weight``, ``bytes``); ``text_dims`` that
        the transformer reads; ``memory`` by width: parameters and predicted bytes for a picture of
        the model's own size.
    """
    folder = Path(folder)
    config = load_config(folder)
    s = Settings.from_config(config, "any")
    vae, encoders = load_vae(folder), load_text_encoders(folder)
    memory = ModelMemory(folder, vae, encoders)
    parts: dict[str, dict] = {
        "transformer": {"kind": type(memory.config).__name__.removesuffix("Config")}
    }
    parts["vae"] = {"kind": type(vae).__name__}
    for name in TOKENIZERS:
        if (folder / name).is_dir():
            parts[name] = {"kind": load_config(folder / name).get("model_type")}
    if (folder / TINY_DECODER).is_dir():
        parts[TINY_DECODER] = {"kind": type(load_tiny_decoder(folder)).__name__}
    request = Request(s.width, s.height, s.guidance != 1)
    variants = memory.config.variants
    few_steps = [name for name in variants if few_step_lora(folder, name)]
    return {
        "folder": str(folder),
        "bytes": folder_bytes(folder),
        "source": _source(config.get("source")),
        "sampling": {k: getattr(s, k) for k in ("steps", "guidance", "shift", "width", "height")},
        "few_steps": {"variants": few_steps, **(FEW_STEPS if few_steps else {})},
        "parts": {name: part | stored(folder / name) for name, part in parts.items()},
        "text_dims": dict(memory.config.text_dims),
        "memory": {name: _needs(memory, name, request) for name in variants},
        "usable_memory": usable_memory(),
    }


def _needs(memory: ModelMemory, variant: str, request: Request) -> dict:
    predicted = memory.predict(variant, request)
    return {
        "parameters": memory.parameters(variant),
        "weights": memory.weights(variant),
        "encoding": predicted.encode,
        "denoising": predicted.denoise,
        "decoding": predicted.decode,
        "fits": memory.fits(variant, request),
    }


def _source(source) -> dict | None:
    """Name and revision of what a model was converted from."""
    if not isinstance(source, dict):
        return None
    name = source.get("name") or source.get("source")
    return {"name": name, "revision": source.get("revision")} if name else None


def stored(folder: Path) -> dict:
    """Number of parameters, bits for each and bytes of the weights in a folder."""
    infos = load_infos(folder)
    quantization = load_config(folder).get("quantization") or {}
    count = 0
    for key, i in infos.items():
        layer, _, part = key.rpartition(".")
        scales, palette = infos.get(f"{layer}.scales"), infos.get(f"{key}.palette")
        try:
            if palette:
                count += prod(float_shape(i.shape, palette.shape))
            elif scales and part == "weight":
                count += prod(scales.shape) * quantization.get(layer, quantization)["group_size"]
            elif part == "bias" or not (scales or part == "palette"):
                count += prod(i.shape)
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise SnapGenError(f"{folder} does not say how {layer} is quantized") from e
    size = sum(i.nbytes for i in infos.values())
    return {"parameters": count, "bits_per_weight": 8 * size / max(count, 1), "bytes": size}
