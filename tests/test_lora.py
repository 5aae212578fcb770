"""LoRA files: formats, scales, widths, strictness; fused, and beside quantized layers."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from mlx.utils import tree_flatten
from safetensors.torch import save_file

from snapgen_mlx.cli.main import main
from snapgen_mlx.config import DiTConfig
from snapgen_mlx.convert.slice import slice_model
from snapgen_mlx.convert.to_mlx import convert
from snapgen_mlx.convert.to_pytorch import export
from snapgen_mlx.errors import SnapGenError, UsageError
from snapgen_mlx.layout import load_config
from snapgen_mlx.loading import load_dit, load_supernet
from snapgen_mlx.lora import LoRALinear, add_lora, fuse_lora, load_lora
from snapgen_mlx.lora_file import LoRAFile
from snapgen_mlx.models.dit import DiT
from snapgen_mlx.models.elastic import slice_flat
from snapgen_mlx.tensors.weights import assign
from snapgen_mlx.training.lora_training import about_training, lora_params, save_lora

from .tiny import tiny_config, write_tiny_model

RANK = 2
# Every kind of layer that slices in its own way, one text layer that does not, one bank.
LAYERS = {
    "down.0.attn.to_q": (64, 64),
    "up.0.ffn.fc2": (64, 128),
    "mid.1.skip_proj": (64, 128),
    "downsample.proj": (64, 256),
    "upsample.proj": (256, 64),
    "final.proj": (64, 64),
    "mid.0.cross.to_k": (32, 32),
    "text_embed.static.proj": (32, 8),
    "time_embed.0.fc1": (24, 256),
    "time_embed.1.fc1": (32, 256),
    "time_embed.2.fc1": (64, 256),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def random_lora(layers=LAYERS, seed=0) -> dict[str, tuple[mx.array, mx.array]]:
    mx.random.seed(seed)
    return {
        path: (mx.random.normal((RANK, columns)), mx.random.normal((rows, RANK)))
        for path, (rows, columns) in layers.items()
    }


def save(path, layers, name=lambda p: p, down="lora_A", up="lora_B", alpha=None):
    tensors = {}
    for layer, (a, b) in layers.items():
        tensors[f"{name(layer)}.{down}.weight"] = a
        tensors[f"{name(layer)}.{up}.weight"] = b
        if alpha is not None:
            tensors[f"{name(layer)}.alpha"] = mx.array(float(alpha))
    mx.save_safetensors(str(path), tensors)
    return path


def flat(dit) -> dict:
    return dict(tree_flatten(dit.parameters()))


def updated(params: dict, layers: dict, scale=1.0) -> dict:
    """The same arithmetic in numpy float64."""
    out = {k: np.array(v, np.float64) for k, v in params.items()}
    for path, (a, b) in layers.items():
        out[f"{path}.weight"] += scale * np.array(b, np.float64) @ np.array(a, np.float64)
    return out


def assert_close(ours: dict, expected: dict):
    assert ours.keys() == expected.keys()
    for key, a in ours.items():
        np.testing.assert_allclose(a, expected[key], rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("variant", ["tiny", "small", "full"])
def test_a_lora_of_the_supernet_is_cut_with_the_width(model, tmp_path, variant):
    lora = random_lora()
    path = save(tmp_path / "lora.safetensors", lora)
    config, params = load_supernet(model)
    whole = {k: mx.array(v.astype(np.float32)) for k, v in updated(params, lora).items()}
    expected = slice_flat(whole, config, config.variant_index(variant))
    assert_close(flat(load_dit(model, variant, loras=[(path, 1.0)])), expected)


def test_a_lora_of_the_widths_own_size_is_taken_as_it_is(model, tmp_path):
    layers = {"down.0.attn.to_q": (32, 32), "time_embed.0.fc1": (32, 256)}
    lora = random_lora(layers)
    path = save(tmp_path / "lora.safetensors", lora)
    plain = flat(load_dit(model, "small"))
    assert_close(flat(load_dit(model, "small", loras=[(path, 1.0)])), updated(plain, lora))
    with pytest.raises(SnapGenError, match="4 of 4 keys fit no layer"):
        load_dit(model, "full", loras=[(path, 1.0)])


@pytest.mark.parametrize(
    ("name", "down", "up"),
    [
        (lambda p: p, "lora_A", "lora_B"),
        (lambda p: p, "lora_down", "lora_up"),
        (lambda p: f"transformer.{p}", "lora_A", "lora_B"),
        (lambda p: f"diffusion_model.{p}", "lora_down", "lora_up"),
        (lambda p: f"base_model.model.{p}", "lora_A.default", "lora_B.default"),
        (lambda p: "lora_unet_" + p.replace(".", "_"), "lora_down", "lora_up"),
    ],
)
def test_formats_say_the_same(model, tmp_path, name, down, up):
    lora = random_lora()
    path = save(tmp_path / "lora.safetensors", lora, name, down, up)
    config, params = load_supernet(model)
    ours = fuse_lora(params, load_lora(path, config, None))
    assert_close(ours, updated(params, lora))


@pytest.mark.parametrize(("alpha", "factor"), [(None, 1), (2, 1), (8, 4), (0.5, 0.25)])
def test_scale_is_alpha_over_rank_of_each_tensor(model, tmp_path, alpha, factor):
    lora = random_lora({"down.0.attn.to_q": (64, 64)})
    path = save(tmp_path / "lora.safetensors", lora, alpha=alpha)
    tensors = mx.load(str(path))
    other = random_lora({"up.0.attn.to_q": (64, 64)}, seed=1)  # another rank, no alpha
    a, b = (mx.concatenate([x, x], axis) for axis, x in enumerate(other["up.0.attn.to_q"]))
    tensors |= {"up.0.attn.to_q.lora_A.weight": a, "up.0.attn.to_q.lora_B.weight": b}
    mx.save_safetensors(str(path), tensors)
    config, params = load_supernet(model)
    ours = fuse_lora(params, load_lora(path, config, None, scale=0.5))
    expected = updated(params, lora, 0.5 * factor)
    assert_close(ours, updated(expected, {"up.0.attn.to_q": (a, b)}, 0.5))


PROCESSORS = {f"{stage}.0.attn.to_{layer}": (64, 64) for stage in ("down", "up") for layer in "qkv"}


@pytest.mark.parametrize(
    ("name", "pair"),
    [
        (lambda p: p, ".lora_{}"),
        (lambda p: p, ".lora_{}.style.weight"),
        (lambda p: f"model.diffusion_model.{p}", ".lora_{}.weight"),
        (lambda p: f"unet.{p}", ".lora_{}.weight"),
        (lambda p: f"module.{p}", ".lora_{}.weight"),
        (lambda p: f"base_model.model._orig_mod.{p}", ".lora_{}.weight"),
        (lambda p: p.replace("attn", "_orig_mod.attn"), ".lora_{}.weight"),
        (lambda p: "lora_transformer_" + p.replace(".", "_"), ".lora_{down|up}.weight"),
        (lambda p: "lycoris_" + p.replace(".", "_"), ".lora_{down|up}.weight"),
        (lambda p: f"some.trainer.of.tomorrow.{p}", ".lora_{down|up}.weight"),
        (lambda p: p, ".lora.{down|up}.weight"),
        (lambda p: f"transformer.{p}", ".lora_linear_layer.{down|up}.weight"),
        (lambda p: p.replace("attn.", "attn.processor."), "_lora.{down|up}.weight"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_schemes_are_understood_by_their_structure(model, tmp_path, name, pair, suffix):
    lora = random_lora(PROCESSORS)
    a, b = ("A", "B") if "{}" in pair else ("down", "up")
    keys = (pair.replace("{down|up}", part).replace("{}", part) for part in (a, b))
    keys = list(keys)
    tensors = {name(p) + k: x for p, ab in lora.items() for k, x in zip(keys, ab, strict=True)}
    path = tmp_path / f"lora{suffix}"
    if suffix == ".bin":
        torch.save({k: torch.tensor(np.array(x)) for k, x in tensors.items()}, path)
    else:
        mx.save_safetensors(str(path), tensors)
    config, params = load_supernet(model)
    assert_close(fuse_lora(params, load_lora(path, config, None)), updated(params, lora))


def test_two_prefixes_in_one_file_are_not_one_lora(model, tmp_path):
    lora = random_lora(PROCESSORS)
    path = save(tmp_path / "lora.safetensors", lora, lambda p: p.replace("up.", "other.up."))
    refused(model, path, "6 of 12")


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("down.0.attn.to_q.dora_scale", "a DoRA"),
        ("down.0.attn.to_q.lora_magnitude_vector.weight", "a DoRA"),
        ("lycoris_down_0_attn_to_q.lokr_w1", "a LoKr"),
        ("lycoris_down_0_attn_to_q.hada_w1_a", "a LoHa"),
        ("down.0.attn.to_q.lora_mid.weight", "a LoCon"),
        ("down.0.attn.to_q.diff", "whole differences"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "text encoder"),
        ("text_encoder.layers.0.q_proj.lora_A.weight", "text encoder"),
    ],
)
def test_other_adapters_are_refused_by_what_they_are(model, tmp_path, key, what):
    path = save(tmp_path / "lora.safetensors", random_lora(PROCESSORS))
    mx.save_safetensors(str(path), mx.load(str(path)) | {key: mx.ones((2, 2))})
    refused(model, path, what, key)


ALPHA = 8.0
TABLE = {"transformer.lora_alpha": ALPHA, "transformer.r": RANK, "text_encoder.lora_alpha": 99}


@pytest.mark.parametrize(
    "header",
    [
        {"lora_adapter_metadata": json.dumps(TABLE)},
        {"transformer.lora_alpha": "8", "transformer.r": "2"},
        {"alpha": "8", "rank": "2"},
        {"ss_network_alpha": "8.0", "ss_network_dim": "2", "ss_output_name": "x"},
        {
            "lora_adapter_metadata": json.dumps(
                {"transformer.lora_alpha": 99}
                | {"transformer.alpha_pattern": {"attn.to_[qkv]": ALPHA}}
            )
        },
        {"lora_alpha": str(ALPHA / RANK**0.5), "use_rslora": "True"},
    ],
)
def test_alpha_is_read_from_the_header(model, tmp_path, header):
    lora = random_lora(PROCESSORS)
    path = save(tmp_path / "lora.safetensors", lora, lambda p: f"transformer.{p}")
    mx.save_safetensors(str(path), mx.load(str(path)), {"format": "pt"} | header)
    config, params = load_supernet(model)
    ours = fuse_lora(params, load_lora(path, config, None))
    assert_close(ours, updated(params, lora, ALPHA / RANK))
    save(path, lora, alpha=2)  # a layer's own tensor counts first
    mx.save_safetensors(str(path), mx.load(str(path)), {"format": "pt"} | header)
    if "rslora" not in str(header):
        assert_close(fuse_lora(params, load_lora(path, config, None)), updated(params, lora, 1))


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({}, 4),
        ({"use_rslora": True}, 8 / 2**0.5),
        ({"lora_alpha": 99, "alpha_pattern": {"to_q": 8, "to_k": 8, "attn.to_v": 8}}, 4),
    ],
)
def test_a_folder_of_peft_is_a_lora(model, tmp_path, changes, factor):
    lora = random_lora(PROCESSORS)
    config = {"peft_type": "LORA", "lora_alpha": 8, "r": RANK, "rank_pattern": {"to_q": RANK}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
    save(tmp_path / "adapter_model.safetensors", lora, lambda p: f"base_model.model.{p}")
    config, params = load_supernet(model)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        ours = fuse_lora(params, load_lora(path, config, None))
        assert_close(ours, updated(params, lora, factor))
    LoRAFile.read(tmp_path).save(tmp_path / "alone" / "lora.safetensors")
    ours = fuse_lora(params, load_lora(tmp_path / "alone" / "lora.safetensors", config, None))
    assert_close(ours, updated(params, lora, factor))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"lora_alpha": "x"}, "'x'"),
        ({"alpha_pattern": {"(": 3}}, "not a pattern"),
        ({"alpha_pattern": [3]}, "not a JSON"),
    ],
)
def test_unfit_configs_of_peft_are_refused(model, tmp_path, changes, what):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8} | changes))
    save(tmp_path / "adapter_model.safetensors", random_lora(PROCESSORS))
    with pytest.raises(SnapGenError, match=what):
        load_lora(tmp_path, load_supernet(model)[0], None)


FLOATS = ["bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_float_of_a_lora_is_read(model, tmp_path, dtype):
    lora = random_lora(PROCESSORS)
    tensors = {}
    for p, (a, b) in lora.items():
        for key, x in (("lora_A.weight", a), ("lora_B.weight", b), ("alpha", mx.array(4.0))):
            tensors[f"{p}.{key}"] = torch.tensor(np.array(x)).to(getattr(torch, dtype))
    save_file(tensors, tmp_path / "lora.safetensors")
    expected = {
        p: [mx.array(tensors[f"{p}.lora_{x}.weight"].float().numpy()) for x in "AB"] for p in lora
    }
    config, params = load_supernet(model)
    ours = fuse_lora(params, load_lora(tmp_path / "lora.safetensors", config, None))
    assert_close(ours, updated(params, expected, 2))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "bool", "int64"])
def test_integers_are_no_weights(model, tmp_path, dtype):
    tensors = {
        f"{p}.lora_{x}.weight": torch.tensor(np.array(m)).to(getattr(torch, dtype))
        for p, ab in random_lora(PROCESSORS).items()
        for x, m in zip("AB", ab, strict=True)
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    refused(model, tmp_path / "lora.safetensors", "dtype", "weights cannot have")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(model, tmp_path, bad):
    path = save(tmp_path / "lora.safetensors", random_lora(PROCESSORS))
    tensors = mx.load(str(path))
    tensors["up.0.attn.to_k.lora_B.weight"][3, 1] = bad
    mx.save_safetensors(str(path), tensors)
    refused(model, path, "up.0.attn.to_k", "NaN or infinity")
    save(path, random_lora(PROCESSORS))
    with pytest.raises(UsageError, match="not a LoRA scale"):
        load_dit(model, "full", loras=[(path, bad)])


@pytest.mark.parametrize("scale", [1e30, -101.0])
def test_scales_that_draw_only_noise_are_refused(model, tmp_path, scale):
    path = save(tmp_path / "lora.safetensors", random_lora(PROCESSORS))
    with pytest.raises(UsageError, match="not a LoRA scale; give -100 to 100"):
        load_dit(model, "full", loras=[(path, scale)])


def test_a_lora_made_for_one_width_is_refused_for_another(model, tmp_path):
    path = save(tmp_path / "lora.safetensors", random_lora(PROCESSORS))
    about = {"widths": ["full"]}
    mx.save_safetensors(str(path), mx.load(str(path)), {"snapgen-mlx": json.dumps(about)})
    load_dit(model, "full", loras=[(path, 1.0)])
    with pytest.raises(SnapGenError, match="made only for width full, not for tiny"):
        load_dit(model, "tiny", loras=[(path, 1.0)])
    with pytest.raises(SnapGenError, match="not for tiny, small"):
        load_lora(path, load_supernet(model)[0], None)


def test_a_lora_knows_its_base_in_every_form(model, checkpoint, tmp_path):
    params = lora_params(tiny_config(), RANK)
    about = about_training(model, ["tiny", "small", "full"], ["a pip", "a pip", "a pop"])
    path = tmp_path / "lora.safetensors"
    save_lora(path, params, about)
    about = LoRAFile.read(path).about
    assert about["captions"] == ["a pip", "a pop"] and about["widths"] == ["tiny", "small", "full"]
    assert about["rank"] == RANK and about["alpha"] == 2 * RANK
    slice_model(model, tmp_path / "cut", "full")
    convert(checkpoint, tmp_path / "back")  # exported before
    for folder in (model, tmp_path / "cut", tmp_path / "back"):
        load_dit(folder, "full", loras=[(path, 1.0)])
    other = write_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(SnapGenError, match="other weights"):
        load_dit(other, "full", loras=[(path, 1.0)])


def refused(model, path, *words):
    with pytest.raises(SnapGenError) as e:
        load_dit(model, "full", loras=[(path, 1.0)])
    assert "\n" not in str(e.value)
    for word in (path.name, *words):
        assert word in str(e.value)


def test_zero_and_partial_matches_are_errors_that_list_the_keys(model, tmp_path):
    path = tmp_path / "lora.safetensors"
    flux = {f"blocks.{i}.attn.to_q": (64, 64) for i in range(4)}
    save(path, random_lora(flux))
    refused(model, path, "8 of 8", "'blocks.0.attn.to_q.lora_A.weight'", "and 3 more")
    save(path, random_lora(LAYERS | {"down.7.attn.to_q": (64, 64)}))
    refused(model, path, "2 of 24", "'down.7.attn.to_q.lora_B.weight'")
    save(path, random_lora(LAYERS | {"down.0.attn.to_k": (64, 48)}))
    refused(model, path, "2 of 24", "down.0.attn.to_k")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("down.0.attn.to_q.lora_A.weight"),
        lambda t: t.update({"down.0.attn.to_q.lora_A.weight": mx.zeros((3, 64))}),
        lambda t: t.update({"down.0.attn.to_q.lora_A.weight": mx.zeros((64,))}),
        lambda t: t.update({"down.0.attn.to_q.lora_A.weight": mx.zeros((0, 64))}),
        lambda t: t.update({"down.0.attn.to_q.alpha": mx.zeros((2,))}),
        lambda t: t.update({"down.0.attn.to_q.alpha": mx.array(float("nan"))}),
        lambda t: t.update({"down.0.attn.to_q.dora_scale": mx.zeros((64,))}),
        lambda t: t.update({f"transformer.{k}": a for k, a in t.items()}),  # twice the same
    ],
)
def test_malformed_layers_are_named(model, tmp_path, change):
    path = save(tmp_path / "lora.safetensors", random_lora())
    tensors = mx.load(str(path))
    change(tensors)
    mx.save_safetensors(str(path), tensors)
    refused(model, path, "down.0.attn.to_q")


def test_damaged_and_foreign_files(model, tmp_path):
    path = save(tmp_path / "lora.safetensors", random_lora())
    path.write_bytes(path.read_bytes()[:-5])
    refused(model, path)
    refused(model, tmp_path / "missing.safetensors")
    (tmp_path / "lora.pt").write_bytes(b"PK")
    refused(model, tmp_path / "lora.pt", "safetensors")
    save(path, random_lora({"time_embed.0.fc1": (24, 256)}))
    refused(model, path, "nothing for this width")


def test_quantized_layers_get_the_update_beside_them(tmp_path):
    config = DiTConfig(
        **dict(hidden_size=64, head_dim=16, num_heads=4, num_kv_heads=2, cross_kv_heads=2),
        **dict(caption_dim=32, text_dims={"static": 32}, layers=[1, 1, 1], bna_blocks=4),
        widths=[1.0],
    )
    mx.random.seed(3)
    dit = DiT(config)
    dit.final.proj.weight = mx.random.normal(dit.final.proj.weight.shape) * 0.1
    nn.quantize(dit, group_size=32, bits=4)
    layers = {"down.0.attn.to_q": (64, 64), "time_embed.0.fc1": (64, 256)}
    layers |= {"final.proj": (64, 64), "text_embed.static.proj": (32, 32)}
    lora = random_lora(layers)
    path = save(tmp_path / "lora.safetensors", lora, alpha=1)
    x, t = mx.random.normal((1, 16, 16, 16)), mx.array([0.7])
    text = {"static": mx.random.normal((1, 3, 32))}

    fused = DiT(config)  # the rounded weights as floats, and the update in them
    weights = {}
    for name, module in dit.named_modules():
        if isinstance(module, nn.QuantizedLinear):
            weights[f"{name}.weight"] = mx.dequantize(
                module.weight, module.scales, module.biases, module.group_size, module.bits
            )
    rest = {k: v for k, v in flat(dit).items() if not k.endswith((".scales", ".biases"))}
    updates = load_lora(path, config, 0)
    assign(fused, fuse_lora(rest | weights, updates), "test")
    before = dit(x, t, text)
    add_lora(dit, updates)
    assert isinstance(dit.down[0].attn.to_q, LoRALinear)
    expected = fused(x, t, text)
    np.testing.assert_allclose(dit(x, t, text), expected, atol=2e-4 * mx.abs(expected).max().item())
    assert mx.abs(before - expected).max() > 0.1 * mx.abs(expected).max()
    half = load_lora(path, config, 0, 0.5)
    nothing = {k: u._replace(b=-0.5 * u.b) for k, u in updates.items()}
    add_lora(dit, half)
    add_lora(dit, nothing)
    np.testing.assert_allclose(dit(x, t, text), expected, atol=1e-3 * mx.abs(expected).max().item())


# --- fused by convert


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("torch") / "model"
    export(model, folder)
    return folder


def test_convert_fuses_loras_into_every_width(model, checkpoint, tmp_path):
    lora = random_lora()
    path = save(tmp_path / "lora.safetensors", lora, alpha=1)
    convert(checkpoint, tmp_path / "out", loras=[(path, 0.5), (path, 1.0)])
    config, params = load_supernet(model)
    assert_close(load_supernet(tmp_path / "out")[1], updated(params, lora, 1.5 / RANK))
    for variant in config.variants:  # as if it were given at run time
        ours = flat(load_dit(tmp_path / "out", variant))
        theirs = flat(load_dit(model, variant, loras=[(path, 1.5)]))
        assert_close(ours, {k: np.array(a) for k, a in theirs.items()})


def test_convert_with_loras_is_one_conversion_of_its_own(checkpoint, tmp_path):
    path = save(tmp_path / "lora.safetensors", random_lora())
    command = ["convert", str(checkpoint), str(tmp_path / "out"), "--lora", f"{path}:0.5"]
    assert CliRunner().invoke(main, command).exit_code == 0
    made = load_config(tmp_path / "out")["source"]["loras"]
    assert [(m["name"], m["scale"]) for m in made] == [("lora.safetensors", 0.5)]
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 0 and "nothing to do" in again.output
    for other in ([], ["--lora", str(path)]):
        result = CliRunner().invoke(main, command[:3] + other)
        assert result.exit_code == 1 and "holds another transformer" in result.stderr


def test_a_few_step_lora_of_peft_keeps_its_strength(model, tmp_path):
    """The folder says alpha in a file of its own, which is not copied."""
    slice_model(model, tmp_path / "cut", "full")
    export(tmp_path / "cut", tmp_path / "torch")
    own = {k: v for k, v in random_lora().items() if "time_embed" not in k}
    lora, peft = own, tmp_path / "peft"
    peft.mkdir()
    (peft / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "use_rslora": True}))
    save(peft / "adapter_model.safetensors", lora, lambda p: f"base_model.model.{p}")
    convert(tmp_path / "torch", tmp_path / "out", few_step_lora=peft)
    config = load_supernet(tmp_path / "cut")[0]
    ours, theirs = (load_lora(p, config, 0) for p in (tmp_path / "out" / "few_step", peft))
    assert ours.keys() == theirs.keys()
    for name, update in theirs.items():
        np.testing.assert_allclose(ours[name].b, update.b, rtol=1e-5)
        assert mx.array_equal(ours[name].a, update.a)


def test_convert_refuses_loras_that_do_not_fit(checkpoint, tmp_path):
    path = save(tmp_path / "lora.safetensors", random_lora({"blocks.0.to_q": (64, 64)}))
    with pytest.raises(SnapGenError, match="2 of 2 keys fit no layer"):
        convert(checkpoint, tmp_path / "out", loras=[(path, 1.0)])
    with pytest.raises(UsageError, match="transformer"):
        convert(checkpoint, tmp_path / "out", only=["vae"], loras=[(path, 1.0)])
    assert [p.name for p in tmp_path.iterdir()] == ["lora.safetensors"]
