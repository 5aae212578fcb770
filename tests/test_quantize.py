"""``quantize``: what is measured, recipes within budgets, and models that every command reads."""

import dataclasses
import json
import re
import shutil
from math import prod

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from snapgen_mlx.cli.main import main
from snapgen_mlx.config import DiTConfig
from snapgen_mlx.convert.slice import slice_model
from snapgen_mlx.errors import UsageError
from snapgen_mlx.files import folder_bytes, write_json
from snapgen_mlx.layout import FEW_STEP, load_config
from snapgen_mlx.loading import load_dit, load_supernet
from snapgen_mlx.lora_file import read_tensors as read_lora
from snapgen_mlx.memory import Request
from snapgen_mlx.models.elastic import axis_groups, leading_slice, random_supernet, slice_flat
from snapgen_mlx.pipeline import Pipeline
from snapgen_mlx.quantization import quantize as quantize_module
from snapgen_mlx.quantization import sensitivity
from snapgen_mlx.quantization.backends import backend_of
from snapgen_mlx.quantization.calibration import Calibration, load_widths, peak, psnr, snr
from snapgen_mlx.quantization.prompt_sets import BUILT_IN, PromptSets, split_prompts
from snapgen_mlx.quantization.quantize import load_rounded
from snapgen_mlx.quantization.recipe import (
    METHODS,
    Recipe,
    average_bits,
    design,
    least_bits,
    protected,
    quantizable,
    uniform,
)
from snapgen_mlx.quantization.sensitivity import layer_inputs, measure
from snapgen_mlx.tensors import palette
from snapgen_mlx.tensors.palette import BITS
from snapgen_mlx.tensors.safetensors_io import read_header
from snapgen_mlx.tensors.weights import load_tensors, save_tensors

from .settled import active_memory
from .tiny import write_tiny_model

VARIANTS = ["tiny", "small", "full"]
BACKENDS = ["affine", "palette"]
PROMPTS = ["a smiling cat", "a red dog"]
SETS = PromptSets(PROMPTS, ["a happy kitty", "a cat"], ["a red kitty", "a dog"])
# Heads of 32 channels, so that there are convolutions for palettes.
CONFIG = dataclasses.replace(
    DiTConfig.from_preset("embedded"),
    **{"head_dim": 32, "num_heads": 8, "num_kv_heads": 8},
    **{"layers": [1, 2, 0], "text_dims": {"static": 8}, "caption_dim": 32},
)
SHAPES = quantizable(CONFIG, 32)


def run(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def one_line(result, code):
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.output
    return lines[0]


def final_psnrs(output) -> list[float]:
    """Of the widths, in their order."""
    return [float(n) for n in re.findall(r"([\d.]+) dB after the last", output)]


def write_model(folder, seed=0):
    write_tiny_model(folder)
    sampling = {"steps": 2, "guidance": 1.0, "shift": 3.0, "size": 64}
    write_json(folder / "config.json", load_config(folder) | {"sampling": sampling})
    mx.random.seed(seed)
    params = random_supernet(CONFIG)
    shape = params["final.proj.weight"].shape
    params["final.proj.weight"] = 0.1 * mx.random.normal(shape)
    save_tensors(folder / "transformer", params)
    write_json(folder / "transformer" / "config.json", CONFIG.to_dict())
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(["", *(p for three in zip(*SETS, strict=True) for p in three), " "]))
    return path


@pytest.fixture(scope="module")
def measured(model, tmp_path_factory):
    """{backend: (file, sensitivities)}"""
    out, calibration = {}, Calibration.from_model(model, PROMPTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(palette, "CELLS", 256)  # hundreds of palettes, quickly made
        for name in BACKENDS:
            path = tmp_path_factory.mktemp(name) / "sensitivity.json"
            out[name] = path, measure(model, backend_of(name, CONFIG), calibration, path)
    return out


@pytest.fixture
def few_layers(monkeypatch):
    """Only these are measured."""
    layers = ("final.proj", "time_embed.1.fc1", "mid.0.attn.to_k", "upsample.proj")
    few = {layer: SHAPES[layer] for layer in layers}
    monkeypatch.setattr(sensitivity, "quantizable", lambda config, group: few)
    return few


@pytest.fixture(scope="module")
def quantized(model, measured, prompts, tmp_path_factory):
    """{backend: (folder, output of the command)}"""
    out = {}
    for name in BACKENDS:
        folder = tmp_path_factory.mktemp(name) / "quantized"
        options = ["--backend", name, "--sensitivity", measured[name][0], "--prompts", prompts]
        result = run("quantize", model, folder, "--bits", 4.3, *options)
        assert result.exit_code == 0, result.output
        out[name] = folder, result.output
    return out


# --- sensitivity


def test_the_last_layer_alone_changes_the_latents_by_its_output_error(
    model, tmp_path, monkeypatch, few_layers
):
    # One step from noise to latents: they are the noise minus the velocity.
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    config = load_config(folder)
    write_json(folder / "config.json", config | {"sampling": config["sampling"] | {"steps": 1}})
    # Every token's input is taken, not a sample.
    monkeypatch.setattr(sensitivity, "ROWS", 10**6)
    calibration = Calibration.from_model(folder, PROMPTS)
    for name in BACKENDS:
        form = backend_of(name, CONFIG)
        found = measure(folder, form, calibration, tmp_path / f"{name}.json")
        for pipe in load_widths(folder):
            _, reference = calibration.latents(pipe)
            errors = found["final.proj"][pipe.variant]
            effect = errors["latents"] * reference.square().mean().item()
            mse = errors["mse"]["4"]
            assert effect == pytest.approx(mse, rel=1e-4)


def test_errors_are_measured_for_each_layer_width_and_number_of_bits(measured):
    for _, found in measured.values():
        assert found.keys() == SHAPES.keys()
        for layer, widths in found.items():
            own = [VARIANTS[int(layer.split(".")[1])]] if "time_embed" in layer else VARIANTS
            assert list(widths) == own
            for errors in widths.values():
                mse, nmse = (list(errors[k].values()) for k in ("mse", "nmse"))
                assert len(mse) == len(BITS)
                assert mse == sorted(mse, reverse=True) and mse[-1] > 0
                # 2 bits leave tenths of the signal's power, 8 a ten-thousandth.
                assert 0.01 < nmse[0] < 1 and nmse[-1] < 1e-3
                assert 0 < errors["latents"] < 0.1


def test_inputs_come_from_every_step(model):
    calibration = Calibration.from_model(model, PROMPTS)
    inputs = layer_inputs(Pipeline.load(model, "tiny"), calibration)
    assert inputs["time_embed.0.fc1"].shape == (2, 256)  # one vector a step
    assert len(inputs["down.0.attn.to_q"]) == 2 * 2 * 16  # all tokens of these small pictures
    assert inputs["mid.1.skip_proj"].shape[1] == 2 * 96


@pytest.mark.parametrize("stop", [1, 5, 9])
def test_an_interrupted_measurement_goes_on(model, measured, tmp_path, few_layers, stop):
    path, calibration = tmp_path / "s.json", Calibration.from_model(model, PROMPTS)
    form = backend_of("affine", CONFIG)

    def interrupt(done, total):
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(model, form, calibration, path, interrupt)
    assert sum(map(len, json.loads(path.read_text())["layers"].values())) == stop
    again = []
    found = measure(model, form, calibration, path, lambda done, total: again.append(done))
    assert again == list(range(stop + 1, 11))
    assert found == {layer: measured["affine"][1][layer] for layer in found}
    assert found.keys() == few_layers.keys()
    assert measure(model, form, calibration, path, pytest.fail) == found


def test_a_measurement_of_something_else_is_refused(model, measured, tmp_path, prompts):
    path = measured["affine"][0]
    options = ["--sensitivity", path, "--prompts", prompts]
    line = one_line(run("quantize", model, tmp_path / "x", *options, "--backend", "palette"), 1)
    assert "measured with another backend" in line
    other = write_model(tmp_path / "other", seed=1)
    assert "another transformer" in one_line(run("quantize", other, tmp_path / "x", *options), 1)
    few = tmp_path / "few.txt"
    few.write_text("a dog\na cat\na kitty")
    args = (model, tmp_path / "x", *options[:2], "--prompts", few)
    assert "another prompts" in one_line(run("quantize", *args), 1)
    (tmp_path / "s.json").write_text("{}")
    options[1] = tmp_path / "s.json"
    assert "no sensitivities" in one_line(run("quantize", model, tmp_path / "x", *options), 1)


# --- recipes


@st.composite
def sensitivities(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    found = {}
    for layer in SHAPES:
        nmse = np.exp(rng.normal(size=3))[:, None] * 0.3 * 4.0 ** -np.arange(len(BITS))
        found[layer] = {
            variant: {
                **{
                    k: dict(zip(map(str, BITS), row.tolist(), strict=True)) for k in ("mse", "nmse")
                },
                "latents": float(np.exp(rng.normal() * 2)),
            }
            for variant, row in zip(VARIANTS, nmse, strict=True)
        }
    return found


@pytest.mark.parametrize("method", METHODS)
@given(found=sensitivities(), share=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_recipes_keep_to_their_budget(method, found, share):
    least = least_bits(SHAPES, protected(SHAPES))
    budget = least + share * (8 - least)
    recipe = design(CONFIG, SHAPES, found, budget, method)
    assert recipe.layers.keys() == SHAPES.keys() and set(recipe.layers.values()) <= set(BITS)
    assert all(recipe.layers[layer] == 8 for layer in protected(SHAPES))
    average = average_bits(recipe.layers, SHAPES)
    assert average <= budget + 1e-9
    # Nothing that would still fit was left at fewer bits.
    weights = sum(map(prod, SHAPES.values()))
    for layer, bits in recipe.layers.items():
        if bits < 8:
            more = 8 if method == "mse" else min(b for b in BITS if b > bits)
            assert average + (more - bits) * prod(SHAPES[layer]) / weights > budget - 1e-9


def test_the_mse_rule_is_the_papers():
    """Two kinds of layers, and none at 4 bits with a larger error than one at 8 of its size."""
    errors = {layer: float(i) for i, layer in enumerate(SHAPES)}
    by_bits = {layer: dict.fromkeys(map(str, BITS), e) for layer, e in errors.items()}
    found = {layer: {"full": {"mse": by_bits[layer]}} for layer in SHAPES}
    layers = design(CONFIG, SHAPES, found, 5, "mse").layers
    free = {layer: bits for layer, bits in layers.items() if layer not in protected(SHAPES)}
    assert set(free.values()) == {4, 8}
    for low in free:
        for high in free:
            if free[low] < free[high] and SHAPES[low] == SHAPES[high]:
                assert errors[low] < errors[high]


def test_density_gives_bits_where_they_help_the_latents():
    nmse = {str(b): 4.0**-b for b in BITS}
    found = {k: {"full": {"nmse": nmse, "mse": nmse, "latents": 1.0}} for k in SHAPES}
    found["mid.0.ffn.fc1"]["full"]["latents"] = 1000.0
    found["mid.0.ffn.fc2"]["full"]["latents"] = 0.001
    layers = design(CONFIG, SHAPES, found, 4.5, "density").layers
    assert layers["mid.0.ffn.fc2"] < layers["mid.1.ffn.fc2"] < layers["mid.0.ffn.fc1"]


def test_modulation_and_final_layers_are_protected():
    banks = {f"time_embed.{i}.modulation" for i in range(3)}
    assert protected(SHAPES) == banks | {"final.proj"}
    # The tiny encoder's 8 channels are no group.
    assert "text_embed.static.proj" not in SHAPES


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_were_not_measured_get_8_bits(method):
    nmse = {str(b): 4.0**-b for b in BITS}
    found = {k: {"full": {"nmse": nmse, "mse": nmse, "latents": 1.0}} for k in SHAPES}
    del found["mid.0.ffn.fc1"]
    assert design(CONFIG, SHAPES, found, 5, method).layers["mid.0.ffn.fc1"] == 8


def test_layers_that_a_width_would_cut_through_stay_floats():
    config = dataclasses.replace(CONFIG, widths=[0.25, 1.0], hidden_size=256)
    assert "down.0.attn.to_q" in quantizable(config, 64)
    assert "down.0.attn.to_q" not in quantizable(config, 128)
    assert "down.0.cross.to_k" not in quantizable(config, 64)  # 32 channels of text


# --- what is written


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_folder_holds_what_the_recipe_says(model, quantized, backend):
    folder, output = quantized[backend]
    recipe = json.loads((folder / "recipe.json").read_text())
    assert average_bits(recipe["layers"], SHAPES) == pytest.approx(4.3, abs=0.1)
    header = read_header(folder / "transformer" / "model.safetensors")
    count = 0
    for layer, bits in recipe["layers"].items():
        rows, n = SHAPES[layer]
        packed = header[f"{layer}.weight"]
        assert (packed.dtype, packed.shape) == ("U32", (rows, n * bits // 32))
        count += 8 * packed.nbytes
    assert f"{count / sum(map(prod, SHAPES.values())):.2f} bits on average in the Linear" in output
    floats = {key for key, info in header.items() if info.dtype != "U32"}
    assert {header[key].dtype for key in floats} == {"F16"}
    size = (folder / "transformer" / "model.safetensors").stat().st_size
    weights = sum(a.size for a in load_tensors(model / "transformer").values())
    assert f"{8 * size / weights:.3f}".rstrip("0") + " bits per weight on disk" in output
    conv = header["down.0.attn.kv_compress.k.weight"]
    assert conv.shape == ((8, 32, 2, 2, 8) if backend == "palette" else (8, 32, 2, 2, 32))
    assert (folder / "text_encoder" / "vocab.txt").read_bytes() == (
        model / "text_encoder" / "vocab.txt"
    ).read_bytes()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_width_is_the_slice_of_the_rounded_supernet(model, quantized, backend, variant):
    folder, _ = quantized[backend]
    config, params = load_supernet(model)
    recipe = Recipe.load(folder / "recipe.json", config, SHAPES)
    form = backend_of(backend, config)
    for layer, bits in recipe.layers.items():
        params[f"{layer}.weight"] += form.rounding(params[f"{layer}.weight"], bits)
    expected = slice_flat(params, config, VARIANTS.index(variant))
    ours = dict(tree_flatten(load_dit(folder, variant, mx.float32).parameters()))
    assert ours.keys() == expected.keys()
    for key, a in ours.items():
        if (
            key.replace("time_embed.0", f"time_embed.{VARIANTS.index(variant)}").removesuffix(
                ".weight"
            )
            in recipe.layers
        ):
            assert mx.allclose(a, expected[key], atol=1e-7), key
        elif "kv_compress" in key and backend == "palette":
            assert mx.allclose(a, expected[key], atol=1e-2), key
        else:
            assert mx.array_equal(a, expected[key].astype(mx.float16).astype(mx.float32)), key


def test_affine_rounding_of_a_slice_is_the_slice_of_the_rounding(model):
    _, params = load_supernet(model)
    form = backend_of("affine", CONFIG)
    for layer in ("mid.0.ffn.fc2", "mid.1.skip_proj", "downsample.proj", "upsample.proj"):
        weight, groups = params[f"{layer}.weight"], axis_groups(f"{layer}.weight")
        for bits in BITS:
            cut = leading_slice(weight, groups, 0.375, layer)
            cut_after = leading_slice(form.rounding(weight, bits), groups, 0.375, layer)
            assert mx.array_equal(form.rounding(cut, bits), cut_after), (layer, bits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_commands_read_it(quantized, tmp_path, backend):
    folder, _ = quantized[backend]
    info = run("info", folder).output
    line = next(s for s in info.splitlines() if s.startswith("transformer"))
    count = sum(a.size for a in random_supernet(CONFIG).values())
    size = sum(i.nbytes for i in read_header(folder / "transformer/model.safetensors").values())
    assert f"{count / 1e6:.1f} M parameters, {8 * size / count:.3g} bits per weight" in line

    slice_model(folder, tmp_path / "cut", "tiny")
    packed = read_header(tmp_path / "cut" / "transformer" / "model.safetensors")
    assert packed["down.0.attn.to_q.weight"].dtype == "U32"
    cut, whole = (
        dict(tree_flatten(dit.parameters()))
        for dit in (load_dit(tmp_path / "cut"), load_dit(folder, "tiny"))
    )
    assert cut.keys() == whole.keys()
    assert all(mx.array_equal(cut[key], whole[key]) for key in cut)

    assert run("export", folder, tmp_path / "torch").exit_code == 0
    assert run("convert", tmp_path / "torch", tmp_path / "back").exit_code == 0
    back = load_tensors(tmp_path / "back" / "transformer")
    whole = dict(tree_flatten(load_dit(folder, "full", mx.float32).parameters()))
    for key in ("down.0.attn.to_q.weight", "final.proj.weight", "down.0.attn.kv_compress.k.weight"):
        exported = back[key].astype(mx.float32)  # in the scales' float16
        assert mx.allclose(exported, whole[key], rtol=2**-10, atol=1e-7)

    args = ("generate", "a cat", "-m", folder, "-o", tmp_path / "x.png", "--variant", "small")
    assert run(*args).exit_code == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_palettes_memory_is_predicted(quantized, variant):
    folder, _ = quantized["palette"]
    pipe = Pipeline.load(folder, variant)
    weights = sum(a.size for _, a in tree_flatten(pipe.dit.parameters()))
    assert pipe.memory.weights(variant) == 4 * weights  # floats once they are loaded
    given = pipe.settings("a cat", width=128, height=128)
    pipe.prepare([given])
    mx.eval(pipe.vae.parameters())
    mx.clear_cache()
    base = active_memory()
    mx.reset_peak_memory()
    for _ in pipe.stream(given):
        pass
    peak = mx.get_peak_memory() - base
    predicted = pipe.memory.predict(variant, Request(128, 128)).denoise - pipe.memory.decoder
    assert predicted == pytest.approx(peak, rel=0.25)


def test_psnr_falls_with_the_bits(model, measured, prompts, tmp_path):
    values = []
    for bits in (8, 5, 3.5):
        options = ["--sensitivity", measured["affine"][0], "--prompts", prompts, "--bits", bits]
        output = run("quantize", model, tmp_path / f"{bits}", *options).output
        values.append(final_psnrs(output))
    values = np.array(values)
    assert values.shape == (3, 3)
    assert (np.diff(values, axis=0) < -1).all() and (values > 10).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_size_is_kept_to(model, measured, prompts, tmp_path, backend):
    options = ["--backend", backend, "--sensitivity", measured[backend][0], "--prompts", prompts]
    result = run("quantize", model, tmp_path / "x", *options, "--size", "2.6MB")
    assert result.exit_code == 0, result.output
    assert 2.5e6 < folder_bytes(tmp_path / "x") <= 2.6e6
    line = one_line(run("quantize", model, tmp_path / "y", *options, "--size", "0.5MB"), 2)
    assert "MB more even with the fewest bits" in line and not (tmp_path / "y").exists()
    assert "is no size" in run("quantize", model, tmp_path / "y", "--size", "big").output


def test_psnr_is_reached_with_few_bits(model, measured, prompts, tmp_path):
    options = ["--sensitivity", measured["affine"][0], "--prompts", prompts]
    found = []
    for target in (35, 45):
        result = run("quantize", model, tmp_path / f"{target}", *options, "--psnr", target)
        assert result.exit_code == 0, result.output
        # Not with the noise that the recipe was chosen with.
        assert min(final_psnrs(result.output)) == pytest.approx(target, abs=2.5)
        found.append(float(result.output.split("codes of ")[1].split()[0]))
    assert found[0] < found[1] < 8
    line = one_line(run("quantize", model, tmp_path / "y", *options, "--psnr", 200), 2)
    assert "8 bits give" in line


def test_a_recipe_serves_a_fine_tune(model, quantized, prompts, tmp_path):
    recipe = quantized["affine"][0] / "recipe.json"
    tuned = write_model(tmp_path / "tuned", seed=3)
    for backend in BACKENDS:
        options = ["--recipe", recipe, "--backend", backend, "--prompts", prompts]
        result = run("quantize", tuned, tmp_path / backend, *options)
        assert result.exit_code == 0, result.output
        assert json.loads((tmp_path / backend / "recipe.json").read_text()) == json.loads(
            recipe.read_text()
        )
    assert not list(tmp_path.glob("*.json"))  # nothing was measured


def test_a_few_step_lora_goes_along(model, quantized, prompts, tmp_path):
    folder, layer = tmp_path / "model", "mid.0.attn.to_q"
    shutil.copytree(model, folder)
    a, b = (0.1 * mx.random.normal(shape, key=mx.random.key(4)) for shape in ((4, 256), (256, 4)))
    (folder / FEW_STEP).mkdir()
    lora = folder / FEW_STEP / "tiny.safetensors"
    mx.save_safetensors(str(lora), {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b})
    assert [p.settings("any").steps for p in load_widths(folder)] == [4, 2, 2]
    # The base is rounded, not the sum.
    form = backend_of("affine", CONFIG)
    weight = load_tensors(folder / "transformer")[f"{layer}.weight"]
    expected = (weight + form.rounding(weight, 4) + b @ a)[:96, :96]
    tiny = next(load_rounded(folder, {layer: 4}, form))
    assert mx.allclose(tiny.dit.mid[0].attn.to_q.weight, expected, atol=1e-6)
    for backend in ("affine", "palette"):
        options = ["--recipe", quantized[backend][0] / "recipe.json", "--prompts", prompts]
        out = tmp_path / backend
        result = run("quantize", folder, out, "--backend", backend, *options)
        assert result.exit_code == 0, result.output
        written = out / FEW_STEP / lora.name
        for name, matrix in (("A", a), ("B", b)):
            key = f"{layer}.lora_{name}.weight"
            read = read_lora(written)[key]
            if backend == "affine":
                assert mx.array_equal(read, matrix.astype(mx.float16))
            else:  # 256 values of a normal distribution are near 1 % of its deviation apart
                assert mx.load(str(written))[key].nbytes == matrix.size
                assert mx.abs(read - matrix).mean() < 0.01 * matrix.square().mean().sqrt()
        assert run("export", out, tmp_path / f"{backend}-torch").exit_code == 0
        exported = mx.load(str(tmp_path / f"{backend}-torch" / FEW_STEP / lora.name))
        assert mx.array_equal(exported[key], read)


def test_a_drawing(model, measured, prompts, tmp_path):
    pytest.importorskip("matplotlib")
    options = ["--sensitivity", measured["affine"][0], "--prompts", prompts]
    path = tmp_path / "s.png"
    assert run("quantize", model, tmp_path / "x", *options, "--plot", path).exit_code == 0
    assert path.read_bytes()[:4] == b"\x89PNG"


# --- requests that cannot be met


def test_bad_requests_are_one_line(model, quantized, prompts, tmp_path):
    dest = tmp_path / "x"

    def refused(*args, code, source=model):
        line = one_line(run("quantize", source, dest, *args), code)
        assert not dest.exists() and not list(tmp_path.glob("*.sensitivity.json"))
        return line

    for bits in (1, 2, 8.5, -4, "nan"):
        assert "out of range" in refused("--bits", bits, code=2)
    assert "only one of" in refused("--bits", 4, "--psnr", 40, code=2)
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "holds no prompt" in refused("--prompts", tmp_path / "empty.txt", code=2)
    assert "cannot read the prompts" in refused("--prompts", tmp_path / "none", code=2)
    for backend in BACKENDS:
        line = refused(code=2, source=quantized[backend][0])
        assert "is quantized already" in line
    dest.mkdir()
    (dest / "file").write_text("")
    assert "already exists" in one_line(run("quantize", model, dest), 1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "else"}, "is not a recipe"),
        ({"architecture": None}, "is damaged"),
        ({"layers": [1]}, "is damaged"),
        ({"architecture": {**DiTConfig.from_preset("full").to_dict()}}, "another architecture"),
        ({"layers": {"x": 4}}, "disagree about the layer"),
        ({"layers": {**dict.fromkeys(SHAPES, 4), "final.proj": 7}}, "final.proj has 7 bits"),
        ({"layers": dict.fromkeys(SHAPES, "4")}, "has 4 bits"),
    ],
)
def test_recipes_that_do_not_fit(model, quantized, tmp_path, change, match):
    recipe = json.loads((quantized["affine"][0] / "recipe.json").read_text())
    (tmp_path / "r.json").write_text(json.dumps(recipe | change))
    result = run("quantize", model, tmp_path / "x", "--recipe", tmp_path / "r.json")
    assert match in one_line(result, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_damaged_palettes_are_one_line(quantized, tmp_path):
    shutil.copytree(quantized["palette"][0], tmp_path / "x")
    path = tmp_path / "x" / "transformer"
    tensors = {
        k: mx.array(np.array(a)) for k, a in mx.load(str(path / "model.safetensors")).items()
    }
    tensors["mid.0.ffn.fc1.weight.palette"] = mx.zeros((5,), mx.float16)
    save_tensors(path, tensors)
    for command in (["info"], ["generate", "a cat", "-m"]):
        line = one_line(run(*command, tmp_path / "x"), 1)
        assert "mid.0.ffn.fc1" in line
    assert "mid.0.ffn.fc1.weight" in one_line(run("export", tmp_path / "x", tmp_path / "y"), 1)


def test_a_model_without_its_text_encoder(model, prompts, tmp_path):
    """Such as one of Gemma states, whose encoder is chosen when it draws."""
    folder, layer = tmp_path / "model", "text_embed.static.proj"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("text_encoder"))
    config = dataclasses.replace(CONFIG, text_dims={"static": 32})
    save_tensors(folder / "transformer", random_supernet(config))
    write_json(folder / "transformer" / "config.json", config.to_dict())
    options = ["--method", "mse", "--prompts", prompts]
    result = run("quantize", folder, tmp_path / "x", *options)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "x" / "recipe.json").read_text())["layers"][layer] == 8
    measurement = json.loads((tmp_path / "x.sensitivity.json").read_text())
    found = measurement["layers"]
    assert measurement["unused"] == [layer] and layer not in found
    assert not any("latents" in e for of_layer in found.values() for e in of_layer.values())
    result = run("quantize", model, tmp_path / "y", *options, "--recipe", "r.json")
    assert result.exit_code == 2 and "with --recipe nothing is measured" in result.output


# --- what is measured on what


def test_prompts_are_split_into_sets_that_share_none():
    many = [f"p{i}" for i in range(200)]
    for sets in (BUILT_IN, split_prompts(many * 2), split_prompts([*"abc"])):
        flat = [p for part in sets for p in part]
        assert all(sets) and len(set(flat)) == len(flat)
    assert tuple(map(len, BUILT_IN)) == (16, 264, 32)
    assert tuple(map(len, split_prompts(many))) == (16, 152, 32)
    assert split_prompts([*"abcdef"]) == (["a", "d"], ["b", "e"], ["c", "f"])
    with pytest.raises(UsageError, match="2 different prompts are too few"):
        split_prompts(["a", "b", "a"])


def test_each_set_has_one_use(model, tmp_path, monkeypatch):
    used = []

    def calibrated(model, prompts, seed=0):
        used.append((prompts, seed))
        return original(model, prompts, seed)

    def tuned(model, folder, prompts, run, options):
        used.append((prompts, "tune"))
        return iter(())

    original = Calibration.from_model
    monkeypatch.setattr(Calibration, "from_model", calibrated)
    monkeypatch.setattr(quantize_module, "measure", lambda *_: {})
    monkeypatch.setattr(quantize_module, "tune", tuned)
    monkeypatch.setattr(
        quantize_module, "design", lambda config, shapes, *_: uniform(config, shapes, 4)
    )
    quantize_module.quantize(model, tmp_path / "x", prompts=SETS, tuning=1)
    chosen, tuned_on, scored, *_ = used
    assert chosen == (SETS.choose, 0) and tuned_on == (SETS.tune, "tune")
    assert scored[0] == SETS.score and scored[1] == quantize_module.CHECKED


def test_ratios_in_decibel():
    reference = mx.array([3.0, -4.0, 0.0, 0.0])
    latents = reference + mx.array([0.1, -0.1, 0.1, -0.1])
    assert peak(reference) == 4
    assert psnr(latents, reference) == pytest.approx(20 * np.log10(4 / 0.1), abs=1e-3)
    assert snr(latents, reference) == pytest.approx(20 * np.log10(2.5 / 0.1), abs=1e-3)
    assert psnr(reference, reference) == snr(reference, reference) == np.inf


def test_the_command_says_what_its_figures_are_of(quantized):
    output = quantized["affine"][1]
    line = next(line for line in output.splitlines() if line.startswith("recipe: codes of"))
    codes, every = map(float, re.findall(r"([\d.]+) bits (?:on average|over all)", line))
    assert codes <= 4.3 < every < 6.5
    assert "on 2 prompts that neither chose nor tuned" in output
    peaks = re.findall(r"\(peak ([\d.]+)\); SNR [\d.]+ and ([\d.]+) dB", output)
    assert len(peaks) == 3
    for (_, snr_db), psnr_db in zip(peaks, final_psnrs(output), strict=True):
        assert float(snr_db) < psnr_db
