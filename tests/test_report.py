"""What a finetune shows: the plot of its losses, its sample pictures, how much these changed."""

import json
import shutil
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from snapgen_mlx import Pipeline
from snapgen_mlx.cli.main import main
from snapgen_mlx.training.report import CELL, picture_grid, plot_losses

from .tiny import write_tiny_model

pytestmark = pytest.mark.usefixtures("uncompiled")

WIDTHS = ("tiny", "small", "full")
TEXTS = ["a red dog", "a happy cat", "日本語", "a kitty", "a red dog"]
PROMPTS = ["a red dog", "a happy cat", "a kitty"]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    write_tiny_model(folder / "model")
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    for i, text in enumerate(TEXTS):
        image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        image.save(folder / "data" / f"{i}.png")
        (folder / "data" / f"{i}.txt").write_text(text)
    return folder


def command(material, output, *options):
    args = ["finetune", material / "model", material / "data", "-o", output, "--batch=2"]
    defaults = ["--warmup=1", "--learning-rate=1e-2", "--steps=20", "--sample-every=10"]
    return list(map(str, [*args, *defaults, *options]))


def finetune(*args):
    return CliRunner().invoke(main, command(*args))


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "out"
    result = finetune(material, output, "--validation", material / "data")
    assert result.exit_code == 0, result.output
    return output, result


def cells(path, rows: int) -> np.ndarray:
    """The pictures (rows, prompts, 64, 64, 3) of a grid, without its labels."""
    with Image.open(path) as image:
        pixels = np.asarray(image)
    pixels = pixels[-64 * rows :, -64 * len(PROMPTS) :]
    return pixels.reshape(rows, 64, len(PROMPTS), 64, 3).swapaxes(1, 2)


def drawn(model) -> np.ndarray:
    """What ``generate`` makes of the prompts at every width, with its defaults."""
    pipes = [Pipeline.load(model, width) for width in WIDTHS]
    return np.array([[np.asarray(pipe.generate(p)) for p in PROMPTS] for pipe in pipes])


def test_samples_are_what_generate_draws(material, finished):
    """Before training and after it; of each caption once, and of none that has no known word."""
    output, result = finished
    samples = output / "run" / "samples"
    assert sorted(p.name for p in samples.iterdir()) == ["before-after.png", "step-000010.png"]
    pairs = cells(samples / "before-after.png", 6)
    before, after = pairs[::2], pairs[1::2]
    assert np.array_equal(before, drawn(material / "model"))
    assert np.array_equal(after, drawn(output))
    meanwhile = cells(samples / "step-000010.png", 3)
    for at_end in (before, after):
        assert (meanwhile != at_end).any(axis=(1, 2, 3, 4)).all()
    change = np.abs(before.astype(float) - after).mean(axis=(1, 2, 3, 4))
    assert (change > 0.1).all()
    line = ", ".join(f"{w} {c:.3g}" for w, c in zip(WIDTHS, change, strict=True))
    assert f"pictures changed, in levels of 255: {line}\n" in result.stdout


def test_an_interrupted_run_shows_the_same(material, finished, tmp_path):
    finetune(material, tmp_path / "out", "--minutes=1e-9")
    assert not (tmp_path / "out" / "config.json").exists()
    result = finetune(material, tmp_path / "out")
    assert result.exit_code == 0, result.output
    for name in ("step-000010.png", "before-after.png"):
        a, b = (folder / "run" / "samples" / name for folder in (tmp_path / "out", finished[0]))
        assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("options", [["--lora=2", "--accumulate=2"], ["--checkpoint"]])
def test_samples_of_other_ways_to_train(material, tmp_path, options):
    result = finetune(material, tmp_path, *options, "--steps=12")
    assert result.exit_code == 0, result.output
    meanwhile = cells(tmp_path / "run" / "samples" / "step-000010.png", 3)
    before = cells(tmp_path / "run" / "samples" / "before-after.png", 6)[::2]
    assert np.array_equal(before, drawn(material / "model"))
    assert (meanwhile != before).any(axis=(1, 2, 3, 4)).all()


def test_captions_without_a_known_word(material, tmp_path):
    shutil.copytree(material / "data", tmp_path / "data")
    for file in (tmp_path / "data").glob("*.txt"):
        file.write_text("日本語")
    (tmp_path / "model").symlink_to(material / "model")
    result = finetune(tmp_path, tmp_path / "out", "--steps=11")
    assert result.exit_code == 1
    assert "the captions have no word that" in result.stderr
    assert not (tmp_path / "out" / "run").exists()


def test_training_that_changes_no_picture(material, tmp_path):
    """Weights that change less than a picture's 8 bits can show."""
    result = finetune(material, tmp_path, "--steps=2", "--learning-rate=1e-12")
    assert result.exit_code == 1
    assert "no picture had changed after step 2, so nothing was written; train" in result.stderr
    assert not (tmp_path / "config.json").exists()


# Grid and plot


@pytest.mark.parametrize("side", [64, 1024])
def test_grid(side):
    """Labels stand beside the pictures, whatever their length; large pictures are made smaller."""
    red, blue = (Image.new("RGB", (side, side), c) for c in ("red", "blue"))
    rows = {"a": [red, blue], "a long name of a row": [blue, red]}
    grid = np.asarray(picture_grid(rows, ["x", "many words " * 50]))
    cell = min(side, CELL)
    pictures = grid[-2 * cell :, -2 * cell :].reshape(2, cell, 2, cell, 3)
    assert (pictures[0, :, 0] == [255, 0, 0]).all() and (pictures[0, :, 1] == [0, 0, 255]).all()
    assert (pictures[1, :, 0] == [0, 0, 255]).all() and (pictures[1, :, 1] == [255, 0, 0]).all()
    labels = [grid[: -2 * cell, -cell:], grid[-2 * cell : -cell, : -2 * cell]]
    for label in labels:  # black on white, within bounds
        assert label.min() < 100 and (label[0] == 255).all() and (label[:, 0] == 255).all()


def test_transparent_pictures_stand_on_white():
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    clear.paste((255, 0, 0, 255), (16, 16, 48, 48))
    cell = np.asarray(picture_grid({"a": [clear]}, ["x"]))[-64:, -64:]
    assert (cell[:8] == 255).all() and (cell[24:40, 24:40] == [255, 0, 0]).all()


def curves(path) -> set[tuple]:
    """The saturated colours of a picture, in steps of 32: one a curve."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    saturated = pixels[np.ptp(pixels, axis=1) > 100]
    colours, counts = np.unique(saturated // 32, axis=0, return_counts=True)
    return {tuple(c) for c, n in zip(colours, counts, strict=True) if n > 50}


def test_plot(finished, tmp_path):
    output, _ = finished
    log, plot = output / "run" / "log.jsonl", output / "run" / "loss.png"
    again = tmp_path / "again.png"
    plot_losses(log, again)
    assert again.read_bytes() == plot.read_bytes(), "the last plot is of the whole log"
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps({"step": 10, "loss/full": 1.0, "grad": 5}) + "\n")
    plot_losses(few, again)
    assert len(curves(again)) < len(curves(plot))
    (tmp_path / "none").mkdir()
    plot_losses(tmp_path / "none" / "log.jsonl", tmp_path / "none" / "loss.png")
    assert not any((tmp_path / "none").iterdir())


def test_neither_plot_nor_samples_on_the_way(material, tmp_path, monkeypatch):
    """The plot is made by the same command once matplotlib is installed."""
    options = ["--steps=11", "--sample-every=0"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        result = finetune(material, tmp_path, *options)
    assert result.exit_code == 0, result.output
    note = "no loss.png without matplotlib: pip install 'snapgen-mlx[train]'"
    assert note in result.stderr.splitlines()
    assert [p.name for p in (tmp_path / "run" / "samples").iterdir()] == ["before-after.png"]
    assert not (tmp_path / "run" / "loss.png").exists()
    result = finetune(material, tmp_path, *options)
    assert result.exit_code == 0 and note not in result.stderr, result.output
    assert (tmp_path / "run" / "loss.png").exists()


def test_prior_pictures_are_drawn_once_and_learned(material, tmp_path):
    """They are what ``generate`` draws at the full width, and their prompts may be any."""
    (tmp_path / "prior.txt").write_text("a red cat\n\na smiling dog\n", encoding="utf-8")
    args = (material, tmp_path / "out", "--prior", tmp_path / "prior.txt", "--flip", "--lora=2")
    result = finetune(*args)
    assert result.exit_code == 0, result.output
    assert "drew 2 of 2 prompts" in result.stdout and "encoded 6 of 6 captions" in result.stdout
    latents = [np.load(path) for path in (tmp_path / "out" / "cache").glob("prior-*.npy")]
    pipe = Pipeline.load(material / "model")
    for i, prompt in enumerate(("a red cat", "a smiling dog")):
        *_, last = pipe.stream(pipe.settings(prompt, seed=i))
        assert any(np.array_equal(last.x[0], z) for z in latents)
    again = finetune(*args)
    assert again.exit_code == 0 and "drew" not in again.stdout
    (tmp_path / "prior.txt").write_text("a red cat\n", encoding="utf-8")
    other = finetune(*args)
    assert other.exit_code == 1 and "other pictures or captions, or with" in other.stderr
