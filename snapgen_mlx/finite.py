"""Where NaN or infinity began: such a value makes a black picture and no error of its own."""

from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn

from .errors import SnapGenError, UsageError, shown
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


def check_latent(latents: mx.array, channels: int) -> None:
    """Raise UsageError unless this is one latent, floats (1, h, w, channels)."""
    shape = tuple(latents.shape) if isinstance(latents, mx.array) else ()
    is_float = bool(shape) and mx.issubdtype(latents.dtype, mx.floating)
    if len(shape) != 4 or shape[0] != 1 or shape[3] != channels or not is_float:
        what = f"an array {shape} of {latents.dtype}" if shape else shown(latents)
        raise UsageError(
            f"a latent holds floats of shape (1, height, width, {channels}), not {what}"
        )
