"""What may happen to a tensor between a PyTorch checkpoint and an MLX one."""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx


class Step(NamedTuple):
    """``apply`` must work on an array that is never evaluated: plans learn shapes that way."""

    action: str
    apply: Callable[[mx.array], mx.array]


class Drop(NamedTuple):
    """A source key that the MLX model has no use for."""

    reason: str


COPY = Step("copy", lambda a: a)
CHANNELS_LAST = Step("OIHW -> OHWI", lambda a: a.transpose(0, 2, 3, 1))


def channels_first(a: mx.array) -> mx.array:
    """(O, kh, kw, I) -> (O, I, kh, kw)."""
    return a.transpose(0, 3, 1, 2)
