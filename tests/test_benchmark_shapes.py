"""The commands behind docs/performance.md, on small shapes."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from benchmarks import memory, precision, profile_step, shapes, sheet, updates, widths
from snapgen_mlx import Pipeline
from snapgen_mlx.errors import UsageError
from snapgen_mlx.flops import step_flops

from .tiny import tiny_config

pytestmark = pytest.mark.usefixtures("uncompiled")


def small():
    config = tiny_config()
    config.widths, config.text_dims = [1.0], {"static": 8}
    return config


def test_schedules_and_their_frontier():
    names = ["tiny", "small", "full"]
    found = widths.schedules(names, 4)
    # 3, 6, 10 and 15 ways to draw 1 to 4 steps, narrow widths first.
    assert len(found) == len(set(found)) == 34
    assert {"tiny:1", "tiny:2,full:2", "tiny:1,small:1,full:2", "full:4"} <= set(found)
    results = {
        "fast": {"seconds": 1.0, "overall": 0.5, "frechet": 9.0},
        "worse": {"seconds": 2.0, "overall": 0.4, "frechet": 9.0},
        "good": {"seconds": 3.0, "overall": 0.7, "frechet": 5.0},
    }
    assert widths.frontier(results, "overall") == ["fast", "good"]
    assert widths.frontier(results, "frechet") == ["fast", "good"]
    lines = widths.table(results)
    assert len({line.count("|") for line in lines}) == 1 and lines[3].endswith("|  |")
    assert lines[2].endswith("| overall, Fréchet |")
    results["worse"]["frechet"] = 7.0  # near to real pictures, far from the prompts
    assert widths.frontier(results, "overall") == ["fast", "good"]
    assert widths.frontier(results, "frechet") == ["fast", "worse", "good"]


def test_a_profile_counts_all_operations_of_a_step():
    config = small()
    run, model = shapes.evaluation(config, 128)
    found = profile_step.profile(run, model)
    assert sum(found.flops.values()) == step_flops(config, (16, 16), shapes.TEXT)
    assert {"feed-forward", "attention, far", "attention, near", "attention, dense"} <= set(
        found.seconds
    )


@pytest.mark.parametrize("name", shapes.TABLES)
def test_tables_of_shapes(name, capsys, monkeypatch):
    monkeypatch.setattr(shapes, "NEIGHBOURHOODS", [(4, 0), (4, 1)])
    monkeypatch.setattr(shapes, "STAGES", {"layers": [1, 1, 1]})
    args = SimpleNamespace(sizes=[128], rounds=1, loss=True, steps=2)
    shapes.TABLES[name](small(), args)
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == {"ablation": 6, "tokens": 3, "neighbourhood": 4}[name]


def test_far_tokens_cost_less_with_assa():
    dense, assa = small(), small()
    dense.attention = shapes.DENSE
    assert step_flops(assa, (64, 64), 1) < step_flops(dense, (64, 64), 1)


def test_what_half_precision_and_memory_are_measured_with(tmp_path):
    memory.write_model(tmp_path, 512, 8)
    for predicted, measured in memory.drawing(tmp_path, "tiny", 64).values():
        assert predicted == pytest.approx(measured, rel=0.25)
    pipe = Pipeline.load(dtype=mx.float16)
    with precision.largest_answer() as answers:
        assert precision.latents(pipe, 1, 1).dtype == mx.float32
    assert 1 < mx.stack(answers).max().item() < precision.LARGEST


def test_what_does_not_fit_is_left_out(capsys, monkeypatch):
    """Running out of memory at one size would lose the table."""
    dense = dataclasses.replace(small(), attention=shapes.DENSE)
    tokens = (256 // 8 // dense.patch_size) ** 2
    needed = [8 * c.num_heads * shapes.attention_scores(c, 0, tokens) for c in (small(), dense)]
    monkeypatch.setattr(shapes, "usable_memory", lambda: sum(needed) // 2)
    shapes.tokens(small(), SimpleNamespace(sizes=[256], rounds=1))
    row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].strip("| ").split("|")]
    assert [i for i, cell in enumerate(row) if cell == "-"] == [3, 5, 6]


def test_what_surrounds_a_step(capsys, monkeypatch):
    monkeypatch.setattr(updates, "SIDE", 8)
    updates.main(["--arrays", "2", "--rounds", "1"])
    assert capsys.readouterr().out.count("| Adam, ") == 2


def test_prompts_of_sheets(tmp_path):
    folder = Path(sheet.__file__).parent / "prompts"
    counts = {file.stem: len(sheet.read_prompts(file)) for file in folder.glob("*.txt")}
    assert counts == {"composed": 48, "varied": 60}
    with pytest.raises(UsageError, match=r"cannot read .*none\.txt"):
        sheet.read_prompts(tmp_path / "none.txt")
