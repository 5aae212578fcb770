"""From the Hub to a distilled student by the command alone: two models are converted, the student
learns from the teacher in both ways, is stopped, goes on, and draws."""

import json
import signal

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from snapgen_mlx.cli.main import main
from snapgen_mlx.layout import load_config
from snapgen_mlx.loading import load_supernet
from snapgen_mlx.pipeline import Pipeline

from .checkpoints import DIT, clip_model, clip_tokenizer, save_sharded
from .fake_hub import FakeHub
from .qwen_hub import save_lightning, save_qwen
from .reference.weights import random_state_dict

pytestmark = pytest.mark.usefixtures("uncompiled")

CLI = "import sys; from snapgen_mlx.cli.main import main; main(sys.argv[1:])"
STUDENT = DIT | {"hidden_size": 64, "head_dim": 8, "num_heads": 8, "num_kv_heads": 8}
STUDENT |= {"text_dims": {"clip": 32}, "layers": [1, 1, 1], "ffn_ratio": [2, 2, 2]}


def save_student(folder):
    """The transformer and the text encoder of a student, apart."""
    (folder / "dit").mkdir(parents=True)
    (folder / "dit" / "config.json").write_text(json.dumps(STUDENT))
    save_sharded(random_state_dict(STUDENT, seed=7), folder / "dit", size=200_000)
    clip_model().save_pretrained(folder / "clip")
    clip_tokenizer().save_pretrained(folder / "clip")


def run(*args):
    result = CliRunner().invoke(main, list(map(str, args)))
    assert result.exit_code == 0, result.output
    return result


def test_from_the_hub_to_a_distilled_student(tmp_path, start):
    public, lightning = tmp_path / "public", tmp_path / "lightning.safetensors"
    save_qwen(public / "qwen")
    save_student(public)
    save_lightning(lightning)
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    with FakeHub() as hub:
        hub.repos |= {f"org/{p.name}": p for p in public.iterdir()}
        there = hub.environment(tmp_path / "cache")
        args = ("convert", "org/qwen", teacher, "--quantize", 4, "--few-step-lora", lightning)
        parts = ("--transformer", "org/dit", "--vae", "org/qwen", "--clip", "org/clip")
        for command in (args, ("convert", student, *parts)):
            process = start("-c", CLI, *command, **there)
            _, errors = process.communicate()
            assert process.returncode == 0, errors
    # The published geometries draw 1024 pixels; these ones 64.
    for folder in (teacher, student):
        config = load_config(folder)
        config["sampling"]["size"] = 64
        (folder / "config.json").write_text(json.dumps(config))

    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a red cat", "a hat"):
        picture = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(picture).save(data / f"{name}.png")
        (data / f"{name}.txt").write_text(name)
    settings = ("--batch", 2, "--warmup", 1, "--learning-rate", "1e-3", "--teacher", teacher)
    kd = tmp_path / "kd"
    taught = ("--offload", "--teacher-cache", tmp_path / "answers")
    run("distill", student, data, "-o", kd, "--method", "kd", "--steps", 3, *taught, *settings)
    assert not mx.array_equal(
        load_supernet(kd)[1]["patch_embed.proj.weight"],
        load_supernet(student)[1]["patch_embed.proj.weight"],
    )

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\n")
    kdmd = ["distill", kd, prompts, "--method", "kdmd", "--variant", "tiny", "--lora", 2, "--fuse"]
    kdmd.append("--checkpoint")
    kdmd += ["--steps", 4, "--critic-steps", 1, *settings]
    process = start("-c", CLI, *kdmd, "-o", tmp_path / "few")
    for line in process.stdout:
        if "encoded" in line:
            break
    process.kill()  # before anything was saved
    assert process.wait() == -signal.SIGKILL
    args = map(str, [*kdmd, "--minutes", 1e-4, "-o", tmp_path / "few"])
    assert "goes on from there" in CliRunner().invoke(main, list(args)).stderr
    assert sorted((tmp_path / "few" / "run").glob("state-*.json"))[0].name == "state-00000001.json"
    for name, flags in (("few", ()), ("whole", ["--offload"])):
        run(*kdmd, "-o", tmp_path / name, *flags)
    a, b = (mx.load(str(tmp_path / name / "lora.safetensors")) for name in ("few", "whole"))
    assert a.keys() == b.keys() and all(mx.array_equal(a[k], b[k]) for k in a)

    picture = tmp_path / "cat.png"
    run("generate", "a red cat", "-m", tmp_path / "few", "-o", picture)
    with Image.open(picture) as image:
        assert image.size == (64, 64)
    assert Pipeline.load(tmp_path / "few").settings("a cat").steps == 4
    for flags in ((), ("--base", "--steps", 2)):
        run("generate", "a red cat", "-m", teacher, "-o", tmp_path / "teacher.png", *flags)
