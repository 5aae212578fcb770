"""The benchmark of quantized models on a tiny one, and predicted sizes against written ones."""

import json
import re

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from benchmarks import quantization, sizes
from snapgen_mlx.config import DiTConfig
from snapgen_mlx.models.elastic import random_supernet
from snapgen_mlx.quantization.calibration import Calibration
from snapgen_mlx.quantization.quantize import quantize
from snapgen_mlx.quantization.recipe import average_bits, uniform
from snapgen_mlx.tensors.safetensors_io import read_header

from .test_quantize import CONFIG, PROMPTS, SETS, SHAPES, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path):
    """Pictures of two concepts."""
    rng = np.random.default_rng(0)
    for part in ("train", "heldout"):
        (tmp_path / "data" / part).mkdir(parents=True)
        rows = []
        for concept in ("cat", "dog"):
            name = f"{concept}.png"
            pixels = rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / part / name)
            rows.append({"file_name": name, "text": f"a {concept}", "concept": concept})
        lines = "\n".join(map(json.dumps, rows))
        (tmp_path / "data" / part / "metadata.jsonl").write_text(lines)
    (tmp_path / "data" / "phrasings.jsonl").write_text(lines)
    return tmp_path / "data"


def test_every_row_is_measured_once(model, data, tmp_path, monkeypatch, capsys):
    def rows(config, shapes, found, backend):
        return {f"uniform {bits}": uniform(config, shapes, bits) for bits in (8, 3)}

    def calibration(model, prompts=PROMPTS, seed=0):
        return original(model, prompts, seed)

    original = Calibration.from_model
    monkeypatch.setattr(Calibration, "from_model", calibration)
    monkeypatch.setattr(quantization, "measure", lambda *_: {})
    monkeypatch.setattr(quantization, "recipes", rows)
    made = []

    def make(*args, **options):
        made.append(options["recipe"])
        return quantize(*args, **options, prompts=SETS)

    monkeypatch.setattr(quantization, "quantize", make)
    args = ["x", str(data), str(tmp_path / "out"), "-m", str(model), "--count", "2", "--tune", "2"]
    monkeypatch.setattr("sys.argv", [*args, "--backends", "affine"])
    quantization.main()
    first = capsys.readouterr().out
    table = [line.split("|")[1:-1] for line in first.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in table[2:]] == [
        "float",
        "affine: uniform 8",
        "affine: uniform 8, tuned",
        "affine: uniform 3",
        "affine: uniform 3, tuned",
    ]
    whole, eight, _, three, tuned = ([cell.strip() for cell in row] for row in table[2:])
    assert (whole[1], eight[1], three[1]) == ("32.00", "8.00", "3.00")
    sizes = [float(row[3]) for row in (whole, eight, three)]
    assert sizes == sorted(sizes, reverse=True)
    assert tuned[1:5] == three[1:5]
    final = [[float(n) for n in row[6].split("/")] for row in (eight, three)]
    assert len(final[0]) == 3 and np.greater(*final).all()
    for row in (whole, eight, three, tuned):
        assert all(0 <= float(n) <= 100 for n in re.findall(r"[\d.]+", row[7]))
    quantization.main()
    assert capsys.readouterr().out == first and len(made) == 4


@pytest.mark.parametrize("backend", ["affine", "palette"])
def test_the_table_has_equal_sizes_side_by_side(backend):
    nmse = {str(b): 4.0**-b for b in range(2, 9)}
    found = {k: {"full": {"nmse": nmse, "mse": nmse, "latents": 1.0}} for k in SHAPES}
    rows = quantization.recipes(CONFIG, SHAPES, found, backend)
    bits = {title: average_bits(recipe.layers, SHAPES) for title, recipe in rows.items()}
    for title, value in bits.items():
        if "size of uniform 4" in title:
            assert 3.5 < value <= 4
        elif re.fullmatch(r"(mse|density) 4\.3", title):
            assert 4 < value <= 4.3


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
