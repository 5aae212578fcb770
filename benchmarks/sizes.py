"""Sizes of the full geometry and the Macs that it fits, predicted: ``python -m benchmarks.sizes``.

Nothing is downloaded or computed: models are laid out as ``quantize`` would write them, in files
that are holes, and ``memory`` predicts the peak for a picture of 1024² pixels without guidance on
Metal. Two thirds of a Mac's memory are taken to be usable (as Metal recommends on Macs of up to 36
GB). Encoders are TinyCLIP 39M's text tower and Gemma-3-4b, in 4 bits unless the rest is in 16.
"""

import contextlib
import dataclasses
import json
import tempfile
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from snapgen_mlx.config import DiTConfig
from snapgen_mlx.files import write_json
from snapgen_mlx.loading import load_vae
from snapgen_mlx.memory import ModelMemory, Request
from snapgen_mlx.models.clip_text import CLIPText, CLIPTextConfig
from snapgen_mlx.models.elastic import random_supernet
from snapgen_mlx.models.gemma_text import GemmaText
from snapgen_mlx.models.vae import AutoencoderKLQwenImage, VAEConfig
from snapgen_mlx.quantization.backends import backend_of
from snapgen_mlx.quantization.quantize import other_part, transformer_part
from snapgen_mlx.quantization.recipe import BITS, design, quantizable, uniform
from snapgen_mlx.tensors.safetensors_io import NAMES
from snapgen_mlx.tensors.stream import Component
from snapgen_mlx.tensors.weights import SINGLE

GEMMA = {
    **{"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240},
    **{"num_hidden_layers": 34, "vocab_size": 262208, "sliding_window": 1024},
}
CLIP = CLIPTextConfig(num_hidden_layers=6)
OTHERS = ["vae", "text_encoder", "text_encoder_2"]
MACS = (8, 16, 24)  # GB
USABLE = 2 / 3
FORMS = [("affine", 16), ("affine", 8), ("affine", 4.3), ("palette", 8), ("palette", 4.3)]


@contextlib.contextmanager
def as_on_a_mac():
    """Types and memory as with Metal, which nothing needs that is never evaluated."""
    gpu = mock.patch.object(mx, "default_device", lambda: mx.gpu)
    with gpu, mock.patch.object(mx.metal, "is_available", lambda: True):
        yield


def write_hole(folder: Path, config: dict, entries: dict) -> None:
    """A component's folder with a weight file of the right length and nothing in it."""
    write_json(folder / "config.json", config)
    header, stop = {}, 0
    for key, (dtype, shape) in entries.items():
        start, stop = stop, stop + dtype.size * mx.zeros(shape).size
        header[key] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    with open(folder / SINGLE, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + stop)


def half(module: nn.Module) -> dict:
    return {k: (mx.bfloat16, a.shape) for k, a in tree_flatten(module.parameters())}


def write_model(folder: Path, config: DiTConfig) -> None:
    """The whole pipeline in 16 bits."""
    weights = {k: (mx.bfloat16, a.shape) for k, a in random_supernet(config).items()}
    vae, clip = VAEConfig(), dataclasses.asdict(CLIP) | {"model_type": "clip_text_model"}
    write_json(folder / "config.json", {})
    write_hole(folder / "transformer", config.to_dict(), weights)
    name = {"_class_name": "AutoencoderKLQwenImage"}
    write_hole(folder / "vae", name | dataclasses.asdict(vae), half(AutoencoderKLQwenImage(vae)))
    write_hole(folder / "text_encoder", clip, half(CLIPText(CLIP)))
    write_hole(folder / "text_encoder_2", GEMMA, half(GemmaText(GEMMA)))


def plan(
    folder: Path, config: DiTConfig, backend: str, bits: float, others: list[str]
) -> list[Component]:
    """What ``quantize`` makes of it, with a recipe by the paper's rule for layers alike."""
    form = backend_of(backend, config)
    shapes = quantizable(config, form.group)
    if bits in BITS:
        recipe = uniform(config, shapes, bits)
    else:
        alike = {k: {"full": {"mse": dict.fromkeys(map(str, BITS), 1.0)}} for k in shapes}
        recipe = design(config, shapes, alike, bits, "mse")
    return [transformer_part(folder, recipe, form), *(other_part(folder / n, form) for n in others)]


def peak(folder: Path, config: DiTConfig, gemma_bits: int | None) -> int:
    """Predicted bytes on a Mac."""
    encoders = [CLIPText(CLIP), GemmaText(GEMMA)]
    for encoder in encoders:
        encoder.set_dtype(mx.bfloat16)
    if gemma_bits:
        nn.quantize(encoders[1], group_size=64, bits=gemma_bits)
    memory = ModelMemory(folder, load_vae(folder), encoders)
    return memory.predict(config.variants[-1], Request(1024, 1024)).peak


def main():
    print(
        "Predicted from shapes; GB\n\n"
        "| | weights | transformer | VAE | TinyCLIP | Gemma | all | peak of memory | fits |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    supernet = DiTConfig.from_preset("full")
    models = {n: supernet.variant(i) for i, n in enumerate(supernet.variants)}
    models["all widths in one"] = supernet
    with as_on_a_mac():
        for name, config in models.items():
            for backend, bits in FORMS:
                with tempfile.TemporaryDirectory() as tmp:
                    print(row(Path(tmp), name, config, backend, bits))


def row(folder: Path, name: str, config: DiTConfig, backend: str, bits: float) -> str:
    write_model(folder, config)
    if bits < 16:
        for part in plan(folder, config, backend, bits, OTHERS):
            entries = {k: v for row in part.rows for k, v in row.entries().items()}
            write_hole(folder / part.name, part.config, entries)
    sizes = [(folder / n / SINGLE).stat().st_size / 1e9 for n in ("transformer", *OTHERS)]
    need = peak(folder, config, 4 if bits < 16 else None) / 1e9
    fits = next((f"a Mac of {mac} GB" for mac in MACS if need <= USABLE * mac), "none of these")
    form = f"{bits:g} bits" + (f", {backend}" if bits < 16 else "")
    cells = [name, form, *(f"{s:.3f}" for s in sizes), f"{sum(sizes):.2f}", f"{need:.1f}", fits]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
