"""Checkpoints of the original PyTorch classes: converted, loaded, compared, and turned back."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from snapgen_mlx.cli.convert import convert as convert_command
from snapgen_mlx.cli.export import export as export_command
from snapgen_mlx.config import DiTConfig
from snapgen_mlx.convert.to_mlx import convert
from snapgen_mlx.convert.to_pytorch import export
from snapgen_mlx.errors import SnapGenError, UsageError
from snapgen_mlx.layout import load_config
from snapgen_mlx.loading import load_dit
from snapgen_mlx.models.vae import AutoencoderKLQwenImage, VAEConfig
from snapgen_mlx.tensors import stream
from snapgen_mlx.tensors.weights import assign, load_tensors
from snapgen_mlx.text_loading import load_clip_text, load_gemma_text

from . import checkpoints
from .fake_hub import COMMIT, FakeHub
from .reference.torch_dit import SnapGenPPTransformer2DModel
from .reference.weights import inputs_to_mlx, random_inputs

COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
WORDS = ["a smiling cat", "red rocket"]


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torch") / "model"
    checkpoints.save_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def converted(source, tmp_path_factory):
    dest = tmp_path_factory.mktemp("mlx") / "model"
    report = convert(source, dest)
    assert report["status"] == "converted"
    return dest


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(stream, "SHARD_BYTES", 2_000_000)


def copy(source, target):
    """A copy of a checkpoint's folder that may be damaged."""
    shutil.copytree(source, target)
    return target


def files(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def rel(ours, theirs) -> float:
    ours, theirs = np.array(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def fails(tmp_path, *words, **options):
    """`convert` fails with one line that has these words, and leaves nothing."""
    before = set(tmp_path.iterdir())
    with pytest.raises(SnapGenError) as e:
        convert(dest=tmp_path / "out", **options)
    message = str(e.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert set(tmp_path.iterdir()) == before, "something was left behind"


# --- the same numbers


@pytest.mark.parametrize("index", [0, 1, 2])
def test_transformer_of_every_width(source, converted, index):
    variant = DiTConfig.from_dict(checkpoints.DIT).variants[index]
    reference = SnapGenPPTransformer2DModel(checkpoints.DIT)
    state = {}
    for file in (source / "transformer").glob("*.safetensors"):
        state |= load_file(file)
    reference.load_state_dict(state, strict=True)
    inputs = random_inputs(checkpoints.DIT, (16, 16), batch=2)
    x, t, text, masks = inputs_to_mlx(*inputs)
    dit = load_dit(converted, variant, mx.float32)
    ours = mx.transpose(dit(x, t, text, masks), (0, 3, 1, 2))
    with torch.no_grad():
        assert rel(ours, reference(*inputs, width=index)) < 1e-5


def test_vae(converted):
    folder = converted / "vae"
    vae = AutoencoderKLQwenImage(VAEConfig.from_dict(load_config(folder)))
    assign(vae, load_tensors(folder), folder)
    reference = checkpoints.vae_model()
    z = torch.randn(1, 4, 1, 4, 4)
    mean, std = (torch.tensor(checkpoints.VAE[k]) for k in ("latents_mean", "latents_std"))
    shape = (1, 4, 1, 1, 1)
    with torch.no_grad():
        expected = reference.decode(z * std.view(shape) + mean.view(shape)).sample[:, :, 0]
    ours = vae.decode(mx.array(z[:, :, 0].permute(0, 2, 3, 1).contiguous().numpy()))
    assert rel(ours.transpose(0, 3, 1, 2), expected) < 1e-5


def test_text_encoders(converted):
    clip = load_clip_text(converted / "text_encoder", converted / "tokenizer", mx.float32)
    states, mask = clip.encode(WORDS)
    batch = checkpoints.clip_tokenizer()(WORDS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = checkpoints.clip_model()(**batch).last_hidden_state
    valid = np.array(mask)
    assert rel(np.array(states)[valid], expected[torch.from_numpy(valid)]) < 1e-5

    gemma = load_gemma_text(converted / "text_encoder_2", converted / "tokenizer_2", mx.float32)
    states, mask = gemma.encode(WORDS[:1])
    ids = [2, *checkpoints.gemma_tokenizer().encode(WORDS[0]).ids]
    with torch.no_grad():
        expected = checkpoints.gemma_model()(torch.tensor([ids])).last_hidden_state
    assert rel(states, expected) < 1e-5


# --- what is written


def test_head_and_report(source, converted, tmp_path):
    head = load_config(converted)
    assert head["format"] == "snapgen-mlx" and head["sampling"]["shift"] == 2.5
    hashed = head["source"]["files"]
    assert "transformer/diffusion_pytorch_model.safetensors.index.json" in hashed
    import hashlib

    data = (source / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert hashed["vae/diffusion_pytorch_model.safetensors"] == hashlib.sha256(data).hexdigest()
    assert "snapgen-mlx generate" in (converted / "README.md").read_text()

    report = convert(source, tmp_path / "nothing", dry_run=True)
    assert report["status"] == "planned" and not list(tmp_path.iterdir())
    json.dumps(report)
    assert set(report["components"]) == set(COMPONENTS)
    vae = report["components"]["vae"]
    assert len(vae["dropped"]) == 8 and all("one image" in r["action"] for r in vae["dropped"])
    on_disk = sum(p.stat().st_size for p in converted.rglob("*.safetensors"))
    assert 0 < on_disk - report["bytes"] < 100_000  # the headers
    rows = {r["target"]: r for r in report["components"]["transformer"]["tensors"]}
    assert rows["patch_embed.proj.weight"]["action"] == "OIHW -> OHWI"
    assert rows["patch_embed.proj.weight"]["shape"] == [256, 2, 2, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_source_dtype_is_kept(tmp_path, dtype):
    checkpoints.save_checkpoint(tmp_path / "in", dtype)
    convert(tmp_path / "in", tmp_path / "out")
    name = str(dtype).removeprefix("torch.")
    for component in COMPONENTS:
        for a in load_tensors(tmp_path / "out" / component).values():
            assert a.dtype == getattr(mx, name)


def test_dtype(source, converted, tmp_path):
    convert(source, tmp_path / "out", dtype=mx.bfloat16, only=["transformer"])
    assert {p.name for p in (tmp_path / "out").iterdir() if p.is_dir()} == {"transformer"}
    full = load_tensors(converted / "transformer")
    for key, a in load_tensors(tmp_path / "out" / "transformer").items():
        assert mx.array_equal(a, full[key].astype(mx.bfloat16)), key


def test_second_run_does_nothing(source, tmp_path):
    out = tmp_path / "out"
    convert(source, out, only=["vae"])
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert convert(source, out, only=["vae"])["status"] == "complete"
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    with pytest.raises(SnapGenError, match="already holds another vae; choose another folder"):
        convert(source, out, only=["vae"], dtype=mx.float16)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    weights = out / "vae" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(SnapGenError):
        convert(source, out, only=["vae"])


# --- quantization


@pytest.mark.parametrize("bits", [4, 8])
def test_quantize(source, converted, tmp_path, bits):
    report = convert(source, tmp_path / "out", quantize=bits)
    config = load_config(tmp_path / "out" / "transformer")["quantization"]
    assert (config["group_size"], config["bits"]) == (32, bits)  # 96 channels allow no more
    protected = {k for k, v in config.items() if isinstance(v, dict)}
    if bits == 4:
        assert all(config[layer]["bits"] == 8 for layer in protected)
        assert {"final.proj", "time_embed.0.modulation"} <= protected
    else:
        assert not protected
    written = report["written"]["transformer"]
    assert written["layers"]["8 bits"] == (14 if bits == 4 else 57)
    stored = load_tensors(tmp_path / "out" / "transformer")
    size = sum(a.nbytes for a in stored.values())
    n = report["components"]["transformer"]["parameters"]
    assert written["bits_per_weight"] == pytest.approx(8 * size / n, rel=0.02)
    assert bits < written["bits_per_weight"] < bits + 2

    full = load_tensors(converted / "transformer")
    for key in ("patch_embed.proj.weight", "down.0.scale_shift_table.1", "text_embed.null"):
        assert mx.array_equal(stored[key], full[key].astype(mx.bfloat16))
    assert stored["down.0.attn.to_q.weight"].dtype == mx.uint32

    x, t, text, masks = inputs_to_mlx(*random_inputs(checkpoints.DIT, (16, 16), batch=1))
    for variant in ("tiny", "full"):  # slicing cuts no group
        exact = load_dit(converted, variant, mx.float32)(x, t, text, masks)
        ours = load_dit(tmp_path / "out", variant, mx.float32)(x, t, text, masks)
        error = (mx.abs(exact - ours).mean() / mx.abs(exact).mean()).item()
        assert error < (0.35 if bits == 4 else 0.05)

    folder = tmp_path / "out"
    gemma = load_gemma_text(folder / "text_encoder_2", folder / "tokenizer_2", mx.float32)
    exact = load_gemma_text(converted / "text_encoder_2", converted / "tokenizer_2", mx.float32)
    a, b = gemma.encode(WORDS)[0], exact.encode(WORDS)[0]
    assert 0 < (mx.abs(a - b).mean() / mx.abs(b).mean()).item() < (0.6 if bits == 4 else 0.05)


def test_quantize_refuses_widths_that_cut_groups(tmp_path):
    checkpoints.save_checkpoint(tmp_path / "in", dit=checkpoints.DIT | {"hidden_size": 128})
    with pytest.raises(UsageError, match="groups"):
        convert(tmp_path / "in", tmp_path / "out", quantize=4)


# --- sources


def test_hub(source, converted, tmp_path):
    """Through the command line, with the fake Hub in the process's environment."""
    with FakeHub() as hub:
        hub.repos["org/model"] = source
        env = os.environ | hub.environment(tmp_path / "cache") | {"PYTHONPATH": os.getcwd()}
        code = "from snapgen_mlx.cli.convert import convert; convert()"
        run = [sys.executable, "-c", code, "org/model", str(tmp_path / "out")]
        done = subprocess.run(run, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "wrote" in done.stdout
    head = load_config(tmp_path / "out")["source"]
    assert head["source"] == "org/model" and head["revision"] == COMMIT
    for name, data in files(converted).items():
        if name.endswith(".safetensors"):
            assert (tmp_path / "out" / name).read_bytes() == data


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_single_file(source, converted, tmp_path, name):
    state = {}
    for file in (source / "transformer").glob("*.safetensors"):
        state |= load_file(file)
    save = save_file if name.endswith("safetensors") else torch.save
    save(state, tmp_path / name)
    with pytest.raises(SnapGenError, match="--config"):
        convert(tmp_path / name, tmp_path / "out")
    convert(tmp_path / name, tmp_path / "out", config=source / "transformer" / "config.json")
    ours, expected = (load_tensors(f / "transformer") for f in (tmp_path / "out", converted))
    assert set(ours) == set(expected)
    assert all(mx.array_equal(ours[k], expected[k]) for k in expected)


def test_component_folder_with_its_tokenizer(source, converted, tmp_path):
    copy(source / "text_encoder", tmp_path / "clip")
    for file in (source / "tokenizer").iterdir():
        shutil.copy(file, tmp_path / "clip")
    convert(tmp_path / "clip", tmp_path / "out")
    load_clip_text(tmp_path / "out" / "text_encoder", tmp_path / "out" / "tokenizer")
    assert not (tmp_path / "out" / "tokenizer" / "config.json").exists()


def training_checkpoint(source) -> dict:
    state = {}
    for file in (source / "transformer").glob("*.safetensors"):
        state |= load_file(file)
    return {
        "state_dict": {f"module._orig_mod.{k}": v for k, v in state.items()},
        "ema": {f"module.{k}": v / 2 for k, v in state.items()} | {"n_averaged": torch.tensor(3)},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
    }


@pytest.mark.parametrize("ema", [False, True])
def test_wrappers_and_ema(source, converted, tmp_path, ema):
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save(training_checkpoint(source), folder / "last.pt")
    shutil.copy(source / "transformer" / "config.json", folder)
    report = convert(folder, tmp_path / "out", ema=ema)["components"]["transformer"]
    expected = load_tensors(converted / "transformer")
    for key, a in load_tensors(tmp_path / "out" / "transformer").items():
        assert mx.array_equal(a, expected[key] / 2 if ema else expected[key]), key
    prefix = "ema.module." if ema else "_orig_mod.state_dict.module."
    assert report["prefixes"] == {prefix: len(expected)} and report["ema"] is ema
    reasons = {row["action"] for row in report["dropped"]}
    chosen = "the raw weights (--ema was given)" if ema else "the EMA weights (--ema takes them)"
    assert reasons == {
        f"dropped: {chosen}",
        "dropped: training state, not a weight",
        "dropped: a counter, not a weight",
    }


def test_ema_that_is_not_there(source, tmp_path):
    fails(tmp_path, "no EMA weights", source=source, ema=True, only=["transformer"])


def test_fsdp_folder(source, converted, tmp_path):
    import torch.distributed.checkpoint as dcp

    state = training_checkpoint(source)["state_dict"]
    dcp.save({"model": state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    config = source / "transformer" / "config.json"
    convert(tmp_path / "dcp", tmp_path / "out", config=config)
    ours, expected = (load_tensors(f / "transformer") for f in (tmp_path / "out", converted))
    assert all(mx.array_equal(ours[k], expected[k]) for k in expected)


def open_clip(state: dict, prefix="") -> dict:
    """transformers' text tower in open_clip's layout, with what else such files hold."""
    out = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "attn_mask": torch.zeros(77, 77),
        "text_projection": torch.zeros(32, 16),
    }
    for i in range(2):
        old, new = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        for name in ("weight", "bias"):
            qkv = [state[f"{old}.self_attn.{p}_proj.{name}"] for p in "qkv"]
            out[f"{new}.attn.in_proj_{name}"] = torch.cat(qkv)
            out[f"{new}.attn.out_proj.{name}"] = state[f"{old}.self_attn.out_proj.{name}"]
            out[f"{new}.ln_1.{name}"] = state[f"{old}.layer_norm1.{name}"]
            out[f"{new}.ln_2.{name}"] = state[f"{old}.layer_norm2.{name}"]
            out[f"{new}.mlp.c_fc.{name}"] = state[f"{old}.mlp.fc1.{name}"]
            out[f"{new}.mlp.c_proj.{name}"] = state[f"{old}.mlp.fc2.{name}"]
    return {prefix + k: v for k, v in out.items()}


@pytest.mark.parametrize("layout", ["open_clip", "TinyCLIP", "CLIPModel", "bare"])
def test_clip_layouts(source, converted, tmp_path, layout):
    model = checkpoints.clip_model()
    state = {k.removeprefix("text_model."): v for k, v in model.state_dict().items()}
    folder = tmp_path / "clip"
    folder.mkdir()
    config = load_config(source / "text_encoder")
    if layout == "bare":
        content = dict(state)
    elif layout == "CLIPModel":
        content = {f"text_model.{k}": v for k, v in state.items()}
        content["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        content["vision_model.embeddings.class_embedding"] = torch.zeros(8)
        content["visual_projection.weight"] = content["text_projection.weight"] = torch.zeros(4, 4)
        content["logit_scale"] = torch.tensor(1.0)
        config = {"model_type": "clip", "text_config": config}
    elif layout == "open_clip":
        content = open_clip(state) | {"visual.proj": torch.zeros(2), "logit_scale": torch.ones(())}
    else:
        content = {
            "state_dict": open_clip(state, "_text_encoder.module.")
            | {"_image_encoder.module.visual.proj": torch.zeros(2)}
        }
    torch.save(content, folder / "model.pt")
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, tmp_path / "out")
    ours, expected = (load_tensors(f / "text_encoder") for f in (tmp_path / "out", converted))
    assert set(ours) == set(expected)
    assert all(mx.array_equal(ours[k], expected[k]) for k in expected)


def test_open_clip_config(tmp_path):
    text = {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 3}
    from snapgen_mlx.convert.rules import clip

    for config in ({"text_cfg": text}, {"model_cfg": {"text_cfg": text, "quick_gelu": True}}):
        ours = clip.config(config)
        assert (ours["hidden_size"], ours["num_attention_heads"]) == (256, 4)
        assert ours["hidden_act"] == ("quick_gelu" if "model_cfg" in config else "gelu")
        assert len(clip.shapes(config)) == 4 + 16 * 3


@pytest.mark.parametrize("layout", ["text", "old multimodal", "new multimodal"])
def test_gemma_layouts(source, converted, tmp_path, layout):
    state = checkpoints.gemma_model().state_dict()
    folder = tmp_path / "gemma"
    folder.mkdir()
    config = load_config(source / "text_encoder_2")
    prefix = {
        "text": "model.",
        "old multimodal": "language_model.model.",
        "new multimodal": "model.language_model.",
    }[layout]
    content = {prefix + k: v for k, v in state.items()}
    head = "language_model.lm_head.weight" if layout == "old multimodal" else "lm_head.weight"
    content[head] = state["embed_tokens.weight"].clone()
    if layout != "text":
        vision = "vision_tower.x" if layout.startswith("old") else "model.vision_tower.x"
        content[vision] = torch.zeros(2)
        config = {"model_type": "gemma3", "text_config": config}
    save_file(content, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    report = convert(folder, tmp_path / "out")
    reasons = {row["action"] for row in report["components"]["text_encoder_2"]["dropped"]}
    assert "dropped: the LM head, not called" in reasons
    ours, expected = (load_tensors(f / "text_encoder_2") for f in (tmp_path / "out", converted))
    assert set(ours) == set(expected)
    assert all(mx.array_equal(ours[k], expected[k]) for k in expected)


# --- interruption


def slow_convert(source, dest, wait) -> subprocess.Popen:
    """A conversion in another process that stops after ``wait`` progress reports."""
    code = f"""
import signal, sys, time
from snapgen_mlx.tensors import stream
from snapgen_mlx.convert.to_mlx import convert
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in background
stream.SHARD_BYTES = 2_000_000
count = 0
def progress(done, total):
    global count
    count += 1
    if count == {wait}:
        print("now", flush=True)
        time.sleep(60)
convert({str(source)!r}, {str(dest)!r}, progress=progress)
"""
    run = [sys.executable, "-c", code]
    return subprocess.Popen(run, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_goes_on(source, converted, tmp_path, small_shards, how):
    dest, partial = tmp_path / "out", tmp_path / ".out.partial"
    process = slow_convert(source, dest, wait=5)
    assert process.stdout.readline() == "now\n"
    process.send_signal(how)
    process.wait()
    assert not dest.exists()
    done = {p: p.stat().st_mtime_ns for p in partial.rglob("*.safetensors")}
    assert len(done) == 5
    half = partial / "transformer" / ".model-00006-of-00013.abc.safetensors"
    half.write_bytes(b"as a kill leaves it")

    seen = []
    report = convert(source, dest, progress=lambda d, total: seen.append((d, total)))
    assert report["status"] == "resumed" and not partial.exists()
    for path, mtime in done.items():
        assert (dest / path.relative_to(partial)).stat().st_mtime_ns == mtime
    assert seen[-1][0] == seen[-1][1] == report["bytes"]
    assert sorted(seen) == seen
    assert not [p for p in dest.rglob("*") if p.name in ("journal.json", half.name)]
    ours, expected = (load_tensors(f / "transformer") for f in (dest, converted))
    assert all(mx.array_equal(ours[k], expected[k]) for k in expected)


def test_a_leftover_of_another_conversion_is_not_believed(
    source, converted, tmp_path, small_shards
):
    process = slow_convert(source, tmp_path / "out", wait=3)
    process.stdout.readline()
    process.kill()
    process.wait()
    report = convert(source, tmp_path / "out", dtype=mx.bfloat16)
    assert report["status"] == "converted"
    tensors = load_tensors(tmp_path / "out" / "transformer")
    assert all(a.dtype == mx.bfloat16 for a in tensors.values())


# --- bad input


def edit(path, change):
    """Load a safetensors file, change its table, save it."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.fixture
def broken(source, tmp_path_factory):
    return copy(source, tmp_path_factory.mktemp("broken") / "model")


def first_shard(folder):
    return min((folder / "transformer").glob("*.safetensors"))


def test_truncated_shard(broken, tmp_path):
    shard = first_shard(broken)
    shard.write_bytes(shard.read_bytes()[:-10])
    fails(tmp_path, shard.name, "not a whole safetensors file", source=broken)


def test_missing_shard(broken, tmp_path):
    first_shard(broken).unlink()
    fails(tmp_path, "which is not there", source=broken)


def test_lying_header(broken, tmp_path):
    shard = first_shard(broken)
    shard.write_bytes((1 << 40).to_bytes(8, "little") + shard.read_bytes()[8:])
    fails(tmp_path, shard.name, "header claims", source=broken)


def test_wrong_shape(broken, tmp_path):
    def change(tensors):
        tensors["conv_out.bias" if "conv_out.bias" in tensors else "quant_conv.bias"] = torch.ones(
            3
        )

    edit(broken / "vae" / "diffusion_pytorch_model.safetensors", change)
    fails(tmp_path, "'quant_conv.bias'", "(3,)", "(8,)", source=broken)


def test_shape_that_no_layout_fits(broken, tmp_path):
    path = broken / "vae" / "diffusion_pytorch_model.safetensors"
    edit(path, lambda t: t.update({"quant_conv.weight": torch.ones(8, 8)}))
    fails(tmp_path, "'quant_conv.weight'", "(8, 8)", source=broken)


def test_key_left_over_and_key_missing(broken, tmp_path):
    path = broken / "text_encoder" / "model.safetensors"
    edit(path, lambda t: t.update({"text_model.extra.weight": torch.ones(3)}))
    fails(tmp_path, "no rule for 'text_model.extra.weight'", source=broken)
    edit(path, lambda t: [t.pop(k) for k in list(t) if "extra" in k or k.endswith("fc1.bias")])
    fails(tmp_path, "lacks 'encoder.layers.0.mlp.fc1.bias'", source=broken)


def test_a_pointer_in_a_tokenizers_place_is_named(broken, tmp_path):
    (broken / "tokenizer" / "vocab.json").write_bytes(b"version https://git-lfs.github.com/x\n")
    fails(tmp_path, "vocab.json is a Git LFS pointer", source=broken)


def test_two_keys_for_one_parameter(broken, tmp_path):
    path = broken / "text_encoder" / "model.safetensors"

    def change(tensors):
        key = next(k for k in tensors if k.endswith("final_layer_norm.bias"))
        tensors["module." + key] = tensors[key].clone()

    edit(path, change)
    fails(tmp_path, "all claim to be final_layer_norm.bias", source=broken)


def test_nan_and_infinity_are_counted(broken, tmp_path):
    def change(tensors):
        tensors["quant_conv.bias"][:3] = float("nan")
        tensors["encoder.conv_in.weight"][0, 0, -1, 0, 0] = float("inf")

    edit(broken / "vae" / "diffusion_pytorch_model.safetensors", change)
    words = ("4 values", "'encoder.conv_in.weight', 'quant_conv.bias'")
    fails(tmp_path, *words, source=broken)


def test_overflow_of_the_wanted_dtype(broken, tmp_path):
    path = broken / "vae" / "diffusion_pytorch_model.safetensors"
    edit(path, lambda t: t["quant_conv.bias"].fill_(1e6))
    fails(tmp_path, "8 values", "--dtype", source=broken, dtype=mx.float16)
    convert(broken, tmp_path / "out", dtype=mx.bfloat16, only=["vae"])


def test_nothing_runs(broken, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    shutil.rmtree(broken / "vae")
    (broken / "vae").mkdir()
    torch.save({"x": torch.ones(2), "y": Bomb()}, broken / "vae" / "model.bin")
    (broken / "vae" / "config.json").write_text(
        json.dumps(checkpoints.VAE | {"_class_name": "AutoencoderKLQwenImage"})
    )
    fails(tmp_path, "system", "was refused", source=broken)
    assert not (tmp_path / "ran").exists()


def test_missing_folders(broken, tmp_path):
    shutil.rmtree(broken / "tokenizer_2")
    fails(tmp_path, "no folder tokenizer_2", "--only transformer,vae,text_encoder", source=broken)
    shutil.rmtree(broken / "text_encoder_2")
    fails(tmp_path, "no folder text_encoder_2", source=broken)
    convert(broken, tmp_path / "out", only=["vae"])
    (broken / "vae" / "config.json").unlink()
    with pytest.raises(SnapGenError, match=r"no config\.json"):
        convert(broken, tmp_path / "out2", only=["vae"])


def test_configs_of_something_else(broken, tmp_path):
    config = broken / "transformer" / "config.json"
    good = json.loads(config.read_text())
    for change, words in (
        ({"_class_name": "FluxTransformer2DModel"}, ["FluxTransformer2DModel"]),
        ({"hidden_size": 512}, ["(512"]),
        ({"hidden_size": "big"}, ["hidden_size"]),
        ({"layers": [2, 2, 1]}, ["lacks"]),
        ({"layers": [1, 2, 0]}, ["no rule for"]),
        ({"widths": [1.0]}, ["no rule for"]),
    ):
        config.write_text(json.dumps({**good, **change}))
        fails(tmp_path, *words, source=broken)
    config.write_text((broken / "vae" / "config.json").read_text())
    fails(tmp_path, "is of a vae, in the place of a transformer", source=broken)
    config.write_text("{")
    fails(tmp_path, "not valid JSON", source=broken)
    config.write_text(json.dumps(good))
    vae = broken / "vae" / "config.json"
    vae.write_text(
        json.dumps({"_class_name": "AutoencoderKLQwenImage", "base_dim": "x", "z_dim": 4})
    )
    fails(tmp_path, str(vae), source=broken)


def test_full_disk(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
        fails(tmp_path, "0.0 GB free", "make room", source=source)

    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stream, "write_tensors", no_space)
    fails(tmp_path, "No space left on device", source=source)


def test_disk_that_fills_up(source, tmp_path):
    """The real thing: a limit on file size, met in the middle of a shard."""
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
from snapgen_mlx.convert.to_mlx import convert
from snapgen_mlx.errors import SnapGenError
try:
    convert({str(source)!r}, {str(tmp_path / "out")!r})
except SnapGenError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and "File too large" in done.stdout, done
    assert not list(tmp_path.iterdir())


def test_dest_in_the_way(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(SnapGenError, match="holds something else"):
        convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"
    (tmp_path / "file").write_text("x")
    with pytest.raises(SnapGenError):
        convert(source, tmp_path / "file")
    with pytest.raises(SnapGenError, match="cannot write"):
        convert(source, tmp_path / "file" / "out")


def test_damaged_download(source, tmp_path):
    """A file of the Hub's cache whose name, its checksum, is not that of its content."""
    folder = copy(source / "vae", tmp_path / "vae")
    weights = folder / "diffusion_pytorch_model.safetensors"
    import hashlib

    name = hashlib.sha256(weights.read_bytes()).hexdigest()
    weights.rename(tmp_path / name)
    weights.symlink_to(tmp_path / name)
    convert(folder, tmp_path / "good")
    data = bytearray((tmp_path / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / name).write_bytes(data)
    fails(tmp_path, "does not have its checksum", source=folder)


def test_sources_that_are_converted_already(source, converted, tmp_path):
    with pytest.raises(UsageError, match="MLX model already"):
        convert(converted, tmp_path / "out")
    convert(source, tmp_path / "q", quantize=8)
    fails(tmp_path, "quantized for MLX already", source=tmp_path / "q" / "text_encoder_2")
    with pytest.raises(UsageError, match="--only"):
        convert(source, tmp_path / "out", only=["unet"])


# --- and back


def test_round_trip_is_exact(converted, tmp_path, small_shards):
    report = export(converted, tmp_path / "torch")
    assert report["dequantized"] == {}
    convert(tmp_path / "torch", tmp_path / "again")
    for name in COMPONENTS:
        ours, expected = (load_tensors(f / name) for f in (tmp_path / "again", converted))
        assert set(ours) == set(expected)
        for key, a in expected.items():
            same = ours[key].dtype == a.dtype and mx.array_equal(ours[key], a)
            assert same, key
        assert load_config(tmp_path / "again" / name) == load_config(converted / name)
    for name in ("tokenizer", "tokenizer_2"):
        assert files(tmp_path / "again" / name) == files(converted / name)
    assert load_config(tmp_path / "again")["sampling"] == load_config(converted)["sampling"]


def test_export_loads_strictly_in_pytorch(source, converted, tmp_path):
    from diffusers import AutoencoderKLQwenImage as TorchVAE
    from transformers import CLIPTextModel, CLIPTokenizer, Gemma3TextModel

    out = tmp_path / "torch"
    export(converted, out)
    assert "zero" in (out / "README.md").read_text()
    reference = SnapGenPPTransformer2DModel(load_config(out / "transformer"))
    state = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    reference.load_state_dict(state, strict=True)
    for file in (source / "transformer").glob("*.safetensors"):
        for key, value in load_file(file).items():
            assert torch.equal(state[key], value)

    vae = TorchVAE.from_pretrained(out / "vae")
    assert set(vae.state_dict()) == set(
        load_file(out / "vae" / "diffusion_pytorch_model.safetensors")
    )
    z = torch.randn(1, 4, 1, 4, 4)
    with torch.no_grad():
        assert torch.equal(vae.decode(z).sample, checkpoints.vae_model().decode(z).sample)

    ids = torch.tensor([[5, 6, 7]])
    for cls, name, ours in (
        (CLIPTextModel, "text_encoder", checkpoints.clip_model()),
        (Gemma3TextModel, "text_encoder_2", checkpoints.gemma_model()),
    ):
        model, info = cls.from_pretrained(out / name, output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            ours, theirs = (m(ids).last_hidden_state for m in (ours, model.eval()))
        assert torch.equal(ours, theirs)
    words = CLIPTokenizer.from_pretrained(out / "tokenizer")(WORDS[0])["input_ids"]
    assert words == checkpoints.clip_tokenizer()(WORDS[0])["input_ids"]


def test_export_of_a_quantized_model(source, tmp_path):
    convert(source, tmp_path / "q", quantize=8)
    report = export(tmp_path / "q", tmp_path / "torch")
    assert report["dequantized"] == {"transformer": 57, "text_encoder_2": 14}
    assert "Dequantized" in (tmp_path / "torch" / "README.md").read_text()
    state = load_file(tmp_path / "torch" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(v.dtype == torch.bfloat16 for v in state.values())
    assert "quantization" not in load_config(tmp_path / "torch" / "transformer")
    convert(tmp_path / "torch", tmp_path / "again")
    a, b = (load_dit(tmp_path / n, "full", mx.float32) for n in ("q", "again"))
    x, t, text, masks = inputs_to_mlx(*random_inputs(checkpoints.DIT, (16, 16), batch=1))
    exact, ours = a(x, t, text, masks), b(x, t, text, masks)
    assert (mx.abs(exact - ours).max() / mx.abs(exact).max()).item() < 0.02


def test_round_trip_of_the_embedded_kind(tmp_path):
    """A static text table and the small autoencoder, in the places of the large models."""
    from mlx.utils import tree_flatten

    from snapgen_mlx.files import write_json
    from snapgen_mlx.models.autoencoder import SnapGenAutoencoder, SnapGenAutoencoderConfig
    from snapgen_mlx.tensors.weights import save_tensors

    folder = tmp_path / "model"
    sampling = {"steps": 4, "guidance": 1.0, "shift": 3.0, "size": 256}
    write_json(
        folder / "config.json", {"format": "snapgen-mlx", "version": 1, "sampling": sampling}
    )
    sizes = {"encoder_channels": [8, 16], "decoder_channels": [16, 8], "blocks": 1}
    write_json(folder / "vae" / "config.json", {"_class_name": "SnapGenAutoencoder", **sizes})
    vae = SnapGenAutoencoder(SnapGenAutoencoderConfig(**sizes))
    save_tensors(folder / "vae", dict(tree_flatten(vae.parameters())))
    static = {"model_type": "static_text", "dim": 4, "max_length": 8}
    write_json(folder / "text_encoder" / "config.json", static)
    table = mx.random.randint(-100, 100, (3, 4)).astype(mx.int8)
    save_tensors(folder / "text_encoder", {"table": table, "scale": mx.ones((3,))})
    (folder / "text_encoder" / "vocab.txt").write_text("[UNK]\na\ncat\n")
    export(folder, tmp_path / "torch")
    weights = load_file(tmp_path / "torch" / "vae" / "diffusion_pytorch_model.safetensors")
    assert weights["encoder.conv_in.weight"].shape == (8, 48, 3, 3)
    convert(tmp_path / "torch", tmp_path / "again")
    for name in ("vae", "text_encoder"):
        ours, expected = (load_tensors(f / name) for f in (tmp_path / "again", folder))
        assert set(ours) == set(expected)
        assert all(mx.array_equal(ours[k], expected[k]) for k in expected)
        assert load_config(tmp_path / "again" / name) == load_config(folder / name)
    assert (tmp_path / "again" / "text_encoder" / "vocab.txt").is_file()
    assert load_config(tmp_path / "again")["sampling"] == sampling


def test_export_refuses(source, converted, tmp_path):
    with pytest.raises(UsageError, match="not an MLX model folder"):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "config.json").write_text("{}")
        export(tmp_path / "x", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    with pytest.raises(SnapGenError, match="not empty"):
        export(converted, tmp_path / "full")
    broken = copy(converted, tmp_path / "broken")
    tensors = load_tensors(broken / "vae")
    tensors.pop("quant_conv.bias")
    mx.save_safetensors(str(broken / "vae" / "model.safetensors"), tensors)
    with pytest.raises(SnapGenError, match=r"quant_conv.bias"):
        export(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the command line


def test_commands(source, tmp_path):
    run = CliRunner().invoke
    result = run(convert_command, [str(source), str(tmp_path / "out"), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "never called for one image" in result.output and "would write" in result.output
    assert not (tmp_path / "out").exists()
    report = tmp_path / "report.json"
    options = ["--only", "transformer,vae", "--quantize", "4", "--report", str(report)]
    result = run(convert_command, [str(source), str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    assert "bits per weight" in result.output
    rows = json.loads(report.read_text())["components"]["transformer"]["tensors"]
    assert {"source", "target", "shape", "dtype", "action", "bytes"} <= set(rows[0])
    result = run(convert_command, [str(source), str(tmp_path / "out"), *options])
    assert "nothing to do" in result.output
    result = run(export_command, [str(tmp_path / "out"), str(tmp_path / "torch")])
    assert result.exit_code == 0 and "became floats" in result.output
    result = run(convert_command, [str(tmp_path / "none" / "such"), str(tmp_path / "out2")])
    assert isinstance(result.exception, SnapGenError)
