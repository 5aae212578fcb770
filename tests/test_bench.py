"""What ``snapgen-mlx bench`` measures, the operations it counts, and the table of results."""

import dataclasses
import json
import math

import mlx.core as mx
import mlx.nn as nn
import pytest
from click.testing import CliRunner

from benchmarks import collect
from snapgen_mlx import bench
from snapgen_mlx.bench import Bench, Plan
from snapgen_mlx.cli.main import main
from snapgen_mlx.config import DiTConfig
from snapgen_mlx.flops import decoder_flops, step_flops
from snapgen_mlx.models import attention
from snapgen_mlx.models.dit import DiT
from snapgen_mlx.models.vae import AutoencoderKLQwenImage, VAEConfig

from .gpu import as_on_a_gpu
from .tiny import tiny_config, write_tiny_model

pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch):
    monkeypatch.setattr(bench, "MATRIX", {True: 64, False: 64})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def counted(monkeypatch):
    """A list that gets the operations of each product and attention as it is called."""
    found = []

    def watch(owner, name, flops):
        call = getattr(owner, name)

        def watched(*args, **kwargs):
            y = call(*args, **kwargs)
            found.append(flops(y, *args))
            return y

        monkeypatch.setattr(owner, name, watched)

    def layer(y, self, x):
        return 2 * y.size * math.prod(self.weight.shape[1:])

    watch(nn.Linear, "__call__", layer)
    watch(nn.Conv2d, "__call__", layer)
    # Each row of y is the product of a filter of 4·D inputs.
    watch(attention.Filter, "__call__", lambda y, *_: 2 * y.size * 4 * y.shape[-1])

    def scores(y, q, k, *_):
        return 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]

    watch(mx.fast, "scaled_dot_product_attention", scores)
    return found


@pytest.mark.parametrize(
    "change",
    [{}, {"downsample": False, "attention": ["dense"] * 3}, {"patch_size": 1}, {"bna_radius": 2}],
    ids=str,
)
def test_counted_operations_of_a_step(counted, change):
    config = dataclasses.replace(tiny_config(), widths=[1.0], **change)
    dit = DiT(config)
    text = dit.condition_text({"static": mx.zeros((1, 5, 8))}, None, 1)
    time = dit.condition_time(mx.array([0.5]))
    counted.clear()
    dit.denoise(mx.zeros((1, 16, 32, config.in_channels)), time, text)
    assert step_flops(config, (16, 32), 5) == sum(counted)


def test_counted_operations_of_decoding(counted):
    config = VAEConfig(base_dim=8)
    AutoencoderKLQwenImage(config).decode(mx.zeros((1, 6, 4, 16)))
    assert decoder_flops(config, 6, 4) == sum(counted)


def test_dense_attention_would_grow_with_the_square():
    """Operations per token of ASSA and dense attention, from 512² to 2048² pixels."""
    small = DiTConfig.from_preset("small")
    dense = dataclasses.replace(small, attention=["dense"] * 3)
    grow = [
        step_flops(c, (256, 256), 77) / 16 / step_flops(c, (64, 64), 77) for c in (small, dense)
    ]
    assert 1.3 < grow[0] < 2 < 0.8 * grow[1]


def test_rows_of_a_model(model):
    plan = Plan(("tiny", "full"), (64,), rounds=2, batch=2)
    rows = list(Bench(model, plan).rows())
    whats = [row["what"] for row in rows]
    assert whats == ["encode", "step", "decode", "picture"] * 2 + ["training"]
    for row in rows:
        s = row["seconds"]
        assert 0 < s["least"] <= s["median"] <= s["most"] and s["rounds"] == 2
        if row["what"] in ("step", "training"):
            assert row["gflops"] == pytest.approx(row["gflop"] / s["median"])
            assert row["share"] > 0
        if row["what"] != "picture":
            memory = row["memory"]
            assert memory["measured"] > 0 and 0.3 < memory["predicted"] / memory["measured"] < 3
    assert rows[1]["gflop"] < rows[5]["gflop"]  # tiny and full


def test_what_does_not_fit_is_skipped(model, monkeypatch):
    monkeypatch.setattr("snapgen_mlx.memory.usable_memory", lambda: 1000)
    (row,) = Bench(model, Plan(("full",), (64,), parts=("step",))).rows()
    assert "needs about" in row["skipped"] and "seconds" not in row


def test_few_bits_are_measured_on_a_gpu(model, monkeypatch):
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(bench, "group_size", lambda config: 32)
    plan = Plan(("full",), (64,), (16, 4), rounds=1, parts=("step",))
    sixteen, four = Bench(model, plan).rows()
    assert (sixteen["bits"], four["bits"]) == (16, 4)
    assert four["memory"]["predicted"] < sixteen["memory"]["predicted"]
    assert four["memory"]["measured"] < sixteen["memory"]["measured"]


def test_command_prints_and_writes_what_is_documented(model, tmp_path):
    file = tmp_path / "b.json"
    args = ["bench", str(model), "--variant", "tiny", "--rounds", "1", "--json", str(file)]
    result = CliRunner().invoke(main, [*args, "--only", "step", "--only", "picture"])
    assert result.exit_code == 0, result.output
    assert "step" in result.output and "products of large matrices" in result.output
    document = json.loads(file.read_text())
    assert (document["format"], document["version"]) == ("snapgen-mlx bench", 1)
    page = (collect.FOLDER / "README.md").read_text()
    keys = {*document, *document["machine"], *(key for row in document["rows"] for key in row)}
    assert not [key for key in keys if f"`{key}`" not in page]
    assert CliRunner().invoke(main, [*args, "--geometry", "tiny"]).exit_code == 2
    assert CliRunner().invoke(main, [*args, "--bits", "4"]).exit_code == 2


@pytest.mark.parametrize(
    "wrong",
    [("--variant", "fulll"), ("--size", "64", "--size", "100"), ("--json", "text/b.json")],
)
def test_what_is_wrong_is_said_before_anything_is_measured(model, tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("")
    monkeypatch.setattr(Bench, "rows", lambda self: pytest.fail("measured"))
    result = CliRunner().invoke(main, ["bench", str(model), "--variant", "tiny", *wrong])
    assert result.exit_code == (1 if "--json" in wrong else 2), result.output
    assert len(result.stderr.splitlines()) == 1 and wrong[-1] in result.stderr


def test_collected_table_says_what_is_missing(model, tmp_path):
    file = tmp_path / "b.json"
    args = ["bench", str(model), "--variant", "tiny", "--rounds", "1", "--only", "step"]
    assert CliRunner().invoke(main, [*args, "--json", str(file)]).exit_code == 0
    document = json.loads(file.read_text())
    lines = collect.table([document]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "tiny, 16 bits" in lines[2] and sum(collect.NOBODY in line for line in lines) == 5
    document["machine"]["processor"] = "Apple M3 Pro"
    assert sum(collect.NOBODY in x for x in collect.table([document]).splitlines()) == 4
