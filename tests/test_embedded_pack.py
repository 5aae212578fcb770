"""The embedded model's last step: parts of two models, in few bits, in one folder."""

import mlx.core as mx
import numpy as np

from recipes.embedded.pack import SAMPLING, main
from snapgen_mlx.convert.to_mlx import convert
from snapgen_mlx.convert.to_pytorch import export
from snapgen_mlx.files import read_json
from snapgen_mlx.loading import load_dit_config
from snapgen_mlx.pipeline import Pipeline
from snapgen_mlx.training.lora_training import about_training, lora_params, save_lora
from snapgen_mlx.vocabulary import known_words

from .tiny import write_sticker_model, write_tiny_model


def test_the_packed_model_draws_as_the_float_one(tmp_path, capsys):
    export(write_sticker_model(tmp_path / "made"), tmp_path / "torch")
    model, few_bits, out = (tmp_path / name for name in ("model", "few-bits", "out"))
    convert(tmp_path / "torch", model)
    convert(tmp_path / "torch", few_bits, dtype=mx.float16)  # too narrow for groups of 32
    config = load_dit_config(model)
    for i, width in enumerate(config.variants):
        about = about_training(model, [width], ())
        lora = lora_params(config.variant(i), 4)
        save_lora(model / "few_step" / f"{width}.safetensors", lora, about)

    assert main([str(model), str(few_bits), str(out)]) == 0
    head = read_json(out / "config.json")
    assert head["sampling"] == SAMPLING and head["source"] == {"name": "embedded"}
    assert len(known_words(out)) == 156
    pictures = []
    for folder in (model, out):
        pipe = Pipeline(folder, config.variants[0])
        settings = {"seed": 1, "width": 64, "height": 64}
        assert pipe.settings("a cat", **settings).steps == 4
        pictures.append(np.asarray(pipe.generate("a cat", **settings), np.float32))
    assert pictures[0].shape == (64, 64, 4)
    assert np.abs(pictures[0] - pictures[1]).mean() < 3

    export(write_tiny_model(tmp_path / "other", seed=1), tmp_path / "other-torch")
    convert(tmp_path / "other-torch", tmp_path / "another")
    assert main([str(tmp_path / "another"), str(few_bits), str(tmp_path / "none")]) == 1
    assert "not made from the same checkpoint" in capsys.readouterr().err
