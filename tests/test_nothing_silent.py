"""What would be a wrong picture without a word is an error that says why."""

import mlx.core as mx
import pytest
from click.testing import CliRunner

from snapgen_mlx.cli.main import main

from .tiny import write_tiny_model


def spoilt(folder, part, key, value):
    """A tiny model with one value of one weight spoilt."""
    write_tiny_model(folder)
    file = folder / part / "model.safetensors"
    tensors = mx.load(str(file))
    tensors[key] = mx.full(tensors[key].shape, value, tensors[key].dtype)
    mx.eval(tensors)
    mx.save_safetensors(str(file), tensors)
    return folder


@pytest.mark.parametrize(
    ("part", "key", "value", "words"),
    [
        ("transformer", "mid.0.attn.to_q.weight", float("nan"), "mid.0.attn.to_q.weight"),
        ("transformer", "up.0.ffn.fc2.weight", float("inf"), "up.0.ffn.fc2.weight"),
        ("vae", None, float("nan"), "autoencoder"),
        ("text_encoder", "scale", float("nan"), "text encoder static"),
    ],
)
def test_nan_is_no_black_picture_but_an_error_that_names_the_stage(
    tmp_path, part, key, value, words
):
    if part == "vae":
        names = mx.load(str(write_tiny_model(tmp_path / "x") / "vae" / "model.safetensors"))
        key = next(k for k in names if k.startswith("decoder"))
    folder = spoilt(tmp_path / "model", part, key, value)
    out = tmp_path / "out.png"
    result = CliRunner().invoke(main, ["generate", "a cat", "-m", str(folder), "-o", str(out)])
    assert result.exit_code == 1 and not out.exists()
    assert words in result.stderr and "NaN or infinity" in result.stderr


def generate(*args):
    return CliRunner().invoke(main, ["generate", *map(str, args), "--steps", "1"])


def test_a_picture_of_another_model_is_not_redrawn_in_silence(tmp_path):
    ours, other = (write_tiny_model(tmp_path / str(seed), seed) for seed in (0, 1))
    out = tmp_path / "a.png"
    assert generate("a cat", "-m", ours, "-o", out).exit_code == 0
    again = generate("--from-metadata", out, "-m", ours, "-o", tmp_path / "b.png")
    assert again.exit_code == 0 and (tmp_path / "b.png").is_file()
    refused = generate("--from-metadata", out, "-m", other, "-o", tmp_path / "c.png")
    assert refused.exit_code == 2 and "another model" in refused.stderr
    assert not (tmp_path / "c.png").exists()


def test_words_that_the_model_does_not_know_are_named(tmp_path):
    model = write_tiny_model(tmp_path / "model")
    known = generate("a red cat", "-m", model, "-o", tmp_path / "a.png")
    assert "does not know" not in known.stderr
    result = generate("a zxcv cat", "-m", model, "-o", tmp_path / "a.png")
    assert result.exit_code == 0 and "does not know: zxcv" in result.stderr


def test_prompts_with_the_same_file_name_are_numbered(tmp_path):
    model = write_tiny_model(tmp_path / "model")
    prompts = ["a cat", "A Cat!", "a cat"]
    result = generate(*prompts, "-m", model, "-o", tmp_path / "{prompt}.png")
    assert result.exit_code == 0, result.stderr
    names = sorted(p.name for p in tmp_path.glob("*.png"))
    assert names == ["a-cat-2.png", "a-cat-3.png", "a-cat.png"]
