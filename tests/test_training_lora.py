"""LoRA on an elastic model: one pair of matrices per layer for every width, frozen weights."""

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten, tree_unflatten
from PIL import Image

from snapgen_mlx.cli.main import main
from snapgen_mlx.loading import load_supernet
from snapgen_mlx.lora import fuse_lora, load_lora
from snapgen_mlx.models.dit import DiT
from snapgen_mlx.models.elastic import slice_flat
from snapgen_mlx.tensors.weights import save_tensors
from snapgen_mlx.training.checkpoint import load_state
from snapgen_mlx.training.elastic_trainer import ElasticOptions, ElasticTrainer
from snapgen_mlx.training.flow_matching import add_noise
from snapgen_mlx.training.lora_training import attach_lora, lora_change, lora_params, save_lora

from .settled import active_memory
from .tiny import write_tiny_model
from .toy import toy_config, toy_data, toy_params

pytestmark = pytest.mark.usefixtures("uncompiled")

RANK = 3


def batch(seed: int, size: int = 4):
    rng = np.random.default_rng(seed)
    x0, text, masks = toy_data().batch(rng, size)
    eps = mx.array(rng.standard_normal(x0.shape, dtype=np.float32))
    return x0, text, masks, {"eps": eps, "t": mx.array(rng.random(size, dtype=np.float32))}


def make_models(config, base, params) -> list[DiT]:
    models = []
    for i in range(len(config.widths)):
        dit = DiT(config.variant(i))
        dit.load_weights(list(slice_flat(base, config, i).items()), strict=True)
        attach_lora(dit, slice_flat(params, config, i))
        models.append(dit)
    return models


def make_trainer(rank=RANK, config=None, **options):
    """-> (trainer, frozen supernet); B is random too."""
    config = config or toy_config(layers=[1, 2, 1], downsample=True)
    base, params = toy_params(config), lora_params(config, rank)
    params = {
        k: mx.random.normal(a.shape) * 0.05 if "lora_b" in k else a for k, a in params.items()
    }
    options = ElasticOptions(warmup=1, lora=rank, **options)
    return ElasticTrainer(config, params, options, make_models(config, base, params)), base


def test_fresh_matrices_change_nothing():
    config = toy_config(layers=[1, 2, 1], downsample=True)
    base, params = toy_params(config), lora_params(config, RANK)
    x0, text, masks, noise = batch(0)
    for i, dit in enumerate(make_models(config, base, params)):
        plain = DiT(config.variant(i))
        plain.load_weights(list(slice_flat(base, config, i).items()), strict=True)
        assert mx.array_equal(dit(x0, noise["t"], text, masks), plain(x0, noise["t"], text, masks))
        assert lora_change(dit) == 0
    layers = {k.rpartition(".")[0] for k in params}
    assert len(layers) == 4 * 10  # of each block: 4 + 4 of attention, 2 of feed-forward
    assert params["down.0.ffn.fc1.lora_a"].shape == (RANK, 32)
    assert params["down.0.ffn.fc1.lora_b"].shape == (64, RANK)


def test_gradients_are_those_of_the_fused_weights():
    """dL/dA = 2 B^T dL/dW and dL/dB = 2 dL/dW A^T, at each width, W of that width alone."""
    trainer, base = make_trainer()
    config, params = trainer.config, trainer.weights.params
    x0, text, masks, noise = batch(1)
    x_t, target = add_noise(x0, noise["eps"], noise["t"])
    for i in range(3):
        data = (x_t, noise["t"], text, masks)
        _, _, grads = trainer._grads[i](params, data, target, {})
        own = slice_flat(params, config, i)
        weights = dict(slice_flat(base, config, i))
        for k in own:
            if k.endswith("lora_a"):
                layer = k.removesuffix(".lora_a")
                weights[f"{layer}.weight"] += 2 * own[f"{layer}.lora_b"] @ own[k]
        dit = DiT(config.variant(i))

        def loss(w, dit=dit, data=data):
            dit.update(tree_unflatten(list(w.items())))
            return (dit(*data) - target).square().mean()

        expected = mx.grad(loss)(weights)
        assert grads.keys() == own.keys()
        for k, g in grads.items():
            layer, _, part = k.rpartition(".")
            dw = expected[f"{layer}.weight"]
            a, b = own[f"{layer}.lora_a"], own[f"{layer}.lora_b"]
            want = 2 * b.T @ dw if part == "lora_a" else 2 * dw @ a.T
            assert mx.abs(g - want).max() <= 1e-5 * mx.abs(dw).max() + 1e-8, k


def test_training_leaves_the_base_alone_and_the_file_holds_every_width(tmp_path):
    trainer, base = make_trainer(learning_rate=1e-2, steps=20)
    frozen = [
        {k: mx.array(a) for k, a in tree_flatten(m.parameters()) if "lora_" not in k}
        for m in trainer.models
    ]
    for step in range(4):
        trainer.step(*batch(step), [step % 2])
    for before, model in zip(frozen, trainer.models, strict=True):
        after = dict(tree_flatten(model.parameters()))
        assert all(mx.array_equal(a, after[k]) for k, a in before.items())
    assert all("lora_" in k for k in trainer.weights.params)
    params, config = trainer.weights.mean, trainer.config
    save_lora(tmp_path / "lora.safetensors", params)
    x0, text, masks, noise = batch(9)
    for i in range(3):
        trained = trainer.bind(i, params)
        assert lora_change(trained) > 1e-3
        expected = trained(x0, noise["t"], text, masks)
        fused = DiT(config.variant(i))
        updates = load_lora(tmp_path / "lora.safetensors", config, i)
        fused.load_weights(list(fuse_lora(slice_flat(base, config, i), updates).items()))
        error = mx.abs(fused(x0, noise["t"], text, masks) - expected).max()
        assert error <= 1e-5 * mx.abs(expected).max()


# Memory


@pytest.mark.parametrize("lora", [None, RANK])
@pytest.mark.parametrize("change", [{"accumulate": 2}, {"accumulate": 4}, {"checkpoint": True}])
def test_parts_and_checkpointing_change_only_the_rounding(change, lora):
    results = []
    for options in ({}, change):
        if lora:
            trainer, _ = make_trainer(learning_rate=1e-3, **options)
        else:
            config = toy_config(layers=[1, 2, 1], downsample=True)
            options = ElasticOptions(warmup=1, **options)
            trainer = ElasticTrainer(config, toy_params(config), options)
        metrics = trainer.step(*batch(2), [1])
        results.append(({k: v.item() for k, v in metrics.items()}, trainer.state()))
    (one, state), (two, state2) = results
    assert one == pytest.approx(two, rel=1e-5)
    assert state.keys() == state2.keys()
    moments = [k for k in state if k.endswith(".m")]
    largest = max(mx.abs(state[k]).max().item() for k in moments)
    assert moments and all(mx.abs(state[k] - state2[k]).max() <= 1e-5 * largest for k in moments)


def test_checkpointing_needs_less_memory():
    """Twelve blocks whose activations weigh more than their weights."""
    config = toy_config(layers=[4, 4, 4], widths=[1.0], hidden_size=64, head_dim=8)
    rng, peaks = np.random.default_rng(0), []
    x0 = mx.array(rng.standard_normal((8, 16, 16, 4), dtype=np.float32))
    text, masks = toy_data().text(["a cat"] * 8)
    noise = {"eps": x0[::-1], "t": mx.full((8,), 0.5)}
    for checkpoint in (False, True):
        options = ElasticOptions(warmup=1, checkpoint=checkpoint)
        trainer = ElasticTrainer(config, toy_params(config), options)
        mx.eval(trainer.state())
        mx.reset_peak_memory()
        before = active_memory()
        trainer.step(x0, text, masks, noise, [])
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 0.5 * peaks[0], peaks


# The command


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    write_tiny_model(folder / "model")
    (folder / "data").mkdir()
    for i, colour in enumerate(("red", "blue", "green", "white")):
        Image.new("RGB", (64, 64), colour).save(folder / "data" / f"{i}.png")
        (folder / "data" / f"{i}.txt").write_text("a red cat")
    return folder


def finetune(*args):
    args = [*args, "--steps", 6, "--batch", 4, "--learning-rate", 1e-2, "--warmup", 1]
    return CliRunner().invoke(main, ["finetune", *map(str, args)])


def generate(model, *args):
    return CliRunner().invoke(main, ["generate", "a red cat", "-m", *map(str, [model, *args])])


@pytest.mark.parametrize("packed", [False, True])
def test_the_command(material, tmp_path, packed):
    """On float weights, and on packed ones, which it leaves packed."""
    model = material / "model"
    if packed:
        model = write_tiny_model(tmp_path / "packed")
        _, tensors = load_supernet(model)
        for k in [k for k in tensors if k.endswith(("cross.to_k.weight", "cross.to_v.weight"))]:
            names = [k.replace("weight", name) for name in ("weight", "scales", "biases")]
            tensors |= zip(names, mx.quantize(tensors[k], group_size=32, bits=4), strict=True)
        save_tensors(model / "transformer", tensors)
    output = tmp_path / "out"
    result = finetune(model, material / "data", "-o", output, "--lora", 2)
    assert result.exit_code == 0, result.output
    changed = result.stdout.splitlines()[-3]
    assert changed.startswith("weights changed: tiny ")
    state, _ = load_state(output / "run")
    assert all("lora_" in k or k.split("/")[0] in ("ratio", "opt") for k in state)
    assert not (output / "config.json").exists()
    pictures = []
    for name, args in (("base", ()), ("lora", ("--lora", output / "lora.safetensors"))):
        for variant in ("tiny", "full"):
            picture = tmp_path / f"{name}-{variant}.png"
            result = generate(model, "--variant", variant, *args, "-o", picture)
            assert result.exit_code == 0, result.output
            pictures.append(np.array(Image.open(picture), dtype=int))
    assert all(np.abs(pictures[i] - pictures[i + 2]).max() > 0 for i in range(2))


def test_other_weights_below_a_lora_are_refused(material, tmp_path):
    args = (material / "data", "-o", tmp_path / "out", "--lora", 2)
    assert finetune(material / "model", *args).exit_code == 0
    other = write_tiny_model(tmp_path / "other")
    _, tensors = load_supernet(other)
    save_tensors(other / "transformer", {k: 2 * a for k, a in tensors.items()})
    result = finetune(other, *args)
    assert result.exit_code == 1 and "other weights of the model" in result.stderr
    result = finetune(material / "model", *args[:-1], 4)
    assert result.exit_code == 1 and "lora 2, not 4" in result.stderr


def test_resume_wants_a_run(material, tmp_path):
    args = (material / "model", material / "data", "-o", tmp_path / "out", "--lora", 2)
    result = finetune("--resume", *args)
    assert result.exit_code == 2 and "no run in" in result.stderr
    assert finetune(*args).exit_code == 0
    assert finetune("--resume", *args).exit_code == 0
