"""Distribution matching (DMD) [paper Eq. 9]."""

import mlx.core as mx
import numpy as np

from ..sampling import FEW_STEPS
from .distill import without_projectors
from .optimizer import add_arrays, global_norm

SHIFT = FEW_STEPS["shift"]
TAU_RANGE = (0.02, 0.98)
BINS = 4  # ranges of tau for which the critic's loss is reported


def sample_taus(key: mx.array, batch: int) -> mx.array:
    """tau (B,): uniform, shifted like the sampler's sigmas, within TAU_RANGE."""
    u = mx.random.uniform(shape=(batch,), key=key)
    return mx.clip(SHIFT * u / (1 + (SHIFT - 1) * u), *TAU_RANGE)


def per_sample(error: mx.array) -> mx.array:
    """Mean of (B, H, W, C) over all axes but the batch."""
    return error.mean(axis=(1, 2, 3))


def dmd_loss(x0: mx.array, c0: mx.array, r0: mx.array) -> tuple[mx.array, mx.array]:
    """A loss whose gradient by x0 is w·(c0 - r0) / x0.size [paper Eq. 9].

    Args:
        x0: the student's prediction (B, H, W, C).
        c0: what the critic predicts from x0 with noise (B, H, W, C).
        r0: what the teacher predicts from the same (B, H, W, C).

    Returns:
        The loss, and w (B,).
    """
    w = 1 / (per_sample(mx.abs(mx.stop_gradient(x0) - r0)) + 1e-6)
    target = mx.stop_gradient(x0 - w[:, None, None, None] * (c0 - r0))
    return 0.5 * (x0 - target).square().mean(), w


def by_tau(losses: mx.array, tau: mx.array) -> dict[str, mx.array]:
    """The critic's mean loss, and that of each bin of tau which has a sample; both (B,)."""
    metrics, bins = {"loss/critic": losses.mean()}, np.array(tau * BINS).astype(int)
    for i in np.unique(bins).tolist():
        rows = mx.array(np.flatnonzero(bins == i))
        metrics[f"critic/tau {i / BINS:g}"] = losses[rows].mean()
    return metrics


def balanced(grads: dict[str, mx.array]) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """The sum of several losses' gradients, each scaled to the mean of their norms.

    Args:
        grads: {"LOSS/name": gradient}; those of projectors do not count in the norms.

    Returns:
        {name: gradient}, and the norms before, {"grad/LOSS": scalar}.
    """
    terms: dict[str, dict[str, mx.array]] = {}
    for key, g in grads.items():
        term, _, name = key.partition("/")
        terms.setdefault(term, {})[name] = g
    norms = {term: global_norm(without_projectors(own)) for term, own in terms.items()}
    mean = sum(norms.values()) / len(norms)
    total: dict[str, mx.array] = {}
    for term, own in terms.items():
        scale = mean / mx.maximum(norms[term], 1e-12)
        scaled = {k: scale * g for k, g in own.items()}
        total = add_arrays(total, scaled) if total else scaled
    return total, {f"grad/{term}": norm for term, norm in norms.items()}
