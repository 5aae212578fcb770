"""The comparison of elastic and standalone training, at a size that takes seconds."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import elastic
from snapgen_mlx.hub import embedded_model
from snapgen_mlx.loading import load_dit_config


def write_data(folder):
    rng = np.random.default_rng(0)
    for part, n in (("train", 4), ("heldout", 2)):
        (folder / part).mkdir(parents=True)
        rows = []
        for i in range(n):
            pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((128, 128)).save(folder / part / f"{i}.png")
            rows.append(json.dumps({"file_name": f"{i}.png", "text": "a red apple"}))
        (folder / part / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def run(monkeypatch, capsys, data, out, *options):
    monkeypatch.setattr(elastic, "ROUNDS", 1)
    sizes = ["--seeds", "2", "--steps", "2", "--batch", "2", "--hidden", "32"]
    monkeypatch.setattr(sys, "argv", ["elastic", str(data), str(out), *sizes, *options])
    elastic.main()
    return capsys.readouterr().out, json.loads((out / "results.json").read_text())


def test_comparison_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, capsys):
    data, out = write_data(tmp_path / "data"), tmp_path / "out"
    log, first = run(monkeypatch, capsys, data, out)
    arms = [*elastic.STANDALONE, *elastic.ELASTIC]
    assert list(first["losses"]) == arms
    for arm, losses in first["losses"].items():
        widths = [arm.split("-")[1]] if arm in elastic.STANDALONE else elastic.WIDTHS
        assert [set(of_seed) for of_seed in losses] == [set(widths)] * 2
        assert losses[0] != losses[1]
    assert "| undistilled |" in log and "Weights and optimizer" in log

    before = {p: p.stat().st_mtime_ns for p in out.rglob("state-*")}
    assert len(before) == 2 * 2 * len(arms)
    for path in (out / "unscaled-1").iterdir():
        path.unlink()
    _, second = run(monkeypatch, capsys, data, out)
    assert second == first
    changed = {p.parent.name for p, t in before.items() if p.stat().st_mtime_ns != t}
    assert changed == {"unscaled-1"}


def test_fine_tuning_starts_from_trained_weights(tmp_path, monkeypatch, capsys):
    config = elastic.geometry(32)
    trained = {k: a * 0 for k, a in elastic.random_supernet(config).items()}
    monkeypatch.setattr(elastic, "load_float_supernet", lambda model: (config, trained))
    data, out = write_data(tmp_path / "data"), tmp_path / "out"
    options = ["--fine-tune", "--arms", "elastic", "--learning-rate", "1e-9"]
    log, results = run(monkeypatch, capsys, data, out, *options)
    assert "| before | " in log
    for name, before in results["before"].items():
        assert before > 1  # of velocities, where nothing is predicted
        for arm in ("elastic", f"standalone-{name}"):
            assert [losses[name] for losses in results["losses"][arm]] == pytest.approx(
                [before] * 2
            )


def test_a_small_model_takes_what_the_embedded_one_does():
    own, config = load_dit_config(embedded_model()), elastic.geometry(32)
    ends = ("in_channels", "patch_size", "text_dims")
    assert [getattr(config, k) for k in ends] == [getattr(own, k) for k in ends]
    assert config.variants == elastic.WIDTHS and config.hidden_size == 32


def test_arms_of_a_seed_start_alike():
    config = elastic.geometry(32)
    params = elastic.random_supernet(config)
    supernet = elastic.make_trainer("elastic", config, params, {}).weights.params
    width = elastic.make_trainer("standalone-tiny", config, params, {}).weights.params
    own = width["mid.0.ffn.fc1.weight"]
    assert own.shape == (36, 12)
    assert (supernet["mid.0.ffn.fc1.weight"][:36, :12] == own).all()
    assert (supernet["time_embed.0.fc1.weight"] == width["time_embed.0.fc1.weight"]).all()


def test_table_and_cost():
    losses = {arm: [{n: 2.0 for n in elastic.WIDTHS}] * 2 for arm in elastic.ELASTIC}
    losses["elastic"] = [
        {"tiny": 1.01, "small": 1.0, "full": 1.0},
        {"tiny": 2.06, "small": 2.0, "full": 1.98},
    ]
    for name in elastic.WIDTHS:
        losses[f"standalone-{name}"] = [{name: 1.0}, {name: 2.0}]
    assert "before" not in str(elastic.table(losses, {}))
    rows = elastic.table(losses, dict(zip(elastic.WIDTHS, (3.0, 4.0, 5.0), strict=True)))
    assert rows.pop(2) == "| before | 3.0000 | 4.0000 | 5.0000 |"
    assert rows[2].startswith("| standalone | 1.5000 ± 0.5000 |")
    assert "1.5350 ± 0.5250 (+2.00 ± 1.00 %)" in rows[3]
    assert rows[3].endswith("1.4900 ± 0.4900 (-0.50 ± 0.50 %) |")

    size = {"elastic": 15, **dict(zip(elastic.STANDALONE, (4, 6, 10), strict=True))}
    seconds = {"elastic": 1.8, **dict(zip(elastic.STANDALONE, (0.2, 0.4, 1.0), strict=True))}
    memory, time = elastic.cost_lines(size, seconds)
    assert "0.750 of" in memory
    assert "1.125 of" in time and "0.812 with m = 0.300" in time and "+38.5 %" in time


@pytest.mark.parametrize("arm", ["elastic", "standalone-small"])
def test_bytes_are_those_of_weights_and_two_moments(arm):
    config = elastic.geometry(32)
    trainer = elastic.make_trainer(arm, config, elastic.random_supernet(config), {})
    floats = sum(a.size for a in trainer.weights.params.values())
    counters = 8 + 4  # the optimizer's step and learning rate
    assert elastic.state_bytes(trainer) == 3 * 4 * floats + counters
