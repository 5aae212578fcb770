"""What each layer loses when it alone is quantized, measured layer by layer and width by width."""

import hashlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from ..device import scalar
from ..errors import SnapGenError
from ..files import file_sha256, read_json, write_json
from ..loading import load_supernet
from ..models.elastic import axis_groups, bank_index, in_bank, leading_slice
from ..pipeline import Pipeline
from ..tensors.palette import BITS
from ..tensors.weights import load_tensors, weight_files
from .backends import Backend
from .calibration import Calibration, load_widths
from .recipe import quantizable

ROWS = 512  # rows of a layer's inputs, over all prompts and steps
EFFECT_PROMPTS = 4
EFFECT_BITS = 4
SAVE_SECONDS = 10
FORMAT = {"format": "snapgen-mlx-sensitivity", "version": 1}


def measure(
    model,
    backend: Backend,
    calibration: Calibration,
    path,
    progress: Callable[[int, int], None] | None = None,
    effect: bool = True,
) -> dict:
    """Quantize each layer alone and measure the error at every width.

    In memory are one width of the model, ``ROWS`` rows of the inputs of each layer, and one layer's
    copies.

    Args:
        model: folder of the float model.
        backend: how weights are quantized.
        calibration: the prompts and steps.
        path: JSON file that keeps the measurement; a later call goes on from it.
        progress: called with (layers done, layers in all).
        effect: also measure the final latents, which takes most of the time.

    Returns:
        {layer: {variant: {"mse", "nmse": {bits: error}, "latents": error}}}. "mse" is the mean
        squared error of the layer's output on a sample of its inputs along the schedule. "nmse" is
        the same divided by the output's power. "latents" is the squared error of the final latents
        divided by their power, with the layer at 4 bits. A layer without inputs is left out, such
        as that of a text encoder that the model does not have.

    Raises:
        SnapGenError: ``path`` holds another measurement.
    """
    path = Path(path)
    config, _ = load_supernet(model)
    layers = quantizable(config, backend.group)
    pipes = load_widths(model)
    found = _open(path, _key(model, pipes, backend, calibration))
    done, unused, saved = found["layers"], found.setdefault("unused", []), time.monotonic()
    wanted = {"mse", "latents"} if effect else {"mse"}

    def lacking(layer: str, index: int) -> bool:
        there = done.get(layer, {}).get(config.variants[index], {})
        return layer not in unused and width_has(layer, index) and bool(wanted - there.keys())

    todo = {i: [k for k in layers if lacking(k, i)] for i in range(len(config.widths))}
    total = sum(width_has(k, i) for k in layers if k not in unused for i in todo)
    ready = total - sum(map(len, todo.values()))
    try:
        for index, variant in enumerate(config.variants):
            args = (config, index, todo[index], backend, calibration, effect)
            for layer, errors in _measure(pipes[index], *args):
                if errors is None and layer not in unused:
                    unused.append(layer)
                elif errors is not None:
                    done.setdefault(layer, {})[variant] = errors
                ready += 1
                if progress:
                    progress(ready, total)
                if time.monotonic() > saved + SAVE_SECONDS:
                    write_json(path, found)
                    saved = time.monotonic()
            pipes[index].free("dit")
    finally:
        write_json(path, found)
    return done


def width_has(layer: str, index: int) -> bool:
    """Whether the width of this index has the layer."""
    return bank_index(layer) in (None, index)


def _measure(pipe, config, index: int, layers: list[str], backend, calibration, effect: bool):
    """Yield each layer with its errors at one width; with None where nothing goes through it."""
    if not layers:
        return
    tensors = load_tensors(pipe.folder / "transformer")
    modules, inputs = dict(pipe.dit.named_modules()), layer_inputs(pipe, calibration)
    if effect:
        _, reference = calibration.latents(pipe, EFFECT_PROMPTS)
    for layer in layers:
        weight = tensors.pop(f"{layer}.weight")  # left there, it would stay in memory
        if own_path(layer) not in inputs:
            yield layer, None
            continue
        module, x = modules[own_path(layer)], inputs.pop(own_path(layer))
        cut = cutter(layer, config.widths[index])
        errors = _output_errors(weight, x.astype(mx.float32), cut, backend)
        if not effect:
            yield layer, errors
            continue
        original = module.weight
        module.weight = original + cut(backend.rounding(weight, EFFECT_BITS)).astype(original.dtype)
        _, latents = calibration.latents(pipe, EFFECT_PROMPTS)
        module.weight = original
        error = (latents - reference).square().mean() / reference.square().mean()
        yield layer, errors | {"latents": scalar(error)}


def own_path(layer: str) -> str:
    """A layer's path in the model of one width."""
    return layer if bank_index(layer) is None else in_bank(layer, 0)


def cutter(layer: str, width: float) -> Callable[[mx.array], mx.array]:
    """Cuts a width out of a layer's weight. Weights are rounded whole, then cut, as when loaded."""
    return partial(leading_slice, groups=axis_groups(f"{layer}.weight"), width=width, path=layer)


class Catcher(nn.Module):
    """Stands in for a Linear layer and keeps a random ``share`` of the rows of each input."""

    def __init__(self, layer: nn.Linear, share: int, rng: np.random.Generator):
        super().__init__()
        self.layer = layer
        self._rows: list[mx.array] = []  # "_": no parameters of the model
        self._share, self._rng = share, rng

    @property
    def rows(self) -> list[mx.array]:
        return self._rows

    @property
    def bias(self) -> mx.array:
        return self.layer.bias

    def __call__(self, x: mx.array) -> mx.array:
        rows = x.reshape(-1, x.shape[-1])
        chosen = self._rng.permutation(len(rows))[: self._share]
        self._rows.append(rows[mx.array(chosen)])
        return self.layer(x)


def layer_inputs(pipe: Pipeline, calibration: Calibration) -> dict[str, mx.array]:
    """A random sample of the inputs (rows, in) of each Linear layer along the schedule.

    Layers without inputs are left out.

    Args:
        pipe: the model.
        calibration: the prompts and steps.
    """
    layers = {path: m for path, m in pipe.dit.named_modules() if isinstance(m, nn.Linear)}
    rng, batches = np.random.default_rng(0), sum(1 for _ in calibration.steps(pipe))
    share = max(1, ROWS // (batches * pipe.settings("any").steps))
    catchers = {path: Catcher(layer, share, rng) for path, layer in layers.items()}
    pipe.dit.update_modules(tree_unflatten(list(catchers.items())))
    try:
        for steps in calibration.steps(pipe):
            for step in steps:
                mx.eval(step.x, [catcher.rows for catcher in catchers.values()])
    finally:
        pipe.dit.update_modules(tree_unflatten(list(layers.items())))
    return {path: mx.concatenate(c.rows) for path, c in catchers.items() if c.rows}


def _output_errors(weight: mx.array, x: mx.array, cut: Callable, backend: Backend) -> dict:
    """Squared errors of the output of a layer with these inputs, by bits."""

    def power(weight: mx.array) -> mx.array:
        return (x @ cut(weight.astype(mx.float32)).T).square().mean()

    whole = max(scalar(power(weight)), 1e-30)
    mse = {str(b): scalar(power(backend.rounding(weight, b))) for b in BITS}
    return {"mse": mse, "nmse": {b: error / whole for b, error in mse.items()}}


def _key(model, pipes: list[Pipeline], backend: Backend, calibration: Calibration) -> dict:
    """What a measurement depends on."""
    files = sorted(set(weight_files(Path(model) / "transformer").values()))
    files += [path for pipe in pipes for path in pipe.few_steps.values()]
    digest = hashlib.sha256(b"".join(bytes.fromhex(file_sha256(file)) for file in files))
    settings = [pipe.settings("any") for pipe in pipes]
    return {
        "transformer": digest.hexdigest(),
        "backend": backend.name,
        "group": backend.group,
        "prompts": calibration.prompts,
        "sampling": [[s.steps, s.guidance, s.shift, s.width, s.height] for s in settings],
    }


def _open(path: Path, key: dict) -> dict:
    if not path.exists():
        return {**FORMAT, "of": key, "layers": {}}
    found = read_json(path)
    if found.get("format") != FORMAT["format"] or found.get("version") != FORMAT["version"]:
        raise SnapGenError(f"{path} holds no sensitivities; choose another file for them")
    if differ := [k for k in key if found.get("of", {}).get(k) != key[k]]:
        raise SnapGenError(
            f"{path} was measured with another {', '.join(differ)}; remove it or choose another"
        )
    return found
