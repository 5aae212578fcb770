"""MLX model folder in, PyTorch checkpoint out (architecture section 4): the inverse of convert."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..digest import base_digest
from ..errors import SnapGenError, UsageError, name_keys
from ..files import atomic_folder, atomic_write, expand_user, file_sha256, write_json
from ..layout import COMPONENTS, FORMAT, TOKENIZERS, load_config, tokenizer_files
from ..lora import copy_few_step_loras
from ..tensors.affine import dequantize
from ..tensors.palette import SUFFIX as PALETTE
from ..tensors.palette import expand
from ..tensors.readers import Info, Reader, open_component
from ..tensors.safetensors_io import NAMES, READ_AS
from ..tensors.stream import Component, Row, Step, copy_rows, verify, write_components
from ..tokenizer_files import copy_word_files
from ..vocabulary import copy_words
from .rules import qwen_vae
from .rules.interface import Rules
from .rules.registry import Kind, kind_of


@dataclass(kw_only=True)
class ExportedComponent(Component):
    kind: Kind
    dequantized: int = 0  # layers


class _Floats:
    """A reader over another whose affine-quantized layers and palettes come as floats."""

    def __init__(self, reader: Reader, shapes: dict[str, tuple[int, ...]]):
        self.files = reader.files
        self.infos: dict[str, Info] = {}
        self._reader, self._shapes = reader, shapes
        self.layers = sum(key.endswith((".scales", PALETTE)) for key in reader.infos)
        for key, info in reader.infos.items():
            for values in (f"{key.removesuffix('.weight')}.scales", f"{key}{PALETTE}"):
                if values in reader.infos and key in shapes:
                    info = Info(reader.infos[values].dtype, tuple(shapes[key]))
            if not key.endswith((".scales", ".biases", PALETTE)):
                self.infos[key] = info

    def read(self, key: str) -> mx.array:
        layer = key.removesuffix(".weight")
        names = (key, f"{key}{PALETTE}", f"{layer}.scales", f"{layer}.biases")
        parts = {n: self._reader.read(n) for n in names if n == key or n in self._reader.infos}
        return dequantize(expand(parts, "export"), self._shapes)[key]


class _WithZeros:
    """A reader with further tensors that are zero."""

    def __init__(self, reader: Reader, zeros: dict[str, tuple[int, ...]], dtype: str):
        self._reader, self.files = reader, reader.files
        self.infos = {**reader.infos, **{k: Info(dtype, shape) for k, shape in zeros.items()}}

    def read(self, key: str) -> mx.array:
        if key in self._reader.infos:
            return self._reader.read(key)
        return mx.zeros(self.infos[key].shape, READ_AS[self.infos[key].dtype])


def export(folder, dest, progress: Callable[[int, int], None] | None = None) -> dict:
    """Write an MLX model folder as a diffusers-style PyTorch checkpoint.

    Weights keep their dtype; quantized layers become floats in the dtype of their scales. If no
    layer was quantized, converting the result gives the same tensors to the bit.

    Args:
        folder: the model folder.
        dest: new folder.
        progress: called with (bytes done, bytes in all).

    Returns:
        {"bytes", "dequantized": {component: layers}, "written": {component: report}}.

    Raises:
        SnapGenError: the folder is damaged, is not an MLX model, or lacks weights; or ``dest`` is
            not empty.
    """
    folder, dest = Path(folder), expand_user(dest).absolute()
    head = load_config(folder)
    if head.get("format") != FORMAT["format"]:
        raise UsageError(f"{folder} is not an MLX model folder of snapgen-mlx")
    names = [name for name in COMPONENTS if (folder / name).is_dir()]
    components = {name: _component(folder / name) for name in names}
    if not components:
        raise SnapGenError(f"{folder} holds none of {', '.join(COMPONENTS)}")
    sampling = head.get("sampling", {})
    with atomic_folder(dest) as tmp:
        write_components(tmp, components.values(), "pt", progress)
        index = {"_class_name": "SnapGenPPPipeline", "sampling": sampling}
        index["base"] = base_digest(folder)
        if "transformer" in components:
            files = (tmp / "transformer").glob("*.safetensors")
            index["weights"] = sorted(map(file_sha256, files))
        for name, component in components.items():
            index |= _entry(folder, name, component)
            _copy_files(folder, tmp, name)
        copy_few_step_loras(folder, tmp)
        copy_words(folder, tmp)
        index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
        scheduler = {"_class_name": index["scheduler"][1], "shift": sampling.get("shift", 3.0)}
        write_json(tmp / "scheduler" / "scheduler_config.json", scheduler)
        write_json(tmp / "model_index.json", index)
        with atomic_write(tmp / "README.md") as card:
            card.write_text(_card(components))
        written = verify(tmp, components.values())
    size = sum(c.nbytes for c in components.values())
    return {"bytes": size, "dequantized": _dequantized(components), "written": written}


def _dequantized(components: dict[str, ExportedComponent]) -> dict[str, int]:
    return {name: c.dequantized for name, c in components.items() if c.dequantized}


def _component(folder: Path) -> ExportedComponent:
    config = load_config(folder)
    kind = kind_of(config, folder / "config.json")
    reader, rules = open_component(folder), kind.rules
    component = ExportedComponent(
        name=folder.name,
        config={k: v for k, v in config.items() if k != "quantization"},
        reader=reader,
        stem="diffusion_pytorch_model" if "_class_name" in config else "model",
        kind=kind,
    )
    if rules is None:
        component.rows = copy_rows(reader)
        return component
    shapes = rules.shapes(config)
    floats = _Floats(reader, shapes)
    component.reader, component.dequantized = floats, floats.layers
    if odd := set(shapes) ^ set(floats.infos):
        raise SnapGenError(f"{folder} lacks, or has beyond its model, {name_keys(odd)}")
    for key, info in floats.infos.items():
        if info.shape != tuple(shapes[key]):
            raise SnapGenError(f"{folder}: {key!r} has shape {info.shape}, not {shapes[key]}")
        component.rows.append(_row(rules, key, info.shape, READ_AS[info.dtype]))
    if rules is qwen_vae:
        zeros, dtype = qwen_vae.time_convs(config), component.rows[0].dtype
        component.reader = _WithZeros(floats, zeros, NAMES[dtype])
        component.rows += [Row(key, shape, key, dtype) for key, shape in zeros.items()]
    return component


def _row(rules: Rules, key: str, shape: tuple[int, ...], dtype: mx.Dtype) -> Row:
    """What becomes of an MLX parameter."""
    target, lazy = rules.back(key, mx.zeros(shape, dtype))
    step = Step("back", lambda a: rules.back(key, a)[1])
    return Row(key, tuple(lazy.shape), target, dtype, step)


def _entry(folder: Path, name: str, component: ExportedComponent) -> dict[str, list[str]]:
    kind = component.kind
    entry = {name: [kind.library, kind.model]}
    if kind.tokenizer and (folder / TOKENIZERS[name]).is_dir():
        entry[TOKENIZERS[name]] = [kind.library, kind.tokenizer]
    return entry


def _copy_files(folder: Path, target: Path, name: str) -> None:
    copy_word_files(folder / name, target / name)
    source = folder / TOKENIZERS.get(name, "")
    if name in TOKENIZERS and source.is_dir():
        (target / source.name).mkdir()
        for file in tokenizer_files(source):
            shutil.copyfile(file, target / source.name / file.name)


def _card(components: dict[str, ExportedComponent]) -> str:
    lines = [
        "# SnapGen++ for PyTorch",
        "",
        "Exported by snapgen-mlx: a diffusers-style folder, `transformer/` in the layout of",
        "`SnapGenPPTransformer2DModel`.",
    ]
    if any(component.kind.rules is qwen_vae for component in components.values()):
        lines += [
            "",
            "The VAE is for single images: its `time_conv` layers and all but the last temporal",
            "slices of its convolutions, which an image never uses, are zero.",
        ]
    if names := _dequantized(components):
        lines += ["", f"Dequantized, and therefore rounded: {', '.join(names)}."]
    return "\n".join(lines) + "\n"
