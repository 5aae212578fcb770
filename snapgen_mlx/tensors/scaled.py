"""Weights in 8-bit floats whose scales stand beside them."""

import mlx.core as mx

from ..errors import SnapGenError, name_keys
from .readers import Info, Reader

FLOAT8 = ("F8_E4M3", "F8_E5M2")
# What follows a layer's name: the scale of its weight; what only computing in 8 bits needs.
SCALES = ("weight_scale", "weight_scale_inv", "scale_weight")
OF_COMPUTING = ("input_scale", "output_scale", "scale_input", "scale_output", "comfy_quant")
MARKER = "scaled_fp8"  # an empty tensor that says how the file was made


class ScaledFloat8:
    """A reader that multiplies fp8 weights by their scales, and gives no scales.

    dropped: {key: what became of it} of the scales and of what else such files hold.
    """

    def __init__(self, reader: Reader):
        self._reader, self.files = reader, reader.files
        self._scales: dict[str, str] = {}
        self.dropped: dict[str, str] = {}
        for key, info in reader.infos.items():
            layer, _, name = key.rpartition(".")
            weight = reader.infos.get(f"{layer}.weight" if layer else "weight")
            is_float8 = weight is not None and weight.dtype in FLOAT8
            if name in SCALES and is_float8:
                assert weight is not None
                self._add(f"{layer}.weight" if layer else "weight", weight, key, info)
            elif (name in OF_COMPUTING and is_float8) or name == MARKER:
                self.dropped[key] = "of computing in 8 bits"
        alone = [
            key
            for key, info in reader.infos.items()
            if info.dtype in FLOAT8 and len(info.shape) > 1 and key not in self._scales
        ]
        if self._scales and alone:
            raise SnapGenError(
                f"{self.files[0]}: {name_keys(alone)} in 8 bits without a scale, though others "
                "have one; download or save it again"
            )
        self.infos = {k: info for k, info in reader.infos.items() if k not in self.dropped}

    def _add(self, weight: str, info: Info, scale: str, how: Info) -> None:
        if weight in self._scales:
            raise SnapGenError(
                f"{self.files[0]}: {weight!r} has two scales: {self._scales[weight]}, {scale}"
            )
        if how.dtype not in ("F32", "BF16", "F16", "F64") or not _fits(how.shape, info.shape):
            raise SnapGenError(
                f"{self.files[0]}: {scale!r} of {how.dtype} {how.shape} is no scale of {weight!r} "
                f"{info.shape}"
            )
        self._scales[weight] = scale
        self.dropped[scale] = "multiplied into its weight"

    def read(self, key: str) -> mx.array:
        a = self._reader.read(key)
        if key not in self._scales:
            return a
        scale = self._reader.read(self._scales[key]).astype(mx.float32)
        return (a.astype(mx.float32) * _spread(scale, a.shape)).astype(a.dtype)


def _fits(scale: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return _blocks(scale, shape) is not None


def _blocks(scale: tuple[int, ...], shape: tuple[int, ...]) -> list[int] | None:
    """How many entries along each axis of the weight share a scale; None when it cannot be."""
    if all(n == 1 for n in scale):
        return list(shape)
    if scale[:1] == shape[:1] and all(n == 1 for n in scale[1:]):
        return [1, *shape[1:]]  # one for each row
    if len(scale) != len(shape):
        return None
    blocks = [_block(m, n) for m, n in zip(scale, shape, strict=True)]
    return None if 0 in blocks else blocks


def _block(count: int, n: int) -> int:
    """The size of ``count`` blocks that cover ``n`` entries, the last perhaps in part; 0 if none:
    a power of two, as all known files have it, or an even division."""
    powers = (1 << i for i in range(n.bit_length() + 1))
    even = n // count if count and n % count == 0 else 0
    return next((b for b in powers if -(-n // b) == count), even)


def _spread(scale: mx.array, shape: tuple[int, ...]) -> mx.array:
    """The scale of every entry, or what broadcasts to it."""
    blocks = _blocks(scale.shape, shape)
    assert blocks is not None
    if scale.size == 1:
        return scale.reshape(())
    scale = scale.reshape(*scale.shape, *[1] * (len(shape) - scale.ndim))
    for axis, (block, n) in enumerate(zip(blocks, shape, strict=True)):
        if scale.shape[axis] > 1 and block > 1:
            scale = mx.repeat(scale, block, axis).split((n,), axis)[0]
    return scale
