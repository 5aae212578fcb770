"""The benchmark of quantized models on a tiny one, and predicted sizes against written ones."""

import mlx.core as mx
import numpy as np
import pytest

from benchmarks import quantization, sizes
from snapgen_mlx.config import DiTConfig
from snapgen_mlx.judge import protocol
from snapgen_mlx.models.elastic import random_supernet
from snapgen_mlx.quantization.calibration import load_widths
from snapgen_mlx.quantization.quantize import quantize
from snapgen_mlx.quantization.recipe import average_bits, uniform
from snapgen_mlx.tensors.safetensors_io import read_header

from .fake_judge import FakeJudge
from .test_quantize import CONFIG, SETS, SHAPES, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def test_no_prompt_of_the_judge_chooses_bits_or_tunes():
    sets = quantization.own_prompts()
    sizes = [len(own) for own in sets]
    assert np.greater(sizes, [10, 200, 20]).all()
    scored = {prompt.text for prompt in protocol()}
    assert len(scored.union(*sets)) == len(scored) + sum(sizes)


def test_every_row_is_measured_once(model, tmp_path, monkeypatch, capsys):
    """Quantized on its own prompts; the judge sees what ``generate`` draws."""

    def rows(config, shapes, found):
        return {f"uniform {bits}": uniform(config, shapes, bits) for bits in (8, 3)}

    chosen, made = [], []

    def measured(model, form, calibration, kept):
        chosen.append(calibration.prompts)
        return {}

    def make(*args, **options):
        made.append(options["prompts"])
        return quantize(*args, **options)

    monkeypatch.setattr(quantization, "BACKENDS", ["affine"])
    monkeypatch.setattr(quantization, "own_prompts", lambda: SETS)
    monkeypatch.setattr(quantization, "measure", measured)
    monkeypatch.setattr(quantization, "recipes", rows)
    monkeypatch.setattr(quantization, "quantize", make)
    judge = FakeJudge(monkeypatch, 0, [2, 1, 0] * 5)  # right ones of two, by width
    out = tmp_path / "out"
    args = ["x", str(model), str(out), "--prompts", "2", "--tune", "2"]
    monkeypatch.setattr("sys.argv", args)
    quantization.main()
    first = capsys.readouterr().out
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in first.splitlines()
        if line.startswith("|")
    ]
    assert [row[0] for row in table[2:]] == [
        "float",
        "affine: uniform 8",
        "affine: uniform 8, tuned",
        "affine: uniform 3",
        "affine: uniform 3, tuned",
    ]
    whole, eight, _, three, tuned = table[2:]
    assert (whole[1], eight[1], three[1]) == ("32.00", "8.00", "3.00")
    sizes = [float(row[3]) for row in (whole, eight, three)]
    assert sizes == sorted(sizes, reverse=True)
    assert tuned[1:5] == three[1:5]
    final = [[float(n) for n in row[6].split("/")] for row in (eight, three)]
    assert len(final[0]) == 3 and np.greater(*final).all()
    found = dict(zip(table[0][7:], whole[7:], strict=True))
    assert found["single"] == "- / - / -"
    assert (found["position"], found["attribution"]) == ("100 / 100 / 0", "100 / 0 / 0")
    assert found["overall"] == "100 / 50 / 0"
    folders = [model, *(out / f"affine-{i}{t}" for i in range(2) for t in ("", "-tuned"))]
    pipes = [pipe for folder in folders for pipe in load_widths(folder)]
    for pipe, pictures in zip(pipes, judge.shown, strict=True):
        own = pipe.generate(protocol()[1].text, seed=1)
        assert np.array_equal(np.array(pictures[1]), np.array(own))
    assert made == [SETS] * 4
    quantization.main()
    assert capsys.readouterr().out == first and len(made) == 4
    assert chosen == [SETS.choose] * 2


def test_rows_keep_within_their_bits():
    nmse = {str(b): 4.0**-b for b in range(2, 9)}
    found = {k: {"full": {"nmse": nmse, "mse": nmse, "latents": 1.0}} for k in SHAPES}
    rows = quantization.recipes(CONFIG, SHAPES, found)
    bits = {title: average_bits(recipe.layers, SHAPES) for title, recipe in rows.items()}
    assert bits.keys() == {"uniform 8", "uniform 4", "mse 4.3", "density 4.3"}
    assert bits["uniform 8"] == 8 and 4 <= bits["uniform 4"] < 4.3
    assert all(4 < bits[f"{method} 4.3"] <= 4.3 for method in ("mse", "density"))
    assert {rows[f"{method} 4.3"].method for method in ("mse", "density")} == {"mse", "density"}


@pytest.mark.parametrize("backend", ["affine", "palette"])
def test_planned_sizes_are_written_ones(model, tmp_path, backend):
    recipe = uniform(CONFIG, SHAPES, 4)
    report = quantize(model, tmp_path / "x", backend=backend, recipe=recipe, prompts=SETS)
    for part in sizes.plan(model, CONFIG, backend, 4, others=["vae"]):
        header = read_header(tmp_path / "x" / part.name / "model.safetensors")
        assert sum(info.nbytes for info in header.values()) == part.nbytes
        assert part.nbytes < report["parts"][part.name]["bytes"]


def test_holes_are_read_as_models_but_take_no_room(tmp_path):
    config = DiTConfig.from_preset("tiny")
    with sizes.as_on_a_mac():
        cells = sizes.row(tmp_path, "tiny", config, "affine", 4.3).split("|")
    path = tmp_path / "transformer" / "model.safetensors"
    weights = sum(a.size for a in random_supernet(config).values())
    bits = 8 * path.stat().st_size / weights
    # A half-precision scale and bias for 64 weights are half a bit for each; convolutions and
    # biases, 1.5 % of the weights, stay in 16 bits.
    assert bits == pytest.approx(4.8 + 0.015 * 11, abs=0.02)
    assert path.stat().st_blocks * 512 < 1e6
    assert float(cells[3]) == pytest.approx(path.stat().st_size / 1e9, abs=1e-3)
    assert cells[-2].strip() == "a Mac of 8 GB"
    assert mx.default_device() == mx.cpu or mx.metal.is_available()
