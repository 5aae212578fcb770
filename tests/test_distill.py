"""Distillation: losses, teachers and steps against independent implementations; runs; commands."""

import itertools
import json
import shutil
import signal
import time

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from mlx.utils import tree_flatten, tree_unflatten
from PIL import Image

from snapgen_mlx.cli.main import main
from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.loading import load_supernet
from snapgen_mlx.models.dit import DiT
from snapgen_mlx.models.elastic import bank_index, slice_flat
from snapgen_mlx.pipeline import Pipeline
from snapgen_mlx.sampling import denoise, schedule
from snapgen_mlx.training import kdmd, watch
from snapgen_mlx.training.checkpoint import load_state
from snapgen_mlx.training.distill import (
    KDOptions,
    KDTrainer,
    ProjectorFit,
    alpha,
    feature_loss,
    timestep_aware,
)
from snapgen_mlx.training.dmd import TAU_RANGE, balanced, by_tau, dmd_loss, sample_taus
from snapgen_mlx.training.flow_matching import add_noise, sample_timesteps
from snapgen_mlx.training.kdmd import SIGMAS
from snapgen_mlx.training.loop import Inputs, fixed_batches
from snapgen_mlx.training.lora_training import SCALE, LoRAWeights, lora_params
from snapgen_mlx.training.teacher import ModelTeacher, TaughtDataset
from snapgen_mlx.training.watch import Watch

from .tiny import write_tiny_model
from .toy import ToyText, toy_config, toy_data, toy_params
from .toy_distill import (
    RANK,
    ToyVAE,
    random_lora,
    toy_kdmd,
    toy_kdmd_run,
    toy_model,
    toy_pictures,
    toy_teacher,
    trained_params,
    updates,
)

pytestmark = pytest.mark.usefixtures("uncompiled")

STEPS = 12


def batch(seed: int = 0, size: int = 4):
    """x0, text, masks; the last sample has no text."""
    x0, text, masks = toy_data().batch(np.random.default_rng(seed), size)
    masks["toy"] = masks["toy"] & (mx.arange(size) < size - 1)[:, None]
    return x0, text, masks


def normal(shape, seed: int = 1) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def flat(model) -> dict:
    return dict(tree_flatten(model.parameters()))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[k], b[k]) for k in a)


class Recorder(optim.Optimizer):
    """Keeps the gradients of a step and changes nothing."""

    def apply_gradients(self, gradients, parameters):
        self.gradients = gradients
        return {}


# Losses


def test_alpha():
    t = mx.array([0.5, 0.25, 0.1, 0.02])
    np.testing.assert_allclose(alpha(t), [1, 0.729, 0.2485, 0.0066], rtol=0, atol=5e-5 * 10)
    np.testing.assert_allclose(alpha(1 - t), alpha(t), rtol=1e-4)
    z = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    density = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0),
        [torch.distributions.transforms.SigmoidTransform()],
    )
    ratio = (density.log_prob(z) - density.log_prob(torch.tensor(0.5).double())).exp()
    np.testing.assert_allclose(alpha(mx.array(z.float().numpy())), ratio, rtol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 1.7, 3.0])
def test_alpha_follows_the_timesteps_that_are_drawn(shift):
    """1 at the largest density, and elsewhere as the density, which is measured by drawing."""
    t = mx.linspace(0.002, 0.998, 4000)
    a = np.array(alpha(t, shift))
    assert abs(a.max() - 1) < 1e-5
    drawn = np.array(sample_timesteps(mx.random.key(0), 1_000_000, shift))
    counts, edges = np.histogram(drawn, 25, (0, 1))
    per_bin = np.array([a[(t >= lo) & (t < hi)].mean() for lo, hi in itertools.pairwise(edges)])
    np.testing.assert_allclose(counts / counts.sum(), per_bin / per_bin.sum(), atol=2e-3)
    if shift == 3:
        assert abs(np.array(t)[a.argmax()] - 0.861) < 2e-3


def test_timestep_aware_scaling():
    """It is as large as the flow loss; the teacher's share of the gradient is 1 - alpha. Where both
    hardly differ, the gradient has a limit."""
    flow, out, t = mx.array([0.3, 2.0, 0.1]), mx.array([0.7, 0.5, 1e-4]), mx.array([0.5, 0.1, 0.9])
    value, (by_flow, by_out) = mx.value_and_grad(
        lambda f, o: timestep_aware(f, o, t).sum(), argnums=(0, 1)
    )(flow, out)
    a = np.array(alpha(t), np.float64)
    ratio = np.minimum(np.array(flow) / np.array(out), 10)
    np.testing.assert_allclose(value, (a * flow + (1 - a) * ratio * np.array(out)).sum(), rtol=1e-5)
    np.testing.assert_allclose(value[None], [0.3 + 2.0 + a[2] * 0.1 + (1 - a[2]) * 1e-3], rtol=1e-5)
    np.testing.assert_allclose(by_flow, a, rtol=1e-5)
    np.testing.assert_allclose(by_out, (1 - a) * ratio, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (6, 10), (2, 2)])
def test_features_of_another_grid(grid):
    """The student's tokens are brought to the teacher's grid as PyTorch resizes pictures."""
    tokens, target = normal((2, 4, 4, 6)), normal((2, *grid, 5), 2)
    phi = {"weight": normal((5, 6), 3), "bias": normal((5,), 4)}
    ours = feature_loss(tokens, phi, target)
    x = torch.tensor(np.array(tokens)).permute(0, 3, 1, 2)
    x = torch.nn.functional.interpolate(x, grid, mode="bilinear", align_corners=False)
    w, b = (torch.tensor(np.array(phi[k])) for k in ("weight", "bias"))
    error = torch.nn.functional.linear(x.permute(0, 2, 3, 1), w, b) - torch.tensor(np.array(target))
    np.testing.assert_allclose(ours, (error**2).mean(dim=(1, 2, 3)), rtol=1e-5)


def test_a_fitted_projector_has_the_least_loss():
    """Least squares in numpy, from parts on another grid; better than no tokens at all."""
    tokens = [normal((2, 4, 4, 6), seed) for seed in (1, 2)]
    target = [normal((2, 4, 4, 5), 3), normal((2, 8, 8, 5), 4)]
    target[0] = target[0] + tokens[0][..., :5] + 2
    fit = ProjectorFit()
    for pair in zip(tokens, target, strict=True):
        fit.add(*pair)
    phi = fit.solve()
    large = torch.tensor(np.array(tokens[1])).permute(0, 3, 1, 2)
    large = torch.nn.functional.interpolate(large, (8, 8), mode="bilinear", align_corners=False)
    x = np.concatenate(
        [np.array(tokens[0]).reshape(-1, 6), large.permute(0, 2, 3, 1).reshape(-1, 6)]
    )
    y = np.concatenate([np.array(a).reshape(-1, 5) for a in target])
    best = np.linalg.lstsq(np.concatenate([x, np.ones((len(x), 1))], axis=1), y, rcond=None)[0]
    np.testing.assert_allclose(phi["weight"].T, best[:-1], atol=2e-3)
    np.testing.assert_allclose(phi["bias"], best[-1], atol=2e-3)
    assert feature_loss(tokens[0], phi, target[0]).mean() < target[0].square().mean()


def test_dmd_gradient():
    """w·(c0 - r0) / numel, and down it lies the teacher's prediction."""
    x0, c0, r0 = (normal((2, 4, 4, 3), seed) for seed in (1, 2, 3))
    (value, w), gradient = mx.value_and_grad(lambda x: dmd_loss(x, c0, r0))(x0)
    a, c, r = (np.array(x, np.float64) for x in (x0, c0, r0))
    weight = 1 / (np.abs(a - r).mean((1, 2, 3)) + 1e-6)
    step = weight[:, None, None, None] * (c - r)
    np.testing.assert_allclose(w, weight, rtol=1e-5)
    np.testing.assert_allclose(gradient, step / a.size, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(value, 0.5 * (step**2).mean(), rtol=1e-5)
    # A critic that knows the student says c0 = x0: the student then goes towards the teacher.
    gradient = np.array(mx.grad(lambda x: dmd_loss(x, x0, r0)[0])(x0))
    assert np.abs(a - 0.01 * a.size * gradient - r).mean() < np.abs(a - r).mean()


def test_dmd_in_velocities():
    """c0 - r0 = tau·(v_teacher - v_critic)."""
    x_tau, v_critic, v_teacher, tau = normal((1, 2, 2, 3)), normal((1, 2, 2, 3), 2), 0.5, 0.3
    c0, r0 = x_tau - tau * v_critic, x_tau - tau * v_teacher
    np.testing.assert_allclose(c0 - r0, tau * (v_teacher - v_critic), atol=1e-6)


def test_taus():
    tau = np.array(sample_taus(mx.random.key(0), 20000))
    assert tau.min() == np.float32(TAU_RANGE[0]) and tau.max() == np.float32(TAU_RANGE[1])
    assert np.median(tau) == pytest.approx(0.75, abs=0.01)  # 3/2 / (1 + 2/2) of the uniform's


def test_sigmas():
    assert SIGMAS == [1, 0.9, 0.75, 0.5, 0]


# Teachers


def test_guided_velocity():
    teacher, model = toy_teacher(), toy_model(2)
    x0, text, masks = batch()
    t = mx.array([0.9, 0.5, 0.2, 0.7])
    positive, negative = model(x0, t, text, masks), model(x0, t, {}, {})
    np.testing.assert_allclose(
        teacher.velocity(x0, t, text, masks, 3.0),
        negative + 3 * (positive - negative),
        rtol=1e-4,
        atol=1e-5,
    )
    assert mx.array_equal(teacher.velocity(x0, t, text, masks), positive)
    nothing = {"toy": mx.zeros_like(masks["toy"])}
    np.testing.assert_allclose(
        teacher.velocity(x0, t, text, nothing, 3.0), negative, rtol=1e-4, atol=1e-5
    )


def test_the_few_step_lora_switches_bit_exactly():
    model, (x0, text, masks) = toy_model(2), batch()
    t = mx.full(4, 0.75)
    before, weights = model(x0, t, text, masks), flat(model)
    lora = random_lora(model.config)
    teacher = ModelTeacher(model, updates(lora))
    off, _ = teacher.outputs(x0, t, text, masks)
    on, _ = teacher.outputs(x0, t, text, masks, few_step=True)
    again, _ = teacher.outputs(x0, t, text, masks)
    assert mx.array_equal(off, before) and mx.array_equal(again, before)
    assert same(flat(model), weights)
    fused = toy_model(2)
    for path, update in updates(lora).items():
        layer = dict(fused.named_modules())[path]
        layer.weight = layer.weight + update.b @ update.a
    np.testing.assert_allclose(on, fused(x0, t, text, masks), rtol=1e-4, atol=1e-5)
    assert mx.abs(on - off).max() > 0.01
    zero = ModelTeacher(model, updates(lora_params(model.config, RANK)))
    assert mx.array_equal(zero.outputs(x0, t, text, masks, few_step=True)[0], before)


def test_features_are_standardised():
    teacher, (x0, text, masks) = toy_teacher(), batch()
    _, tokens = teacher.outputs(x0, mx.full(4, 0.5), text, masks)
    assert tokens.shape == (4, 4, 4, 32) and tokens.dtype == mx.float16
    tokens = tokens.astype(mx.float32)
    np.testing.assert_allclose(tokens.mean(axis=-1), 0, atol=1e-3)
    np.testing.assert_allclose(tokens.var(axis=-1), 1, atol=1e-3)


class OtherText(ToyText):
    """A teacher's encoder of the same name with other states."""

    def encode(self, texts):
        states, mask = super().encode(texts)
        return states[:, :2] + 1, mask[:, :2]


def test_a_teacher_with_its_own_text():
    model, other = toy_model(2), OtherText()
    data = TaughtDataset(toy_data(), [other])
    x0, text, masks = data.batch(np.random.default_rng(0), 8, dropout=0.5)
    plain = toy_data().batch(np.random.default_rng(0), 8, dropout=0.5)
    assert mx.array_equal(plain[0], x0)
    assert mx.array_equal(plain[1]["toy"], text["toy"]) and mx.array_equal(
        plain[2]["toy"], masks["toy"]
    )
    given = np.array(mx.any(masks["toy"], axis=1))
    assert 0 < given.sum() < 8
    t = mx.full(8, 0.5)
    teacher = ModelTeacher(model, own_text=True)
    ours = teacher.velocity(x0, t, text, masks)
    captions = [i for i in range(8)]
    for i in captions:
        states = {"toy": text["teacher/toy"][i : i + 1]} if given[i] else {}
        seen = {"toy": masks["teacher/toy"][i : i + 1]} if given[i] else {}
        expected = model(x0[i : i + 1], t[:1], states, seen)
        np.testing.assert_allclose(ours[i : i + 1], expected, rtol=1e-4, atol=1e-5)
    # A student does not see them.
    assert mx.array_equal(model(x0, t, text, masks), model(x0, t, {"toy": text["toy"]}, masks))


# Knowledge distillation


def kd_trainer(config, **options) -> KDTrainer:
    options = KDOptions(warmup=2, clip=1e9, shift=2.0, **options)
    return KDTrainer(config, toy_params(config), options, teacher=toy_teacher(seed=3))


def kd_step(trainer: KDTrainer, *inputs) -> dict[str, mx.array]:
    return trainer.step(*trainer.look_ahead([Inputs(*inputs)])[0])


@pytest.mark.parametrize("distill", [0.0, 0.7])
def test_kd_gradients_are_autograds(distill):
    """Of L_full + w L_narrow, each S(L_diff, L_out) + L_feat, with the phi of each width."""
    config = toy_config(layers=[1, 2, 1], downsample=True)
    trainer, index = kd_trainer(config, distill=distill), 1
    trainer.weights.optimizer = Recorder()
    x0, text, masks = batch(3)
    noise = {"eps": normal(x0.shape, 4), "t": mx.array([0.2, 0.5, 0.8, 0.6])}
    metrics = kd_step(trainer, x0, text, masks, noise, [index])
    params = dict(trainer.weights.params)  # not updated, with the phi that the step began with
    x_t, target = add_noise(x0, noise["eps"], noise["t"])
    theirs, features = toy_teacher(seed=3).outputs(x_t, noise["t"], text, masks)
    models = [DiT(config.variant(i)) for i in range(3)]

    def width(params, i, v_full=None):
        own = slice_flat({k: a for k, a in params.items() if "projector" not in k}, config, i)
        models[i].update(tree_unflatten(list(own.items())))
        time = models[i].condition_time(noise["t"])
        tokens = models[i].features(x_t, time, models[i].condition_text(text, masks, 4))
        v = models[i].head(tokens, time)
        flow, out = (((v - a) ** 2).mean(axis=(1, 2, 3)) for a in (target, theirs))
        a = alpha(noise["t"], 2.0)
        loss = (a * flow + (1 - a) * mx.stop_gradient(flow / out) * out).mean()
        phi = tokens @ params[f"projector.{i}.weight"].T + params[f"projector.{i}.bias"]
        loss = loss + ((phi - features) ** 2).mean()
        if v_full is not None:
            loss = loss + distill * ((v - mx.stop_gradient(v_full)) ** 2).mean()
        return loss, v

    def loss(params):
        full, v_full = width(params, 2)
        return full + metrics["w/small"] * width(params, index, v_full)[0]

    expected = mx.grad(loss)(params)
    merged = trainer.weights.optimizer.gradients
    scale = max(mx.abs(g).max().item() for g in expected.values())
    for k, g in expected.items():
        if bank_index(k) in (None, 2, index):
            assert mx.abs(merged[k] - g).max().item() <= 1e-5 * scale, k
        else:
            assert k not in merged, k
    assert {k for k in merged if "projector" in k} == {
        f"projector.{i}.{name}" for i in (1, 2) for name in ("weight", "bias")
    }
    assert {"loss/full", "out/small", "features/full"} <= set(metrics)


def test_kd_comes_nearer_to_its_teacher():
    config, data = toy_config(widths=[1.0]), toy_data()
    trainer = kd_trainer(config, steps=40, learning_rate=1e-2, ema=0.0)
    records = []
    for step in range(40):
        x0, text, masks = data.batch(np.random.default_rng(step), 8)
        noise, subnets = trainer.draw(None, mx.random.key(step), x0.shape)
        metrics = kd_step(trainer, x0, text, masks, noise, subnets)
        records.append([metrics[f"{k}/full"].item() for k in ("out", "features")])
    first, last = np.mean(records[:5], axis=0), np.mean(records[-5:], axis=0)
    assert all(last < 0.7 * first), (first, last)


# K-DMD: one step against the same maths spelled out, with LoRAs fused into the weights


def fused(base, params: dict) -> DiT:
    model = DiT(base.config)
    weights = flat(base)
    for k, a in params.items():
        layer, _, part = k.rpartition(".")
        if part == "lora_a":
            name = f"{layer}.weight"
            weights[name] = weights[name] + SCALE * params[f"{layer}.lora_b"] @ a
    model.update(tree_unflatten(list(weights.items())))
    return model


def features_of(model, x, t, text, masks):
    time = model.condition_time(t)
    tokens = model.features(x, time, model.condition_text(text, masks, len(x)))
    return model.head(tokens, time), tokens


def kdmd_gradients(base, teacher, student, critic, x0, text, masks, noise, k, real=False):
    """Gradients of student with phi, and of the critic, as in the paper's algorithm."""
    s = [mx.array(a) for a in SIGMAS]
    x = noise["x"]
    if real:
        x = (1 - s[k]) * x0 + s[k] * x
    else:
        for i in range(k):
            t = mx.full(len(x), SIGMAS[i])
            x = x + (s[i + 1] - s[i]) * fused(base, student)(x, t, text, masks)
    t = mx.full(len(x), SIGMAS[k])

    def loss(own):
        v, tokens = features_of(fused(base, own), x, t, text, masks)
        y = x - s[k] * v
        tau = noise["tau/student"][:, None, None, None]
        x_tau = mx.stop_gradient((1 - tau) * y) + tau * noise["eps/student"]
        flat_tau = noise["tau/student"]
        c0 = x_tau - tau * fused(base, critic)(x_tau, flat_tau, text, masks)
        r0 = x_tau - tau * teacher.velocity(x_tau, flat_tau, text, masks, 4.0)
        w = 1 / (mx.abs(y - r0).mean(axis=(1, 2, 3), keepdims=True) + 1e-6)
        gradient = mx.stop_gradient(w * (c0 - r0) / y.size)
        theirs, target = teacher.outputs(x, t, text, masks, few_step=teacher.is_few_step)
        if not teacher.is_few_step:
            theirs = teacher.velocity(x, t, text, masks, 4.0)
        phi = tokens @ own["projector.0.weight"].T + own["projector.0.bias"]
        return (gradient * y).sum() + ((v - theirs) ** 2).mean() + ((phi - target) ** 2).mean()

    y = x - s[k] * fused(base, student)(x, t, text, masks)
    tau = noise["tau/critic"][:, None, None, None]
    noised = (1 - tau) * y + tau * noise["eps/critic"]

    def critic_loss(own):
        v = fused(base, own)(noised, noise["tau/critic"], text, masks)
        return ((v - (noise["eps/critic"] - y)) ** 2).mean()

    return mx.grad(loss)(student), mx.grad(critic_loss)(critic)


@pytest.mark.parametrize(
    ("k", "real", "few"), [(0, False, True), (1, False, False), (3, False, True), (2, True, True)]
)
def test_a_step_is_the_papers(k, real, few):
    """``few``: the teacher has a few-step LoRA; its guided velocities are learned otherwise."""
    trainer = toy_kdmd(critic_steps=1, clip=1e9, noised_real=real)
    teacher = trainer.teacher = toy_teacher() if few else ModelTeacher(toy_model(2))
    student, critic = (random_lora(trainer.model.config, seed) for seed in (7, 8))
    trainer.student.params |= student
    trainer.critic.params = critic
    trainer.student.optimizer, trainer.critic.optimizer = Recorder(), Recorder()
    x0, text, masks = toy_data().batch(np.random.default_rng(1), 4)
    noise, _ = trainer.draw(np.random.default_rng(0), mx.random.key(2), x0.shape)
    metrics = trainer.step(x0, text, masks, noise, k)
    # Not updated, with the phi that the step began with.
    phi = {k: a for k, a in trainer.student.params.items() if "projector" in k}
    of_student, of_critic = kdmd_gradients(
        toy_model(0), teacher, student | phi, critic, x0, text, masks, noise, k, real
    )
    for ours, theirs in (
        (trainer.student.optimizer.gradients, of_student),
        (trainer.critic.optimizer.gradients, of_critic),
    ):
        scale = max(mx.abs(g).max().item() for g in theirs.values())
        assert ours.keys() == theirs.keys() and scale > 1e-4
        for name, g in theirs.items():
            assert mx.abs(ours[name] - g).max().item() <= 2e-4 * scale, name
    assert {"loss/dmd", "loss/out", "loss/features", "loss/critic", "gap", "w"} < set(metrics)


def test_step_0_is_the_base():
    """Student and critic are the base bit for bit, and the few-step teacher too before its LoRA."""
    trainer, base = toy_kdmd(), toy_model(0)
    x0, text, masks = batch()
    t = mx.full(4, 0.75)
    expected = base(x0, t, text, masks)
    for params in (trainer.student.params, trainer.critic.params, trainer.student.mean):
        assert mx.array_equal(trainer.bind(params)(x0, t, text, masks), expected)


def test_the_projector_fits_before_the_student_moves():
    """A random phi begins worse than one that predicts zero: standardised tokens have a mean
    square of 1."""
    trainer = toy_kdmd(critic_steps=1)
    first = steps(trainer, 1)[0]
    assert first["loss/features"] < 0.9
    phi = trainer.student.params["projector.0.weight"]
    fresh = toy_kdmd(critic_steps=1)
    fresh.restore(trainer.state())
    steps(fresh, 1, 1)
    steps(trainer, 1, 1)
    assert mx.array_equal(  # one that goes on does not fit it again
        fresh.student.params["projector.0.weight"], trainer.student.params["projector.0.weight"]
    )
    assert not mx.array_equal(phi, trainer.student.params["projector.0.weight"])


def steps(trainer, n: int, start: int = 0) -> list[dict]:
    data, out = toy_data(), []
    for step in range(start, start + n):
        rng = np.random.default_rng(step)
        x0, text, masks = data.batch(rng, 4)
        noise, k = trainer.draw(rng, mx.random.key(step), x0.shape)
        out.append({k: v.item() for k, v in trainer.step(x0, text, masks, noise, k).items()})
    return out


def test_five_critic_updates_to_one_of_the_student():
    trainer, changed = toy_kdmd(), []
    for step in range(10):
        before = trainer.state()
        metrics = steps(trainer, 1, step)[0]
        after = trainer.state()
        student = not same(
            *(
                {k: a for k, a in s.items() if "student/params" in k and "projector" not in k}
                for s in (before, after)
            )
        )
        critic = not same(
            *({k: a for k, a in s.items() if "critic/params" in k} for s in (before, after))
        )
        changed.append((student, critic))
        assert student == ("loss/dmd" in metrics) and "loss/critic" in metrics
    assert changed == [(i in (4, 9), True) for i in range(10)]


@pytest.mark.parametrize(
    ("loss", "names"),
    [
        ("dmd", {"dmd", "critic"}),
        ("kd", {"out", "features"}),
        ("kdmd", {"dmd", "out", "features", "critic"}),
    ],
)
def test_what_a_loss_consists_of(loss, names):
    trainer = toy_kdmd(loss=loss)
    metrics = set().union(*steps(trainer, 5))
    assert {k.partition("/")[2] for k in metrics if k.startswith("loss/")} == names
    assert any("projector" in k for k in trainer.student.params) == (loss != "dmd")
    assert not any("projector" in k for k in trainer.lora)


def test_balanced_losses_pull_equally():
    """The gradient is the sum of the three losses' own, each with the mean of their norms."""
    trainer, asked = toy_kdmd(critic_steps=1, clip=1e9, balance=True), []
    trainer.student.params |= random_lora(trainer.model.config, 7)
    trainer.student.optimizer, own = Recorder(), trainer._losses
    trainer._losses = lambda *inputs: asked.append(inputs) or own(*inputs)
    metrics = steps(trainer, 1)[0]
    # What a trainer without balance makes of one loss alone.
    plain = toy_kdmd(critic_steps=1)
    terms, norms = {}, {}
    for term in ("dmd", "out", "features"):
        _, terms[term] = plain._student_grads_fn(trainer.student.params, *asked[0], term=term)
        squares = [g.square().sum() for k, g in terms[term].items() if "projector" not in k]
        norms[term] = sum(squares).item() ** 0.5
        assert metrics[f"grad/{term}"] == pytest.approx(norms[term], rel=1e-3)
    assert max(norms.values()) > 1.5 * min(norms.values()), "nothing to balance"
    mean = sum(norms.values()) / 3
    for name, g in trainer.student.optimizer.gradients.items():
        expected = sum(terms[t][name] * (mean / norms[t]) for t in terms)
        assert mx.abs(g - expected).max().item() <= 2e-3 * mx.abs(expected).max().item() + 1e-6


def test_balanced_keeps_what_is_zero():
    total, norms = balanced({"a/w": mx.zeros(3), "b/w": mx.ones(3)})
    assert norms["grad/a"].item() == 0 and mx.isfinite(total["w"]).all()


def test_the_mean_starts_late():
    trainer = toy_kdmd(critic_steps=1, average_from=3, ema=0.9)
    means = []
    for step in range(5):
        steps(trainer, 1, step)
        means.append((dict(trainer.student.params), dict(trainer.student.mean)))
    for params, mean in means[:3]:
        assert same(params, mean)
    for before, (params, mean) in zip((means[2][1], means[3][1]), means[3:], strict=True):
        for k in params:
            np.testing.assert_allclose(mean[k], 0.9 * before[k] + 0.1 * params[k], atol=1e-6)


def test_adam_without_a_first_moment():
    """Bias-corrected RMSProp in numpy, on a single matrix."""
    weights = LoRAWeights({"a": mx.array([1.0, -2.0])}, kdmd.KDMDOptions(0.1, warmup=0, clip=1e9))
    p, v = np.array([1.0, -2.0]), np.zeros(2)
    for n, g in enumerate(([1.0, 0.5], [-2.0, 0.1], [0.3, -0.2]), 1):
        weights.update({"a": mx.array(g)})
        v = 0.99 * v + 0.01 * np.square(g)
        p = p - 0.1 * np.array(g) / (np.sqrt(v / (1 - 0.99**n)) + 1e-8)
        np.testing.assert_allclose(weights.params["a"], p, rtol=1e-5)


def test_parts_of_a_batch_add_up():
    whole, parts = toy_kdmd(critic_steps=1), toy_kdmd(critic_steps=1, accumulate=2)
    a, b = (steps(t, 1)[0] for t in (whole, parts))
    # Of parts DMD's metrics are means of means; losses are the same, and so is the update.
    for name in (
        "loss/critic",
        "loss/out",
        "loss/features",
        "loss/dmd",
        "grad/critic",
        "grad/student",
    ):
        assert a[name] == pytest.approx(b[name], rel=1e-4), name
    assert {k for k in a if k.startswith("critic/tau")} == {
        k for k in b if k.startswith("critic/tau")
    }


def test_losses_by_tau():
    losses, tau = mx.array([1.0, 2.0, 3.0, 4.0]), mx.array([0.02, 0.24, 0.75, 0.98])
    found = {k: v.item() for k, v in by_tau(losses, tau).items()}
    assert found == {"loss/critic": 2.5, "critic/tau 0": 1.5, "critic/tau 0.75": 3.5}


def test_checkpointed_blocks_change_nothing():
    a, b = (steps(toy_kdmd(checkpoint=c), 5) for c in (False, True))
    for one, two in zip(a, b, strict=True):
        assert one.keys() == two.keys()
        for k in one:
            assert one[k] == pytest.approx(two[k], rel=1e-3, abs=1e-6), k


def test_a_restored_trainer_goes_on_bit_for_bit():
    one, two = toy_kdmd(), toy_kdmd()
    steps(one, 7)
    two.restore(one.state())
    assert steps(one, 4, 7) == steps(two, 4, 7) and same(one.state(), two.state())


# Runs


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    run = tmp_path_factory.mktemp("reference")
    records = list(toy_kdmd_run(run, STEPS))
    assert records[-1]["done"]
    assert {"val/std", "val/colour", "val/spread", "val/error"} <= set(records[-1])
    return run


def log(run) -> list[dict]:
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("images/s", "peak GB")}
        for line in (run / "log.jsonl").read_text().splitlines()
    ]


def test_killed_and_resumed(start, tmp_path, reference):
    """Kills at any moment; log and state as of a run without."""
    killed = 0
    for wait in (0.0, 0.3):
        process = start("-m", "tests.toy_distill", tmp_path, STEPS, 0.0005)
        process.stdout.readline()
        time.sleep(wait)
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    assert killed
    assert list(toy_kdmd_run(tmp_path, STEPS))[-1]["done"]
    assert log(tmp_path) == log(reference)
    assert same(load_state(tmp_path)[0], load_state(reference)[0])


def test_two_processes_are_one(start_two, tmp_path, reference):
    """Student and critic have the gradients of the whole batch; the first process writes."""
    processes = start_two("-m", "tests.toy_distill", "run", STEPS, 1)
    errors = [process.communicate(timeout=500)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert not (tmp_path / "1" / "run").exists()
    two, one = tmp_path / "0" / "run", reference
    for a, b in zip(log(two), log(one), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-3), a["step"]
    (a, _), (b, _) = load_state(two), load_state(one)
    moved = {k for k in b if k.startswith(("student/params/", "critic/params/"))}
    apart = sum((a[k] - b[k]).square().sum().item() for k in moved) ** 0.5
    start = toy_kdmd(steps=STEPS).state()
    assert apart < 0.02 * sum((b[k] - start[k]).square().sum().item() for k in moved) ** 0.5


def test_resuming_with_another_teacher(reference):
    trainer = toy_kdmd(steps=STEPS)
    trainer.fingerprints = {"teacher": "another"}
    with pytest.raises(SnapGenError, match="was started with another teacher"):
        next(toy_kdmd_run(reference, STEPS, trainer))


def test_pictures_of_a_run(reference):
    """A row per caption: its seeds by the student and by the teacher."""
    names = sorted(p.name for p in (reference / "grids").glob("*.png"))
    assert names == ["00000008.png", "00000012.png"]
    with Image.open(reference / "grids" / names[0]) as image:
        assert image.size == (4 * 2 * watch.SEEDS, 4 * 2)


def watched(trainer) -> dict[str, float]:
    return trainer.validate(list(fixed_batches(toy_pictures(), 4)))


def test_monitors_compare_with_the_guided_teacher(tmp_path):
    trainer = toy_kdmd(Watch(ToyVAE(), tmp_path), guidance=3.0)
    teacher, student = toy_model(2), toy_model(0)
    latents = {}
    for name, model, sigmas, guidance in (
        ("theirs", teacher, schedule(watch.REFERENCE_STEPS), 3.0),
        ("ours", student, SIGMAS, 1.0),
    ):
        parts = []
        for _, eps, _, text, masks in fixed_batches(toy_pictures(), 8):
            *_, last = denoise(model, eps, text, masks, sigmas, guidance)
            parts.append(np.array(last.x, np.float64))
        latents[name] = np.concatenate(parts)

    def spread(z):
        pairs = [(a - b) ** 2 for row in z.reshape(2, watch.SEEDS, -1) for a in row for b in row]
        return np.mean(pairs) * watch.SEEDS / (watch.SEEDS - 1)  # without pairs of the same

    def colour(z):
        rgb = (z[..., :3] / 4 + 0.5).clip(0, 1)
        return (rgb.max(-1) - rgb.min(-1)).mean()

    ours, theirs = latents["ours"], latents["theirs"]
    expected = {
        "val/std": ours.std() / theirs.std(),
        "val/colour": colour(ours) / colour(theirs),
        "val/spread": (spread(ours) / spread(theirs)) ** 0.5,
        "val/error": ((ours - theirs) ** 2).mean() / spread(theirs),
    }
    assert watched(trainer) == pytest.approx(expected, rel=1e-3)


# Runs made to go wrong on purpose, of a full width that has learned the toy data


@pytest.fixture(scope="module")
def trained():
    return trained_params(300)


def endangered_run(run, trained, **options):
    watch = Watch(ToyVAE(), run / "grids")
    defaults = dict(loss="dmd", critic_steps=1, steps=32, average_from=0, ema=0.5)
    trainer = toy_kdmd(watch, trained, **defaults | options)
    return list(toy_kdmd_run(run, 32, trainer))


def test_a_sound_run_is_let_be(tmp_path, trained):
    first, *_, last = [
        r for r in endangered_run(tmp_path, trained, learning_rate=3e-3) if "val/std" in r
    ]
    assert last["step"] == 32 and last["val/error"] < first["val/error"]


def test_a_far_too_high_learning_rate_is_caught(tmp_path, trained):
    with pytest.raises(SnapGenError, match=r"pictures saturate: .* lower learning rate"):
        endangered_run(tmp_path, trained, learning_rate=1.0)


def test_a_flipped_sign_is_caught(tmp_path, trained, monkeypatch):
    right = kdmd.dmd_loss
    monkeypatch.setattr(kdmd, "dmd_loss", lambda x0, c0, r0: right(x0, r0, c0))
    with pytest.raises(SnapGenError, match="the pictures saturate: "):
        endangered_run(tmp_path, trained, learning_rate=1e-2)


def test_a_collapse_is_caught(tmp_path):
    """All seeds of a caption draw the same."""
    trainer = toy_kdmd(Watch(ToyVAE(), tmp_path))

    def generate(noise, text, masks, lora=None):
        return noise if lora else mx.broadcast_to(noise[:1], noise.shape)

    trainer.generate = generate
    with pytest.raises(
        SnapGenError, match="the pictures collapse: the seeds of a caption differ 0 "
    ):
        watched(trainer)


@pytest.mark.parametrize(
    ("monitor", "value", "what"),
    [
        ("std", 1.31, "saturate: 1.3 times the contrast"),
        ("colour", 1.6, "saturate: .* 1.6 times its colour"),
        ("spread", 0.3, "collapse: .* differ 0.3 times"),
    ],
)
def test_what_counts_as_failed(monitor, value, what):
    sound = dict.fromkeys(("std", "colour", "spread", "error"), 1.0)
    watch.check_monitors(sound, sound)
    bad = sound | {monitor: value}
    with pytest.raises(SnapGenError, match=f"the pictures {what}"):
        watch.check_monitors(bad, sound)
    watch.check_monitors(bad, bad)  # as the run began
    with pytest.raises(SnapGenError, match="the pictures "):
        watch.check_monitors(sound | {monitor: float("nan")}, sound)


def test_a_run_may_begin_beyond_the_limits(tmp_path):
    """A base whose unguided pictures are far more saturated than its guided ones."""
    trainer = toy_kdmd(Watch(ToyVAE(), tmp_path))
    drawn = trainer.generate
    trainer.generate = lambda *args, lora=None: 5 * drawn(*args, lora)
    assert watched(trainer)["val/std"] > 2 * watch.MOST_STD


# Commands


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Two tiny models and a folder of pictures."""
    folder = tmp_path_factory.mktemp("material")
    write_tiny_model(folder / "model")
    write_tiny_model(folder / "other", seed=5)
    shutil.copytree(folder / "model" / "vae", folder / "other" / "vae", dirs_exist_ok=True)
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        image.save(folder / "data" / f"{i}.png")
        (folder / "data" / f"{i}.txt").write_text("a red dog" if i % 2 else "a happy cat")
    return folder


def invoke(material, output, **options):
    options = {"steps": 10, "batch": 4, "learning-rate": 1e-3, "warmup": 1} | options
    args = ["distill", material / "model", material / "data", "-o", output]
    flags = [f"--{k}" if v is True else f"--{k}={v}" for k, v in options.items()]
    return CliRunner().invoke(main, [*map(str, args), *flags])


@pytest.fixture(scope="module")
def few_step(material, tmp_path_factory):
    """The output of DMD on the full width, fused too."""
    output = tmp_path_factory.mktemp("few") / "out"
    options = {"method": "kdmd", "loss": "dmd", "lora": 2, "sample-every": 10, "fuse": True}
    options["learning-rate"] = 3e-2
    result = invoke(material, output, **options)
    assert result.exit_code == 0, result.output
    assert "loss critic" in result.output and "weights changed: full" in result.output
    return output


def draw(model, **options) -> np.ndarray:
    return np.asarray(Pipeline.load(model, **options).generate("a smiling cat"), np.float32)


def test_a_fused_width_is_a_four_step_model(material, few_step):
    """It draws what the base does with the LoRA in four steps."""
    pipe = Pipeline.load(few_step)
    s = pipe.settings("a cat")
    assert pipe.dit_config.variants == ["full"] and (s.steps, s.guidance, s.shift) == (4, 1, 3)
    loras = [(few_step / "lora.safetensors", 1.0)]
    plain = Pipeline.load(material / "model", "full", loras=loras)
    expected = np.asarray(plain.generate("a smiling cat", steps=4, guidance=1.0), np.float32)
    ours = draw(few_step)
    assert np.abs(ours - expected).max() <= 1
    without = Pipeline.load(material / "model", "full")
    before = np.asarray(without.generate("a smiling cat", steps=4, guidance=1.0), np.float32)
    assert np.abs(ours - before).max() > 1
    assert (few_step / "run" / "grids" / "00000010.png").is_file()


def test_a_few_step_lora_teaches_a_narrower_width(material, few_step, tmp_path):
    """Found in the teacher's folder too; the LoRA made becomes that width's."""
    model = shutil.copytree(material / "model", tmp_path / "model")
    (model / "few_step").mkdir()
    shutil.copy(few_step / "lora.safetensors", model / "few_step" / "full.safetensors")
    options = {"method": "kdmd", "variant": "tiny", "lora": 2}
    result = invoke(material, tmp_path / "a", **options, teacher=model)
    assert result.exit_code == 0, result.output
    given = {"few-step-lora": few_step / "lora.safetensors"}
    result = invoke(material, tmp_path / "b", **options, **given)
    assert result.exit_code == 0, result.output
    a, b = (mx.load(str(tmp_path / name / "lora.safetensors")) for name in "ab")
    assert same(a, b) and any("lora_B" in k and mx.any(v) for k, v in a.items())
    assert not any("projector" in k for k in a)
    shutil.copy(tmp_path / "a" / "lora.safetensors", model / "few_step" / "tiny.safetensors")
    assert Pipeline.load(model, "tiny").settings("a cat").steps == 4
    assert np.abs(draw(model, variant="tiny") - draw(material / "model", variant="tiny")).max() > 1


def test_kd_trains_a_model_of_all_widths(material, tmp_path):
    """With a teacher that reads captions by a table of its own."""
    result = invoke(material, tmp_path / "out", method="kd", teacher=material / "other")
    assert result.exit_code == 0, result.output
    assert "weights changed: tiny" in result.output
    assert result.output.count("captions") == 2  # of the student's encoder and of the teacher's
    weights = load_supernet(tmp_path / "out")[1]
    assert weights.keys() == load_supernet(material / "model")[1].keys()
    for variant in ("tiny", "full"):
        draw(tmp_path / "out", variant=variant)


def test_a_run_from_before_an_option_goes_on(material, tmp_path):
    options = {"method": "kdmd", "loss": "dmd", "variant": "tiny", "lora": 2}
    invoke(material, tmp_path, **options, minutes=1e-9)
    (state,) = (tmp_path / "run").glob("state-*.json")
    about = json.loads(state.read_text())
    assert about["options"].pop("balance") is False
    state.write_text(json.dumps(about))
    assert invoke(material, tmp_path, **options).exit_code == 0


def test_the_same_command_goes_on(material, tmp_path):
    """Out of time before the student's first update, then run to its end: as if at once."""
    options = {"method": "kdmd", "loss": "dmd", "variant": "tiny", "lora": 2}
    result = invoke(material, tmp_path / "a", **options, minutes=1e-9)
    assert result.exit_code == 1 and "no weight had changed after step 1" in result.stderr
    assert result.stderr.endswith("the same command goes on from there\n")
    assert load_state(tmp_path / "a" / "run")[1]["step"] == 1
    for name in "ab":
        assert invoke(material, tmp_path / name, **options).exit_code == 0
    assert same(*(mx.load(str(tmp_path / name / "lora.safetensors")) for name in "ab"))


def test_requests_that_cannot_be_met(material, tmp_path):
    output = tmp_path / "out"
    for options, code, message in (
        ({"method": "kd", "variant": "tiny"}, 2, "--variant is not for --method kd"),
        ({"method": "kdmd", "subnets": "all"}, 2, "--subnets is not for --method kdmd"),
        ({"method": "decoder", "force": True}, 2, "--force is not for --method decoder"),
        ({"method": "kdmd", "loss": "dmd", "variant": "huge"}, 2, "no variant 'huge'"),
        ({"method": "kdmd", "teacher": tmp_path / "none"}, 1, "no such file or folder"),
        ({"method": "kd", "batch": 3, "accumulate": 2}, 2, "does not divide into 2 parts\n"),
        ({"method": "kdmd", "guidance": "nan"}, 2, "nan is no finite number"),
    ):
        result = invoke(material, output, **options)
        assert result.exit_code == code and message in result.stderr, result.output
        assert "Traceback" not in result.stderr
    vae = shutil.copytree(material / "model", tmp_path / "vae") / "vae" / "config.json"
    vae.write_text(vae.read_text().replace('"blocks": 1', '"blocks": 2'))
    result = invoke(material, output, method="kd", teacher=tmp_path / "vae")
    assert result.exit_code == 2 and "has another autoencoder" in result.stderr
    assert not (output / "lora.safetensors").exists() and not (output / "config.json").exists()
