"""The two forms that a weight of few bits can have on disk."""

from dataclasses import dataclass

import mlx.core as mx

from ..config import DiTConfig
from ..errors import UsageError
from ..models.elastic import group_size
from ..tensors import palette
from ..tensors.stream import AffineRow, PaletteRow, Row


def half(dtype: mx.Dtype) -> mx.Dtype:
    """What the weights that stay floats, and the scales, are stored as."""
    return mx.float16 if dtype == mx.float32 else dtype


@dataclass(frozen=True)
class Affine:
    """MLX's own packed weights: a scale and a bias for every ``group`` of a row."""

    group: int
    name = "affine"

    def rounding(self, weight: mx.array, bits: int) -> mx.array:
        """What the weight changes by."""
        packed = mx.quantize(weight.astype(half(weight.dtype)), self.group, bits)
        # With float32 scales, as in `affine.dequantize`.
        scales, biases = packed[1].astype(mx.float32), packed[2].astype(mx.float32)
        return mx.dequantize(packed[0], scales, biases, self.group, bits) - weight

    def row(self, key: str, shape: tuple[int, ...], dtype: mx.Dtype, bits: int) -> Row:
        return AffineRow(key, shape, key, half(dtype), bits=bits, group=self.group)


@dataclass(frozen=True)
class Palette:
    """2^bits values for a whole weight, by k-means."""

    name = "palette"
    group = 32  # words hold whole multiples of so many indices, whatever their bits

    def rounding(self, weight: mx.array, bits: int) -> mx.array:
        """What the weight changes by."""
        return palette.roundtrip(weight.astype(half(weight.dtype)), bits) - weight

    def row(self, key: str, shape: tuple[int, ...], dtype: mx.Dtype, bits: int) -> Row:
        return PaletteRow(key, shape, key, half(dtype), bits=bits)


Backend = Affine | Palette


def backend_of(name: str, config: DiTConfig) -> Backend:
    """By its name. Raises UsageError for a transformer whose widths cut through all groups."""
    try:
        group = group_size(config)
    except UsageError as e:
        raise UsageError(f"this transformer cannot be quantized: {e}") from e
    return Palette() if name == "palette" else Affine(group)
