"""From a PyTorch checkpoint on the Hub to a picture, through the command line.

The checkpoint is saved by the original classes, the Hub is on loopback, and every picture is held
against a PyTorch pipeline that reads the same checkpoint and starts from the same noise.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from transformers import GemmaTokenizer

from snapgen_mlx import Pipeline
from snapgen_mlx.cli.main import main
from snapgen_mlx.layout import load_config
from snapgen_mlx.tensors.affine import dequantize
from snapgen_mlx.tensors.weights import load_tensors

from . import checkpoints
from .fake_hub import COMMIT, FakeHub
from .reference.torch_pipeline import TorchPipeline

REPO = Path(__file__).parents[1]
VARIANTS = ["tiny", "small", "full"]
COMPONENTS = ["transformer", "vae", "text_encoder", "text_encoder_2"]
PROMPT = "A smiling cat"
LONG = "a red rocket, a smiling cat, " * 10  # more than either encoder reads


def gemma_tokenizer() -> GemmaTokenizer:
    """One with Gemma's rules and a vocabulary that the tiny encoder can embed."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *"▁abcdefghijklmnopqrstuvwxyzACS,.'", "at", "▁s"]
    merges = [("a", "t"), ("▁", "s")]
    vocab = {word: i for i, word in enumerate(words)}
    return GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)


def command(*args, env=None) -> str:
    """Runs snapgen-mlx in a process of its own, which must succeed; returns what it printed."""
    code = "from snapgen_mlx.cli.main import main; main()"
    run = [sys.executable, "-c", code, *map(str, args)]
    env = os.environ | {"PYTHONPATH": str(REPO)} | (env or {})
    done = subprocess.run(run, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def invoke(*args) -> str:
    """The same in this process, which is quicker."""
    result = CliRunner().invoke(main, [*map(str, args)])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The checkpoint that the Hub serves."""
    folder = tmp_path_factory.mktemp("torch") / "model"
    checkpoints.save_checkpoint(folder)
    shutil.rmtree(folder / "tokenizer_2")
    gemma_tokenizer().save_pretrained(folder / "tokenizer_2")
    assert len(list((folder / "transformer").glob("*-of-*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def hub(source, tmp_path_factory):
    with FakeHub() as fake:
        fake.repos["org/model"] = source
        patience = {"HF_HUB_ETAG_TIMEOUT": "60", "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
        fake.env = fake.environment(tmp_path_factory.mktemp("cache")) | patience
        yield fake


@pytest.fixture(scope="module")
def converted(hub, tmp_path_factory):
    """convert org/model, whole."""
    folder = tmp_path_factory.mktemp("mlx") / "model"
    assert "wrote" in command("convert", "org/model", folder, env=hub.env)
    head = load_config(folder)["source"]
    assert (head["source"], head["revision"]) == ("org/model", COMMIT)
    assert all((folder / name).is_dir() for name in [*COMPONENTS, "tokenizer", "tokenizer_2"])
    return folder


@pytest.fixture(scope="module")
def reference(source):
    return TorchPipeline(source)


@pytest.fixture
def generate(tmp_path, monkeypatch):
    """Runs `generate`; returns the latents (1, h, w, C) that it decoded, and the picture."""
    decoded = []
    decode = Pipeline.decode

    def record(self, latents, *args, **kwargs):
        decoded.append(np.array(latents))
        return decode(self, latents, *args, **kwargs)

    monkeypatch.setattr(Pipeline, "decode", record)

    def run(model, prompt=PROMPT, *flags, **options):
        path = tmp_path / f"{len(decoded)}.png"
        given = [f"--{name}={value}" for name, value in options.items()]
        invoke("generate", prompt, "-m", model, "-o", path, *given, *flags)
        with Image.open(path) as image:
            return decoded[-1], np.array(image)

    return run


def noise(size: tuple[int, int], seed: int) -> torch.Tensor:
    """What the pipeline starts from, as (1, C, h, w)."""
    width, height = size
    shape = (1, height // 8, width // 8, checkpoints.DIT["in_channels"])
    a = np.array(mx.random.normal(shape, key=mx.random.key(seed)))
    return torch.from_numpy(a).permute(0, 3, 1, 2)


def expected(reference, variant="full", size=(64, 64), seed=0, prompt=PROMPT, **sampling):
    """The reference's latents (1, h, w, C) and picture."""
    width = VARIANTS.index(variant)
    x = reference.latents(noise(size, seed), prompt, width=width, **sampling)
    return x.permute(0, 2, 3, 1).numpy(), reference.decode(x).numpy()


def same_picture(ours, theirs):
    (latents, image), (expected_latents, expected_image) = ours, theirs
    assert latents.shape == expected_latents.shape
    error = np.abs(latents - expected_latents).max() / np.abs(expected_latents).max()
    assert error < 1e-4
    assert image.shape == expected_image.shape
    # Random weights make a picture of all shades; a grey or clipped one would hide differences.
    assert expected_image.std() > 20 and np.isin(expected_image, (0, 255)).mean() < 0.5
    assert np.abs(image.astype(int) - expected_image.astype(int)).max() <= 1


# --- the same picture

CASES = {
    "no guidance": dict(guidance=1.0),
    "guidance": dict(guidance=4.0, seed=1),
    "negative": dict(guidance=3.0, negative="a red rocket", seed=2),
    "wide, decoded in tiles": dict(guidance=2.0, negative=LONG, size=(640, 64), seed=3),
    "tall, long prompt": dict(guidance=1.5, prompt=LONG, size=(64, 128), seed=4),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_same_picture_as_pytorch(converted, reference, generate, variant, case):
    check(converted, reference, generate, variant, **CASES[case])


def check(model, reference, generate, variant, size=(64, 64), prompt=PROMPT, **sampling):
    sampling = {"steps": 4, **sampling}
    width, height = size
    ours = generate(model, prompt, variant=variant, width=width, height=height, **sampling)
    same_picture(ours, expected(reference, variant, size, prompt=prompt, shift=2.5, **sampling))


def test_settings_of_the_checkpoint(converted, reference, generate):
    """Its scheduler's shift, and the 28 guided steps of a base model."""
    ours = generate(converted, width=64, height=64)
    same_picture(ours, expected(reference, steps=28, guidance=4.0, shift=2.5))


def test_low_ram(converted, reference, generate):
    """Phases that free each other, and smaller tiles."""
    sampling = dict(steps=2, guidance=2.0, seed=7)
    ours = generate(converted, PROMPT, "--low-ram", width=320, height=64, **sampling)
    same_picture(ours, expected(reference, size=(320, 64), shift=2.5, **sampling))


def test_a_width_cut_out(converted, reference, tmp_path, generate):
    invoke("slice", converted, tmp_path / "small", "--variant", "small")
    ours = generate(tmp_path / "small", width=64, height=64, steps=2, guidance=2.0)
    same_picture(ours, expected(reference, "small", steps=2, guidance=2.0, shift=2.5))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("names", [["clip"], ["gemma"], []])
def test_without_encoders(source, tmp_path, generate, variant, names):
    """Either encoder may be missing; without both, the null token is all there is."""
    parts = {"clip": "text_encoder", "gemma": "text_encoder_2"}
    only = ",".join(["transformer", "vae", *(parts[name] for name in names)])
    invoke("convert", source, tmp_path / "out", "--only", only)
    reference = TorchPipeline(source, names)
    case = dict(guidance=3.0, negative="a red rocket", seed=5)
    check(tmp_path / "out", reference, generate, variant, **case)


def test_both_encoders_matter(converted, reference, source):
    """Or the tests above would not see one go missing."""
    sampling = dict(steps=2, guidance=1.0, shift=2.5)
    pictures = [
        expected(TorchPipeline(source, names), **sampling)[0]
        for names in (["clip", "gemma"], ["clip"], ["gemma"], [])
    ]
    scale = np.abs(pictures[0]).max()
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert np.abs(a - b).max() / scale > 1e-2


def test_a_model_folder_that_lacks_an_encoder(converted, source, tmp_path, generate):
    shutil.copytree(converted, tmp_path / "model")
    for name in ("text_encoder_2", "tokenizer_2"):
        shutil.rmtree(tmp_path / "model" / name)
    check(tmp_path / "model", TorchPipeline(source, ["clip"]), generate, "small", guidance=2.0)


def test_a_converted_model_on_the_hub(hub, converted, tmp_path, generate):
    """`generate -m org/name` downloads it; the picture is that of the local folder."""
    hub.repos["org/mlx"] = converted
    options = ["--width=64", "--height=64", "--steps=2", "--variant=tiny"]
    command("generate", PROMPT, "-m", "org/mlx", "-o", tmp_path / "hub.png", *options, env=hub.env)
    _, image = generate(converted, width=64, height=64, steps=2, variant="tiny")
    with Image.open(tmp_path / "hub.png") as there:
        assert np.array_equal(there, image)


# --- and back


def test_export_and_back_is_bit_identical(converted, reference, tmp_path, generate):
    invoke("export", converted, tmp_path / "torch")
    invoke("convert", tmp_path / "torch", tmp_path / "again")
    for name in COMPONENTS:
        ours, theirs = (load_tensors(folder / name) for folder in (tmp_path / "again", converted))
        assert ours.keys() == theirs.keys()
        for key, a in theirs.items():
            assert ours[key].dtype == a.dtype and mx.array_equal(ours[key], a), key
    options = dict(width=64, height=64, steps=2)
    latents, image = generate(converted, **options)
    again, image_again = generate(tmp_path / "again", **options)
    assert np.array_equal(latents, again) and np.array_equal(image, image_again)
    # PyTorch's own classes make the same picture of what was exported, to the bit.
    sampling = dict(steps=2, guidance=2.0, shift=2.5)
    latents, image = expected(reference, **sampling)
    again, image_again = expected(TorchPipeline(tmp_path / "torch"), **sampling)
    assert np.array_equal(latents, again) and np.array_equal(image, image_again)


# --- quantized


@pytest.fixture(scope="module")
def quantized(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "model"
    printed = invoke("convert", hub.repos["org/model"], folder, "--quantize", 8)
    assert "in 8 bits" in printed
    return folder


@pytest.fixture(scope="module")
def dequantized(quantized, tmp_path_factory):
    """PyTorch on the weights that the quantized model stands for."""
    folder = tmp_path_factory.mktemp("dequantized") / "model"
    assert "became floats" in invoke("export", quantized, folder)
    pipeline = TorchPipeline(folder)
    # Export rounds to the scales' bfloat16; on a CPU packed layers become float32.
    gemma, *_ = pipeline.encoders["gemma"]
    for part, module, prefix in (
        ("transformer", pipeline.dit, ""),
        ("text_encoder_2", gemma, "model."),
    ):
        tensors = load_tensors(quantized / part)
        packed = {key.removesuffix(".scales") for key in tensors if key.endswith(".scales")}
        shapes = {prefix + key: a.shape for key, a in module.state_dict().items()}
        floats = dequantize(tensors, shapes)
        state = {
            f"{layer}.weight".removeprefix(prefix): torch.tensor(
                np.array(floats[f"{layer}.weight"])
            )
            for layer in packed
        }
        module.load_state_dict(state, strict=False)
    return pipeline


@pytest.mark.parametrize("variant", VARIANTS)
def test_quantized(quantized, dequantized, reference, generate, variant):
    case = dict(guidance=2.0, negative="a red rocket", seed=6)
    check(quantized, dequantized, generate, variant, **case)
    sampling = dict(steps=4, shift=2.5, **case)
    rounded, exact = (expected(p, variant, **sampling)[0] for p in (dequantized, reference))
    error = np.sqrt(np.mean((rounded - exact) ** 2) / np.mean(exact**2))
    # Weights rounded by 0.5 % make 1.2 to 2 % after four guided steps; 4 bits make 9 to 15 %.
    assert 0.005 < error < 0.04
