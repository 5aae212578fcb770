"""What differs between devices: the types computed with, packed layers, limits; forced on a CPU."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten
from PIL import Image

from snapgen_mlx import Pipeline, device
from snapgen_mlx.cli.main import main
from snapgen_mlx.doctor import examine
from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.files import write_json
from snapgen_mlx.loading import load_dit, load_supernet
from snapgen_mlx.memory import ModelMemory, Request
from snapgen_mlx.models.elastic import random_supernet
from snapgen_mlx.models.vae import AutoencoderKLQwenImage, VAEConfig
from snapgen_mlx.sampling import last_step
from snapgen_mlx.tensors.affine import QuantizedLinear, cast_floats
from snapgen_mlx.tensors.weights import save_tensors
from snapgen_mlx.training.elastic_trainer import ElasticOptions, ElasticTrainer

from .gpu import as_on_a_gpu
from .tiny import tiny_config, write_tiny_model

pytestmark = pytest.mark.usefixtures("uncompiled")


HALF = [mx.float16, mx.bfloat16]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def packed(model, tmp_path_factory):
    """The same in 8 bits, with float16 scales; group 32 suits widths of 64 channels alone."""
    folder = tmp_path_factory.mktemp("packed")
    config, tensors = load_supernet(model)
    out = {}
    for key, a in tensors.items():
        layer = key.removesuffix(".weight")
        if "ffn.fc" in key and a.ndim == 2:
            groups = mx.quantize(a.astype(mx.float16), group_size=32, bits=8)
            out |= dict(zip((key, f"{layer}.scales", f"{layer}.biases"), groups, strict=True))
        else:
            out[key] = a
    save_tensors(folder, out)
    write_json(folder / "config.json", config.to_dict())
    return folder


def rel(a, b) -> float:
    a, b = (np.array(x.astype(mx.float32)) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def velocity(dit):
    x = mx.random.normal((1, 16, 16, dit.config.in_channels), key=mx.random.key(1))
    text = {"static": mx.random.normal((1, 4, 8), key=mx.random.key(2))}
    return dit(x, mx.array([0.5]), text)


def test_types_follow_the_device(monkeypatch):
    assert device.inference_dtype() == device.training_dtype() == mx.float32
    assert device.wide(None) == mx.float32 and device.wide(mx.float16) == mx.bfloat16
    as_on_a_gpu(monkeypatch)
    assert device.inference_dtype() == mx.float16 and device.training_dtype() == mx.bfloat16
    assert device.wide(None) == mx.bfloat16


def test_a_gpu_of_cuda_is_not_taken_for_metal(monkeypatch, tmp_path):
    """What is known of Metal's kernels alone does not count on another GPU."""
    config = tiny_config()
    config.hidden_size, config.head_dim = 512, 64  # fused by Metal
    write_json(tmp_path / "transformer" / "config.json", config.to_dict())
    save_tensors(tmp_path / "transformer", random_supernet(config))
    vae, names, peaks = AutoencoderKLQwenImage(VAEConfig(base_dim=8)), [], []
    for metal in (True, False):
        as_on_a_gpu(monkeypatch, metal)
        names.append(device.device_name())
        found = ModelMemory(tmp_path, vae, []).predict("full", Request(512, 512))
        peaks.append((found.denoise, found.decode))
    assert names == ["Metal", "CUDA"]
    assert peaks[0][0] < peaks[1][0] and peaks[0][1] < peaks[1][1]
    assert "on CUDA" in examine(tmp_path)[1].found


@pytest.mark.parametrize("dtype", [*HALF, mx.float32])
def test_packed_layers_keep_their_scales_and_answer_in_kind(packed, monkeypatch, dtype):
    floats = velocity(load_dit(packed, "full", mx.float32))
    as_on_a_gpu(monkeypatch)
    dit = load_dit(packed, "full", dtype)
    layers = [m for m in dit.modules() if isinstance(m, nn.QuantizedLinear)]
    assert len(layers) == 8 and all(type(m) is QuantizedLinear for m in layers)
    # float16 is finer than bfloat16, and stays; float32 takes it in.
    scales = mx.float32 if dtype == mx.float32 else mx.float16
    assert {m.scales.dtype for m in layers} == {m.biases.dtype for m in layers} == {scales}
    out = velocity(dit)
    assert out.dtype == dtype
    bound = {mx.float16: 2e-3, mx.bfloat16: 2e-2, mx.float32: 1e-5}[dtype]
    assert rel(out, floats) < bound


def test_scales_rounded_to_bfloat16_would_cost_half_of_eight_bits():
    """Why they are kept: the error of a weight with them, and without."""
    weight = mx.random.normal((256, 512), key=mx.random.key(0)).astype(mx.float16)
    codes, *groups = mx.quantize(weight, group_size=64, bits=8)

    def error(dtype):
        scales, biases = (a.astype(dtype).astype(mx.float32) for a in groups)
        return rel(mx.dequantize(codes, scales, biases, group_size=64, bits=8), weight)

    assert error(mx.bfloat16) > 1.3 * error(mx.float16)
    kept = cast_floats({"l.scales": groups[0], "l.biases": groups[1], "l.weight": codes}, HALF[1])
    assert [a.dtype for a in kept.values()] == [mx.float16, mx.float16, mx.uint32]
    # The other way nothing is lost: a type for all.
    coarse = cast_floats({"l.scales": groups[0].astype(mx.bfloat16)}, mx.float16)
    assert coarse["l.scales"].dtype == mx.float16


def test_a_cpu_unpacks_with_scales_in_float32(packed):
    dit = load_dit(packed, "full")
    _, stored = load_supernet(packed)
    layer = "down.0.ffn.fc1"
    codes, scales, biases = (stored[f"{layer}.{n}"] for n in ("weight", "scales", "biases"))
    a, b = (np.array(x.astype(mx.float32))[..., None] for x in (scales, biases))
    words = np.array(codes).view(np.uint8).reshape(*a.shape[:2], 32)
    exact = (words * a + b).reshape(codes.shape[0], -1)
    assert rel(dict(tree_flatten(dit.parameters()))[f"{layer}.weight"], mx.array(exact)) < 1e-7


def test_pictures_in_each_type(model, monkeypatch):
    """float16 rounds a picture an eighth as much as bfloat16, which is why it is the default."""
    given = {"seed": 1, "steps": 3}
    cpu = Pipeline.load(model, "full")
    reference = last_step(cpu.stream(cpu.settings("a smiling cat", **given))).x
    as_on_a_gpu(monkeypatch)
    errors = {}
    for dtype in (None, *HALF):
        pipe = Pipeline.load(model, "full", dtype=dtype)
        assert pipe.dtype == (dtype or mx.float16)
        assert pipe.dit.final.proj.weight.dtype == pipe.dtype
        assert pipe.dit.final.proj.weight.nbytes * 2 == cpu.dit.final.proj.weight.nbytes
        x = last_step(pipe.stream(pipe.settings("a smiling cat", **given))).x
        assert pipe.decode(x).size == (64, 64)
        errors[pipe.dtype] = rel(x, reference)
    assert 0 < errors[mx.float16] < 1e-3 < 5 * errors[mx.float16] < errors[mx.bfloat16] < 3e-2


def test_a_step_trains_float32_weights_by_bfloat16_copies(monkeypatch):
    def trained():
        mx.random.seed(0)
        config = tiny_config()
        params = random_supernet(config)
        trainer = ElasticTrainer(config, params, ElasticOptions(warmup=0, learning_rate=1e-3))
        x0 = mx.random.normal((2, 8, 8, config.in_channels))
        noise, subnets = trainer.draw(np.random.default_rng(0), mx.random.key(0), x0.shape)
        text = {"static": mx.random.normal((2, 4, 8))}
        masks = {"static": mx.ones((2, 4), mx.bool_)}
        losses = trainer.step(x0, text, masks, noise, subnets)
        return losses["loss/full"].item(), trainer.weights.params, trainer.models[2]

    loss, _, _ = trained()
    as_on_a_gpu(monkeypatch)
    half, params, copy = trained()
    assert {a.dtype for a in params.values()} == {mx.float32}
    assert half == pytest.approx(loss, rel=1e-2) and half != loss
    assert copy.up[0].ffn.fc1.weight.dtype == mx.bfloat16


def test_a_container_may_have_less_memory_than_its_machine(tmp_path, monkeypatch):
    files = [tmp_path / "new", tmp_path / "old"]
    monkeypatch.setattr(device, "CONTAINER_LIMITS", files)
    monkeypatch.setattr(device, "_working_set", lambda: None)
    whole = device.usable_memory()
    files[0].write_text("max\n")
    files[1].write_text("9223372036854771712\n")  # no limit
    assert device.usable_memory() == whole
    files[0].write_text(f"{10**9}\n")
    assert device.usable_memory() == int(0.8 * 10**9)


def test_limits_are_set_where_a_gpu_names_its_memory(model, monkeypatch):
    calls = {}
    for name in ("set_wired_limit", "set_cache_limit"):
        monkeypatch.setattr(mx, name, lambda n, name=name: calls.update({name: n}))
    Pipeline.load(model)
    as_on_a_gpu(monkeypatch)
    Pipeline.load(model)  # this "GPU" names none
    assert not calls
    info = {"max_recommended_working_set_size": 8_000_000_000}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    Pipeline.load(model)
    assert calls == {"set_wired_limit": 8_000_000_000, "set_cache_limit": 1_000_000_000}
    assert device.usable_memory() == 8_000_000_000


def test_command_takes_a_type_and_repeats_it(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*args):
        result = CliRunner().invoke(main, ["generate", *args, "-m", str(model)])
        return result

    assert run("a cat", "--dtype", "float16", "-o", "a.png").exit_code == 0
    with Image.open("a.png") as image:
        assert json.loads(image.text["snapgen-mlx"])["dtype"] == "float16"
    assert run("--from-metadata", "a.png", "-o", "b.png").exit_code == 0
    with Image.open("a.png") as a, Image.open("b.png") as b:
        assert np.array_equal(a, b)
    refused = run("a cat", "--dtype", "float8")
    assert refused.exit_code == 2 and "bfloat16" in refused.stderr
    # Half of the bytes, as --explain says.
    sizes = [run("--explain", "--dtype", name).output for name in ("float16", "float32")]
    assert sizes[0] != sizes[1]


def test_overflow_says_what_to_try(model, tmp_path):
    folder = write_tiny_model(tmp_path / "m")
    _, tensors = load_supernet(folder)
    tensors["final.proj.weight"] = tensors["final.proj.weight"] * 1e6
    save_tensors(folder / "transformer", tensors)
    with pytest.raises(SnapGenError, match="--dtype bfloat16"):
        Pipeline.load(folder, "full", dtype=mx.float16).generate("a cat")
