"""``slice``, ``info`` and ``init``: models cut, looked at and made up."""

import dataclasses
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten
from PIL import Image

from snapgen_mlx.cli.main import main
from snapgen_mlx.config import DiTConfig
from snapgen_mlx.convert import init as init_module
from snapgen_mlx.convert.init import init
from snapgen_mlx.convert.slice import slice_model
from snapgen_mlx.digest import base_digest
from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.files import write_json
from snapgen_mlx.layout import load_config
from snapgen_mlx.loading import load_dit
from snapgen_mlx.models.elastic import random_supernet
from snapgen_mlx.models.vae import VAEConfig
from snapgen_mlx.tensors.weights import load_tensors, save_tensors

from .settled import active_memory
from .tiny import write_tiny_model

VARIANTS = ["tiny", "small", "full"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def run(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def one_line(result, code):
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.output
    return lines[0]


def files(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def assert_same(ours: dict, expected: dict):
    assert ours.keys() == expected.keys()
    for key, a in ours.items():
        assert a.dtype == expected[key].dtype and mx.array_equal(a, expected[key]), key


# --- slice


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_slice_is_the_supernet_at_that_width(model, tmp_path, variant):
    dest = tmp_path / "cut"
    assert run("slice", model, dest, "--variant", variant).exit_code == 0
    theirs, ours = (
        {k: v for k, v in files(folder).items() if not k.startswith("transformer/")}
        for folder in (model, dest)
    )
    head = json.loads(ours.pop("config.json"))
    assert head.pop("base") == base_digest(model)  # LoRAs of the model are its too
    assert head == json.loads(theirs.pop("config.json")) and ours == theirs
    config = DiTConfig.from_dict(load_config(dest / "transformer"))
    assert config.variants == [variant] and config.widths == [1.0]
    cut, whole = load_dit(dest), load_dit(model, variant)
    assert_same(*(dict(tree_flatten(m.parameters())) for m in (cut, whole)))
    x, t = mx.random.normal((2, 16, 16, 16)), mx.array([0.3, 1.0])
    text = {"static": mx.random.normal((2, 3, 8))}
    assert mx.array_equal(cut(x, t, text), whole(x, t, text))
    for name, folder, option in (("a", model, ["--variant", variant]), ("b", dest, [])):
        path = tmp_path / f"{name}.png"
        assert run("generate", "a cat", "-m", folder, "-o", path, *option).exit_code == 0
    a, b = (Image.open(tmp_path / f"{n}.png") for n in "ab")
    assert a.tobytes() == b.tobytes()
    assert json.loads(b.text["snapgen-mlx"])["variant"] == variant


def packed(folder, config: DiTConfig, group: int, bits: int = 8):
    """A transformer folder whose every matrix is packed; the gates in 4 bits."""
    mx.random.seed(1)
    tensors, quantization = {}, {"group_size": group, "bits": bits}
    for key, a in random_supernet(config).items():
        layer = key.removesuffix(".weight")
        if layer == key or a.ndim != 2 or a.shape[-1] % group:
            tensors[key] = a
            continue
        own = 4 if "modulation" in key else bits
        if own != bits:
            quantization[layer] = {"group_size": group, "bits": own}
        names = (f"{layer}.weight", f"{layer}.scales", f"{layer}.biases")
        tensors |= zip(names, mx.quantize(a, group, own), strict=True)
    save_tensors(folder / "transformer", tensors)
    write_json(
        folder / "transformer" / "config.json", config.to_dict() | {"quantization": quantization}
    )
    return folder


@pytest.fixture(scope="module")
def packed_model(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("packed") / "model"
    shutil.copytree(model, folder)
    config = dataclasses.replace(
        DiTConfig.from_preset("embedded"), layers=[1, 2, 1], text_dims={"static": 8}, caption_dim=32
    )
    return packed(folder, config, 32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_weights_are_cut_on_their_groups(packed_model, tmp_path, variant):
    slice_model(packed_model, tmp_path / "cut", variant)
    stored = load_tensors(tmp_path / "cut" / "transformer")
    assert stored["down.0.attn.to_q.weight"].dtype == mx.uint32
    cut, whole = load_dit(tmp_path / "cut"), load_dit(packed_model, variant)
    assert_same(*(dict(tree_flatten(m.parameters())) for m in (cut, whole)))
    quantization = load_config(tmp_path / "cut" / "transformer")["quantization"]
    assert quantization == {
        **{"group_size": 32, "bits": 8},
        "time_embed.0.modulation": {"group_size": 32, "bits": 4},
    }
    before, after = (
        (p / "transformer" / "model.safetensors").stat().st_size
        for p in (packed_model, tmp_path / "cut")
    )
    width = dict(zip(VARIANTS, (0.375, 0.5, 1), strict=True))[variant]
    assert after < before * (width + 0.05)


def test_groups_that_a_width_cuts_through(packed_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(packed_model, folder)
    shutil.rmtree(folder / "transformer")
    packed(folder, DiTConfig.from_dict(load_config(packed_model / "transformer")), 64)
    line = one_line(run("slice", folder, tmp_path / "cut", "--variant", "tiny"), 1)
    assert "quantized in groups that width 0.375 cuts through" in line
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert run("slice", folder, tmp_path / "cut", "--variant", "small").exit_code == 0


def test_slices_that_cannot_be(model, tmp_path):
    dest = tmp_path / "cut"
    assert "tiny, small, full" in one_line(run("slice", model, dest, "--variant", "huge"), 2)
    assert "nowhere" in one_line(run("slice", tmp_path / "nowhere", dest, "--variant", "tiny"), 1)
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    path = damaged / "transformer" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "model.safetensors" in one_line(run("slice", damaged, dest, "--variant", "tiny"), 1)
    tensors = load_tensors(model / "transformer")
    del tensors["final.proj.bias"]
    save_tensors(damaged / "transformer", tensors)
    assert "final.proj.bias" in one_line(run("slice", damaged, dest, "--variant", "tiny"), 1)
    assert [p.name for p in tmp_path.iterdir()] == ["damaged"]

    assert run("slice", model, dest, "--variant", "tiny").exit_code == 0
    assert "cut" in one_line(run("slice", model, dest, "--variant", "tiny"), 1)
    again = run("slice", dest, tmp_path / "again", "--variant", "tiny")
    assert "nothing to slice" in one_line(again, 2)


# --- info


def test_info_says_what_there_is(model):
    result = run("info", model)
    assert result.exit_code == 0
    size = sum(len(b) for b in files(model).values())
    assert f"{size / 1e6:.0f} MB on disk" in result.output
    assert "3 steps, guidance 2, shift 3, 64x64" in result.output
    assert "SnapGenAutoencoder" in result.output and "static_text" in result.output
    for i, name in enumerate(VARIANTS):
        row = next(line for line in result.output.splitlines() if line.startswith(name))
        parameters = tree_flatten(load_dit(model, VARIANTS[i]).parameters())
        assert f"{sum(a.size for _, a in parameters) / 1e6:.1f} M" in row
    assert "--variant auto takes full" in result.output


def test_info_counts_bits_of_packed_models(packed_model):
    line = next(s for s in run("info", packed_model).output.splitlines() if s[:11] == "transformer")
    infos = load_tensors(packed_model / "transformer")
    size = sum(a.nbytes for a in infos.values())
    config = DiTConfig.from_dict(load_config(packed_model / "transformer"))
    count = sum(a.size for a in random_supernet(config).values())
    assert f"{count / 1e6:.1f} M parameters, {8 * size / count:.3g} bits per weight" in line


def test_info_reads_no_weights(model):
    mx.clear_cache()
    before = active_memory()
    mx.reset_peak_memory()
    assert run("info", model).exit_code == 0
    assert mx.get_peak_memory() - before < 10_000


def test_info_of_what_is_no_model(packed_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(packed_model, folder)
    config = load_config(folder / "transformer") | {"quantization": {"bits": 8}}
    write_json(folder / "transformer" / "config.json", config)
    assert "is quantized" in one_line(run("info", folder), 1)
    one_line(run("info", tmp_path / "nowhere"), 1)
    assert "config.json" in one_line(run("info", tmp_path), 1)
    (tmp_path / "model_index.json").write_text("{}")
    assert "snapgen-mlx convert" in one_line(run("info", tmp_path), 1)


# --- init


@pytest.fixture
def small_geometry(monkeypatch):
    """Geometries of the same parts, but quickly written."""
    real = DiTConfig.from_preset

    def preset(name):
        small = dict(hidden_size=256, head_dim=16, num_heads=16, num_kv_heads=8, caption_dim=32)
        return dataclasses.replace(real("full"), **small, layers=[1, 2, 1], bna_blocks=4)

    monkeypatch.setattr(init_module.DiTConfig, "from_preset", preset)
    monkeypatch.setattr(init_module, "VAEConfig", lambda: VAEConfig(base_dim=8))


def test_init_writes_a_model_that_makes_noise(tmp_path):
    assert "noise" in run("init", tmp_path / "a", "--geometry", "embedded", "--random", 1).output
    paths = [tmp_path / f"{name}.png" for name in "xyz"]
    for path, prompt, seed in zip(paths, ("a cat", "a dog", "a cat"), (0, 0, 1), strict=True):
        args = ("-m", tmp_path / "a", "--seed", seed, "-o", path, "--steps", 1, "--variant", "tiny")
        result = run("generate", prompt, *args)
        assert result.exit_code == 0 and "the prompt has no effect" in result.stderr
    x, y, z = (np.array(Image.open(path)) for path in paths)
    assert (x == y).all() and (x != z).any() and len(np.unique(x)) > 10
    assert "none" in run("info", tmp_path / "a").output


def test_init_in_both_formats_is_the_same_model(tmp_path, small_geometry):
    for name, *options in (("mlx",), ("again",), ("torch", "--format", "pytorch")):
        result = run("init", tmp_path / name, "--geometry", "full", "--random", 3, *options)
        assert result.exit_code == 0, result.output
    assert files(tmp_path / "mlx") == files(tmp_path / "again")
    assert "noise" in (tmp_path / "torch" / "README.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "mlx", "torch"]
    assert run("convert", tmp_path / "torch", tmp_path / "back").exit_code == 0
    for part in ("transformer", "vae"):
        ours, theirs = (load_tensors(tmp_path / name / part) for name in ("mlx", "back"))
        assert_same(ours, theirs)
        assert all(a.dtype == mx.float32 for a in ours.values())
        assert not any(mx.array_equal(a, mx.zeros_like(a)) for a in ours.values() if a.ndim > 1)
    configs = (load_config(tmp_path / name / "transformer") for name in ("mlx", "back"))
    assert next(configs) == next(configs)
    init(tmp_path / "other", "full", 4)
    assert files(tmp_path / "mlx") != files(tmp_path / "other")


def test_init_holds_one_tensor_at_a_time(tmp_path, small_geometry):
    mx.clear_cache()
    before = active_memory()
    mx.reset_peak_memory()
    size = init(tmp_path / "a", "full", 0)["bytes"]
    assert mx.get_peak_memory() - before < 0.3 * size


def test_init_that_cannot_be(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("")
    one_line(run("init", tmp_path / "a", "--geometry", "embedded", "--random", 0), 1)
    assert run("init", tmp_path / "b", "--geometry", "huge", "--random", 0).exit_code == 2
    with pytest.raises(SnapGenError, match="huge"):
        init(tmp_path / "b", "huge", 0)
    (tmp_path / "file").write_text("")
    one_line(run("init", tmp_path / "file" / "x", "--geometry", "embedded", "--random", 0), 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "file"]


def test_info_for_programs_and_the_list_of_words(packed_model, tmp_path):
    result = run("info", packed_model, "--json")
    described = json.loads(result.output)
    assert described["parts"]["transformer"]["bytes"] > 0 and described["words"] == []
    assert set(described["memory"]) == {"tiny", "small", "full"}
    assert json.loads(run("info", "--json").output)["sampling"]["width"] == 256
    listed = run("info", "embedded", "--words").output.splitlines()
    assert "apple" in listed and len(listed) == 156
    assert json.loads(run("info", "--words", "--json").output) == listed
    assert "words.json" in one_line(run("info", packed_model, "--words"), 2)


def test_the_embedded_model_has_a_name_everywhere(tmp_path):
    assert run("export", "embedded", tmp_path / "torch").exit_code == 0
    assert run("convert", tmp_path / "torch", tmp_path / "mlx").exit_code == 0
    listed = run("info", tmp_path / "mlx", "--words").output
    assert listed == run("info", "--words").output and "rocket" in listed
    picture = str(tmp_path / "a.png")
    args = ["a rocket", "--steps", "1", "--variant", "tiny", "-o", picture]
    assert run("generate", "-m", "embedded", *args).exit_code == 0


@pytest.mark.parametrize(
    "args",
    [
        ("convert", "embedded", "~nobody-here/x"),
        ("export", "embedded", "~nobody-here/x"),
        ("generate", "a cat", "--lora", "~nobody-here/x"),
        ("serve", "--port", "0", "--gallery", "~nobody-here/x"),
    ],
)
def test_a_home_that_there_is_not(args):
    assert "no user" in one_line(run(*args), 2)


@pytest.mark.parametrize("source", ["a" * 5000, "\0", "~nobody-of-this-name/x"])
def test_what_cannot_be_a_model_is_one_line(source):
    result = run("info", source)
    assert result.exit_code in (1, 2) and "nexpected" not in result.stderr
    assert len(result.stderr.splitlines()) == 1
