"""Qwen-Image from its Hub folder to pictures: conversion, quantization, LoRA, the pipeline."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from mlx.utils import tree_flatten
from safetensors.torch import load_file, save_file

from snapgen_mlx import pipeline as pipeline_module
from snapgen_mlx.convert.to_mlx import convert
from snapgen_mlx.errors import SnapGenError, UsageError
from snapgen_mlx.layout import load_config
from snapgen_mlx.loading import load_qwen_image
from snapgen_mlx.lora import LoRALinear
from snapgen_mlx.notes import kept_text
from snapgen_mlx.pipeline import Pipeline
from snapgen_mlx.text_loading import load_text_encoders
from snapgen_mlx.tokenizer_files import load_qwen_tokenizer

from .gpu import as_on_a_gpu
from .qwen_hub import MODULES, save_lightning, save_qwen
from .settled import active_memory

PROMPT = "the cat's red hat"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return save_qwen(tmp_path_factory.mktemp("hub") / "qwen")


@pytest.fixture(scope="module")
def lightning(tmp_path_factory):
    return save_lightning(tmp_path_factory.mktemp("lora") / "lightning.safetensors")


@pytest.fixture(scope="module")
def model(hub, lightning, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlx") / "qwen"
    convert(hub, folder, few_step_lora=lightning)
    return folder


@pytest.fixture(scope="module")
def packed(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlx") / "packed"
    convert(hub, folder, quantize=4)
    return folder


@pytest.fixture(scope="module")
def original(hub):
    pipeline = QwenImagePipeline.from_pretrained(hub)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def rel(a, b) -> float:
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def draw_original(pipeline, noise, **settings):
    """Latents (1, h, w, C) and picture of diffusers' pipeline from ``noise``."""
    _, h, w, C = noise.shape
    packed = torch.tensor(np.array(noise)).permute(0, 3, 1, 2).reshape(1, C, h // 2, 2, w // 2, 2)
    packed = packed.permute(0, 2, 4, 1, 3, 5).reshape(1, h * w // 4, 4 * C)
    size = {"height": 8 * h, "width": 8 * w}
    out = pipeline(PROMPT, latents=packed, output_type="latent", **size, **settings).images
    z = out.reshape(1, h // 2, w // 2, C, 2, 2).permute(0, 1, 4, 2, 5, 3).reshape(1, h, w, C)
    image = pipeline(PROMPT, latents=packed, output_type="np", **size, **settings).images
    return z.numpy(), image


def draw(pipe, noise, monkeypatch, **settings):
    monkeypatch.setattr(pipeline_module, "draw_noise", lambda *_: noise)
    _, h, w, _ = noise.shape
    s = pipe.settings(PROMPT, height=8 * h, width=8 * w, **settings)
    *_, last = pipe.stream(s)
    return last.x, pipe.vae.decode(last.x) / 2 + 0.5


@pytest.mark.parametrize(
    ("guidance", "negative"), [(1.0, None), (4.0, None), (2.5, "a hat"), (4.0, "  ")]
)
def test_pictures_are_those_of_the_original_pipeline(
    model, original, monkeypatch, guidance, negative
):
    noise = mx.random.normal((1, 8, 12, 4), key=mx.random.key(3))
    theirs = negative if negative and negative.strip() else " "
    settings = {"num_inference_steps": 3, "true_cfg_scale": guidance, "negative_prompt": theirs}
    z, image = draw_original(original, noise, **settings)
    pipe = Pipeline(model, base=True)
    ours = draw(pipe, noise, monkeypatch, steps=3, guidance=guidance, negative=negative)
    assert rel(ours[0], z) < 1e-4
    assert np.abs(np.array(ours[1]) - image).max() < 1e-3


def test_the_few_step_lora_stays_beside_and_is_on_by_default(model, original, monkeypatch):
    """Against the original with the update in its weights."""
    pipe = Pipeline(model)
    s = pipe.settings(PROMPT)
    assert (s.steps, s.guidance, s.shift) == (4, 1.0, 3.0)
    beside = [m for _, m in pipe.dit.named_modules() if isinstance(m, LoRALinear)]
    assert len(beside) == 3 * len(MODULES)
    weights = {k: a.clone() for k, a in original.transformer.state_dict().items()}
    lora, fused = load_file(model / "few_step" / "full.safetensors"), dict(weights)
    for key, down in lora.items():
        if key.endswith(".lora_down.weight"):
            layer = key.removesuffix(".lora_down.weight")
            scale = lora[f"{layer}.alpha"] / len(down)
            fused[f"{layer}.weight"] = fused[f"{layer}.weight"] + scale * (
                lora[f"{layer}.lora_up.weight"] @ down
            )
    noise = mx.random.normal((1, 8, 8, 4), key=mx.random.key(4))
    settings = {"num_inference_steps": 4, "true_cfg_scale": 1.0}
    plain, _ = draw_original(original, noise, **settings)
    try:
        original.transformer.load_state_dict(fused)
        expected, _ = draw_original(original, noise, **settings)
    finally:
        original.transformer.load_state_dict(weights)
    assert rel(plain, expected) > 0.1
    assert rel(draw(pipe, noise, monkeypatch)[0], expected) < 1e-4


# --- LoRA files


def velocity(model):
    x = mx.random.normal((2, 8, 8, 4), key=mx.random.key(0))
    states = mx.random.normal((2, 5, 64), key=mx.random.key(1))
    return model(x, mx.array([0.9, 0.4]), {"qwen": states})


def test_alpha_counts_for_each_layer(model, lightning, tmp_path):
    """Twice alpha is twice the update; without alpha the factor is 1, as with alpha = rank."""
    tensors = load_file(lightning)
    layers = sorted({k.rpartition(".lora_")[0] for k in tensors if ".lora_" in k})
    scaled = dict(tensors)
    for i, layer in enumerate(layers):
        scaled[f"{layer}.alpha"] = torch.tensor(2.0 * 2 ** (i % 2))
        if i % 2:
            scaled[f"{layer}.lora_up.weight"] = tensors[f"{layer}.lora_up.weight"] / 2
    save_file(scaled, tmp_path / "scaled.safetensors")
    save_lightning(tmp_path / "none.safetensors", alpha=None)
    save_lightning(tmp_path / "rank.safetensors", alpha=4.0)
    out = {
        name: velocity(load_qwen_image(model, [(path, 1.0)]))
        for name, path in [
            ("as it is", lightning),
            *((n, tmp_path / f"{n}.safetensors") for n in ("scaled", "none", "rank")),
        ]
    }
    assert rel(out["scaled"], out["as it is"]) < 1e-6
    assert rel(out["none"], out["rank"]) < 1e-6
    assert rel(out["none"], out["as it is"]) > 0.01


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "transformer.", "lora_unet_"])
@pytest.mark.parametrize("names", [("lora_down", "lora_up"), ("lora_A", "lora_B")])
def test_the_names_of_other_tools(model, lightning, tmp_path, prefix, names):
    def rename(key):
        layer, _, part = key.partition(".lora_")
        if not part:
            layer, part = key.removesuffix(".alpha"), ""
        if prefix == "lora_unet_":
            layer = layer.replace(".", "_")
        end = f".{names['up' in part]}.weight" if part else ".alpha"
        return f"{prefix}{layer}{end}"

    save_file({rename(k): a for k, a in load_file(lightning).items()}, tmp_path / "l.safetensors")
    ours = velocity(load_qwen_image(model, [(tmp_path / "l.safetensors", 1.0)]))
    assert mx.array_equal(ours, velocity(load_qwen_image(model, [(lightning, 1.0)])))


def test_a_lora_of_zero_scale_is_the_model_bit_for_bit(model, lightning):
    assert mx.array_equal(
        velocity(load_qwen_image(model, [(lightning, 0.0)])), velocity(load_qwen_image(model))
    )


def test_a_lora_of_another_model_is_refused(hub, model, tmp_path):
    deeper = save_lightning(tmp_path / "deeper.safetensors", layers=4)
    with pytest.raises(SnapGenError, match="36 of 144 keys fit no layer of this model"):
        load_qwen_image(model, [(deeper, 1.0)])
    with pytest.raises(SnapGenError, match="fit no layer"):
        convert(hub, tmp_path / "out", few_step_lora=deeper)
    with pytest.raises(UsageError, match="changes the transformer"):
        convert(hub, tmp_path / "out", only=["vae"], few_step_lora=deeper)
    assert not (tmp_path / "out").exists()


# --- conversion


def test_it_is_streamed(hub, tmp_path):
    """No more of the weights is in memory than a shard holds."""
    shards = sorted((hub / "transformer").glob("*.safetensors"))
    assert len(shards) >= 7
    mx.synchronize()
    mx.reset_peak_memory()
    before = active_memory()
    convert(hub, tmp_path / "q", only=["transformer"], quantize=4)
    assert mx.get_peak_memory() - before < max(s.stat().st_size for s in shards)


def test_low_bits_spare_modulation(packed):
    model = load_qwen_image(packed)
    entries = load_config(packed / "transformer")["quantization"]
    assert entries["bits"] == 4
    eight = [path for path, how in entries.items() if isinstance(how, dict) and how["bits"] == 8]
    assert sum(path.endswith(("img_mod.1", "txt_mod.1")) for path in eight) == 6
    assert {"time_text_embed.timestep_embedder.linear_2", "norm_out.linear", "proj_out"} <= set(
        eight
    )
    assert not any(".attn." in path or "_mlp." in path for path in eight)
    assert dict(tree_flatten(model.parameters()))["proj_out.weight"].shape == (16, 64)


def test_few_bits_change_little(model, packed):
    a, b = (np.array(velocity(load_qwen_image(folder))) for folder in (packed, model))
    assert 0.98 < (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b) < 1 - 1e-5


def test_packed_layers_compute_what_their_floats_do(packed, lightning, monkeypatch):
    """As on Metal, where they stay packed, with the LoRA beside them."""
    floats = velocity(load_qwen_image(packed, [(lightning, 1.0)]))
    as_on_a_gpu(monkeypatch)
    model = load_qwen_image(packed, [(lightning, 1.0)], dtype=mx.float32)
    assert sum(isinstance(m, nn.QuantizedLinear) for _, m in model.named_modules()) > 40
    assert rel(velocity(model), floats) < 1e-4


def test_texts_are_encoded_by_a_packed_tower_too(model, packed):
    (ours,), (low,) = load_text_encoders(model), load_text_encoders(packed)
    states, mask = ours.encode([PROMPT, " "])
    other, _ = low.encode([PROMPT, " "])
    a, b = (np.array(s)[np.array(mask)] for s in (other, states))
    assert 0.95 < (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b) < 1 - 1e-6


def test_a_missing_shard_is_named(hub, tmp_path):
    import shutil

    shutil.copytree(hub, tmp_path / "hub")
    lost = sorted((tmp_path / "hub" / "transformer").glob("*-00003-*"))[0]
    lost.unlink()
    with pytest.raises(SnapGenError, match=lost.name):
        convert(tmp_path / "hub", tmp_path / "out")


def test_old_tokenizer_files_give_the_same_ids(hub, tmp_path):
    whole = json.loads((hub / "tokenizer" / "tokenizer.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    merges = [" ".join(pair) for pair in whole["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    added = {str(t["id"]): {"content": t["content"]} for t in whole["added_tokens"]}
    config = {"added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    new, old = load_qwen_tokenizer(hub / "tokenizer"), load_qwen_tokenizer(tmp_path)
    for text in (PROMPT, "<|im_start|>user\nA  SMILING cat,\t42 cafe\u0301s' 🐈\n\n", ""):
        assert new(text) == old(text)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(SnapGenError, match=r"no <\|im_start\|> token"):
        load_qwen_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("scheduler", "shift"),
    [
        ({"shift": 3.0}, 3.0),
        # The published scheduler_config.json: 4096 tokens at 1024².
        (
            {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "shift": 1.0}
            | {"base_image_seq_len": 256, "max_image_seq_len": 8192},
            2.0007,
        ),
    ],
)
def test_the_schedulers_shift(hub, tmp_path, scheduler, shift):
    import shutil

    shutil.copytree(hub, tmp_path / "hub")
    (tmp_path / "hub" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    convert(tmp_path / "hub", tmp_path / "out", only=["vae"])
    assert load_config(tmp_path / "out")["sampling"]["shift"] == pytest.approx(shift, abs=1e-3)


def test_sizes_that_do_not_fit_are_refused(model):
    pipe = Pipeline(model)
    with pytest.raises(UsageError, match="multiples of 16"):
        pipe.settings(PROMPT, width=72, height=64)
    assert pipeline_module.Pipeline.load(model).variant == "full"


def test_a_text_that_is_cut_is_named_and_a_size_is_not(model):
    pipe = Pipeline.load(model)
    assert pipe.notes(pipe.settings(PROMPT, width=64, height=128)) == []
    long = "cat " * 800 + "hat"
    (line,) = pipe.notes(pipe.settings(long, width=64, height=64))
    (encoder,) = pipe.encoders
    count = encoder.token_count(long)
    assert f"qwen reads 512 of {count} tokens" in line and count > 512
    kept = kept_text(encoder, long)
    assert encoder.token_count(kept) <= 512 < encoder.token_count(kept + " cat cat cat")
