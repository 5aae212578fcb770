"""Qwen-Image as a teacher: what it says, offloading, answers on disk, and runs by the command."""

import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from snapgen_mlx.cli.main import main
from snapgen_mlx.config import QwenImageConfig
from snapgen_mlx.convert.to_mlx import convert
from snapgen_mlx.errors import SnapGenError, UsageError
from snapgen_mlx.files import read_json, write_json
from snapgen_mlx.loading import load_qwen_image, load_supernet
from snapgen_mlx.models.qwen_image import QwenImage
from snapgen_mlx.models.tiny_decoder import TinyDecoder, TinyDecoderConfig
from snapgen_mlx.pipeline import Pipeline
from snapgen_mlx.tensors.weights import flat_parameters, load_tensors, save_tensors
from snapgen_mlx.text_loading import load_text_encoders
from snapgen_mlx.training import teacher as teacher_module
from snapgen_mlx.training.teacher import ModelTeacher, load_teacher
from snapgen_mlx.training.tiny_decoder_training import (
    DecoderOptions,
    DecoderTrainer,
    decoding_loss,
)

from .qwen_hub import save_lightning, save_qwen
from .settled import active_memory
from .tiny import write_tiny_model

pytestmark = pytest.mark.usefixtures("uncompiled")

PROMPTS = ["a red cat", "a happy dog", "a cat"]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A teacher with its 4-step LoRA, a student of its autoencoder, pictures and prompts."""
    folder = tmp_path_factory.mktemp("material")
    save_lightning(folder / "lightning.safetensors")
    convert(save_qwen(folder / "hub"), folder / "qwen")
    write_tiny_model(folder / "student", in_channels=4)
    shutil.rmtree(folder / "student" / "vae")
    shutil.copytree(folder / "qwen" / "vae", folder / "student" / "vae")
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    for i, prompt in enumerate(PROMPTS):
        picture = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / "data" / f"{i}.png")
        (folder / "data" / f"{i}.txt").write_text(prompt)
    (folder / "prompts.txt").write_text(f"{PROMPTS[0]}\n\n")
    return folder


def asked_teacher(material, offload: bool = False) -> ModelTeacher:
    lora = material / "lightning.safetensors"
    teacher = load_teacher(material / "qwen", material / "student", lora, offload)
    teacher.read_null(teacher.text_encoders())
    return teacher


@pytest.fixture(scope="module")
def question(material):
    """x_t, t, states and masks of three captions; the student is not given the last one."""
    (encoder,) = load_text_encoders(material / "qwen")
    states, mask = encoder.encode(PROMPTS)
    given = mx.array([[True], [True], [False]])
    text = {"static": mx.zeros((3, 1, 8)), "teacher/qwen": states}
    x_t = mx.random.normal((3, 8, 8, 4), key=mx.random.key(0))
    return x_t, mx.array([0.9, 0.5, 0.2]), text, {"static": given, "teacher/qwen": mask}


def test_what_it_says(material, question):
    """Each sample alone, without padding; where the student has no text, the empty one's states."""
    x_t, t, text, masks = question
    teacher, (encoder,) = asked_teacher(material), load_text_encoders(material / "qwen")
    v, tokens = teacher.outputs(x_t, t, text, masks)
    guided = teacher.velocity(x_t, t, text, masks, 3.0)
    few, _ = teacher.outputs(x_t, t, text, masks, few_step=True)
    plain = load_qwen_image(material / "qwen")
    lightning = load_qwen_image(material / "qwen", [(material / "lightning.safetensors", 1.0)])
    for i, prompt in enumerate([*PROMPTS[:2], " "]):
        row = slice(i, i + 1)
        pos, neg = (
            plain(x_t[row], t[row], {"qwen": encoder.encode([p])[0]}) for p in (prompt, " ")
        )
        np.testing.assert_allclose(v[row], pos, rtol=1e-4, atol=1e-5)
        mixed, like = np.array(neg + 3 * (pos - neg)), np.array(pos)
        for y in range(0, 8, 2):
            for x in range(0, 8, 2):
                patch = mixed[0, y : y + 2, x : x + 2]
                length = np.linalg.norm(like[0, y : y + 2, x : x + 2])
                patch *= length / np.linalg.norm(patch)
        np.testing.assert_allclose(guided[row], mixed, rtol=1e-4, atol=1e-5)
        expected = lightning(x_t[row], t[row], {"qwen": encoder.encode([prompt])[0]})
        np.testing.assert_allclose(few[row], expected, rtol=1e-4, atol=1e-5)
    assert tokens.shape == (3, 4, 4, 64) and tokens.dtype == mx.float16
    assert mx.abs(few - v).max() > 0.01


def test_offloading_changes_nothing(material, question):
    held, offloaded = asked_teacher(material), asked_teacher(material, offload=True)
    for guidance, few in ((1.0, False), (4.0, False), (1.0, True)):
        mx.clear_cache()
        before = active_memory()
        theirs = offloaded.outputs(*question, guidance, few)
        assert mx.get_active_memory() - before < offloaded.memory.streamed / 2
        ours = held.outputs(*question, guidance, few)
        assert all(mx.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert offloaded.memory == held.memory
    assert 0 < held.memory.streamed < held.memory.weights


def test_memory_of_an_offloaded_teacher(tmp_path):
    """The prediction, where weights are most of it, and the peak; it is far from all weights."""
    sizes = dict(num_layers=8, attention_head_dim=64, num_attention_heads=4)
    sizes |= dict(joint_attention_dim=64, axes_dims_rope=(16, 24, 24))
    write_json(tmp_path / "config.json", sizes)
    save_tensors(tmp_path, flat_parameters(QwenImage(QwenImageConfig(**sizes))))
    teacher = ModelTeacher(
        load_qwen_image(tmp_path), read=lambda few: load_qwen_image(tmp_path, read_once=True)
    )
    x_t, t = mx.random.normal((1, 16, 16, 16)), mx.array([0.5])
    text = {"qwen": mx.random.normal((1, 16, 64))}
    masks = {"qwen": mx.ones((1, 16), mx.bool_)}
    mx.eval(x_t, text, masks)
    mx.clear_cache()
    before = active_memory()
    mx.reset_peak_memory()
    teacher.outputs(x_t, t, text, masks)
    peak = mx.get_peak_memory() - before
    memory = replace(teacher.memory, text_tokens=16)
    predicted = memory.streamed + memory.asked((16, 16), 1, guided=False)
    assert predicted == pytest.approx(peak, rel=0.25)
    assert peak < 0.6 * memory.weights


# Commands


def invoke(material, data, output, *flags, **options):
    options = {"steps": 4, "batch": 2, "learning-rate": 1e-3, "warmup": 1} | options
    args = ["distill", material / "student", material / data, "-o", output]
    args += ["--teacher", material / "qwen", *flags]
    result = CliRunner().invoke(
        main, [*map(str, args), *(f"--{k}={v}" for k, v in options.items())]
    )
    assert "Traceback" not in result.output
    return result


def weights_of(folder) -> dict:
    return load_supernet(folder)[1]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[k], b[k]) for k in a)


def test_kd(material, tmp_path, monkeypatch):
    """Offloaded, it is asked about several steps at once. What is kept is asked for no more."""
    seen = []
    outputs = ModelTeacher.outputs

    def spy(self, x_t, *args, **options):
        seen.append(len(x_t))
        return outputs(self, x_t, *args, **options)

    monkeypatch.setattr(ModelTeacher, "outputs", spy)
    for name, flags in (
        ("plain", ()),
        ("kept", ("--offload", "--teacher-cache", tmp_path / "cache")),
        ("again", ("--teacher-cache", tmp_path / "cache")),
    ):
        result = invoke(material, "data", tmp_path / name, *flags, method="kd")
        assert result.exit_code == 0, result.output
        asked = {"plain": [2] * 4, "kept": [8], "again": []}
        assert seen == asked[name], name
        seen.clear()
    assert len(list((tmp_path / "cache").iterdir())) == 8
    plain = weights_of(tmp_path / "plain")
    for k, a in weights_of(tmp_path / "kept").items():
        # Batches of other sizes round otherwise.
        assert mx.abs(a - plain[k]).max() < 1e-3 * 4 * 0.1, k
    assert same(weights_of(tmp_path / "again"), weights_of(tmp_path / "kept"))
    assert not same(plain, weights_of(material / "student"))


def lora_of(folder) -> dict:
    return mx.load(str(folder / "lora.safetensors"))


def test_kdmd_from_prompts_alone(material, tmp_path):
    """A run that was stopped goes on; offloading changes no bit; the fused student draws."""
    options = {"method": "kdmd", "lora": 2, "critic-steps": 2, "variant": "tiny"}
    options["few-step-lora"] = material / "lightning.safetensors"
    stopped = invoke(material, "prompts.txt", tmp_path / "a", minutes=1e-9, **options)
    assert stopped.exit_code == 1 and "after step 1" in stopped.stderr
    for name, flags in (("a", ()), ("b", ("--fuse", "--offload"))):
        result = invoke(material, "prompts.txt", tmp_path / name, *flags, **options)
        assert result.exit_code == 0, result.output
    a, b = (lora_of(tmp_path / name) for name in "ab")
    assert same(a, b) and any("lora_B" in k and mx.any(v) for k, v in a.items())
    pipe = Pipeline.load(tmp_path / "b")
    assert pipe.settings("a cat").steps == 4
    drawn = [np.asarray(p.generate("a cat"), int) for p in (pipe, Pipeline.load(tmp_path / "b"))]
    assert drawn[0].shape == (64, 64, 3) and (drawn[0] == drawn[1]).all()
    without = Pipeline.load(material / "student", "tiny")
    before = np.asarray(without.generate("a cat", steps=4, guidance=1.0), int)
    assert np.abs(drawn[0] - before).max() > 0


def test_what_cannot_teach(material, tmp_path):
    options = {"method": "kdmd", "lora": 2}
    other = save_lightning(tmp_path / "deeper.safetensors", layers=4)
    result = invoke(material, "prompts.txt", tmp_path / "o", **options, **{"few-step-lora": other})
    assert result.exit_code == 1 and "36 of 144 keys fit no layer" in result.stderr
    for flags, message in (
        (("--noised-real",), "--noised-real learns from pictures"),
        (("--teacher-cache", tmp_path), "--teacher-cache is not for --method kdmd"),
    ):
        result = invoke(material, "prompts.txt", tmp_path / "o", *flags, **options)
        assert result.exit_code == 2 and message in result.stderr
    result = invoke(material, "prompts.txt", tmp_path / "o", method="kd")
    assert result.exit_code == 2 and "--method kd learns from pictures" in result.stderr
    assert not (tmp_path / "o").exists()

    student = shutil.copytree(material / "student", tmp_path / "student")
    config = read_json(student / "vae" / "config.json")
    config["latents_std"][2] *= 2
    write_json(student / "vae" / "config.json", config)
    vae = shutil.copytree(material / "student", tmp_path / "same") / "vae"
    tensors = load_tensors(vae)
    save_tensors(vae, {k: a.astype(mx.float16).astype(mx.float32) for k, a in tensors.items()})
    teacher_module.check_latents(material / "qwen", tmp_path / "same")
    save_tensors(vae, {k: a + 0.3 if "encoder" in k else a for k, a in tensors.items()})
    with pytest.raises(UsageError, match="has other weights than that of"):
        load_teacher(material / "qwen", tmp_path / "same")
    with pytest.raises(UsageError, match=r"other deviations of the latents .*\[2, 1.5, 0.7, ...\]"):
        load_teacher(material / "qwen", student)
    with pytest.raises(UsageError, match=r"other channels of a latent .*\(4, not 16\)"):
        load_teacher(material / "qwen", write_tiny_model(tmp_path / "wide"))
    broken = shutil.copytree(material / "qwen", tmp_path / "broken")
    (broken / "transformer" / "model.safetensors").unlink()
    with pytest.raises(SnapGenError, match=r"model\.safetensors"):
        load_teacher(broken, material / "student")


def test_what_a_tiny_decoder_minimises():
    """L1 of pixels, and of neighbours' differences in the picture and its halves and quarters."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((2, 8, 16, 3)).astype(np.float32) for _ in range(2))
    error = torch.tensor(a - b).permute(0, 3, 1, 2)
    expected = error.abs().mean()
    for _ in range(3):
        expected += sum(error.diff(dim=axis).abs().mean() for axis in (2, 3)) / 3
        error = torch.nn.functional.avg_pool2d(error, 2)
    assert decoding_loss(mx.array(a), mx.array(b)).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_a_tiny_decoder_learns():
    mx.random.seed(0)
    decoder = TinyDecoder(TinyDecoderConfig(4, (16, 16, 8, 8), blocks=1))

    class Still:
        """A decoder whose picture shows the latent's first three channels."""

        def decode(self, latents):
            x = mx.repeat(mx.repeat(latents[..., :3], 8, 1), 8, 2)
            return mx.clip(x, -1, 1)

    options = DecoderOptions(learning_rate=1e-2, steps=40, warmup=1, accumulate=2)
    trainer, losses = DecoderTrainer(decoder, Still(), options), []
    x0 = mx.random.normal((2, 6, 4, 4), key=mx.random.key(0))
    for _ in range(40):
        losses.append(trainer.step(x0, {}, {}, {}, (0, 0))["loss/l1"].item())
    assert losses[-1] < 0.7 * losses[0]
    for step in range(20):
        _, (row, column) = trainer.draw(np.random.default_rng(step), None, (4, 40, 32, 4))
        assert 0 <= row <= 8 and column == 0


def test_a_tiny_decoder(material, tmp_path):
    """It is resumed bit for bit, and draws."""
    options = {"method": "decoder", "steps": 6, "learning-rate": 3e-3}
    for name, more in (("a", {"minutes": 1e-4}), ("a", {}), ("b", {})):
        args = ["distill", material / "student", material / "data", "-o", tmp_path / name]
        args += ["--batch", 2, "--warmup", 1, "--validation", material / "data"]
        args += [f"--{k}={v}" for k, v in (options | more).items()]
        result = CliRunner().invoke(main, list(map(str, args)))
        assert result.exit_code == 0, result.output
    a, b = (mx.load(str(tmp_path / n / "tiny_decoder" / "model.safetensors")) for n in "ab")
    assert same(a, b)
    log = (tmp_path / "b" / "run" / "log.jsonl").read_text().splitlines()
    assert "val/l1" in log[-1]
    model = shutil.copytree(material / "student", tmp_path / "model")
    shutil.copytree(tmp_path / "a" / "tiny_decoder", model / "tiny_decoder")
    pipe = Pipeline.load(model, "tiny", tiny_decoder=True)
    assert pipe.generate("a cat", steps=1).size == (64, 64)
    for wrong in (["--teacher", material / "qwen"], ["--guidance", 2]):
        result = CliRunner().invoke(main, list(map(str, [*args, *wrong])))
        assert result.exit_code == 2 and "is not for --method decoder" in result.stderr
