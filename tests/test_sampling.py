"""Schedule, guidance and Euler steps."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_unflatten

from snapgen_mlx.loading import load_supernet
from snapgen_mlx.models.dit import DiT
from snapgen_mlx.models.elastic import slice_flat
from snapgen_mlx.sampling import denoise, schedule

from .tiny import write_tiny_model


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    config, params = load_supernet(write_tiny_model(tmp_path_factory.mktemp("tiny")))
    dit = DiT(config.variant(1))
    dit.update(tree_unflatten(list(slice_flat(params, config, 1).items())))
    return dit


def inputs(batch=2, length=5):
    mx.random.seed(3)
    text = {"static": mx.random.normal((batch, length, 8))}
    mask = {"static": mx.arange(length) < mx.array([[length], [2]])}
    return mx.random.normal((batch, 8, 8, 16)), text, mask


def test_four_steps_have_exactly_the_papers_sigmas():
    assert schedule(4, 3.0) == [1, 0.9, 0.75, 0.5, 0]


def test_28_steps_follow_the_training_specification():
    sigmas = schedule(28, 3.0)
    assert len(sigmas) == 29
    assert sigmas[:3] == pytest.approx([1, 0.98780, 0.975], abs=5e-6)
    assert sigmas[-4:] == pytest.approx([0.26471, 0.1875, 0.1, 0], abs=5e-6)
    assert schedule(5, 1.0) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])


def test_euler_on_a_straight_flow_is_exact(dit, monkeypatch):
    """With the true velocity eps - x0 any number of steps ends at x0, and so does every x0."""
    eps, text, masks = inputs()
    x0 = mx.random.normal(eps.shape)
    monkeypatch.setattr(DiT, "denoise", lambda *_: eps - x0)
    for steps in (1, 4, 28):
        for step in denoise(dit, eps, text, masks, schedule(steps)):
            np.testing.assert_allclose(step.x0, x0, atol=2e-6)
        assert step.index == steps - 1
        np.testing.assert_allclose(step.x, x0, atol=4e-6)


def test_one_step_is_the_models_velocity(dit):
    eps, text, masks = inputs()
    (step,) = denoise(dit, eps, text, masks, [1.0, 0.0])
    v = dit(eps, mx.ones(2), text, masks)
    np.testing.assert_allclose(step.x, eps - v, atol=1e-6)


@pytest.mark.parametrize("length", [None, 3, 5, 9])
def test_guidance_in_one_batch_equals_two_calls(dit, length):
    """Prompt and negative (null, shorter, as long, longer) joined and padded, or apart."""
    eps, text, masks = inputs()
    negative = None
    if length:
        mask = mx.arange(length) < mx.array([[1], [length]])
        negative = ({"static": mx.random.normal((2, length, 8))}, {"static": mask})
    (step,) = denoise(dit, eps, text, masks, [1.0, 0.4], guidance=3.0, negative=negative)
    v_pos = dit(eps, mx.ones(2), text, masks)
    v_neg = dit(eps, mx.ones(2), *(negative or ({}, {})))
    want = eps - 0.6 * (v_neg + 3.0 * (v_pos - v_neg))
    np.testing.assert_allclose(step.x, want, atol=1e-5)


def test_guidance_of_one_never_evaluates_the_negative(dit, monkeypatch):
    eps, text, masks = inputs()
    seen = []
    real = DiT.denoise
    monkeypatch.setattr(DiT, "denoise", lambda s, x, *a: seen.append(len(x)) or real(s, x, *a))
    list(denoise(dit, eps, text, masks, schedule(2), guidance=1.0))
    list(denoise(dit, eps, text, masks, schedule(2), guidance=1.5))
    assert seen == [2, 2, 4, 4]
