"""A run with a text encoder trained along: export, conversion, the same latents in MLX."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from recipes.pretrain import export, sample, train
from recipes.pretrain.elastic import Training
from recipes.pretrain.text import NAME, load_words, pad
from recipes.pretrain.train import WORD_TABLE, build
from snapgen_mlx import Pipeline
from snapgen_mlx.cli.main import main as snapgen_mlx

from . import checkpoints
from .test_pretrain import TEXT, TRAINING, TRANSFORMER, write_shard

PROMPT = "two 🐱 to the left of a smilingly red dog"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """run/ of four steps, parts/vae, words/ with emoji, and the checkpoint that is exported."""
    folder = tmp_path_factory.mktemp("export")
    write_shard(folder / "data", "shard-00000", 0)
    shutil.copytree(WORD_TABLE, folder / "words")
    (folder / "words" / "emoji.json").write_text('{"🐱": "cats"}', encoding="utf-8")
    training = TRAINING | {"steps": 4, "learning_rate": 0.03, "prompts": []}
    config = {"transformer": TRANSFORMER, "text": TEXT, "training": training}
    (folder / "c.json").write_text(json.dumps(config))
    args = ["--data", folder / "data", "--out", folder / "run", "--config", folder / "c.json"]
    assert train.main([*map(str, args), "--words", str(folder / "words")]) == 0
    checkpoints.vae_model().save_pretrained(folder / "parts" / "vae")
    args = [folder / "run", folder / "torch", "--parts", folder / "parts"]
    assert export.main([*map(str, args)]) == 0
    return folder


def test_latents_equal_after_28_guided_steps(folder, tmp_path):
    done = CliRunner().invoke(snapgen_mlx, ["convert", str(folder / "torch"), str(tmp_path / "m")])
    assert done.exit_code == 0, done.output

    network = build(TRANSFORMER, TEXT, Training(), folder / "words")
    for part, file in (
        (network.dit, "transformer/diffusion_pytorch_model.safetensors"),
        (network.text, "text_encoder/model.safetensors"),
    ):
        part.load_state_dict(load_file(folder / "torch" / file), strict=True)
    words = load_words(folder / "words", network.text.config)
    ids, mask = pad(words.ids([PROMPT]))
    assert ids.shape == (1, 11)  # smiling ##ly; the emoji is one word
    for index, variant in enumerate(["tiny", "small", "full"]):
        pipeline = Pipeline.load(tmp_path / "m", variant)
        settings = pipeline.settings(PROMPT, seed=5)
        assert (settings.width, settings.steps, settings.guidance) == (64, 28, 4.0)
        ours = list(pipeline.stream(settings))[-1].x
        noise = torch.from_numpy(np.array(mx.random.normal((1, 8, 8, 4), key=mx.random.key(5))))
        theirs = sample.denoise(network, noise, {NAME: ids}, {NAME: mask}, index)
        assert (theirs - noise).abs().max() > 0.1
        error = np.abs(np.array(ours) - theirs.numpy()).max() / theirs.abs().max().item()
        assert error <= 1e-4, variant


def test_export_of_the_conversion_is_the_checkpoint(folder, tmp_path):
    for args in (["convert", folder / "torch", tmp_path / "m"], ["export", "m", "back"]):
        args = [args[0], *(str(tmp_path / a) for a in args[1:])]
        assert CliRunner().invoke(snapgen_mlx, args).exit_code == 0
    for file in ("transformer/diffusion_pytorch_model", "text_encoder/model"):
        before, after = (
            load_file(top / f"{file}.safetensors") for top in (folder / "torch", tmp_path / "back")
        )
        assert before.keys() == after.keys()
        assert all(torch.equal(a, after[k]) for k, a in before.items())
    for name in ("config.json", "vocab.txt", "emoji.json"):
        file = tmp_path / "back" / "text_encoder" / name
        assert file.read_text() == (folder / "torch" / "text_encoder" / name).read_text()


def train_from(folder, checkpoint, out) -> int:
    """A run of one step whose rate is 0, from a checkpoint's weights."""
    training = TRAINING | {"steps": 1, "learning_rate": 0.0, "prompts": []}
    config = {"transformer": TRANSFORMER, "text": TEXT, "training": training}
    (folder / "still.json").write_text(json.dumps(config))
    args = ["--data", folder / "data", "--out", out, "--config", folder / "still.json"]
    return train.main([*map(str, args), "--words", str(folder / "words"), "--init", checkpoint])


def test_a_run_starts_from_a_checkpoint(folder, tmp_path):
    assert train_from(folder, str(folder / "torch"), tmp_path / "run") == 0
    args = [tmp_path / "run", tmp_path / "back", "--parts", folder / "parts"]
    assert export.main([*map(str, args)]) == 0
    for file in ("transformer/diffusion_pytorch_model", "text_encoder/model"):
        before, after = (
            load_file(top / f"{file}.safetensors") for top in (folder / "torch", tmp_path / "back")
        )
        assert before.keys() == after.keys()
        assert all(torch.equal(a, after[k]) for k, a in before.items())


@pytest.mark.parametrize("fault", ["nothing", "damaged", "lost weight"])
def test_a_run_does_not_start_from_a_damaged_checkpoint(folder, tmp_path, capsys, fault):
    checkpoint, name = tmp_path / "torch", "diffusion_pytorch_model.safetensors"
    if fault != "nothing":
        shutil.copytree(folder / "torch", checkpoint)
        file = checkpoint / "transformer" / name
        if fault == "damaged":
            file.write_bytes(file.read_bytes()[:-10])
        else:
            weights = load_file(file)
            del weights["patch_embed.proj.bias"]
            save_file(weights, file)
    assert train_from(folder, str(checkpoint), tmp_path / "run") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: cannot start from") and name in line
    assert not (tmp_path / "run" / "state.pt").exists()


@pytest.mark.parametrize("fault", ["no run", "no vae", "damaged state"])
def test_bad_input(folder, tmp_path, capsys, fault):
    shutil.copytree(folder / "run", tmp_path / "run")
    run, parts, code = tmp_path / "run", folder / "parts", 2
    if fault == "no run":
        run = tmp_path
    elif fault == "no vae":
        parts = tmp_path
    else:
        content = (run / "state.pt").read_bytes()
        (run / "state.pt").write_bytes(content[:-100])
        code = 1
    assert export.main([str(run), str(tmp_path / "out"), "--parts", str(parts)]) == code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["other vocabulary", "lost weight", "other sizes"])
def test_a_damaged_text_encoder_is_named(folder, tmp_path, fault):
    model = tmp_path / "m"
    args = ["convert", str(folder / "torch"), str(model)]
    assert CliRunner().invoke(snapgen_mlx, args).exit_code == 0
    encoder = model / "text_encoder"
    config = json.loads((encoder / "config.json").read_text())
    if fault == "other vocabulary":
        vocab = (encoder / "vocab.txt").read_text().splitlines()
        (encoder / "vocab.txt").write_text("\n".join(vocab[:-1]) + "\n")
    else:
        config["layers" if fault == "lost weight" else "heads"] = 3
        (encoder / "config.json").write_text(json.dumps(config))
    done = CliRunner().invoke(snapgen_mlx, ["generate", "a cat", "-m", str(model)])
    assert done.exit_code == 1 and "text_encoder" in done.output
    assert "Traceback" not in done.output
