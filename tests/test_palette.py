"""Palettes: k-means against the optimum, packing, and what a damaged one does."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.tensors.palette import BITS, expand, fit, kmeans, pack, roundtrip, unpack


def least_error(values: np.ndarray, k: int) -> float:
    """Squared error of the best k centres for sorted ``values``, by dynamic programming."""
    n = len(values)
    s, q = (np.concatenate([[0], np.cumsum(v)]) for v in (values, values**2))
    i, j = np.arange(n + 1)[:, None], np.arange(n + 1)[None]
    cost = q[j] - q[i] - (s[j] - s[i]) ** 2 / np.maximum(j - i, 1)
    cost[i > j] = np.inf
    best = cost[0]
    for _ in range(1, k):
        best = (best[:, None] + cost).min(axis=0)
    return best[-1]


@pytest.mark.parametrize("name", ["normal", "laplace", "uniform", "standard_t"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_kmeans_comes_close_to_the_optimum(name, bits):
    rng = np.random.default_rng(bits)
    draw = getattr(rng, name)
    values = np.sort(draw(5, size=600) if name == "standard_t" else draw(size=600))
    centres = kmeans(values, np.ones(600), 1 << bits)
    assert (np.diff(centres) >= 0).all()
    error = ((values[:, None] - centres) ** 2).min(axis=1).sum()
    best = least_error(values, 1 << bits)
    assert best * (1 - 1e-9) <= error < 1.005 * best


def test_kmeans_counts_its_weights():
    values, counts = np.array([0.0, 1.0, 10.0, 11.0]), np.array([30, 10, 1, 3])
    centres = kmeans(values, counts, 2)
    assert np.allclose(centres, [0.25, 10.75])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_every_weight_becomes_the_nearest_value(bits, dtype):
    weight = (mx.random.normal((24, 2, 64), key=mx.random.key(0)) * 0.05).astype(dtype)
    indices, palette = fit(weight, bits)
    packed = mx.array(pack(indices, bits))
    assert packed.dtype == mx.uint32 and packed.shape == (24, 2, 2 * bits)
    assert palette.dtype == dtype and palette.shape == (1 << bits,)
    out = unpack(packed, palette)
    assert mx.array_equal(out, roundtrip(weight, bits))
    assert out.dtype == dtype and out.shape == weight.shape
    out, weight, palette = (a.astype(mx.float32) for a in (out, weight, palette))
    nearest = mx.abs(weight[..., None] - palette).min(axis=-1)
    assert mx.array_equal(mx.abs(out - weight), nearest)


def test_more_bits_are_better_and_as_good_as_theory():
    weight = mx.random.normal((512, 512), key=mx.random.key(1)).astype(mx.float16)
    # Max 1960: the least squared error of a Gaussian's 4, 8 and 16 levels.
    for bits, expected in ((2, 0.1175), (3, 0.03454), (4, 0.009497)):
        error = (roundtrip(weight, bits) - weight).astype(mx.float32).square().mean().item()
        assert error == pytest.approx(expected, rel=0.02)
    errors = [mx.abs(roundtrip(weight, b) - weight).mean().item() for b in BITS]
    assert errors == sorted(errors, reverse=True)


def test_few_values_are_kept_exactly():
    weight = mx.array(np.resize([0.5, -1.0, 3.0], (4, 32))).astype(mx.float16)
    for bits in BITS:
        assert mx.array_equal(roundtrip(weight, bits), weight)


@pytest.mark.parametrize("bits", BITS)
@given(indices=arrays.arrays(np.uint8, st.tuples(st.integers(1, 3), st.sampled_from([32, 96]))))
@settings(max_examples=20, deadline=None)
def test_indices_come_back(bits, indices):
    indices = indices & ((1 << bits) - 1)
    palette = mx.arange(1 << bits).astype(mx.float16)
    assert np.array_equal(np.array(unpack(mx.array(pack(indices, bits)), palette)), indices)


def test_slices_of_a_packed_weight_are_slices_of_the_weight():
    weight = mx.random.normal((8, 256), key=mx.random.key(2)).astype(mx.float16)
    for bits in BITS:
        indices, palette = fit(weight, bits)
        packed = mx.array(pack(indices, bits))
        cut = unpack(packed[:3, : 3 * bits], palette)
        assert mx.array_equal(cut, unpack(packed, palette)[:3, :96])


def test_weights_that_no_palette_can_have():
    for bad in (float("nan"), float("inf")):
        with pytest.raises(SnapGenError, match="NaN or infinity"):
            fit(mx.full((1, 32), bad, mx.float16), 4)


PACKED, VALUES = mx.zeros((2, 8), mx.uint32), mx.zeros((16,), mx.float16)


@pytest.mark.parametrize(
    "damaged",
    [
        {"x.weight.palette": VALUES},
        {"x.weight": PACKED, "x.weight.palette": VALUES[:15]},
        {"x.weight": PACKED, "x.weight.palette": VALUES[None]},
        {"x.weight": PACKED, "x.weight.palette": VALUES[:1]},
        {"x.weight": PACKED, "x.weight.palette": VALUES[:8]},
        {"x.weight": PACKED.astype(mx.float16), "x.weight.palette": VALUES},
    ],
)
def test_a_damaged_palette_is_one_error(damaged):
    with pytest.raises(SnapGenError, match=r"here: x\.weight is not a palette") as e:
        expand(damaged, "here")
    assert "\n" not in str(e.value)
