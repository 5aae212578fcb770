"""The two forms that a weight of few bits can have on disk."""

from dataclasses import dataclass

import mlx.core as mx

from ..config import DiTConfig
from ..convert.plan import Row
from ..convert.steps import COPY, Step
from ..convert.transformer import group_size
from ..errors import UsageError
from . import palette


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
        return mx.dequantize(*packed, self.group, bits) - weight

    def rows(self, key: str, shape: tuple, dtype: mx.Dtype, bits: int) -> list[Row]:
        action = f"{bits} bits"
        row = Row(key, shape, action, key, half(dtype), bits, COPY, self.group)
        return [row]


@dataclass(frozen=True)
class Palette:
    """2^bits values for a whole weight, by k-means."""

    name = "palette"
    group = 32  # words hold whole multiples of so many indices, whatever their bits

    def rounding(self, weight: mx.array, bits: int) -> mx.array:
        """What the weight changes by."""
        return palette.roundtrip(weight.astype(half(weight.dtype)), bits) - weight

    def rows(self, key: str, shape: tuple, dtype: mx.Dtype, bits: int) -> list[Row]:
        found = []  # the writer asks for the indices, then for the values

        def indices(a: mx.array) -> mx.array:
            indices, values = palette.fit(a.astype(half(dtype)), bits)
            found.append(values)
            return mx.array(palette.pack(indices, bits))

        packed = (*shape[:-1], shape[-1] * bits // 32)
        action = f"palette of {1 << bits}"
        return [
            Row(key, packed, action, key, mx.uint32, step=Step(action, indices)),
            Row(
                key,
                (1 << bits,),
                action,
                f"{key}{palette.SUFFIX}",
                half(dtype),
                step=Step(action, lambda _: found.pop()),
            ),
        ]


Backend = Affine | Palette


def backend_of(name: str, config: DiTConfig) -> Backend:
    """By its name. Raises UsageError for a transformer whose widths cut through all groups."""
    try:
        group = group_size(config.to_dict())
    except UsageError as e:
        raise UsageError(f"this transformer cannot be quantized: {e}") from e
    return Palette() if name == "palette" else Affine(group)
