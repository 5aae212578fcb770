"""LoRA files: low-rank updates of Linear layers, matched strictly, then fused or run beside.

W' = W + scale · alpha/r · B A with A (r, in) and B (out, r) [Hu et al. 2021, section 4.1].
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from .config import DiTConfig
from .errors import SnapGenError, name_keys
from .layout import FEW_STEP
from .models.elastic import axis_groups, bank_index, in_bank, leading_slice, random_supernet
from .tensors.palette import expand
from .tensors.safetensors_io import read_header, save_arrays

PARTS = {
    **dict.fromkeys((".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight"), "a"),
    **dict.fromkeys((".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight"), "b"),
    ".alpha": "alpha",
}
PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "lora_unet_")
LISTED = 5  # keys named in a message


class Update(NamedTuple):
    """What a LoRA adds to a weight (out, in): b @ a, all scales already in b; float32."""

    a: mx.array  # (r, in)
    b: mx.array  # (out, r)


def load_lora(path, config: DiTConfig, index: int | None, scale: float = 1.0) -> dict[str, Update]:
    """Updates of a safetensors file by the path of their layer.

    Args: config, of the checkpoint, a supernet or a single width; index, the width to update: a
        LoRA of the supernet is cut to it as the weights are, one of its own sizes is taken as it
        is; None for the checkpoint uncut; scale, the user's factor.
    A file's alpha/r counts for each layer, 1 where it has no alpha. Raises SnapGenError for a
    damaged file, and unless every key of it fits a layer of the model.
    """
    layers, tensors, unfit = _read(path)
    updates, bad = _match(layers, tensors, _shapes(config))
    if index is not None and bad:
        own, own_bad = _match(layers, tensors, _shapes(config.variant(index)))
        if len(own_bad) < len(bad):
            updates, bad = own, own_bad
    elif index is not None:
        updates = _cut(updates, config, index)
    if unfit := unfit + [key for name in bad for key in layers[name].values()]:
        raise SnapGenError(
            f"{path}: {len(unfit)} of {len(tensors)} keys fit no layer of this model: "
            f"{name_keys(unfit, LISTED)}; is the LoRA of another model?"
        )
    if not updates:
        raise SnapGenError(f"{path} holds nothing for this width of the model")
    return {name: Update(u.a, scale * u.b) for name, u in updates.items()}


def read_lora(path) -> dict[str, mx.array]:
    """The tensors of a safetensors file; palettes come as the floats they stand for.

    Raises SnapGenError for a damaged file and for one of another kind.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise SnapGenError(f"{path} is not a safetensors file, which a LoRA must be")
    read_header(path)
    return expand(mx.load(str(path)), path)


def copy_few_step_loras(
    source: Path, target: Path, change: Callable[[dict], dict] = lambda tensors: tensors
) -> None:
    """The LoRAs with which a model needs few steps, where it has them; palettes become floats.

    change: what becomes of a LoRA's tensors.
    """
    for file in sorted((source / FEW_STEP).glob("*.safetensors")):
        save_arrays(target / FEW_STEP / file.name, change(read_lora(file)))


def _read(path) -> tuple[dict[str, dict[str, str]], dict[str, mx.array], list[str]]:
    """({layer: {part: key}}, {key: tensor}, keys that are no part of a LoRA)."""
    layers, other, tensors = {}, [], read_lora(path)
    for key in tensors:
        suffix = next((s for s in PARTS if key.endswith(s)), None)
        if suffix:
            layers.setdefault(key.removesuffix(suffix), {})[PARTS[suffix]] = key
        else:
            other.append(key)
    return layers, tensors, other


def _shapes(config: DiTConfig) -> dict[str, tuple[int, int]]:
    """{path: (out, in)} of all Linear layers, those of every width's bank among them."""
    weights = random_supernet(config).items()  # never evaluated
    return {
        key.removesuffix(".weight"): a.shape
        for key, a in weights
        if key.endswith(".weight") and a.ndim == 2
    }


def _match(layers, tensors, shapes) -> tuple[dict[str, Update], list[str]]:
    """The updates that fit a layer of ``shapes``, and the names in the file that do not."""
    known = {path: path for path in shapes} | {path.replace(".", "_"): path for path in shapes}
    updates, unfit = {}, []
    for name, keys in layers.items():
        path = _resolve(name, known)
        try:
            a, b = tensors[keys["a"]], tensors[keys["b"]]
            (rows, columns), (rank, _) = shapes[path], a.shape
            fits = rank and a.shape == (rank, columns) and b.shape == (rows, rank)
            alpha = tensors[keys["alpha"]].item() if "alpha" in keys else rank
        except (KeyError, ValueError):  # no such layer, a part is missing, alpha is no number
            fits = False
        if not fits or path in updates or not math.isfinite(alpha):
            unfit.append(name)
            continue
        updates[path] = Update(a.astype(mx.float32), b.astype(mx.float32) * (alpha / rank))
    return updates, unfit


def _resolve(name: str, known: dict[str, str]) -> str | None:
    """The layer's path, after as few prefixes are taken off as need be."""
    while name not in known:
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        if prefix is None:
            return None
        name = name.removeprefix(prefix)
    return known[name]


def _cut(updates: dict[str, Update], config: DiTConfig, index: int) -> dict[str, Update]:
    """Updates of a supernet for one of its widths, by the paths of that width's model."""
    out, width = {}, config.widths[index]
    for path, (a, b) in updates.items():
        bank = bank_index(f"{path}.weight")
        if bank is None:
            rows, columns = axis_groups(f"{path}.weight")
            a, b = (
                leading_slice(a, (0, columns), width, path),
                leading_slice(b, (rows,), width, path),
            )
            out[path] = Update(a, b)
        elif bank == index:
            out[in_bank(path, 0)] = Update(a, b)
    return out


def fuse_lora(tensors: dict[str, mx.array], updates: dict[str, Update]) -> dict[str, mx.array]:
    """Flat float parameters with the updates added in float32, each weight in its own dtype."""
    out = dict(tensors)
    for path, update in updates.items():
        weight = out[f"{path}.weight"]
        out[f"{path}.weight"] = (weight + update.b @ update.a).astype(weight.dtype)
    return out


class LoRALinear(nn.Module):
    """A layer with its update beside it: a quantized one, whose rounding the update must not
    share, or one whose update is trained or switched."""

    def __init__(self, linear: nn.Module, update: Update, scale: float = 1.0):
        super().__init__()
        self.linear = linear
        self.lora_a, self.lora_b = update
        self.scale = scale

    @property
    def bias(self) -> mx.array:
        return self.linear.bias

    def __call__(self, x: mx.array) -> mx.array:
        update = (x @ self.lora_a.T) @ self.lora_b.T
        return self.linear(x) + self.scale * update


def add_lora(model: nn.Module, updates: dict[str, Update]) -> None:
    """Change a loaded model: float layers are fused, quantized ones get the update beside them."""
    modules = dict(model.named_modules())
    new = []
    for path, update in updates.items():
        layer = modules[path]
        if isinstance(layer, nn.Linear):
            layer.weight = fuse_lora({"l.weight": layer.weight}, {"l": update})["l.weight"]
        else:
            base = layer
            while isinstance(base, LoRALinear):
                base = base.linear
            dtype = base.scales.dtype
            new.append((path, LoRALinear(layer, Update(*(m.astype(dtype) for m in update)))))
    model.update_modules(tree_unflatten(new))
