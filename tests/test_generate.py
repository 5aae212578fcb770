"""``snapgen-mlx generate`` and the Python pipeline, through files, on a tiny random model."""

import json
import os
import shutil
import stat
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from snapgen_mlx import Pipeline
from snapgen_mlx.cli.main import main
from snapgen_mlx.errors import UsageError

from .tiny import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    """Run the command in an empty folder; -m is the tiny model unless given."""
    monkeypatch.chdir(tmp_path)

    def run(*args, model=model, stdin=None):
        args = ["generate", *map(str, args), "-m", str(model)]
        return CliRunner().invoke(main, args, input=stdin)

    return run


def one_line(result, code):
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.output
    return lines[0]


def test_same_seed_same_bytes_and_metadata_repeats_it(run, tmp_path):
    assert run("a smiling cat", "--seed", 7, "-o", "a.png").exit_code == 0
    assert run("a smiling cat", "--seed", 7, "-o", "b.png").exit_code == 0
    assert run("a smiling cat", "--seed", 8, "-o", "c.png").exit_code == 0
    a, b, c = ((tmp_path / f"{n}.png").read_bytes() for n in "abc")
    assert a == b != c
    with Image.open("a.png") as image:
        assert image.size == (64, 64) and image.mode == "RGB"
        found = json.loads(image.text["snapgen-mlx"])
    assert found["prompt"] == "a smiling cat" and found["seed"] == 7
    assert (found["steps"], found["guidance"], found["shift"]) == (3, 2.0, 3.0)
    assert found["variant"] == "full"
    assert run("--from-metadata", "a.png", "-o", "d.png").exit_code == 0
    assert (tmp_path / "d.png").read_bytes() == a


def test_variants_steps_guidance_negative_and_size_matter(run, tmp_path):
    changes = [
        (),
        ("--variant", "tiny"),
        ("--variant", "small"),
        ("--steps", 2),
        ("--guidance", 1),
        ("--negative", "red dog"),
        ("--width", 128),
    ]
    seen = set()
    for i, change in enumerate(changes):
        assert run("a cat", *change, "-o", f"{i}.png").exit_code == 0
        seen.add((tmp_path / f"{i}.png").read_bytes())
    assert len(seen) == len(changes)
    assert Image.open("6.png").size == (128, 64)


def test_prompts_seeds_count_and_names(run, tmp_path):
    assert run("a cat", "a DOG!", "--seed", 1, "--seed", 5).exit_code == 0
    assert {p.name for p in tmp_path.iterdir()} == {
        "a-cat-1.png",
        "a-cat-5.png",
        "a-dog-1.png",
        "a-dog-5.png",
    }
    assert run("cat", "--seed", 3, "--count", 2, "-o", "x/{seed}").exit_code == 0
    assert {p.name for p in (tmp_path / "x").iterdir()} == {"3.png", "4.png"}


def test_prompts_from_standard_input(run, tmp_path):
    assert run(stdin="a cat\n\n  a dog \n").exit_code == 0
    assert {p.name for p in tmp_path.iterdir()} == {"a-cat-0.png", "a-dog-0.png"}
    one_line(run(stdin="\n"), 2)


def test_an_existing_picture_is_never_overwritten(run, tmp_path):
    (tmp_path / "a.png").write_bytes(b"mine")
    assert "a-2.png" in run("cat", "-o", "a.png").output
    assert (tmp_path / "a.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("cat", "--variant", "huge"), "tiny, small, full"),
        (("cat", "--width", 100, "--height", 100), "multiples of 64"),
        (("cat", "--width", 0), "multiples of 64"),
        (("cat", "--width", 4096), "2048"),
        (("",), "empty"),
        (("   ",), "empty"),
        (("cat " * 5000,), "20000 characters"),
        (("cat", "--negative", "x" * 5000), "5000 characters"),
        (("zebra",), "no word"),
        (("cat", "--steps", 0), "steps"),
        (("cat", "--guidance", "nan"), "guidance"),
        (("cat", "--seed", -1), "seed"),
        (("cat", "--seed", 2**63), "seed"),
        (("cat", "dog", "-o", "x.png"), "{prompt}"),
        (("cat", "--seed", 1, "--seed", 2, "--count", 2), "--count"),
    ],
)
def test_bad_requests_are_one_line_and_leave_nothing(run, tmp_path, args, word):
    assert word in one_line(run(*args), 2)
    assert not list(tmp_path.iterdir())


def test_unwritable_output(run, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in one_line_after_progress(run("cat", "-o", "file/x.png"))
    if os.geteuid():  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
        one_line_after_progress(run("cat", "-o", "locked/x.png"))
    assert [p.name for p in tmp_path.iterdir() if p.name != "locked"] == ["file"]


def one_line_after_progress(result):
    assert result.exit_code == 1 and "Traceback" not in result.output
    errors = [part for part in result.stderr.splitlines() if part.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    return errors[0]


def damaged(model, tmp_path, name, change):
    folder = tmp_path.parent / f"{tmp_path.name}-damaged"
    shutil.copytree(model, folder)
    change(folder / name)
    return folder


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, -1])
def test_truncated_weights(run, model, tmp_path, part, keep):
    def cut(path):
        data = path.read_bytes()
        path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])

    folder = damaged(model, tmp_path, f"{part}/model.safetensors", cut)
    assert "model.safetensors" in one_line(run("cat", model=folder), 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", '{"_class_name": "FluxPipeline"}'),
        ("config.json", "{"),
        ("transformer/config.json", '{"_class_name": "FluxTransformer2DModel"}'),
        ("transformer/config.json", '{"model_type": "llama", "hidden_size": 64}'),
        ("transformer/config.json", "[]"),
        ("vae/config.json", '{"_class_name": "AutoencoderKL"}'),
        ("text_encoder/config.json", '{"model_type": "t5"}'),
    ],
)
def test_config_of_another_model(run, model, tmp_path, name, text):
    folder = damaged(model, tmp_path, name, lambda path: path.write_text(text))
    assert "config" in one_line(run("cat", model=folder), 1)


def test_missing_parts_and_models(run, model, tmp_path):
    folder = damaged(model, tmp_path, "vae", shutil.rmtree)
    assert "vae" in one_line(run("cat", model=folder), 1)
    one_line(run("cat", model=tmp_path / "nowhere"), 1)


def test_debug_shows_the_traceback(model):
    result = CliRunner().invoke(main, ["--debug", "generate", "", "-m", str(model)])
    assert isinstance(result.exception, UsageError)


def test_pipeline_yields_steps_and_repeats_itself(model):
    pipe = Pipeline.load(model, variant="tiny")
    assert pipe.variant == "tiny"
    settings = pipe.settings("a happy kitty", seed=2, steps=4, guidance=1.0)
    steps = list(pipe.stream(settings))
    assert [s.sigma for s in steps] == [1, 0.9, 0.75, 0.5]
    np.testing.assert_allclose(steps[-1].x, steps[-1].x0, atol=1e-6)
    image = pipe.generate("a happy kitty", seed=2, steps=4, guidance=1.0)
    assert image == pipe.decode(steps[-1].x)


def test_viewers_can_read_the_settings_unless_they_are_left_out(run, tmp_path):
    assert run("a <cat> & dog \U0001f600", "-o", "a.png").exit_code == 0
    with Image.open("a.png") as image:
        xmp = ElementTree.fromstring(image.info["xmp"])
    text = "".join(xmp.itertext())
    assert "a <cat> & dog \U0001f600 (seed 0, steps 3" in text
    assert run("a cat", "-o", "b.png", "--no-metadata").exit_code == 0
    data = (tmp_path / "b.png").read_bytes()
    assert b"snapgen" not in data and b"cat" not in data
