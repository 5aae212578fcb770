"""Files of training loops and other tools: the right copy of the model is found, or named."""

import argparse
import collections
import json
import shutil
import types

import mlx.core as mx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from snapgen_mlx.cli.main import main
from snapgen_mlx.convert.containers import is_ema
from snapgen_mlx.convert.to_mlx import convert
from snapgen_mlx.convert.to_pytorch import export
from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.lora_file import LoRAFile
from snapgen_mlx.tensors.formats import open_weights, weight_names
from snapgen_mlx.tensors.weights import load_tensors

from .tiny import write_tiny_model

ONE = "mid.0.attn.to_q.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A transformer's folder in the PyTorch layout."""
    folder = tmp_path_factory.mktemp("source")
    export(write_tiny_model(folder / "mlx"), folder / "torch")
    return folder / "torch" / "transformer"


@pytest.fixture(scope="module")
def state(source):
    return load_file(source / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    convert(source, out)
    return load_tensors(out / "transformer")


def converted(source, content, tmp_path, name="model.pth", **options):
    """(weights, report) of a file with this content."""
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    (save_file if name.endswith("safetensors") else torch.save)(content, folder / name)
    report = convert(folder / name, tmp_path / "out", **options)["components"]["transformer"]
    return load_tensors(tmp_path / "out" / "transformer"), report


def is_times(ours, expected, factor):
    assert set(ours) == set(expected)
    return all(mx.array_equal(ours[k], expected[k] * factor) for k in expected)


def wrap(state, prefix):
    return {prefix + key: a for key, a in state.items()}


PREFIXES = ["model.diffusion_model.", "net.", "dit.", "a.b.c.", "online_model.module."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_common_prefix_is_taken_off_and_said(source, state, expected, tmp_path, prefix):
    content = {k: v.contiguous() for k, v in wrap(state, prefix).items()}
    content["first_stage_model.decoder.conv_in.weight"] = torch.ones(2, 2, 3, 3)
    ours, report = converted(source, content, tmp_path, "model.safetensors")
    assert is_times(ours, expected, 1) and report["ema"] is False
    assert report["prefixes"] == {prefix: len(state)}
    (dropped,) = report["dropped"]
    assert dropped["source"].startswith("first_stage") and prefix in dropped["action"]


def lit_ema(state):
    """An averaging module whose buffers' names must hold no dots."""
    ema = {f"model_ema.diffusion_model{k.replace('.', '')}": a / 2 for k, a in state.items()}
    counters = {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(7)}
    return {"state_dict": wrap(state, "model.diffusion_model.") | ema | counters}


def trained_by_name(state):
    moments = {k: {"exp_avg": a * 3, "exp_avg_sq": a * 4} for k, a in state.items()}
    return {"model": state, "params_ema": half(state), "optim": {"state": moments}}


def moments_by_kind(state):
    return {"net": state, "net_ema": half(state), "opt": {"exp_avg": state, "grad": state}}


def settings(state):
    enough = {
        "args": argparse.Namespace(lr=np.float32(1e-4), seeds=np.arange(3), names={"a", "b"}),
        "hyper": types.SimpleNamespace(betas=(0.9, 0.99)),
        "seen": collections.Counter("aab"),
        "best": np.float64(0.5),
        "metrics": collections.defaultdict(list, {"loss": [1.0]}),
        "torch": torch.torch_version.TorchVersion("2.1"),
    }
    return enough | {"state_dict": state, "state_dict_ema": half(state)}


def half(state):
    return {k: a / 2 for k, a in state.items()}


CONTAINERS = {
    "LitEma": lit_ema,
    "optimizer by name": trained_by_name,
    "optimizer by kind": moments_by_kind,
    "settings": settings,
    "shadow": lambda s: {"model_state": s, "ema": {"shadow": half(s), "decay": 0.9}},
    "ema_0.9999": lambda s: {"module": wrap(s, "module."), "ema_0.9999": half(s)},
    "flat": lambda s: s | wrap(half(s), "averaged_model."),
    "EMAModel": lambda s: {"net": s, "EMAModel": {"weights": half(s), "step": torch.tensor(3)}},
}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("ema", [False, True])
def test_raw_and_averaged_weights_are_told_apart(source, state, expected, tmp_path, name, ema):
    content = CONTAINERS[name](state)
    ours, report = converted(source, content, tmp_path, "last.ckpt", ema=ema)
    assert is_times(ours, expected, 0.5 if ema else 1)
    assert report["ema"] is ema
    other = "dropped: the raw weights (--ema was given)"
    other = other if ema else "dropped: the EMA weights (--ema takes them)"
    assert sum(row["action"] == other for row in report["dropped"]) == len(state)


def test_averaged_weights_alone_are_taken_and_said(source, state, expected, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    torch.save({"ema": half(state)}, folder / "model.pt")
    result = CliRunner().invoke(main, ["convert", str(folder), str(tmp_path / "out")])
    assert result.exit_code == 0 and "took the EMA weights" in result.stdout
    assert is_times(load_tensors(tmp_path / "out" / "transformer"), expected, 0.5)


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (lambda s: {"student": s, "teacher": half(s)}, {}, "the model 2 times, as 'student.'"),
        (lambda s: {"ema_a": s, "ema_b": half(s)}, {}, "the model 2 times, as 'ema_a.'"),
        (lambda s: {"model": s}, {"ema": True}, "no EMA weights"),
        (
            lambda s: {"model": s, "ema": {"shadow_params": list(s.values())}},
            {"ema": True},
            "a list without names",
        ),
        (lambda s: {"net": s | {"new.weight": torch.ones(2, 2)}}, {}, "no rule for 'net.new"),
        (lambda s: {"net": {k: v for k, v in s.items() if k != ONE}}, {}, f"lacks '{ONE}'"),
        (lambda s: {"net": s | {ONE: torch.empty(0)}}, {}, "ZeRO-3"),
        (
            lambda s: {"net": {k: v for k, v in s.items() if k != ONE}, "ema": half(s)},
            {},
            "only a part of the raw ones; convert with --ema",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(source, state, tmp_path, content, options, words):
    with pytest.raises(SnapGenError, match="(?s)" + words.replace(".", r"\.")):
        converted(source, content(state), tmp_path, **options)
    assert not (tmp_path / "out").exists()


def test_a_list_of_averaged_weights_is_left_out_with_the_reason(source, state, expected, tmp_path):
    content = {"model": state, "ema": {"shadow_params": list(half(state).values())}}
    ours, report = converted(source, content, tmp_path)
    assert is_times(ours, expected, 1)
    assert {row["action"] for row in report["dropped"]} == {"dropped: EMA weights without names"}


def test_words_of_averages():
    yes = ["ema.", "state_dict_ema.", "EMAModel.", "modelEma.", "a.shadow.", "swa_model.", "ema2."]
    no = ["", "model.", "schema.", "cinema.", "emanate.", "net.mean."]
    assert all(map(is_ema, yes)) and not any(map(is_ema, no))


# --- 8-bit floats with scales


def scaled(a, kind, dtype=torch.float8_e4m3fn):
    """(codes, scale) as the known tools write a matrix."""
    if kind == "tensor":
        scale = a.abs().max() / 400
        return (a / scale).to(dtype), scale
    if kind == "row":
        scale = a.abs().amax(1, keepdim=True) / 400
        return (a / scale).to(dtype), scale
    rows, columns = -(-a.shape[0] // 16), -(-a.shape[1] // 16)
    scale = torch.rand(rows, columns) + 0.5
    whole = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
    return (a / whole[: a.shape[0], : a.shape[1]]).to(dtype), scale


@pytest.mark.parametrize(
    ("kind", "name"),
    [("tensor", "scale_weight"), ("row", "weight_scale"), ("block", "weight_scale_inv")],
)
def test_scales_of_float8_are_multiplied_in(source, state, expected, tmp_path, kind, name):
    content = {k: v.contiguous() for k, v in state.items()}
    layers = [ONE.removesuffix(".weight"), "downsample.proj", "time_embed.0.fc1"]
    for layer in layers:
        codes, scale = scaled(state[f"{layer}.weight"], kind)
        content |= {f"{layer}.weight": codes, f"{layer}.{name}": scale.contiguous()}
        content[f"{layer}.input_scale"] = torch.tensor(3.0)
    content = wrap(content, "model.diffusion_model.")
    content["model.diffusion_model.scaled_fp8"] = torch.empty(0)
    ours, report = converted(source, content, tmp_path, "model.safetensors")
    for key, a in expected.items():
        if key.removesuffix(".weight") in layers:
            step = 0.07 * mx.abs(a).max() if kind == "block" else 0.07 * mx.abs(a) + 0.01
            assert (mx.abs(ours[key] - a) <= step).all(), key
        else:
            assert mx.array_equal(ours[key], a), key
    reasons = [row["action"] for row in report["dropped"]]
    assert reasons.count("dropped: multiplied into its weight") == len(layers)
    assert reasons.count("dropped: of computing in 8 bits") == len(layers) + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({ONE.replace("weight", "weight_scale"): torch.ones(7)}),
        lambda t: t.update({ONE.replace("weight", "weight_scale"): torch.ones(2, 2, 2)}),
        lambda t: t.update({ONE.replace("weight", "weight_scale"): torch.ones(1).int()}),
        lambda t: t.update(
            {ONE.replace("weight", n): torch.ones(1) for n in ("weight_scale", "scale_weight")}
        ),
        lambda t: t.update({"mid.0.attn.to_k.weight_scale": torch.ones(1)}),  # of a float32 weight
        lambda t: t.update({f"x.{ONE}_scale": torch.ones(1)}),  # under another prefix
        lambda t: t.update(
            {
                f"{ONE}_scale": torch.ones(1),
                "mid.0.attn.to_k.weight": t["mid.0.attn.to_k.weight"].to(torch.float8_e5m2),
            }
        ),
    ],
)
def test_scales_that_fit_nothing_are_refused(source, state, tmp_path, change):
    content = {k: v.contiguous() for k, v in state.items()}
    content[ONE] = content[ONE].to(torch.float8_e4m3fn)
    change(content)
    with pytest.raises(SnapGenError, match="scale"):
        converted(source, content, tmp_path, "model.safetensors")


# --- names of files


def variant_shards(folder, state, index, shard):
    folder.mkdir()
    keys = sorted(state)
    table = {}
    for i, part in enumerate((keys[:20], keys[20:]), 1):
        name = shard.format(f"{i:05}-of-00002")
        save_file({k: state[k].contiguous() for k in part}, folder / name)
        table |= dict.fromkeys(part, name)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": table}))


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        (
            "diffusion_pytorch_model.safetensors.index.bf16.json",
            "diffusion_pytorch_model.bf16-{}.safetensors",
        ),
        (
            "diffusion_pytorch_model.safetensors.index.fp16.json",
            "diffusion_pytorch_model-{}.fp16.safetensors",
        ),
        ("model.safetensors.index.non_ema.json", "model.non_ema-{}.safetensors"),
        ("model.fp16.safetensors.index.json", "model.fp16-{}.safetensors"),
    ],
)
def test_shards_of_a_variant(source, state, expected, tmp_path, index, shard):
    folder = tmp_path / "in"
    variant_shards(folder, state, index, shard)
    shutil.copy(source / "config.json", folder)
    for file in list(folder.iterdir()):  # as a Mac leaves them on other systems' disks
        (folder / f"._{file.name}").write_bytes(b"\0\5\26\7")
    for place in (folder, folder / index):
        assert len(open_weights(place).infos) == len(state)
    convert(folder, tmp_path / "out")
    assert is_times(load_tensors(tmp_path / "out" / "transformer"), expected, 1)
    (folder / index).unlink()
    with pytest.raises(SnapGenError, match="without their index"):
        open_weights(folder)


@pytest.mark.parametrize(
    ("names", "used"),
    [
        (["model.fp16.safetensors", "model.safetensors"], ["model.safetensors"]),
        (["model.fp16.safetensors", "pytorch_model.bin"], ["model.fp16.safetensors"]),
        (["model.fp16.safetensors", "my_lora.safetensors"], ["model.fp16.safetensors"]),
        (["._model.safetensors", "x.pt"], ["x.pt"]),
        (["last.ckpt", "config.json"], ["last.ckpt"]),
        (["my.own.name.safetensors"], ["my.own.name.safetensors"]),
        (["._model.safetensors", ".model.bin"], []),
    ],
)
def test_names_of_variants(names, used):
    assert weight_names(names) == used


def test_two_variants_are_not_guessed_between():
    with pytest.raises(SnapGenError, match=r"model\.bf16\.safetensors', 'model\.fp16"):
        weight_names(["model.fp16.safetensors", "model.bf16.safetensors"])


def test_files_that_are_not_read_are_named(source, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(source, folder)
    (folder / "diffusion_pytorch_model.ema.safetensors").write_bytes(b"x")
    result = CliRunner().invoke(main, ["convert", str(folder), str(tmp_path / "out")])
    assert result.exit_code == 0
    assert "not read: diffusion_pytorch_model.ema.safetensors" in result.stdout


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n"
PAGE = b"\n<!DOCTYPE html><html><body>Sign in</body></html>"
XML = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'


@pytest.mark.parametrize(
    ("data", "words"),
    [(POINTER, "git lfs pull"), (PAGE, "a web page"), (XML, "a web page"), (b"", "empty")],
)
@pytest.mark.parametrize("name", ["model.safetensors", "model.bin", "config.json", ".metadata"])
def test_what_stands_in_a_files_place_is_named(source, tmp_path, data, words, name):
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    (folder / name).write_bytes(data)
    with pytest.raises(SnapGenError, match=f"{name} is.*{words}"):
        convert(folder, tmp_path / "out")
    if name.startswith("model"):
        with pytest.raises(SnapGenError, match=words):
            LoRAFile.read(folder / name)
