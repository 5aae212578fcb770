"""The shipped model as a user meets it: whole, small enough, and drawing what it is asked for."""

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from snapgen_mlx import Pipeline
from snapgen_mlx.cli.main import main
from snapgen_mlx.hub import embedded_model
from snapgen_mlx.sampling import denoise, schedule

VARIANTS = ("tiny", "small", "full")


@pytest.fixture(scope="module")
def pipes():
    return {variant: Pipeline.load(variant=variant) for variant in VARIANTS}


def test_assets_are_complete_and_below_40_mb():
    folder = embedded_model()
    assert (folder / "README.md").is_file()
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 40e6


def test_every_width_draws_in_four_unguided_steps_and_the_base_in_more(pipes):
    for variant, pipe in pipes.items():
        s, base = (p.settings("a cat") for p in (pipe, Pipeline.load(variant=variant, base=True)))
        assert (s.steps, s.guidance) == (4, 1.0)
        assert base.steps > 4 and base.guidance > 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_generate_without_any_option_but_the_width(tmp_path, monkeypatch, variant):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        args = ["generate", "a smiling cat", "--variant", variant, "-o", name]
        assert CliRunner().invoke(main, args).exit_code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open("a.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (256, 256, 4)
    alpha = pixels[..., 3]
    assert (alpha[[0, 0, -1, -1], [0, -1, 0, -1]] < 32).all(), "the background is transparent"
    assert (alpha[64:192, 64:192] > 224).mean() > 0.3, "and something stands before it"


def test_colours_are_those_asked_for(pipes):
    """Mean over 4 seeds of the inner picture: hearts named by colour differ the right way."""

    def mean_colour(prompt):
        images = [pipes["full"].generate(prompt, seed=seed) for seed in range(4)]
        return np.mean([np.asarray(i)[80:176, 80:176] for i in images], axis=(0, 1, 2))

    red, green, blue = (mean_colour(f"a {c} heart") for c in ("red", "green", "blue"))
    assert red[0] - red[1] > green[0] - green[1]
    assert blue[2] - blue[0] > red[2] - red[0]


def test_text_matters_more_than_noise(pipes):
    """Pictures of one prompt from different noise are nearer than those of different prompts."""
    prompts = ["two dogs", "a red apple", "a rocket", "a cat"]
    pipe = pipes["full"]
    text, masks = pipe.encode([p for p in prompts for _ in range(4)])
    noise = mx.random.normal((16, 32, 32, 8), key=mx.random.key(1))
    for step in denoise(pipe.dit, noise, text, masks, schedule(4), 1.0):
        mx.eval(step.x)
    z = np.array(step.x).reshape(4, 4, -1)
    distance = np.linalg.norm(z[:, :, None, None] - z, axis=-1)  # prompt, seed, prompt, seed
    within = np.mean([distance[p, :, p][~np.eye(4, dtype=bool)] for p in range(4)])
    between = np.mean([distance[p, :, q] for p in range(4) for q in range(4) if p != q])
    assert within < 0.9 * between
