"""A width for each step, widths chosen by time, and refusals of memory that are overruled."""

import gc
import json
import weakref

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten
from PIL import Image

from snapgen_mlx import Pipeline, memory
from snapgen_mlx.cli.main import main
from snapgen_mlx.errors import UsageError
from snapgen_mlx.loading import load_dit, load_dit_config
from snapgen_mlx.memory import Request
from snapgen_mlx.sampling import denoise, last_step, schedule
from snapgen_mlx.training import training_memory
from snapgen_mlx.training.lora_training import lora_params, save_lora
from snapgen_mlx.training.optimizer import AdamOptions
from snapgen_mlx.training.training_memory import TrainingMemory
from snapgen_mlx.widths import by_step, parse_widths, total_steps
from snapgen_mlx.within import StepTimes, variant_within

from .tiny import write_tiny_model

NAMES = ["tiny", "small", "full"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def latent(pipe, **given):
    return last_step(pipe.stream(pipe.settings("a smiling cat", **given))).x


def test_variants_with_counts_are_read_strictly():
    assert parse_widths("full", NAMES) == [("full", 0)]
    parts = parse_widths("tiny:2,full:1", NAMES)
    assert total_steps(parts) == 3 and total_steps([("full", 0)]) is None
    assert (
        by_step(parts, 3) == ["tiny", "tiny", "full"] and by_step([("full", 0)], 2) == ["full"] * 2
    )
    for wrong in (
        "tiny:2,full",
        "tiny:0",
        "tiny:-1,full:2",
        "tiny:²",
        ":2",
        "huge:1",
        "huge",
        3,
        "",
    ):
        with pytest.raises(UsageError):
            parse_widths(wrong, NAMES)


def test_each_step_is_made_by_its_width(model):
    pipe = Pipeline.load(model, "tiny:1,full:2")
    mixed = latent(pipe, guidance=2.0)
    dits = {name: load_dit(model, name) for name in ("tiny", "full")}
    x = mx.random.normal(mixed.shape, key=mx.random.key(0))
    text, masks = pipe.encode(["a smiling cat"])
    sigmas = schedule(3)
    for i, name in enumerate(("tiny", "full", "full")):
        (step,) = denoise(dits[name], x, text, masks, sigmas[i : i + 2], 2.0)
        x = step.x
    # The pipeline conditions on all times at once, whose products round differently.
    assert mx.abs(mixed - x).max().item() < 1e-5 * mx.abs(x).max().item()
    assert not mx.array_equal(mixed, latent(Pipeline.load(model, "full"), steps=3))
    # A count for all steps is that width alone.
    assert mx.array_equal(
        latent(Pipeline.load(model, "small:3")), latent(Pipeline.load(model, "small"), steps=3)
    )
    with pytest.raises(UsageError, match="makes 3 steps, not 4"):
        pipe.settings("a", steps=4)


def test_steps_left_out_are_those_of_the_first_width(model):
    """An edit of little strength starts late in the schedule, where the last width draws."""
    image = Image.new("RGB", (64, 64), "red")
    given = {"strength": 0.3, "seed": 3}
    a = Pipeline.load(model, "tiny:2,full:1").edit("a cat", image, **given)
    b = Pipeline.load(model, "full").edit("a cat", image, steps=3, **given)
    assert np.array_equal(np.asarray(a), np.asarray(b))


def test_memory_counts_the_widths_that_stay(model):
    sizes = Pipeline.load(model).memory
    request = Request(64, 64)

    def peak(variant, **how):
        return sizes.predict(variant, Request(64, 64, **how)).denoise

    weights = {name: sizes.weights(name) for name in ("tiny", "full")}
    beside = max(peak(name) - weights[name] for name in weights)
    assert peak("tiny:1,full:1") == sum(weights.values()) + beside
    assert peak("tiny:1,full:1", low_ram=True) == max(peak(n, low_ram=True) for n in weights)
    assert sizes.predict("full:2", request) == sizes.predict("full", request)
    pipe = Pipeline.load(model, "tiny:1,full:2", low_ram=True)
    held, tiny = [], None
    for _ in pipe.stream(pipe.settings("a cat")):
        held.append(list(pipe._dits))
        tiny = tiny or weakref.ref(pipe.width("tiny"))
        gc.collect()
        assert (tiny() is None) == (held[-1] == ["full"])  # nobody else holds it
    assert held == [["tiny"], ["full"], ["full"]]
    assert mx.array_equal(latent(pipe), latent(Pipeline.load(model, "tiny:1,full:2")))


def test_few_step_loras_follow_their_width(tmp_path):
    folder = write_tiny_model(tmp_path / "m")
    config = load_dit_config(folder)
    (folder / "few_step").mkdir()
    for i, name in enumerate(("tiny", "full")):
        own = config.variant(NAMES.index(name))
        matrices = {k: mx.random.normal(a.shape) for k, a in lora_params(own, 2, i).items()}
        save_lora(folder / "few_step" / f"{name}.safetensors", matrices, {"widths": [name]})
    pipe = Pipeline.load(folder, "tiny:2,full:2")
    assert pipe.settings("a").guidance == 1.0 and set(pipe.few_steps) == {"tiny", "full"}
    for name in ("tiny", "full"):
        expected = load_dit(folder, name, loras=[(pipe.few_steps[name], 1.0)])
        ours, theirs = (dict(tree_flatten(d.parameters())) for d in (pipe.width(name), expected))
        assert all(mx.array_equal(ours[k], theirs[k]) for k in theirs)
    before = pipe.digests["few-step LoRA"]
    # A width without one would have to be guided: then none has.
    pipe.switch("small:1,full:1")
    assert not pipe.few_steps and "few-step LoRA" not in pipe.digests
    pipe.switch("full")
    assert pipe.digests["few-step LoRA"] != before


TIMES = StepTimes({"tiny": 1.0, "small": 2.0, "full": 4.0}, decoding=0.5)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (100, [("full", 4)]),
        (16.5, [("full", 4)]),
        (16.4, [("small", 1), ("full", 3)]),
        (13.6, [("tiny", 1), ("full", 3)]),
        (10.5, [("tiny", 2), ("full", 2)]),
        (4.5, [("tiny", 4)]),
        (4.4, [("tiny", 3)]),
        (1.5, [("tiny", 1)]),
    ],
)
def test_time_is_filled_with_all_steps_and_wide_ones_last(seconds, expected):
    assert TIMES.choose(seconds, 4) == expected
    assert TIMES.picture(expected) <= seconds


def test_widths_that_do_not_fit_together_are_not_chosen():
    assert TIMES.choose(13.6, 4, lambda parts: len(parts) == 1) == [("small", 4)]


def test_previews_with_little_memory_let_go_of_the_transformer(model):
    """Each is decoded while no transformer is held, and the picture stays the same."""
    pipe = Pipeline.load(model, "tiny", low_ram=True)
    for step in pipe.stream(pipe.settings("a cat")):
        held = weakref.ref(pipe.width("tiny"))
        pipe.decode(step.x0, preview=True)
        gc.collect()
        assert held() is None
    whole = Pipeline.load(model, "tiny")
    assert mx.array_equal(step.x, last_step(whole.stream(whole.settings("a cat"))).x)


def test_no_time_is_refused():
    with pytest.raises(UsageError, match="one step of tiny takes 1 s and decoding"):
        TIMES.choose(1.4, 4)


def test_a_variant_is_measured_and_drawn(model):
    pipe = Pipeline.load(model)
    variant, said = variant_within(pipe, pipe.settings("a cat"), 1000)
    assert variant == "full:3" == pipe.variant and said.startswith("full:3 takes about")
    assert pipe.settings("a cat").steps == 3


def test_command_draws_within_a_time_and_repeats_it(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*args):
        return CliRunner().invoke(main, ["generate", *args, "-m", str(model)])

    drawn = run("a cat", "--within", "1000s", "-o", "{variant}.png")
    assert drawn.exit_code == 0 and "a step of tiny" in drawn.stderr, drawn.output
    with Image.open("full-3.png") as image:
        assert json.loads(image.text["snapgen-mlx"])["variant"] == "full:3"
    assert run("--from-metadata", "full-3.png", "-o", "again.png").exit_code == 0
    with Image.open("full-3.png") as a, Image.open("again.png") as b:
        assert np.array_equal(np.asarray(a), np.asarray(b))
    for wrong in (("--within", "1s", "--variant", "full"), ("--within", "0"), ("--within", "soon")):
        assert run("a cat", *wrong).exit_code == 2
    assert run("a cat", "--variant", "tiny:1,full:1", "-o", "c.png").exit_code == 0
    assert "tiny:1,full:1 fits" in run("--explain", "--variant", "tiny:1,full:1").output


def test_force_draws_what_does_not_fit_and_says_so(model, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "usable_memory", lambda: 1000)
    monkeypatch.chdir(tmp_path)
    args = ["generate", "a cat", "-m", str(model), "-o", "a.png"]
    assert CliRunner().invoke(main, args).exit_code == 2
    forced = CliRunner().invoke(main, [*args, "--force"])
    assert forced.exit_code == 0 and (tmp_path / "a.png").exists()
    (line,) = forced.stderr.strip().splitlines()
    assert "tiny at 64x64 needs about" in line and "only 0 MB can be used here" in line
    assert "may swap" in line
    with pytest.raises(UsageError, match="--variant full"):
        # Less than two widths is the wider one alone.
        sizes = Pipeline.load(model, force=True).memory
        monkeypatch.setattr(
            memory, "usable_memory", lambda: sizes.predict("full", Request(64, 64)).peak
        )
        sizes.check("tiny:1,full:1", Request(64, 64))


def test_force_trains_what_does_not_fit(model, monkeypatch):
    sizes = TrainingMemory.from_model(model)
    assert sizes.check(AdamOptions(), 1, force=True) is None
    monkeypatch.setattr(training_memory, "usable_memory", lambda: 1000)
    with pytest.raises(UsageError, match="this training needs about"):
        sizes.check(AdamOptions(), 1)
    assert "may swap" in sizes.check(AdamOptions(), 1, force=True)
