"""The elastic training step: its maths against small independent implementations."""

import math

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from snapgen_mlx.models.dit import DiT
from snapgen_mlx.models.elastic import bank_index, slice_flat
from snapgen_mlx.training.elastic_trainer import ElasticOptions, ElasticTrainer
from snapgen_mlx.training.flow_matching import (
    add_noise,
    sample_timesteps,
    training_shift,
    validation_loss,
)
from snapgen_mlx.training.optimizer import AdamOptions, Averaged, global_norm

from .toy import toy_config, toy_data, toy_params

pytestmark = pytest.mark.usefixtures("uncompiled")

FULL = 2  # index of the full width


def batch(seed: int, size: int = 4):
    """x0, text, masks and noise; the last sample has no text."""
    rng = np.random.default_rng(seed)
    x0, text, masks = toy_data().batch(rng, size)
    eps = mx.array(rng.standard_normal(x0.shape, dtype=np.float32))
    t = mx.array(rng.random(size, dtype=np.float32))
    masks["toy"] = masks["toy"] & (mx.arange(size) < size - 1)[:, None]
    return x0, text, masks, {"eps": eps, "t": t}


def make_trainer(config=None, **options) -> ElasticTrainer:
    config = config or toy_config()
    return ElasticTrainer(config, toy_params(config), ElasticOptions(warmup=2, **options))


def noisy(x0, text, masks, noise):
    """x_t, target, and the rest of a width's input, of a ``batch``."""
    return *add_noise(x0, noise["eps"], noise["t"]), (noise["t"], text, masks)


class Recorder(optim.Optimizer):
    """Keeps the gradients of a step and changes nothing."""

    def apply_gradients(self, gradients, parameters):
        self.gradients = gradients
        return {}


def gradients(batch, subnets, config=None, **options):
    """Unclipped gradients of one step and its metrics."""
    trainer = make_trainer(config, clip=1e9, **options)
    trainer.weights.optimizer = Recorder()
    metrics = trainer.step(*batch, subnets)
    return trainer.weights.optimizer.gradients, {k: v.item() for k, v in metrics.items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[k], b[k]) for k in a)


# Noise and time


def test_timesteps_follow_the_formula():
    key = mx.random.key(3)
    z = np.array(mx.random.normal((1000,), key=key), dtype=np.float64)
    u = 1 / (1 + np.exp(-z))
    assert [training_shift(size) for size in (128, 256, 640, 1024, 2048)] == [1, 1, 2, 3, 3]
    for shift in (1.0, 3.0):
        t = sample_timesteps(key, 1000, shift)
        np.testing.assert_allclose(t, shift * u / (1 + (shift - 1) * u), atol=1e-6)
        assert t.dtype == mx.float32 and mx.all((t > 0) & (t < 1))
    # Where the shift puts the median: a/2 / (1 + (a-1)/2).
    assert np.median(sample_timesteps(mx.random.key(0), 20000, 3.0)) == pytest.approx(
        0.75, abs=0.01
    )


def test_noise_and_velocity_identities():
    x0, _, _, noise = batch(0)
    eps = noise["eps"]
    t = mx.array([0.0, 0.25, 0.7, 1.0])
    x_t, v = add_noise(x0, eps, t)
    assert mx.array_equal(x_t[0], x0[0]) and mx.array_equal(x_t[3], eps[3])
    s = t[:, None, None, None]
    assert mx.allclose(x_t - s * v, x0, atol=1e-6)
    assert mx.allclose(x_t + (1 - s) * v, eps, atol=1e-6)
    slope = (add_noise(x0, eps, t + 0.01)[0] - x_t) / 0.01
    assert mx.allclose(slope, v, atol=1e-3)


# One width


def test_one_width_is_plain_adam():
    """Against Adam, its schedule and clipping written out in numpy float64."""
    config = toy_config(widths=[1.0])
    params = toy_params(config)
    options = ElasticOptions(
        1e-3, (0.9, 0.99), warmup=2, steps=6, final_rate=0.1, clip=0.5, ema=0.3
    )
    trainer = ElasticTrainer(config, params, options)
    dit = DiT(config)

    def loss(params, x0, text, masks, noise):
        eps, t = noise["eps"], noise["t"]
        dit.update(params)
        x_t = (1 - t[:, None, None, None]) * x0 + t[:, None, None, None] * eps
        return mx.square(dit(x_t, t, text, masks) - (eps - x0)).mean()

    p = {k: np.array(a, np.float64) for k, a in params.items()}
    ema, m, v = dict(p), dict.fromkeys(p, 0.0), dict.fromkeys(p, 0.0)
    clipped = 0
    for step in range(5):
        data = batch(step)
        tree = tree_unflatten([(k, mx.array(a.astype(np.float32))) for k, a in p.items()])
        value, g = mx.value_and_grad(loss)(tree, *data)
        g = {k: np.array(a, np.float64) for k, a in tree_flatten(g)}
        size = math.sqrt(sum((a**2).sum() for a in g.values()))
        clipped += size > 0.5
        # Warm-up from 0 over 2 steps, then a cosine from 1e-3 to 1e-4 over the other 4.
        if step < 2:
            rate = 1e-3 * step / 2
        else:
            rate = 1e-4 + 0.9e-3 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 4))
        for k in p:
            a = g[k] * min(1, 0.5 / size)
            m[k] = 0.9 * m[k] + 0.1 * a
            v[k] = 0.99 * v[k] + 0.01 * a**2
            p[k] = p[k] - rate * m[k] / (np.sqrt(v[k]) + 1e-8)
            d = min(0.3, (step + 2) / (step + 11))  # a young average forgets faster
            ema[k] = d * ema[k] + (1 - d) * p[k]
        metrics = trainer.step(*data, [])
        assert set(metrics) == {"loss/full", "grad"}
        assert metrics["loss/full"].item() == pytest.approx(value.item(), rel=1e-5)
        assert metrics["grad"].item() == pytest.approx(size, rel=1e-4)
    assert clipped == 5
    for k in p:
        # A bias on keys has no gradient but rounding, whose sign alone Adam sees.
        noise = 1e-2 if np.abs(m[k]).max() < 1e-6 else 1e-5
        np.testing.assert_allclose(trainer.weights.params[k], p[k], rtol=0, atol=noise, err_msg=k)
        np.testing.assert_allclose(trainer.weights.mean[k], ema[k], rtol=0, atol=noise, err_msg=k)


def test_validation_loss_weighs_batches_by_size():
    config = toy_config(widths=[1.0])
    dit = DiT(config)
    dit.load_weights(list(toy_params(config).items()), strict=True)
    data = batch(1, 6)
    x_t, target, rest = noisy(*data)
    expected = (dit(x_t, *rest) - target).square().mean().item()
    x0, text, masks, noise = data
    parts = [
        (x0[r], noise["eps"][r], noise["t"][r], {"toy": text["toy"][r]}, {"toy": masks["toy"][r]})
        for r in (slice(0, 4), slice(4, 6))
    ]
    assert validation_loss(dit, parts) == pytest.approx(expected, rel=1e-5)


# Several widths


@pytest.mark.parametrize("subnets", [[0], [1], [0, 1]])
def test_merged_gradients_are_autograds(subnets):
    """Of L_full + sum over subnets of w (L_diff + distill · L_dist), through the slicing."""
    config = toy_config(layers=[1, 2, 1], downsample=True)
    data = batch(2)
    merged, metrics = gradients(data, subnets, config, distill=0.7)
    x_t, target, rest = noisy(*data)
    models = [DiT(config.variant(i)) for i in range(3)]

    def velocity(params, i):
        models[i].update(tree_unflatten(list(slice_flat(params, config, i).items())))
        return models[i](x_t, *rest)

    def loss(params):
        v_full = velocity(params, FULL)
        total = (v_full - target).square().mean()
        for i in subnets:
            v = velocity(params, i)
            own = (v - target).square().mean()
            own += 0.7 * (v - mx.stop_gradient(v_full)).square().mean()
            total += metrics[f"w/{config.variants[i]}"] * own
        return total

    # w compares each width's own gradient with the full width's own, whatever else is added.
    def norm(i, within):
        def alone(params):
            v = velocity(params, i)
            own = (v - target).square().mean()
            return own if i == FULL else own + 0.7 * (v - v_full).square().mean()

        cut = slice_flat(mx.grad(alone)(toy_params(config)), config, within)
        return global_norm({k: g for k, g in cut.items() if bank_index(k) is None}).item()

    v_full = velocity(toy_params(config), FULL)
    for i in subnets:
        ratio = min(max(norm(FULL, i) / norm(i, i), 0.2), 5)
        assert metrics[f"w/{config.variants[i]}"] == pytest.approx(ratio, rel=1e-3)
    expected = mx.grad(loss)(toy_params(config))
    scale = max(mx.abs(g).max().item() for g in expected.values())
    for k, g in expected.items():
        if bank_index(k) in (None, FULL, *subnets):
            assert mx.abs(merged[k] - g).max().item() <= 1e-5 * scale, k
        else:
            assert k not in merged and not mx.any(g), k
    assert merged.keys() <= expected.keys()
    assert metrics["grad"] == pytest.approx(global_norm(merged).item(), rel=1e-5)
    assert {k for k in metrics if "loss" in k} == {
        f"loss/{config.variants[i]}" for i in (FULL, *subnets)
    }


def width_gradients(data, i, distill):
    """Gradients of one width alone, over what widths share, in that width's shapes."""
    config = toy_config()
    params = toy_params(config)
    x_t, target, rest = noisy(*data)
    full, model = DiT(config.variant(FULL)), DiT(config.variant(i))
    full.load_weights(list(slice_flat(params, config, FULL).items()), strict=True)
    v_full = full(x_t, *rest)

    def loss(sub):
        model.update(tree_unflatten(list(sub.items())))
        v = model(x_t, *rest)
        return (v - target).square().mean() + distill * (v - v_full).square().mean()

    grads = mx.grad(loss)(slice_flat(params, config, i))
    return {k: g for k, g in grads.items() if bank_index(k) is None}


@pytest.mark.parametrize("index", [0, 1])
def test_adaptive_weight_is_the_ratio_of_norms(index):
    data = batch(3)
    own = width_gradients(data, index, distill=1.0)
    of_full = slice_flat(width_gradients(data, FULL, distill=0.0), toy_config(), index)
    assert own.keys() == of_full.keys()
    ratio = global_norm(of_full).item() / global_norm(own).item()
    assert 0.2 < ratio < 5
    _, metrics = gradients(data, [index])
    name = toy_config().variants[index]
    assert metrics[f"w/{name}"] == pytest.approx(ratio, rel=1e-4)
    cosine = sum((own[k] * of_full[k]).sum() for k in own) / (
        global_norm(own) * global_norm(of_full)
    )
    assert metrics[f"cos/{name}"] == pytest.approx(cosine.item(), abs=1e-4)
    _, metrics = gradients(data, [index], adaptive=False)
    assert metrics[f"w/{name}"] == 1


@pytest.mark.parametrize(("before", "weight"), [(1000.0, 5.0), (1e-3, 0.2), (2.0, None)])
def test_adaptive_weight_is_a_clipped_running_mean(before, weight):
    _, first = gradients(batch(3), [0])
    trainer = make_trainer()
    trainer.ratios["0"] = mx.array(before)
    metrics = trainer.step(*batch(3), [0])
    mean = 0.99 * before + 0.01 * first["w/tiny"]
    assert trainer.ratios["0"].item() == pytest.approx(mean, rel=1e-5)
    assert metrics["w/tiny"].item() == pytest.approx(weight or mean, rel=1e-5)
    assert trainer.ratios["1"].item() == 0


def test_distillation_leaves_the_full_width_alone():
    """Beyond the subnet's slice and in the full width's bank its weight changes no bit."""
    config = toy_config()
    without, with_it = (gradients(batch(4), [0], adaptive=False, distill=d)[0] for d in (0.0, 10.0))
    outside = within = 0
    for k, g in without.items():
        bank = bank_index(k)
        if bank == FULL:
            assert mx.array_equal(g, with_it[k]), k
        elif bank is None and k.endswith("ffn.fc1.weight"):
            keep = [int(n * config.widths[0]) for n in g.shape]
            differs = np.array(g != with_it[k])
            within += differs[: keep[0], : keep[1]].sum()
            differs[: keep[0], : keep[1]] = False
            outside += differs.sum()
    assert within > 0 and outside == 0


def test_isolated_parameters_of_an_unsampled_width_rest():
    """Neither they nor their moments change by a bit, even while the moments are not zero."""
    trainer = make_trainer(learning_rate=1e-2)
    for step, subnets in enumerate(([0], [1])):
        trainer.step(*batch(step), subnets)
    before = trainer.state()
    trainer.step(*batch(2), [0])
    after = trainer.state()
    rested = changed = 0
    for k, a in before.items():
        group, path = k.split("/", 1)
        bank = bank_index(path)
        if group not in ("params", "opt") or bank is None:
            continue
        equal = mx.array_equal(a, after[k]).item()
        assert equal == (bank == 1), k
        rested, changed = rested + equal, changed + (not equal)
        if bank == 1 and group == "opt":
            assert mx.any(a).item(), k
    assert rested == 3 * 8 and changed == 2 * 3 * 8  # parameter, m and v of 8 arrays a width


def test_a_toy_problem_is_learned_at_every_width():
    config, data, held_out = toy_config(), toy_data(), toy_data(8, seed=1)
    trainer = make_trainer(steps=120, learning_rate=1e-2, ema=0.9)
    t = mx.array((np.arange(8, dtype=np.float32) + 0.5) / 8)
    eps = mx.random.normal(held_out.latents.shape, key=mx.random.key(5))
    text, masks = held_out.text([captions[0] for captions in held_out.captions])
    fixed = [(mx.array(held_out.latents), eps, t, text, masks)]

    def losses(params):
        for i in range(3):
            trainer.models[i].update(tree_unflatten(list(slice_flat(params, config, i).items())))
            yield validation_loss(trainer.models[i], fixed)

    before = list(losses(trainer.weights.params))
    for step in range(120):
        rng = np.random.default_rng(step)
        x0, text, masks = data.batch(rng, 8)
        noise = mx.array(rng.standard_normal(x0.shape, dtype=np.float32))
        t = sample_timesteps(mx.random.key(step), 8, 1.0)
        trainer.step(x0, text, masks, {"eps": noise, "t": t}, [step % 2])
    after, averaged = list(losses(trainer.weights.params)), list(losses(trainer.weights.mean))
    for i in range(3):
        assert max(after[i], averaged[i]) < 0.8 * before[i], (before, after, averaged)


# State


def test_restored_trainer_goes_on_bit_for_bit():
    one = make_trainer(learning_rate=1e-2)
    for step, subnet in enumerate((0, 1, 1)):
        one.step(*batch(step), [subnet])
    config = toy_config()
    two = ElasticTrainer(config, toy_params(config, seed=9), one.options)
    two.restore(one.state())
    for step, subnet in enumerate((0, 1)):
        a, b = (trainer.step(*batch(step), [subnet]) for trainer in (one, two))
        assert same(a, b)
    assert same(one.state(), two.state())


@pytest.mark.parametrize("correct", [False, True])
def test_adam_in_one_kernel_is_mlx_adam(correct):
    """Up to the rounding of its last digits, on some of the parameters and on all."""
    options = AdamOptions(learning_rate=1e-2, warmup=2, steps=10, clip=1e9, ema=0)
    params = {k: mx.random.normal((3, 5), key=mx.random.key(i)) for i, k in enumerate("ab")}
    ours = Averaged(params, options)
    ours.optimizer.bias_correction = correct
    schedule = ours.optimizer._schedulers["learning_rate"]
    theirs = optim.Adam(schedule, betas=list(options.betas), bias_correction=correct)
    theirs.init(params)
    for step in range(5):
        names = "ab" if step % 2 else "a"
        grads = {k: mx.random.normal((3, 5), key=mx.random.key(9 * step)) for k in names}
        params = params | theirs.apply_gradients(dict(grads), params)
        held = ours.params
        ours.update(grads)
        assert held.keys() == params.keys() == ours.params.keys()  # and none is emptied
    for k, a in params.items():
        np.testing.assert_allclose(ours.params[k], a, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(ours.optimizer.state[k]["v"], theirs.state[k]["v"], rtol=1e-6)
