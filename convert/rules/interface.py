"""What a conversion rule is: how one model's tensors map from PyTorch to MLX and back."""

from typing import NamedTuple, Protocol, runtime_checkable

import mlx.core as mx

from ...tensors.stream import Step


class Drop(NamedTuple):
    """A source key that the MLX model has no use for."""

    reason: str


CHANNELS_LAST = Step("OIHW -> OHWI", lambda a: a.transpose(0, 2, 3, 1))


def channels_first(a: mx.array) -> mx.array:
    """(O, kh, kw, I) -> (O, I, kh, kw)."""
    return a.transpose(0, 3, 1, 2)


class Rules(Protocol):
    """The rules of one model: a module with these functions, or an object with these methods.

    ``source`` is the dictionary of the checkpoint's config.json.
    """

    def config(self, source: dict) -> dict:
        """The MLX model's config.json."""

    def shapes(self, source: dict) -> dict[str, tuple[int, ...]]:
        """Keys and shapes of the MLX model's parameters."""

    def route(self, key: str) -> dict[str, Step] | Drop:
        """What a source key becomes: MLX keys and the steps that give their tensors."""

    def back(self, key: str, a: mx.array) -> tuple[str, mx.array]:
        """The PyTorch key and tensor of an MLX parameter."""


@runtime_checkable
class QuantizableRules(Rules, Protocol):
    """Rules of a model whose matrices can be stored in few bits."""

    def group_size(self, source: dict) -> int:
        """Weights that share a scale."""

    def bits(self, path: str, bits: int) -> int:
        """Bits of a layer in a model of ``bits`` bits."""
