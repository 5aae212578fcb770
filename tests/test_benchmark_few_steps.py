"""The benchmarks of four steps and of widths, at their smoke size."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import distillation, few_steps, widths
from benchmarks.distillation import Frechet
from snapgen_mlx import Pipeline, load_dit
from snapgen_mlx.judge import frechet, protocol, real_pictures
from snapgen_mlx.models.sizes import parameter_count
from snapgen_mlx.training.lora_training import lora_params, save_lora

from .fake_judge import FakeJudge
from .tiny import tiny_config, write_tiny_model

pytestmark = pytest.mark.usefixtures("uncompiled")

VARIANTS = ["tiny", "small", "full"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """With a LoRA per width."""
    model = write_tiny_model(tmp_path_factory.mktemp("material") / "model")
    for i, name in enumerate(VARIANTS):
        params = lora_params(tiny_config().variant(i), 2, i)
        params = {k: a + 0.1 if k.endswith("lora_b") else a for k, a in params.items()}
        save_lora(model / "few_step" / f"{name}.safetensors", params)
    return model


def main(monkeypatch, module, *args):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, args)])
    module.main()


def test_frechet_distance_of_known_gaussians():
    """Of axis-aligned ones it is |m - m'|² + sum (s - s')²."""
    rng = np.random.default_rng(0)
    scale, other, shift = np.array([3.0, 2.0, 1.0]), np.array([1.0, 2.0, 2.5]), np.array([1, 0, -2])
    z = rng.standard_normal((200_000, 3))
    latent = Frechet(z * scale)
    assert latent(z * scale) == pytest.approx(0, abs=1e-6)
    expected = (shift**2).sum() + ((scale - other) ** 2).sum()
    assert latent(rng.standard_normal(z.shape) * other + shift) == pytest.approx(expected, rel=0.02)


def distance(features) -> float:
    real = real_pictures()
    return frechet(features, real.mean, real.covariance)


def test_four_steps_against_many(model, tmp_path, monkeypatch, capsys):
    """Pictures are those of ``generate``, from seeds 0 and on; figures are the judge's of them."""
    right = [3, 2, 1, 0, 2]  # of three pictures, each of another task
    judge = FakeJudge(monkeypatch, 1, right * 3)
    result = tmp_path / "out.json"
    main(monkeypatch, few_steps, "-m", model, "--prompts", 3, "--first", 1, "--json", result)
    out = json.loads(result.read_text())
    assert (out["first"], out["prompts"]) == (1, 3) and out["machine"]["cores"]
    assert list(out["results"]) == VARIANTS
    ways = [(v, way) for v in VARIANTS for way in out["results"][v]]
    given = [
        {"base": True, "steps": 28, "guidance": 2.0},
        {"base": True, "steps": 3, "guidance": 2.0},
        {"base": False, "steps": 4, "guidance": 1.0},
        {"base": True, "steps": 4, "guidance": 2.0},
        {"base": True, "steps": 4, "guidance": 1.0},
    ]
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[4:]]
    assert len(rows) == len(judge.shown) == len(ways) == 15
    for i, (variant, way) in enumerate(ways):
        settings = dict(given[i % 5])
        pipe = Pipeline.load(model, variant, base=settings.pop("base"))
        own = pipe.generate(protocol()[3].text, seed=2, **settings)
        assert np.array_equal(np.array(judge.shown[i][2]), np.array(own)), (variant, way)
        found = out["results"][variant][way]
        assert found["overall"] == pytest.approx(right[i % 5] / 3)
        assert found["frechet"] == pytest.approx(distance(judge.features[i]))
        assert found["parameters"] == parameter_count(load_dit(model, variant))
        assert rows[i][0] == f"{variant}: {way}"
        of_tasks = ["-", f"{100 * (right[i % 5] > 1):.1f} %", "-"]  # single, two, counting
        assert rows[i][1:4] == of_tasks
        share = right[i % 5] / 3
        assert rows[i][7:9] == [f"{100 * share:.1f} %", f"{share:.3f}"]
        assert rows[i][10] == f"{found['frechet']:.2f}"
    drawn = {np.array(pictures[2]).tobytes() for pictures in judge.shown}
    assert len(drawn) == 15


def test_four_steps_need_a_lora_for_each_width(tmp_path, monkeypatch):
    model = write_tiny_model(tmp_path / "model")
    save_lora(model / "few_step" / "tiny.safetensors", lora_params(tiny_config().variant(0), 2, 0))
    with pytest.raises(SystemExit, match="no LoRA for few steps of small"):
        main(monkeypatch, few_steps, "-m", model)


def test_a_width_for_each_step(model, tmp_path, monkeypatch, capsys):
    """By default of other prompts than those that ``few_steps`` scores."""
    monkeypatch.setattr(widths, "MOST", 2)
    right = [0, 1, 2, 3, 2, 1, 0, 1, 2]
    judge = FakeJudge(monkeypatch, 96, right)
    result, plot = tmp_path / "out.json", tmp_path / "plot.png"
    main(monkeypatch, widths, "-m", model, "--prompts", 3, "--json", result, "--plot", plot)
    out = json.loads(result.read_text())
    assert (out["first"], out["prompts"]) == (96, 3)
    names = ["tiny:1", "small:1", "full:1", "tiny:2", "tiny:1,small:1", "tiny:1,full:1"]
    assert list(out["results"]) == [*names, "small:2", "small:1,full:1", "full:2"]
    for i, (name, found) in enumerate(out["results"].items()):
        own = Pipeline.load(model, name).generate(protocol()[98].text, seed=2)
        assert np.array_equal(np.array(judge.shown[i][2]), np.array(own)), name
        assert found["overall"] == pytest.approx(right[i] / 3) and found["seconds"] > 0
        assert found["frechet"] == pytest.approx(distance(judge.features[i]))
    assert capsys.readouterr().out.splitlines()[-9:] == widths.table(out["results"])[2:]
    with Image.open(plot) as image:
        assert image.width > 1000


def test_energy_distance_of_known_samples():
    """Of single points so far apart: twice the distance between, less those within."""
    x, y = np.array([[0.0, 0], [0, 2]]), np.array([[3.0, 0], [3, 0]])
    between = (3 + 3 + 13**0.5 + 13**0.5) / 4
    expected = (2 * between - 2 - 0) / 2**0.5
    assert distillation.energy(x, y) == pytest.approx(expected)


def test_losses_against_each_other_and_resumed(model, tmp_path, monkeypatch, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a smiling cat\na red dog\na happy kitty\n")
    args = f"{prompts} {tmp_path} -m {model} --updates 3 --teacher-updates 3 --count 3"
    args += " --critic-steps 2 --rank 2 --batch 2 --variants tiny --seeds 1"
    main(monkeypatch, distillation, *args.split())
    written = json.loads((tmp_path / "results.json").read_text())
    first = written["results"]
    assert set(first) == {
        f"{loss}-tiny-0" for loss in ("kd", "dmd", "dmd-time", "kdmd", "kdmd-balanced")
    } | {"teacher-full-0"}
    assert first["dmd-time-tiny-0"]["updates"] >= first["dmd-tiny-0"]["updates"] == 3
    assert written["floor"]["frechet"] > 0 and written["floor"]["error"] is None
    table = capsys.readouterr().out
    assert "| kdmd-tiny |" in table and "| guided teacher |" in table
    (tmp_path / "kd-tiny-0" / "result.json").unlink()
    main(monkeypatch, distillation, *args.split())
    again = json.loads((tmp_path / "results.json").read_text())["results"]
    for name, result in first.items():
        assert again[name].get("frechet") == result.get("frechet"), name
