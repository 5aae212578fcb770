"""The memory of a training run: predicted and measured, refused with what would fit."""

import gc
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

from snapgen_mlx import memory
from snapgen_mlx.cli.main import main
from snapgen_mlx.models.dit import DiT
from snapgen_mlx.models.elastic import empty_models, slice_flat
from snapgen_mlx.models.sizes import weight_bytes
from snapgen_mlx.training.elastic_trainer import ElasticOptions, ElasticTrainer
from snapgen_mlx.training.few_steps import with_critic
from snapgen_mlx.training.kdmd import KDMDOptions, KDMDTrainer
from snapgen_mlx.training.lora_training import attach_lora, lora_params
from snapgen_mlx.training.teacher import ModelTeacher
from snapgen_mlx.training.training_memory import TrainingMemory

from .settled import active_memory
from .tiny import tiny_config, write_tiny_model
from .toy import toy_config, toy_params

pytestmark = pytest.mark.usefixtures("uncompiled")

TOKENS = 8


@pytest.mark.parametrize(
    "options",
    [{}, {"checkpoint": True}, {"accumulate": 4}, {"ema": 0}, {"lora": 4}],
    ids=lambda o: str(o),
)
def test_prediction_against_the_peak(options):
    """Within the 15 % that the module promises, on a model between tiny and embedded."""
    config = toy_config(
        hidden_size=128, head_dim=16, layers=[1, 4, 2], ffn_ratio=[4, 3, 4], downsample=True
    )
    options, base = ElasticOptions(warmup=1, **options), toy_params(config)
    models, params, frozen = empty_models(config), base, 0
    if options.lora:
        params = lora_params(config, options.lora)
        for i, dit in enumerate(models):
            dit.load_weights(list(slice_flat(base, config, i).items()), strict=True)
            frozen += sum(a.nbytes for _, a in tree_flatten(dit.parameters()))
            attach_lora(dit, slice_flat(params, config, i))
        mx.eval([dit.parameters() for dit in models])
    trainer = ElasticTrainer(config, params, options, models)
    del base, params, models
    rng = np.random.default_rng(0)
    x0, eps = (mx.array(rng.standard_normal((8, 16, 16, 4), dtype=np.float32)) for _ in range(2))
    text = {"toy": mx.array(rng.standard_normal((8, TOKENS, 8), dtype=np.float32))}
    batch = (x0, text, {"toy": mx.ones((8, TOKENS), mx.bool_)}, {"eps": eps, "t": x0[:, 0, 0, 0]})
    trainer.step(*batch, [1])
    gc.collect()
    mx.clear_cache()
    before = active_memory() - sum(a.nbytes for a in trainer.state().values()) - frozen
    mx.reset_peak_memory()
    trainer.step(*batch, [1])
    predicted = TrainingMemory(config, (16, 16), TOKENS, frozen).peak(options, 8)
    assert predicted == pytest.approx(mx.get_peak_memory() - max(before, 0), rel=0.15)


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate": 4}],
    ids=lambda o: str(o),
)
def test_distilling_a_narrow_width_with_a_wide_teacher(options):
    """The teacher's guided pass is wider than the student's, and counts."""
    config = toy_config(
        hidden_size=256, head_dim=16, layers=[1, 4, 2], ffn_ratio=[4, 3, 4], downsample=True
    )
    params, models = toy_params(config), {}
    for i in (0, 2):
        models[i] = DiT(config.variant(i))
        models[i].load_weights(list(slice_flat(params, config, i).items()), strict=True)
    dit, teacher = models[0], ModelTeacher(models[2])
    frozen = weight_bytes(dit)
    attach_lora(dit, lora_params(dit.config, 16))
    o = KDMDOptions(lora=16, critic_steps=1, warmup=0, steps=10, **options)
    trainer = KDMDTrainer(dit, teacher, o)
    del params, models, dit
    rng = np.random.default_rng(0)
    x0 = mx.array(rng.standard_normal((16, 8, 8, 4), dtype=np.float32))
    text = {"toy": mx.array(rng.standard_normal((16, TOKENS, 8), dtype=np.float32))}
    noise, _ = trainer.draw(rng, mx.random.key(0), x0.shape)
    batch = (x0, text, {"toy": mx.ones((16, TOKENS), mx.bool_)}, noise, 3)
    trainer.step(*batch)
    gc.collect()
    mx.clear_cache()
    held = sum(a.nbytes for a in trainer.state().values()) + frozen + teacher.memory.weights
    before = active_memory() - held
    mx.reset_peak_memory()
    trainer.step(*batch)
    memory = TrainingMemory(trainer.model.config, (8, 8), TOKENS, frozen, teacher=teacher.memory)
    predictor = with_critic(memory, trainer.model.config, 16)
    measured = mx.get_peak_memory() - max(before, 0)
    assert predictor.peak(o, 16) == pytest.approx(measured, rel=0.15)


def test_refusal_says_what_fits(monkeypatch):
    predictor = TrainingMemory(tiny_config(), (32, 32), TOKENS, 10**6)
    options = ElasticOptions()
    need = predictor.peak(options, 8)
    monkeypatch.setattr("snapgen_mlx.training.training_memory.usable_memory", lambda: 0)
    offers = {flags: predictor.peak(o, 8) for flags, o in predictor.alternatives(options, 8)}
    assert list(offers)[:3] == ["--checkpoint", "--accumulate 8", "--accumulate 8 --checkpoint"]
    assert offers["--lora 16"] < need and offers["--checkpoint"] < need
    halves = predictor.peak(replace(options, accumulate=2), 8)
    monkeypatch.setattr("snapgen_mlx.training.training_memory.usable_memory", lambda: halves)
    with_checkpoint = replace(options, checkpoint=True)
    assert list(dict(predictor.alternatives(options, 8)))[1] == "--accumulate 2"
    assert list(dict(predictor.alternatives(with_checkpoint, 4))) == [
        "--accumulate 2",
        "--lora 16",
        "--lora 16 --accumulate 2",
    ]
    for usable, fits in ((need, None), (offers["--checkpoint"], True), (1000, False)):
        monkeypatch.setattr(
            "snapgen_mlx.training.training_memory.usable_memory", lambda n=usable: n
        )
        if fits is None:
            predictor.check(options, 8)
            continue
        with pytest.raises(memory.UsageError, match="this training needs about") as e:
            predictor.check(options, 8)
        assert ("what fits: --checkpoint (" in str(e.value)) == fits
        assert ("no setting of this model fits" in str(e.value)) != fits


def test_the_command(tmp_path, monkeypatch):
    model = write_tiny_model(tmp_path / "model")
    (tmp_path / "data").mkdir()
    args = ["finetune", str(model), str(tmp_path / "data"), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, [*args, "--explain", "--batch", "4"])
    assert result.exit_code == 0, result.output
    head, first, *rest = result.stdout.splitlines()
    assert head.startswith("training in batches of 4, ") and "predicted" in head
    assert first.startswith("as asked") and len(rest) == 7 and not (tmp_path / "out").exists()
    for method, alternatives in (("kd", 15), ("kdmd", 7)):
        result = CliRunner().invoke(main, ["distill", *args[1:], "--method", method, "--explain"])
        assert result.exit_code == 0, result.output
        assert len(result.stdout.splitlines()) == 2 + alternatives
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr("snapgen_mlx.device.usable_memory", lambda: 1000)
    result = CliRunner().invoke(main, [*args[:3], "--explain"])
    assert all(line.endswith("too large") for line in result.stdout.splitlines()[1:])
    result = CliRunner().invoke(main, args[:3])
    assert result.exit_code == 2 and "Missing option '-o' / '--output'" in result.stderr
