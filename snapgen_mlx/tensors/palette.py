"""Palettes: a weight as 2^bits values and an index into them for each of its entries.

On disk ``X.weight`` holds the indices, packed as MLX packs affine weights (little-endian along the
last axis, where they must fill whole words), and ``X.weight.palette`` the values.
``weights.load_tensors`` expands them: a palette saves disk and download, but no memory at run
time, as MLX has no kernel that multiplies by one.
"""

import math

import mlx.core as mx
import numpy as np

from ..errors import SnapGenError

SUFFIX = ".palette"
BITS = (2, 3, 4, 5, 6, 8)
CELLS = 1024  # cells at the start of k-means
ITERATIONS = 1000  # most iterations; a few dozen are usual


def kmeans(values: np.ndarray, counts: np.ndarray, k: int) -> np.ndarray:
    """1-D k-means on values with counts.

    Dynamic programming finds the best partition of about ``CELLS`` cells; then Lloyd's iteration
    runs on the values. The squared error is within 1 % of the optimum. With prefix sums, the time
    does not depend on the number of weights.

    Args:
        values: (M,), rising.
        counts: (M,), how often each value occurs.
        k: number of centres.

    Returns:
        Centres (k,), rising.
    """
    if len(values) <= k:
        return np.pad(values, (0, k - len(values)), mode="edge")
    number, total, power = (np.concatenate([[0], np.cumsum(counts * values**i)]) for i in range(3))
    cuts = _partition(_cells(values, counts, number, total, power), k)
    for _ in range(ITERATIONS):
        size = np.diff(number[cuts])
        first = values[np.minimum(cuts[:-1], len(values) - 1)]
        centres = np.where(size > 0, np.diff(total[cuts]) / np.maximum(size, 1), first)
        inner = np.searchsorted(values, (centres[1:] + centres[:-1]) / 2)
        if (inner == cuts[1:-1]).all():
            break
        cuts = np.array([0, *inner, len(values)])
    return centres


def _cells(values, counts, *sums) -> list[np.ndarray]:
    """Ends of cells, and the prefix sums there.

    Half are as dense as many centres would be, as the cube root of the density (Panter and Dite
    1951); the other half hold equally many values, so that there are always enough.
    """
    ends = np.arange(len(values) + 1)
    if len(values) > CELLS:
        place = np.cumsum(np.cbrt(counts * np.gradient(values) ** 2))
        dense = np.searchsorted(place, np.linspace(0, place[-1], CELLS // 2))
        ends = np.unique([*dense, *np.linspace(0, len(values), CELLS // 2).astype(int)])
    return [ends, *(a[ends] for a in sums)]


def _partition(cells: list[np.ndarray], k: int) -> np.ndarray:
    """Bounds (k + 1,) of the k clusters of whole cells that have the least squared error."""
    ends, n, s, q = cells
    # A cluster has some CELLS / k cells; ten times as many are looked at.
    longest = min(len(ends), 10 * len(ends) // k + 1)
    start = np.arange(len(ends))[:, None] - np.arange(longest)  # of a cluster, by its end
    n_in, s_in, q_in = (a[:, None] - a[start] for a in (n, s, q))
    spread = q_in - s_in**2 / np.maximum(n_in, 1)
    spread[start < 0] = np.inf
    best, splits = q - s**2 / np.maximum(n, 1), []
    for _ in range(k - 1):
        errors = best[start] + spread
        lengths = errors.argmin(axis=1)
        splits.append(np.arange(len(ends)) - lengths)
        best = errors[np.arange(len(ends)), lengths]
    cuts = [len(ends) - 1]
    for split in reversed(splits):
        cuts.append(split[cuts[-1]])
    return ends[[0, *reversed(cuts)]]


def fit(weight: mx.array, bits: int) -> tuple[np.ndarray, mx.array]:
    """The best palette of a weight.

    Every weight counts: 16-bit floats have at most 65536 values, which are clustered with their
    counts.

    Args:
        weight: (...) float16 or bfloat16.
        bits: of an index.

    Returns:
        Indices (...) uint8, and the palette (2^bits,) in the weight's dtype.

    Raises:
        SnapGenError: the weight holds NaN or infinity.
    """
    codes = np.array(weight.view(mx.uint16))
    counts = np.bincount(codes.reshape(-1), minlength=1 << 16)
    used = np.flatnonzero(counts).astype(np.uint16)
    values = _float64(mx.array(used).view(weight.dtype))
    if not np.isfinite(values).all():
        raise SnapGenError("a weight holds NaN or infinity, which a palette cannot represent")
    order = np.argsort(values)
    used, values = used[order], values[order]
    palette = mx.array(kmeans(values, counts[used], 1 << bits)).astype(weight.dtype)
    centres = _float64(palette)  # as they are stored
    nearest = np.zeros(1 << 16, np.uint8)
    nearest[used] = np.searchsorted((centres[1:] + centres[:-1]) / 2, values)
    return nearest[codes], palette


def _float64(a: mx.array) -> np.ndarray:
    return np.array(a.astype(mx.float32)).astype(np.float64)


def pack(indices: np.ndarray, bits: int) -> np.ndarray:
    """Pack indices into words, the first index in the lowest bits.

    Args:
        indices: (..., n) uint8 below 2^bits; n·bits is a multiple of 32.
        bits: of an index.

    Returns:
        (..., n·bits/32) uint32.
    """
    stream = (indices[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    packed = np.packbits(stream.reshape(*indices.shape[:-1], -1), axis=-1, bitorder="little")
    return packed.view("<u4")


def float_shape(packed: tuple[int, ...], palette: tuple[int, ...]) -> tuple[int, ...]:
    """Shape (..., n) of a weight by those of its indices and palette; ValueError if none fits."""
    bits = palette[0].bit_length() - 1
    if palette != (1 << bits,) or bits not in BITS or packed[-1] * 32 % bits:
        raise ValueError(f"{packed} indices into {palette} values")
    return (*packed[:-1], packed[-1] * 32 // bits)


def unpack(packed: mx.array, palette: mx.array) -> mx.array:
    """The weight (..., n) of packed indices and a palette; lazy. ValueError if they do not fit."""
    shape = float_shape(packed.shape, palette.shape)
    if packed.dtype != mx.uint32:
        raise ValueError(f"indices of {packed.dtype}")
    bits = packed.shape[-1] * 32 // shape[-1]
    count = 8 // math.gcd(8, bits)  # indices that fill whole bytes
    stream = packed.view(mx.uint8).reshape(*shape[:-1], -1, count * bits // 8)
    indices = []
    for i in range(count):
        byte, shift = divmod(i * bits, 8)
        index = stream[..., byte] >> shift
        if shift + bits > 8:  # the rest is in the next one
            index = index | (stream[..., byte + 1] << (8 - shift))
        indices.append(index & ((1 << bits) - 1))
    return palette[mx.stack(indices, axis=-1).reshape(shape)]


def expand(tensors: dict[str, mx.array], where) -> dict[str, mx.array]:
    """Replace palettes by the weights they stand for; lazy. Raises SnapGenError for a bad one."""
    out = {key: a for key, a in tensors.items() if not key.endswith(SUFFIX)}
    for key, palette in tensors.items():
        if key.endswith(SUFFIX):
            weight = key.removesuffix(SUFFIX)
            try:
                out[weight] = unpack(tensors[weight], palette)
            except (KeyError, ValueError, IndexError) as e:
                raise SnapGenError(f"{where}: {weight} is not a palette of this library") from e
    return out


def roundtrip(weight: mx.array, bits: int) -> mx.array:
    """The weight as it comes back from its palette."""
    indices, palette = fit(weight, bits)
    return palette[mx.array(indices)]
