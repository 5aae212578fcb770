"""The benchmarks of four steps, at their smoke size."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import distillation, few_steps
from benchmarks.few_steps import Frechet
from snapgen_mlx.training.lora_training import lora_params, save_lora

from .tiny import tiny_config, write_tiny_model

pytestmark = pytest.mark.usefixtures("uncompiled")

CONCEPTS = {"cat": "a smiling cat", "dog": "a red dog", "kitty": "a happy kitty"}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A model with a LoRA per width, and data as ``recipes.embedded.data`` writes it."""
    folder = tmp_path_factory.mktemp("material")
    model = write_tiny_model(folder / "model")
    for i, name in enumerate(("tiny", "small", "full")):
        params = lora_params(tiny_config().variant(i), 2, i)
        params = {k: a + 0.1 if k.endswith("lora_b") else a for k, a in params.items()}
        save_lora(model / "few_step" / f"{name}.safetensors", params)
    rng = np.random.default_rng(0)
    for part in ("train", "heldout"):
        (folder / "data" / part).mkdir(parents=True)
        rows = []
        for concept, text in CONCEPTS.items():
            image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(image).save(folder / "data" / part / f"{concept}.png")
            rows.append({"file_name": f"{concept}.png", "text": text, "concept": concept})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / part / "metadata.jsonl").write_text(lines)
    (folder / "data" / "phrasings.jsonl").write_text(lines)
    return folder


def main(monkeypatch, module, *args):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, args)])
    module.main()


def test_frechet_distance_of_known_gaussians():
    """Of axis-aligned ones it is |m - m'|² + sum (s - s')²."""
    rng = np.random.default_rng(0)
    scale, other, shift = np.array([3.0, 2.0, 1.0]), np.array([1.0, 2.0, 2.5]), np.array([1, 0, -2])
    z = rng.standard_normal((200_000, 3))
    frechet = Frechet(z * scale)
    assert frechet(z * scale) == pytest.approx(0, abs=1e-6)
    expected = (shift**2).sum() + ((scale - other) ** 2).sum()
    assert frechet(rng.standard_normal(z.shape) * other + shift) == pytest.approx(
        expected, rel=0.02
    )


def test_four_steps_against_many(material, tmp_path, monkeypatch, capsys):
    result, grid = tmp_path / "out.json", tmp_path / "grid.png"
    args = (material / "data", "-m", material / "model", "--count", 3, "--variants", "tiny", "full")
    main(monkeypatch, few_steps, *args, "--json", result, "--grid", grid)
    out = json.loads(result.read_text())
    assert out["concepts"] == 3 and out["pictures"] == 3 and out["real pictures"] == 6
    assert out["of pairs"] == 9
    for ways in out["results"].values():
        assert list(ways) == list(few_steps.WAYS)
        assert len({r["frechet"] for r in ways.values()}) == 4  # all drew something else
    table = capsys.readouterr().out
    assert "| tiny: distilled, 4 steps |" in table and "| full: base, 28 steps, guided |" in table
    with Image.open(grid) as image:
        assert image.height > 8 * 64


def test_energy_distance_of_known_samples():
    """Of single points so far apart: twice the distance between, less those within."""
    x, y = np.array([[0.0, 0], [0, 2]]), np.array([[3.0, 0], [3, 0]])
    between = (3 + 3 + 13**0.5 + 13**0.5) / 4
    expected = (2 * between - 2 - 0) / 2**0.5
    assert distillation.energy(x, y) == pytest.approx(expected)


def test_losses_against_each_other_and_resumed(material, tmp_path, monkeypatch, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a smiling cat\na red dog\na happy kitty\n")
    args = f"{prompts} {tmp_path} -m {material / 'model'} --updates 3 --teacher-updates 3 --count 3"
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
