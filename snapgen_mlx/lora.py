"""LoRA files: low-rank updates of Linear layers, matched strictly, then fused or run beside.

W' = W + scale · alpha/r · B A with A (r, in) and B (out, r) [Hu et al. 2021, section 4.1].
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from .config import DiTConfig
from .device import scalar
from .digest import base_digest
from .errors import SnapGenError, UsageError, name_keys
from .layout import FEW_STEP, few_step_loras
from .lora_file import ABOUT, LoRAFile, kind_of_keys, read_about, read_tensors
from .models.elastic import axis_groups, bank_index, in_bank, leading_slice, random_supernet
from .tensors.safetensors_io import header_metadata, save_arrays

MAX_SCALE = 100  # far beyond any use; larger scales draw only noise
LISTED = 5  # keys that a message names


class Update(NamedTuple):
    """What a LoRA adds to a weight (out, in): b @ a, all scales already in b; float32."""

    a: mx.array  # (r, in)
    b: mx.array  # (out, r)


def load_lora(
    path, config: DiTConfig, index: int | None, scale: float = 1.0, base=None
) -> dict[str, Update]:
    """Updates of a LoRA file, or of a folder of PEFT, by the path of their layer.

    Args: config, of the checkpoint, a supernet or a single width; index, the width to update: a
        LoRA of the supernet is cut to it as the weights are, one of its own sizes is taken as it
        is; None for the checkpoint uncut; scale, the user's factor; base, the model folder, where
        the LoRA is to be of this very model if its header tells.
    A file's alpha/r counts for each layer, 1 where it has no alpha. Raises SnapGenError for a
    damaged file, for NaN or infinity, for a LoRA that was made for another width, and unless every
    key of it fits a layer of the model.
    """
    file = _read(path, scale)
    path = file.path
    _check_width(file, config, index)
    if base is not None and file.about.get("base") not in (None, base_digest(base)):
        raise SnapGenError(
            f"{path} was trained on other weights than those of {base}; use it with the model "
            "that it was trained on"
        )
    updates, bad = _match(file, _shapes(config))
    if index is not None and bad:
        own, own_bad = _match(file, _shapes(config.variant(index)))
        if len(own_bad) < len(bad):
            updates, bad = own, own_bad
    elif index is not None:
        updates = _cut(updates, config, index)
    _check_fit(file, bad)
    if not updates:
        raise SnapGenError(f"{path} holds nothing for this width of the model")
    return {name: Update(u.a, scale * u.b) for name, u in updates.items()}


def load_updates(path, shapes: dict[str, tuple[int, int]], scale: float = 1.0) -> dict[str, Update]:
    """``load_lora`` for any model of one width; shapes, {path: (out, in)} of its Linear layers."""
    file = _read(path, scale)
    updates, bad = _match(file, shapes)
    _check_fit(file, bad)
    return {name: Update(u.a, scale * u.b) for name, u in updates.items()}


def _read(path, scale: float) -> LoRAFile:
    if not abs(scale) <= MAX_SCALE:  # NaN too
        raise UsageError(f"{path}: {scale} is not a LoRA scale; give -{MAX_SCALE} to {MAX_SCALE}")
    return LoRAFile.read(path)


def _check_fit(file: LoRAFile, bad: list[str]) -> None:
    """Raises SnapGenError for keys that fit no layer; ``bad``: layers that do not."""
    if unfit := file.other + [key for name in bad for key in file.layers[name].values()]:
        if what := kind_of_keys(unfit):
            raise SnapGenError(f"{file.path} {what}")
        raise SnapGenError(
            f"{file.path}: {len(unfit)} of {len(file.tensors)} keys fit no layer of this model: "
            f"{name_keys(unfit, LISTED)}; is the LoRA of another model?"
        )


def _check_width(file: LoRAFile, config: DiTConfig, index: int | None) -> None:
    """A LoRA that this project made for some widths is not for others."""
    widths = file.about.get("widths")
    if not isinstance(widths, list):
        return
    wanted = config.variants if index is None else [config.variants[index]]
    if missing := [name for name in wanted if name not in widths]:
        raise SnapGenError(
            f"{file.path} was made only for width {', '.join(map(str, widths))}, not for "
            f"{', '.join(missing)}"
        )


def copy_few_step_loras(
    source: Path,
    target: Path,
    change: Callable[[dict], dict] = lambda tensors: tensors,
    base: tuple[str, str] | None = None,
) -> None:
    """Copy the few-step LoRAs of a model, if it has any. Palettes become floats.

    Args:
        source: model folder.
        target: model folder.
        change: is applied to the tensors of each LoRA.
        base: of ``header_for``.
    """
    for file in few_step_loras(source):
        tensors = change(read_tensors(file))
        save_arrays(target / FEW_STEP / file.name, tensors, header_for(file, base))


def header_for(file: Path, base: tuple[str, str] | None) -> dict[str, str]:
    """The header of a LoRA's file. ``base`` has two digests: of weights, and of what they became; a
    LoRA of the former is for the latter now."""
    header, about = header_metadata(file), read_about(file)
    if base and about.get("base") == base[0]:
        header[ABOUT] = json.dumps(about | {"base": base[1]})
    return header


def _shapes(config: DiTConfig) -> dict[str, tuple[int, int]]:
    """{path: (out, in)} of all Linear layers, those of every width's bank among them."""
    weights = random_supernet(config).items()  # never evaluated
    return {
        key.removesuffix(".weight"): a.shape
        for key, a in weights
        if key.endswith(".weight") and a.ndim == 2
    }


def _match(file: LoRAFile, shapes: dict) -> tuple[dict[str, Update], list[str]]:
    """The updates that fit a layer of ``shapes``, and the names in the file that do not."""
    paths = file.resolve(shapes)
    updates: dict[str, Update] = {}
    unfit: list[str] = []
    for name, keys in file.layers.items():
        path, tensors = paths.get(name) or "", file.tensors
        try:
            a, b = tensors[keys["a"]], tensors[keys["b"]]
            (rows, columns), (rank, _) = shapes[path], a.shape
            fits = rank and a.shape == (rank, columns) and b.shape == (rows, rank)
            alpha = scalar(tensors[keys["alpha"]]) if "alpha" in keys else None
        except (KeyError, ValueError):  # no such layer, a part is missing, alpha is not a number
            fits = False
        if not fits or path in updates:
            unfit.append(name)
            continue
        factor = file.strength.scale(name, rank, alpha)
        # As stored: a large file is not to be held in float32 too.
        finite = mx.all(mx.stack([mx.isfinite(m).all() for m in (a, b)]))
        if not (math.isfinite(factor) and finite.item()):
            raise SnapGenError(f"{file.path}: {name} holds NaN or infinity; train it again")
        updates[path] = Update(a.astype(mx.float32), b.astype(mx.float32) * factor)
    return updates, unfit


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
        # A finer type of the matrices, as of a packed layer's scales, raises nothing that follows.
        return self.linear(x) + (self.scale * update).astype(x.dtype)


def add_lora(model: nn.Module, updates: dict[str, Update], fuse: bool = True) -> None:
    """Change a loaded model by a LoRA.

    Args:
        model: the network.
        updates: {layer: update}.
        fuse: add the updates to the weights of float layers; quantized layers keep the update
            beside their weights. If False, all layers do.
    """
    modules = dict(model.named_modules())
    new = []
    for path, update in updates.items():
        layer = modules[path]
        if isinstance(layer, nn.Linear) and fuse:
            layer.weight = fuse_lora({"l.weight": layer.weight}, {"l": update})["l.weight"]
        else:
            base = layer
            while isinstance(base, LoRALinear):
                base = base.linear
            dtype = (base.scales if "scales" in base else base.weight).dtype
            new.append((path, LoRALinear(layer, Update(*(m.astype(dtype) for m in update)))))
    model.update_modules(tree_unflatten(new))
