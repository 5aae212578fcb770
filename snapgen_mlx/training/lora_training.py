"""Training low-rank updates of an elastic model's layers instead of its weights.

One pair of matrices per layer serves every width: A (rank, in) and B (out, rank) are cut along
``in`` and ``out`` as the layer's weight is (architecture section 3).
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from ..config import DiTConfig
from ..device import scalar
from ..digest import base_digest
from ..errors import UsageError, name_keys
from ..loading import load_dit_config
from ..lora import LoRALinear, Update, load_lora
from ..lora_file import ABOUT
from ..models.dit import DiT
from ..models.elastic import random_supernet
from ..tensors.affine import float_weight
from ..tensors.safetensors_io import save_arrays
from .optimizer import AdamOptions, Averaged

SCALE = 2.0  # alpha / rank, as in the paper: rank 64 with alpha 128
STAGES = ("down", "mid", "up")
TRIGGERS = 20  # captions that a file names
LAYERS = ("to_q", "to_k", "to_v", "to_out", "fc1", "fc2")


class LoRAWeights(Averaged):
    """LoRA matrices, Adam with bias correction, and a running mean from the update ``start`` on."""

    def __init__(self, params: dict[str, mx.array], options: AdamOptions, start: int = 0):
        self.start = start
        super().__init__(params, options)
        self.optimizer.bias_correction = True

    def decay(self, step: mx.array) -> mx.array:
        return mx.where(step <= self.start, 0.0, self.options.ema)


def lora_params(config: DiTConfig, rank: int, seed: int = 0) -> dict[str, mx.array]:
    """Fresh LoRA matrices of a supernet, float32.

    The layers are those of attention, cross-attention and feed-forward in all blocks. B is zero, so
    the model starts unchanged.

    Args:
        config: of the supernet.
        rank: of the matrices.
        seed: of A.

    Returns:
        {LAYER.lora_a: (rank, in), LAYER.lora_b: (out, rank)}.
    """
    weights = random_supernet(config).items()  # never evaluated
    params, key = {}, mx.random.key(seed)
    for path, weight in weights:
        *parts, layer, name = path.split(".")
        if parts and parts[0] in STAGES and layer in LAYERS and name == "weight":
            rows, columns = weight.shape
            key, own = mx.random.split(key)
            layer = path.removesuffix(".weight")
            bound = columns**-0.5
            params[f"{layer}.lora_a"] = mx.random.uniform(-bound, bound, (rank, columns), key=own)
            params[f"{layer}.lora_b"] = mx.zeros((rows, rank))
    return params


def attach_lora(model: DiT, params: dict[str, mx.array]) -> None:
    """Put the matrices of one width beside the layers of its model, float or quantized."""
    modules, new = dict(model.named_modules()), []
    for path in params:
        if path.endswith(".lora_a"):
            layer = path.removesuffix(".lora_a")
            update = Update(params[path], params[f"{layer}.lora_b"])
            new.append((layer, LoRALinear(modules[layer], update, SCALE)))
    model.update_modules(tree_unflatten(new))


def lora_layers(model: DiT) -> dict[str, LoRALinear]:
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}


def lora_change(model: DiT, start: dict[str, mx.array] | None = None) -> float:
    """|scale · B A| / |W| over the layers that have a LoRA.

    Args: start, matrices of this width from which it began: their update is no change.
    """
    change: list[mx.array] = []
    total: list[mx.array] = []
    for path, layer in lora_layers(model).items():
        update = layer.lora_b @ layer.lora_a
        if start:
            a, b = (start[f"{path}.lora_{part}"].astype(update.dtype) for part in "ab")
            update = update - b @ a
        update = layer.scale * update
        change.append(update.astype(mx.float32).square().sum())
        total.append(float_weight(layer.linear).astype(mx.float32).square().sum())
    zero = mx.array(0.0)
    return scalar(mx.sqrt(sum(change, zero) / sum(total, zero)))


def save_lora(path, params: dict[str, mx.array], about: dict[str, Any] | None = None) -> None:
    """Write matrices as a file that ``lora.load_lora`` and other tools read.

    Args:
        about: what it was made for and from (``about_training``), for the header.
    """
    names = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
    tensors = {}
    for key, a in params.items():
        layer, _, part = key.rpartition(".")
        tensors[f"{layer}.{names[part]}"] = a
        if part == "lora_a":
            tensors[f"{layer}.alpha"] = mx.array(SCALE * len(a))
    rank = min(len(a) for key, a in params.items() if key.endswith(".lora_a"))
    about = {**(about or {}), "rank": rank, "alpha": SCALE * rank}
    save_arrays(path, tensors, {ABOUT: json.dumps(about)})


def read_lora(path, model: Path, rank: int | None) -> tuple[int, dict[str, mx.array]]:
    """Read a LoRA file of all widths, to go on from.

    Args:
        path: of the file.
        model: folder of the model that it belongs to.
        rank: that it must have; None for any.

    Returns:
        Its rank, and the matrices as in ``lora_params``.

    Raises:
        SnapGenError: it belongs to another model or to only one width.
        UsageError: it changes layers that are not trained, or has another rank.
    """
    config = load_dit_config(model)
    updates = load_lora(path, config, None, base=model)
    ranks = sorted({len(update.a) for update in updates.values()})
    if len(ranks) > 1 or rank not in (None, ranks[0]):
        found = " and ".join(map(str, ranks))
        raise UsageError(
            f"{path} has the rank {found}, and can go on with one rank alone"
            + (f", not with --lora {rank}" if rank else "")
        )
    params = lora_params(config, ranks[0])
    layers = {key.rpartition(".")[0] for key in params}
    if others := updates.keys() - layers:
        raise UsageError(
            f"{path} changes {name_keys(others)}, which is not trained here: only attention and "
            "feed-forward layers are"
        )
    for layer, update in updates.items():
        params[f"{layer}.lora_a"], params[f"{layer}.lora_b"] = update.a, update.b / SCALE
    return ranks[0], params


def about_training(model: Path, widths: list[str], captions: Iterable[str]) -> dict[str, Any]:
    """What a LoRA's header says: the base's digest, the widths, the first captions."""
    captions = list(dict.fromkeys(captions))[:TRIGGERS]
    return {"base": base_digest(model), "widths": widths, "captions": captions}
