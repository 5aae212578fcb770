"""MLX model folder in, PyTorch checkpoint out (architecture section 4): the inverse of convert."""

import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from ..errors import SnapGenError, UsageError
from ..files import atomic_folder, atomic_write
from ..quantization.palette import SUFFIX as PALETTE
from ..quantization.palette import expand
from ..safetensors_io import DTYPES, NAMES
from ..weights import dequantize, load_config, write_json
from . import vae
from .formats import Info, name_some, open_weights
from .hub import COMPONENTS
from .plan import TOKENIZERS, Component, Row, as_they_are, kind, tokenizer_files
from .steps import COPY, Step
from .write import check_disk, copy_few_steps, verify, write_components

# Library and class of a component, and its tokenizer's class, by what its config says it is.
CLASSES = {
    "SnapGenPPTransformer2DModel": ("snapgen_mlx", "SnapGenPPTransformer2DModel", None),
    "AutoencoderKLQwenImage": ("diffusers", "AutoencoderKLQwenImage", None),
    "SnapGenAutoencoder": ("snapgen_mlx", "SnapGenAutoencoder", None),
    "StickerAutoencoder": ("snapgen_mlx", "StickerAutoencoder", None),
    "clip_text_model": ("transformers", "CLIPTextModel", "CLIPTokenizer"),
    "gemma3_text": ("transformers", "Gemma3TextModel", "GemmaTokenizer"),
    "static_text": ("snapgen_mlx", "StaticText", None),
}


class _Floats:
    """A reader over another whose affine-quantized layers and palettes come as floats."""

    def __init__(self, reader, shapes: dict[str, tuple]):
        self.infos, self._reader, self._shapes = {}, reader, shapes
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

    def __init__(self, reader, zeros: dict[str, tuple], dtype: str):
        self._reader = reader
        self.infos = {**reader.infos, **{k: Info(dtype, shape) for k, shape in zeros.items()}}

    def read(self, key: str) -> mx.array:
        if key in self._reader.infos:
            return self._reader.read(key)
        return mx.zeros(self.infos[key].shape, DTYPES[self.infos[key].dtype])


def export(folder, dest, progress: Callable[[int, int], None] | None = None) -> dict:
    """Write an MLX model folder back as a diffusers-style PyTorch checkpoint.

    Weights keep their dtype; quantized layers become floats of their scales' dtype. Converting
    the result gives the same tensors bit for bit, unless there were quantized ones. Returns a
    report {"bytes", "dequantized": {component: layers}, "written"}. Raises SnapGenError for a
    folder that is damaged, no MLX model, or lacks weights, and when ``dest`` holds something.
    """
    folder, dest = Path(folder), Path(dest).expanduser().absolute()
    head = load_config(folder)
    if head.get("format") != "snapgen-mlx":
        raise UsageError(f"{folder} is not an MLX model folder of snapgen-mlx")
    names = [name for name in COMPONENTS if (folder / name).is_dir()]
    components = {name: _component(folder / name) for name in names}
    if not components:
        raise SnapGenError(f"{folder} holds none of {', '.join(COMPONENTS)}")
    sampling = head.get("sampling", {})
    with atomic_folder(dest) as tmp:
        check_disk(tmp, components)
        write_components(tmp, components, "pt", progress)
        index = {"_class_name": "SnapGenPPPipeline", "sampling": sampling}
        for name, component in components.items():
            write_json(tmp / name / "config.json", component.config)
            index |= _entry(folder, name, component)
            _copy_files(folder, tmp, name, component)
        copy_few_steps(folder, tmp)
        index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
        scheduler = {"_class_name": index["scheduler"][1], "shift": sampling.get("shift", 3.0)}
        write_json(tmp / "scheduler" / "scheduler_config.json", scheduler)
        write_json(tmp / "model_index.json", index)
        with atomic_write(tmp / "README.md") as card:
            card.write_text(_card(components))
        written = verify(tmp, components)
    size = sum(c.nbytes for c in components.values())
    return {"bytes": size, "dequantized": _dequantized(components), "written": written}


def _dequantized(components: dict[str, Component]) -> dict[str, int]:
    readers = {name: c.reader for name, c in components.items()}
    return {name: r.layers for name, r in readers.items() if getattr(r, "layers", 0)}


def _component(folder: Path) -> Component:
    config = load_config(folder)
    _, rules = kind(config, folder / "config.json")
    component = Component(folder.name, folder, config, rules, folder / "config.json")
    component.config = {k: v for k, v in config.items() if k != "quantization"}
    component.reader = reader = open_weights(folder)
    if rules is None:
        component.rows = as_they_are(reader)
        return component
    shapes = rules.shapes(config)
    component.reader = reader = _Floats(reader, shapes)
    if odd := set(shapes) ^ set(reader.infos):
        raise SnapGenError(f"{folder} lacks, or has beyond its model, {name_some(odd)}")
    dtypes = {}
    for key, info in reader.infos.items():
        if info.shape != tuple(shapes[key]):
            raise SnapGenError(f"{folder}: {key!r} has shape {info.shape}, not {shapes[key]}")
        dtype = dtypes[key] = DTYPES[info.dtype]
        target, lazy = rules.back(key, mx.zeros(info.shape, dtype))
        step = Step("back", lambda a, key=key: rules.back(key, a)[1])
        component.rows.append(Row(key, tuple(lazy.shape), step.action, target, dtype, step=step))
    if "_class_name" in config:
        component.stem = "diffusion_pytorch_model"
    if rules is vae:
        zeros = vae.time_convs(config)
        dtype = next(iter(dtypes.values()))
        component.reader = _WithZeros(reader, zeros, NAMES[dtype])
        for key, shape in zeros.items():
            component.rows.append(Row(key, shape, "zero", key, dtype, step=COPY))
    return component


def _entry(folder: Path, name: str, component: Component) -> dict[str, list]:
    config = component.config
    library, model, tokenizer = CLASSES[config.get("_class_name") or config["model_type"]]
    entry = {name: [library, model]}
    if tokenizer and (folder / TOKENIZERS[name]).is_dir():
        entry[TOKENIZERS[name]] = [library, tokenizer]
    return entry


def _copy_files(folder: Path, target: Path, name: str, component: Component) -> None:
    for file in (folder / name).glob("*.txt"):  # a static table's words
        shutil.copyfile(file, target / name / file.name)
    source = folder / TOKENIZERS.get(name, "")
    if name in TOKENIZERS and source.is_dir():
        (target / source.name).mkdir()
        for file in tokenizer_files(source):
            shutil.copyfile(file, target / source.name / file.name)


def _card(components: dict[str, Component]) -> str:
    lines = [
        "# SnapGen++ for PyTorch",
        "",
        "Exported by snapgen-mlx: a diffusers-style folder, `transformer/` in the layout of",
        "`SnapGenPPTransformer2DModel`.",
    ]
    if any(component.rules is vae for component in components.values()):
        lines += [
            "",
            "The VAE is for single images: its `time_conv` layers and all but the last temporal",
            "slices of its convolutions, which an image never uses, are zero.",
        ]
    if names := _dequantized(components):
        lines += ["", f"Dequantized, and therefore rounded: {', '.join(names)}."]
    return "\n".join(lines) + "\n"
