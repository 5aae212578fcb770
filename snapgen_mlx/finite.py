"""Where NaN or infinity began: such a value makes a black picture and no error of its own."""

from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn

from .errors import SnapGenError
from .tensors.weights import flat_parameters


def check_finite(arrays: Iterable[mx.array], stage: str, model=None) -> None:
    """Raise SnapGenError for NaN or infinity in what a stage gave.

    Args:
        stage: how the message names it.
        model: what computed it; its own first weight with such a value is named, if it has one.
    """
    if all(map(_is_finite, arrays)):
        return
    where = ""
    if isinstance(model, nn.Module):
        weights = flat_parameters(model).items()
        bad = next((path for path, a in weights if not _is_finite(a)), None)
        where = f", as the weight {bad} does" if bad else " from finite weights"
    raise SnapGenError(
        f"{stage} holds NaN or infinity{where}; nothing was drawn: convert or download the model "
        "again, or try other settings and LoRAs, or --dtype bfloat16 on a GPU"
    )


def _is_finite(a: mx.array) -> bool:
    if not mx.issubdtype(a.dtype, mx.floating) or not a.size:
        return True
    return bool(mx.isfinite(mx.stack([a.max(), a.min()])).all())  # NaN wins both
