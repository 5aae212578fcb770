"""``quantize --tune``: only what stays floats moves, towards the float model, at every width."""

import re

import mlx.core as mx
import numpy as np
import pytest

from snapgen_mlx.errors import UsageError
from snapgen_mlx.loading import load_dit, load_supernet
from snapgen_mlx.models.elastic import slice_flat
from snapgen_mlx.quantization import tuning
from snapgen_mlx.quantization.backends import backend_of
from snapgen_mlx.quantization.quantize import quantize
from snapgen_mlx.quantization.recipe import uniform
from snapgen_mlx.quantization.tuning import (
    TuningOptions,
    TuningTrainer,
    is_tuned,
    options_that_fit,
    tune,
)
from snapgen_mlx.tensors.weights import load_infos, load_tensors
from snapgen_mlx.training import training_memory as training_memory
from snapgen_mlx.training.lora_training import attach_lora, lora_params

from .test_quantize import CONFIG, PROMPTS, SETS, SHAPES, VARIANTS, final_psnrs, run, write_model

STEPS = 30


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.json"
    uniform(CONFIG, SHAPES, 3).save(path)
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(p for three in zip(*SETS, strict=True) for p in three))
    return path


def stored(folder) -> dict[str, mx.array]:
    """Tensors as they are on disk."""
    return mx.load(str(folder / "transformer" / "model.safetensors"))


@pytest.mark.parametrize("backend", ["affine", "palette"])
def test_all_widths_come_nearer_to_the_float_model(model, recipe, prompts, tmp_path, backend):
    options = ["--recipe", recipe, "--backend", backend, "--prompts", prompts]
    before = run("quantize", model, tmp_path / "before", *options)
    after = run("quantize", model, tmp_path / "after", *options, "--tune", STEPS)
    assert before.exit_code == after.exit_code == 0, after.output
    # Of other noise than that learned from.
    gains = np.subtract(final_psnrs(after.output), final_psnrs(before.output))
    assert len(gains) == 3 and (gains > 0.2).all(), gains
    lines = re.findall(r"tuning step \d+/30  full [\d.e-]+ small [\d.e-]+ tiny .*", after.output)
    assert len(lines) == STEPS // 10
    old, new = stored(tmp_path / "before"), stored(tmp_path / "after")
    assert old.keys() == new.keys()
    moved = {k for k in old if not mx.array_equal(old[k], new[k])}
    assert all((a.dtype, a.shape) == (new[k].dtype, new[k].shape) for k, a in old.items())
    assert moved and all(map(is_tuned, moved))
    for kind in (".bias", "scale_shift_table.1", "norm_q.weight"):
        assert any(kind in k for k in moved), kind
    packed = [k for k, info in load_infos(tmp_path / "after" / "transformer").items()]
    assert any(k.endswith((".scales", ".palette")) for k in packed)


def test_tuning_does_no_harm_at_many_bits(model, prompts, tmp_path):
    path = tmp_path / "recipe.json"
    uniform(CONFIG, SHAPES, 8).save(path)
    options = ["--recipe", path, "--prompts", prompts]
    before = run("quantize", model, tmp_path / "before", *options)
    after = run("quantize", model, tmp_path / "after", *options, "--tune", STEPS)
    assert before.exit_code == after.exit_code == 0, after.output
    gains = np.subtract(final_psnrs(after.output), final_psnrs(before.output))
    assert (gains > -0.5).all(), gains


def test_an_interrupted_tuning_goes_on(model, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "SAVE_MINUTES", 0)
    form = backend_of("affine", CONFIG)

    def quantized(name):
        quantize(model, tmp_path / name, recipe=recipe, backend=form.name, prompts=SETS)
        return tmp_path / name

    options = TuningOptions(steps=20)
    at_once, stopped = quantized("at-once"), quantized("stopped")
    whole = [r for r in tune(model, at_once, PROMPTS, tmp_path / "a", options) if "step" in r]
    for record in tune(model, stopped, PROMPTS, tmp_path / "b", options):
        if record.get("step") == 10:
            break
    rest = [r for r in tune(model, stopped, PROMPTS, tmp_path / "b", options) if "step" in r]
    assert [r["step"] for r in whole] == [10, 20] and [r["step"] for r in rest] == [20]
    assert rest[0]["out/tiny"] == whole[1]["out/tiny"]
    a, b = (load_tensors(folder / "transformer") for folder in (at_once, stopped))
    assert all(mx.array_equal(a[k], b[k]) for k in a)


def test_the_loss_is_the_distance_to_the_float_model(model):
    """Nothing at the float model itself; elsewhere that of velocities and standardised tokens."""
    _, params = load_supernet(model)
    tuned = {k: a for k, a in params.items() if is_tuned(k)}
    models, teachers = ([load_dit(model, v) for v in VARIANTS] for _ in range(2))
    trainer = TuningTrainer(
        CONFIG, tuned, TuningOptions(steps=1), models, teachers=teachers, sigmas=[1.0, 0.5]
    )
    x = mx.random.normal((2, 8, 8, CONFIG.in_channels), key=mx.random.key(0))
    batch = x, mx.array([1.0, 0.5]), {}, {}
    for index in range(3):
        own = slice_flat(tuned, CONFIG, index)
        answers = trainer._asked(index, batch)
        assert trainer.objective(index, own, batch, x, answers)[0].item() < 1e-12
        own["final.proj.bias"] = own["final.proj.bias"] + 0.5
        loss, parts, _ = trainer.objective(index, own, batch, x, answers)
        assert loss.item() == pytest.approx(0.25, rel=1e-4)  # tokens do not see it
        assert parts["features"].item() < 1e-12
    noise, subnets = trainer.draw(np.random.default_rng(0), mx.random.key(0), x.shape)
    assert set(noise["t"].tolist()) <= {1.0, 0.5} and subnets == [0, 1]


def test_a_batch_is_cut_where_memory_asks_for_it(model, monkeypatch):
    _, params = load_supernet(model)
    params = {k: a for k, a in params.items() if is_tuned(k)}
    found = []
    for usable in np.geomspace(1e8, 1e6, 150):
        for module in (tuning, training_memory):
            monkeypatch.setattr(module, "usable_memory", lambda n=usable: n)
        try:
            o = options_that_fit(model, model, params, TuningOptions(), 16)
        except UsageError as e:
            assert "no setting of this model fits" in str(e)
            break
        found.append((o.accumulate, o.checkpoint))
    parts = [(n, False) for n in (2, 4, 8, 16)]
    assert list(dict.fromkeys(found)) == [(1, False), (1, True), *parts]


def test_biases_of_layers_with_a_lora_beside_them_are_found(model):
    _, params = load_supernet(model)
    tuned = {k: a for k, a in params.items() if is_tuned(k)}
    models = [load_dit(model, v) for v in VARIANTS]
    attach_lora(models[0], lora_params(models[0].config, 2))
    trainer = TuningTrainer(
        CONFIG, tuned, TuningOptions(steps=1), models, teachers=models, sigmas=[1.0]
    )
    tuned = {k: a + 1 for k, a in tuned.items()}
    dit = trainer.bind(0, tuned)
    expected = slice_flat(tuned, CONFIG, 0)["mid.0.ffn.fc1.bias"]
    assert mx.array_equal(dit.mid[0].ffn.fc1.linear.bias, expected)
