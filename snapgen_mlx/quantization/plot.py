"""A drawing of what each layer loses when it alone is quantized. Needs matplotlib."""

import importlib
import math

from ..errors import UsageError
from ..files import atomic_write
from ..tensors.palette import BITS
from .recipe import summed


def import_matplotlib():
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError as e:
        raise UsageError("drawings need matplotlib: pip install matplotlib") from e


def draw(sensitivity: dict, layers: dict[str, int], path) -> None:
    """Draw the errors of every layer, and the bits that it gets.

    Shown are the normalised output error at each number of bits, and the effect on the final
    latents at 4 bits where it was measured. The errors of all widths are added.

    Args:
        sensitivity: of ``sensitivity.measure``.
        layers: {layer: bits}.
        path: PNG to write.
    """
    figure = import_matplotlib().Figure(figsize=(max(8, len(layers) / 7), 8), layout="constrained")
    errors, effects, chosen = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 1])
    names, places = list(sensitivity), range(len(sensitivity))
    for bits in BITS:

        def error(errors: dict, bits: str = str(bits)) -> float:
            return errors["nmse"][bits]

        values = [summed(sensitivity, n, error) for n in names]
        errors.semilogy(places, values, ".-", linewidth=0.5, label=f"{bits} bits")
    errors.set_ylabel("output error / power")
    errors.legend(ncols=len(BITS), fontsize="small")
    values = [summed(sensitivity, n, lambda e: e.get("latents", math.nan)) for n in names]
    effects.semilogy(places, values, "k.-")
    effects.set_ylabel("error of final\nlatents, 4 bits")
    chosen.bar(places, [layers[n] for n in names])
    chosen.set_ylabel("bits given")
    chosen.set_xticks(places, names, rotation=90, fontsize=5)
    with atomic_write(path) as tmp:
        figure.savefig(tmp, format="png", dpi=120)
