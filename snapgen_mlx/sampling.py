"""Sampling the flow: sigmas, guidance and Euler steps (paper 3.3; shift after SD3)."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise, repeat
from typing import Any

import mlx.core as mx

from .config import TransformerConfig
from .device import scalar
from .loading import Transformer

# What a model distilled by ``training.kdmd`` is sampled with.
FEW_STEPS = {"steps": 4, "guidance": 1.0, "shift": 3.0}


def schedule(steps: int, shift: float = 3.0) -> list[float]:
    """Sigmas from 1 to 0: shift·s / (1 + (shift-1)·s) on linspace(1, 1/N, N), then 0.

    Args:
        steps: N. ``schedule(4)`` is exactly [1, 0.9, 0.75, 0.5, 0].
        shift: of the time schedule.

    Returns:
        N + 1 numbers.
    """
    grid = [1 - i / steps for i in range(steps)]
    return [shift * s / (1 + (shift - 1) * s) for s in grid] + [0.0]


def guide(v_pos: mx.array, v_neg: mx.array, guidance: float) -> mx.array:
    """v = v_neg + g·(v_pos - v_neg) of velocities (B, H, W, C)."""
    return v_neg + guidance * (v_pos - v_neg)


def keep_length(v: mx.array, like: mx.array, patch: int) -> mx.array:
    """v (B, H, W, C) with the length that ``like`` has in each patch, as Qwen-Image is guided."""

    def length(a):
        a = a.reshape(B, H // patch, patch, W // patch, patch, C)
        n = mx.sqrt(a.square().sum(axis=(2, 4, 5), keepdims=True))
        return mx.broadcast_to(n, (B, H // patch, patch, W // patch, patch, 1))

    B, H, W, C = v.shape
    return v * (length(like) / mx.maximum(length(v), 1e-6)).reshape(B, H, W, 1)


def apply_guidance(config: TransformerConfig, v: mx.array, guidance: float) -> mx.array:
    """Guided velocities (B, H, W, C) [classifier-free guidance].

    Args:
        config: of the transformer, which says how lengths are treated.
        v: (2·B, H, W, C), first those with the text, then those with the negative text.
        guidance: 1 for none.
    """
    v_pos, v_neg = mx.split(v, 2)
    guided = guide(v_pos, v_neg, guidance)
    return keep_length(guided, v_pos, config.patch_size) if config.rescale_guidance else guided


@dataclass
class Step:
    """State after one Euler step: x at the next sigma and the image predicted from this one."""

    index: int
    sigma: float
    x: mx.array
    x0: mx.array


def denoise(
    dits: Transformer | Iterator[Transformer],
    noise: mx.array,
    text: dict,
    masks: dict,
    sigmas: list[float],
    guidance: float = 1.0,
    negative: tuple[dict, dict] | None = None,
    put_back: Callable[[mx.array, float], mx.array] | None = None,
) -> Iterator[Step]:
    """Integrate dx/dt = v along a schedule.

    Conditions of time and text are computed once for each transformer. Nothing is evaluated here:
    the caller evaluates each step, and may stop at any.

    Args:
        dits: the transformer of all steps, or that of each step in turn.
        noise: (B, H, W, C).
        text: {encoder: states (B, L, dim)}.
        masks: {encoder: (B, L) bool}.
        sigmas: of ``schedule``.
        guidance: if it is not 1, each step evaluates prompt and negative in one batch of 2·B.
        negative: (text, masks) to lead away from; None for no text.
        put_back: gets x and its sigma after each step, and returns x with the parts that must stay.

    Yields:
        Every step.
    """
    B = noise.shape[0]
    guided = guidance != 1.0
    each = dits if isinstance(dits, Iterator) else repeat(dits)
    # Nothing of a transformer is held between steps: the caller may let go of it.
    known: weakref.ref[Transformer] | None = None
    x = noise.astype(mx.float32)  # schedule maths in float32
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        dit = next(each)
        if known is None or known() is not dit:
            known = weakref.ref(dit)
            conditions: Any = dit.condition_text(text, masks, B)  # of the transformer's own kind
            if guided:
                conditions = conditions.join(dit.condition_text(*(negative or ({}, {})), B))
            times: Any = dit.condition_time(mx.array(sigmas[:-1]))
        inputs = mx.concatenate([x, x]) if guided else x
        v = dit.denoise(inputs, times[i : i + 1], conditions).astype(mx.float32)
        if guided:
            v = apply_guidance(dit.config, v, guidance)
        x0 = x - sigma * v
        x = x + (following - sigma) * v
        if put_back is not None:
            x = put_back(x, following)
        del dit
        yield Step(i, sigma, x, x0)


def draw_noise(
    shape: tuple[int, ...], seed: int, variation: tuple[int, float] | None = None
) -> mx.array:
    """The noise of a seed, or noise between it and that of another one.

    Args:
        shape: (B, h, w, C).
        seed: 0 to 2^63 - 1.
        variation: the other seed and its share.
    """
    noise = mx.random.normal(shape, key=mx.random.key(seed))
    if variation is None:
        return noise
    other, amount = variation
    return blend_noise(noise, mx.random.normal(shape, key=mx.random.key(other)), amount)


def blend_noise(a: mx.array, b: mx.array, amount: float) -> mx.array:
    """Spherical interpolation from noise ``a`` (amount 0) to ``b`` (1), which keeps its norm."""
    a_unit, b_unit = (n / mx.linalg.norm(n.reshape(-1)) for n in (a, b))
    angle = mx.arccos(mx.clip((a_unit * b_unit).sum(), -1, 1))
    if scalar(angle) < 1e-3:
        return a
    return (mx.sin((1 - amount) * angle) * a + mx.sin(amount * angle) * b) / mx.sin(angle)


def last_step(steps: Iterator[Step]) -> Step:
    """Go through all steps; the last one has the picture's latent."""
    *_, last = steps
    return last
