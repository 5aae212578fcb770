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
