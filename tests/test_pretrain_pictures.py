"""Captioned pictures in tars, through encoding, training, export and conversion, to a picture."""

import io
import json
import tarfile

import mlx.core as mx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

from recipes.pretrain import encode, export, sample, train
from recipes.pretrain.elastic import Training
from recipes.pretrain.train import WORD_TABLE, build
from snapgen_mlx import Pipeline
from snapgen_mlx.cli.main import main as snapgen_mlx

from . import checkpoints
from .test_end_to_end import gemma_tokenizer

PROMPTS = ["a red rocket", "A smiling cat"]
DIT = {k: v for k, v in checkpoints.DIT.items() if k != "_class_name"}


def write_tar(path, count: int, size=(80, 64), captions=True):
    rng = np.random.default_rng(count)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            stream = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(stream, "PNG")
            files = {f"{i:03d}.png": stream.getvalue(), f"{i:03d}.json": b"{}"}
            if captions:
                files[f"{i:03d}.txt"] = f"{PROMPTS[i % 2]} {'at' * i}\n".encode()
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """parts/ (encoders), 0.tar and 1.tar, and their shards in data/."""
    folder = tmp_path_factory.mktemp("pictures")
    checkpoints.save_checkpoint(folder / "parts")
    gemma_tokenizer().save_pretrained(folder / "parts" / "tokenizer_2")
    tars = [write_tar(folder / f"{i}.tar", 3 + i) for i in range(2)]
    args = [folder / "data", *tars, "--parts", folder / "parts", "--size", 64]
    assert encode.main([*map(str, args)]) == 0
    return folder


def test_shards(folder):
    for i in range(2):
        tensors = load_file(folder / "data" / f"shard-{i:05d}.safetensors")
        captions = json.loads((folder / "data" / f"shard-{i:05d}.json").read_text())
        assert len(captions) == 3 + i and captions[0] == PROMPTS[0]
        assert tensors["latents"].shape == (3 + i, 8, 8, 4)
        for name in ("clip", "gemma"):
            assert tensors[f"text.{name}"].shape[::2] == (3 + i, 32)
            assert tensors[f"length.{name}"].max() == tensors[f"text.{name}"].shape[1]


def test_a_shard_that_is_there_is_kept(folder):
    shard = folder / "data" / "shard-00000.safetensors"
    before = shard.stat()
    args = [folder / "data", folder / "0.tar", "--parts", folder / "parts", "--size", "64"]
    assert encode.main([*map(str, args)]) == 0
    assert shard.stat() == before


@pytest.mark.parametrize("fault", ["cut", "no captions", "no encoders", "size"])
def test_bad_input(folder, tmp_path, capsys, fault):
    tar = write_tar(tmp_path / "x.tar", 3, captions=fault != "no captions")
    if fault == "cut":
        tar.write_bytes(tar.read_bytes()[:700])
    parts = tmp_path if fault == "no encoders" else folder / "parts"
    size = 100 if fault == "size" else 64
    args = [tmp_path / "data", tar, "--parts", parts, "--size", size]
    assert encode.main([*map(str, args)]) == (2 if fault == "size" else 1)
    lines = capsys.readouterr().err.split("\n")  # the loaders' progress bars come first
    assert lines[-2].startswith("error: ") and not any("Traceback" in line for line in lines)
    assert not (tmp_path / "data" / "shard-00000.safetensors").exists()


def test_from_pictures_to_a_picture(folder, tmp_path):
    """Training on the shards, export, `snapgen-mlx convert`: MLX draws what PyTorch draws."""
    training = {"batch": 4, "steps": 2, "bf16": False, "log_every": 1, "first_shards": 2}
    training |= {"checkpointing": True, "learning_rate": 0.05}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"transformer": DIT, "training": training}))
    run, torch_folder, mlx_folder = (tmp_path / name for name in ("run", "torch", "mlx"))
    args = ["--data", folder / "data", "--out", run, "--config", config]
    assert train.main([*map(str, args)]) == 0
    args = [run, torch_folder, "--parts", folder / "parts"]
    assert export.main([*map(str, args)]) == 0
    done = CliRunner().invoke(snapgen_mlx, ["convert", str(torch_folder), str(mlx_folder)])
    assert done.exit_code == 0, done.output

    network = build(DIT, None, Training(), WORD_TABLE)
    weights = load_file(torch_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    network.dit.load_state_dict(weights, strict=True)
    states = encode.Encoders(folder / "parts", "cpu").states(PROMPTS[1:])
    text = {name: a.float() for name, (a, _) in states.items()}
    masks = {name: torch.ones(a.shape[:2], dtype=torch.bool) for name, (a, _) in states.items()}
    for index, variant in enumerate(["tiny", "small", "full"]):
        pipeline = Pipeline.load(mlx_folder, variant)
        settings = pipeline.settings(PROMPTS[1], seed=3, width=128, height=64)
        assert (settings.steps, settings.guidance, settings.shift) == (28, 4.0, 3.0)
        ours = list(pipeline.stream(settings))[-1].x
        noise = mx.random.normal((1, 8, 16, 4), key=mx.random.key(3))
        noise = torch.from_numpy(np.array(noise))
        theirs = sample.denoise(network, noise, text, masks, index)
        error = mx.abs(ours - mx.array(theirs.numpy())).max() / theirs.abs().max().item()
        assert error.item() <= 1e-4, variant
