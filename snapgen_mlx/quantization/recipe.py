"""How many bits each layer gets: recipes under a budget, and their files."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ..config import DiTConfig
from ..errors import SnapGenError, UsageError
from ..files import read_json, write_json
from ..models.elastic import axis_groups, bank_index, random_supernet
from ..tensors.palette import BITS

METHODS = ("density", "mse")
FORMAT = {"format": "snapgen-mlx-recipe", "version": 1}


def quantizable(config: DiTConfig, group: int) -> dict[str, tuple[int, int]]:
    """Paths and shapes of the Linear layers whose rows are whole groups at every width."""
    layers = {}
    for key, a in random_supernet(config).items():  # never evaluated
        if a.ndim != 2 or not key.endswith(".weight"):
            continue
        n, parts = a.shape[1], axis_groups(key)[1]
        widths = config.widths if parts and bank_index(key) is None else [1]
        if all(n // (parts or 1) * w % group == 0 for w in widths):
            layers[key.removesuffix(".weight")] = tuple(a.shape)
    return layers


def protected(layers) -> set[str]:
    """Modulation and the final layer, which never have less than 8 bits: errors there
    add up over the steps."""
    return {k for k in layers if k.startswith("final.") or k.endswith(".modulation")}


@dataclass
class Recipe:
    """Bits of each Linear layer by its path in the supernet."""

    architecture: dict
    layers: dict[str, int]
    method: str

    def save(self, path) -> None:
        write_json(path, {**FORMAT, **vars(self)})

    @classmethod
    def load(cls, path, config: DiTConfig, shapes: dict) -> "Recipe":
        """Read a recipe file.

        Args:
            path: recipe.json.
            config: of the transformer that it is for.
            shapes: its ``quantizable`` layers.

        Raises:
            SnapGenError: the file is not a recipe, or it is for another architecture.
        """
        d = read_json(Path(path))
        if d.get("format") != FORMAT["format"] or d.get("version") != FORMAT["version"]:
            raise SnapGenError(f"{path} is not a recipe of snapgen-mlx")
        there, here, layers = d.get("architecture"), architecture(config), d.get("layers")
        if not isinstance(there, dict) or not isinstance(layers, dict):
            raise SnapGenError(f"{path} is damaged: a recipe has an architecture and layers")
        for key in here:
            if there.get(key) != here[key]:
                raise SnapGenError(
                    f"{path} is a recipe for another architecture: its {key} is "
                    f"{there.get(key)}, this transformer's {here[key]}"
                )
        if odd := layers.keys() ^ shapes.keys():
            raise SnapGenError(f"{path} and this transformer disagree about the layer {min(odd)}")
        for layer, bits in layers.items():
            if bits not in BITS:
                raise SnapGenError(f"{path}: {layer} has {bits} bits; it must be one of {BITS}")
        return cls(there, layers, str(d.get("method")))


def architecture(config: DiTConfig) -> dict:
    """What a recipe depends on: everything of a transformer but its weights and name."""
    return {k: v for k, v in config.to_dict().items() if k != "variant"}


def uniform(config: DiTConfig, shapes: dict, bits: int) -> Recipe:
    return Recipe(architecture(config), dict.fromkeys(shapes, bits), "uniform")


def code_bits(layers: dict[str, int], shapes: dict) -> int:
    """Bits of all weights together, without scales or palettes."""
    return sum(bits * prod(shapes[layer]) for layer, bits in layers.items())


def average_bits(layers: dict[str, int], shapes: dict) -> float:
    return code_bits(layers, shapes) / sum(map(prod, shapes.values()))


def least_bits(shapes: dict, kept: set[str]) -> float:
    """The average when ``kept`` layers have 8 bits and the rest the fewest."""
    return average_bits({k: 8 if k in kept else BITS[0] for k in shapes}, shapes)


def check_budget(shapes: dict, budget: float, kept: set[str]) -> None:
    """Raise UsageError for average bits that no recipe can have which keeps 8 in ``kept``."""
    least = least_bits(shapes, kept)
    if not least <= budget <= BITS[-1]:
        raise UsageError(
            f"an average of {budget:g} bits is out of range: it must be "
            f"{math.ceil(100 * least) / 100} (2 bits, and 8 in modulation and the final layer) to 8"
        )


def design(
    config: DiTConfig,
    shapes: dict,
    sensitivity: dict,
    budget: float,
    method: str = "density",
) -> Recipe:
    """Choose the bits of each layer within a budget.

    "mse" is the paper's rule [supplement C]: all layers get a few bits, and those with the largest
    output error at these bits get 8. "density" starts at 2 bits. It then takes, again and again,
    the step that reduces the error of the final latents most for its bits. That error was measured
    at 4 bits; at other bits it follows the layer's normalised output error. The errors of all
    widths are added.

    Args:
        config: of the transformer.
        shapes: its ``quantizable`` layers.
        sensitivity: of ``sensitivity.measure``. Layers that are missing get 8 bits.
        budget: most bits, as ``average_bits`` counts them.
        method: "mse" or "density".

    Raises:
        UsageError: the budget is out of range.
    """
    kept = protected(shapes) | (shapes.keys() - sensitivity.keys())
    check_budget(shapes, budget, kept)
    limit = budget * sum(map(prod, shapes.values()))
    rule = {"mse": _by_mse, "density": _by_density}[method]
    return Recipe(architecture(config), rule(sensitivity, shapes, limit, kept), method)


def summed(sensitivity: dict, layer: str, error: Callable[[dict], float]) -> float:
    """The sum of a layer's errors over the widths that have it."""
    return sum(map(error, sensitivity[layer].values()))


def _by_mse(sensitivity: dict, shapes: dict, limit: float, kept: set) -> dict[str, int]:
    def all_at(bits: int) -> dict[str, int]:
        return {layer: 8 if layer in kept else bits for layer in shapes}

    low = max(bits for bits in BITS if code_bits(all_at(bits), shapes) <= limit)
    layers = all_at(low)
    left = limit - code_bits(layers, shapes)
    errors = {k: summed(sensitivity, k, lambda e: e["mse"][str(low)]) for k in sensitivity}
    for layer in sorted(errors, key=lambda layer: errors[layer], reverse=True):
        cost = (8 - layers[layer]) * prod(shapes[layer])
        if cost <= left:
            layers[layer], left = 8, left - cost
    return layers


def _by_density(sensitivity: dict, shapes: dict, limit: float, kept: set) -> dict[str, int]:
    def error(layer: str, bits: int) -> float:
        def of(e):
            return e["latents"] * e["nmse"][str(bits)] / max(e["nmse"]["4"], 1e-30)

        return summed(sensitivity, layer, of)

    errors = {layer: {b: error(layer, b) for b in BITS} for layer in shapes.keys() - kept}
    layers = {layer: 8 if layer in kept else BITS[0] for layer in shapes}
    left = limit - code_bits(layers, shapes)
    while True:
        steps = []
        for layer in errors:
            now = layers[layer]
            for bits in BITS:
                cost = (bits - now) * prod(shapes[layer])
                gain = errors[layer][now] - errors[layer][bits]
                if 0 < cost <= left and gain > 0:
                    steps.append((gain / cost, layer, bits, cost))
        if not steps:
            return layers
        _, layer, bits, cost = max(steps)
        layers[layer], left = bits, left - cost
