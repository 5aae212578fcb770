"""What a network holds: bytes of its weights, and of activations, predicted from sizes."""

import mlx.nn as nn

from ..tensors.weights import flat_parameters


def weight_bytes(module: nn.Module, only: str | tuple[str, ...] = "") -> int:
    """Bytes of a module's weights whose paths start with one of ``only``; none is read."""
    return sum(a.nbytes for path, a in flat_parameters(module).items() if path.startswith(only))


def parameter_count(module: nn.Module) -> int:
    return sum(a.size for a in flat_parameters(module).values())


def encoding_bytes(heads: int, hidden: int, intermediate: int, tokens: int, size: int) -> int:
    """A text transformer's activations at the peak of a layer, on one text (measured on a CPU).

    size: bytes of a float.
    """
    scores = heads * tokens**2
    layer = tokens * (12 * hidden + 4 * intermediate) + 2 * scores
    return layer * size
