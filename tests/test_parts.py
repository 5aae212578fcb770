"""A model assembled from public parts: found where each is, added, checked against each other."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKLQwenImage
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

from snapgen_mlx.cli.main import main
from snapgen_mlx.convert.to_mlx import convert
from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.layout import load_config
from snapgen_mlx.loading import load_tiny_decoder
from snapgen_mlx.pipeline import Pipeline
from snapgen_mlx.tensors.weights import load_tensors

from .checkpoints import (
    DIT,
    clip_model,
    clip_tokenizer,
    gemma_model,
    gemma_tokenizer,
    randomise,
    save_sharded,
)
from .fake_hub import FakeHub
from .reference import torch_taehv
from .reference.weights import random_state_dict

VAE = dict(base_dim=8, z_dim=16, num_res_blocks=1)  # with the published means and deviations
STEPS = 2


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """What a user would name: a transformer, a whole checkpoint with an autoencoder in it, a CLIP
    with both towers, a Gemma, the file of a tiny decoder."""
    root = tmp_path_factory.mktemp("public")
    dit = root / "dit"
    dit.mkdir()
    config = DIT | {"in_channels": 16, "widths": [1.0], "hidden_size": 64, "head_dim": 8}
    config |= {"num_heads": 8, "num_kv_heads": 8}
    (dit / "config.json").write_text(json.dumps(config))
    save_sharded(random_state_dict(config, seed=7), dit)
    whole = root / "whole"
    randomise(AutoencoderKLQwenImage(**VAE), 3).save_pretrained(whole / "vae")
    (whole / "transformer").mkdir()
    (whole / "transformer" / "model.safetensors").write_bytes(b"never to be read")
    (whole / "model_index.json").write_text("{}")
    text = clip_model().config.to_dict()
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, image_size=16)
    vision |= dict(num_attention_heads=2, patch_size=8)
    both = CLIPConfig(text_config=CLIPTextConfig(**text).to_dict(), vision_config=vision)
    randomise(CLIPModel(both), 1).save_pretrained(root / "clip")
    clip_tokenizer().save_pretrained(root / "clip")
    gemma_model().save_pretrained(root / "gemma")
    gemma_tokenizer().save(str(root / "gemma" / "tokenizer.json"))
    torch.save(tiny_state(), root / "taew2_1.pth")
    return root


def tiny_state(seed: int = 0, channels: int = 16) -> dict[str, torch.Tensor]:
    """The keys of the published file: an encoder, and the decoder."""
    decoder = torch_taehv.Decoder(channels)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in decoder.parameters():
            p.copy_(torch.randn_like(p) * (0.1 if p.ndim < 2 else (2 / p[0].numel()) ** 0.5))
        decoder.decoder[-1].weight *= 0.01
    return decoder.state_dict() | {"encoder.0.weight": torch.zeros(64, 3, 3, 3)}


def named(public, *names) -> dict[str, str]:
    parts = {"transformer": "dit", "vae": "whole", "text_encoder": "clip"}
    parts |= {"text_encoder_2": "gemma", "tiny_decoder": "taew2_1.pth"}
    return {name: str(public / parts[name]) for name in names or parts}


@pytest.fixture(scope="module")
def model(public, tmp_path_factory):
    """All parts at once."""
    out = tmp_path_factory.mktemp("mlx") / "model"
    assert convert(None, out, parts=named(public))["status"] == "converted"
    return out


def files(folder) -> dict[str, bytes]:
    paths = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.name != "README.md"}


def test_parts_one_after_the_other(public, model, tmp_path):
    """The same model as of all at once, but for what config.json says of its making."""
    out = tmp_path / "model"
    for name in named(public):
        report = convert(None, out, parts=named(public, name))
        assert report["status"] == "converted"
    ours, theirs = files(out), files(model)
    ours, theirs = ({k: v for k, v in d.items() if k != "config.json"} for d in (ours, theirs))
    assert ours == theirs and len(ours) > 8
    a, b = load_config(out), load_config(model)
    assert a["sampling"] == b["sampling"] and a["base"] == b["base"]
    assert a["parts"].keys() | {"transformer"} == b["parts"].keys()
    before = files(out)
    assert convert(None, out, parts=named(public))["status"] == "complete"
    assert files(out) == before
    with pytest.raises(SnapGenError, match="already holds another vae; choose another folder"):
        convert(None, out, parts=named(public, "vae"), dtype=mx.float16)
    assert files(out) == before


@pytest.mark.parametrize("stop", ["writing", "moving"])
def test_an_interrupted_addition_goes_on(public, model, tmp_path, monkeypatch, stop):
    from snapgen_mlx.convert import to_mlx

    out = tmp_path / "model"
    convert(None, out, parts=named(public, "transformer"))
    before = files(out)
    with monkeypatch.context() as patch:

        def interrupted(*args, **options):
            raise KeyboardInterrupt

        if stop == "writing":
            patch.setattr(to_mlx, "verify", interrupted)
        else:
            patch.setattr(to_mlx.shutil, "rmtree", interrupted)
            patch.setattr(to_mlx, "write_json", interrupted_after(1, to_mlx.write_json))
        with pytest.raises(KeyboardInterrupt):
            convert(None, out, parts=named(public, "vae", "tiny_decoder"))
    assert files(out)["config.json"] == before["config.json"]
    assert convert(None, out, parts=named(public, "vae", "tiny_decoder"))["status"] == "resumed"
    for name in ("vae", "tiny_decoder"):
        assert files(out / name) == files(model / name)
    assert {"vae", "tiny_decoder"} == load_config(out)["parts"].keys() - {"transformer"}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def interrupted_after(calls: int, function):
    left = [calls]

    def call(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return function(*args)

    return call


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vae", {"z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "16 channels"),
        ("vae", {"latents_std": [1.0] * 16}, "Qwen-Image's own means and deviations"),
        ("text_encoder", {"hidden_size": 16}, "clip states with 16 channels, but the transformer"),
        ("tiny_decoder", {}, "tiny decoder reads latents of 4 channels"),
    ],
)
def test_parts_that_do_not_fit(public, tmp_path, name, change, message):
    wrong = tmp_path / "wrong"
    if name == "vae":
        randomise(AutoencoderKLQwenImage(**VAE | change)).save_pretrained(wrong)
    elif name == "text_encoder":
        clip_model(**change).save_pretrained(wrong)
        clip_tokenizer().save_pretrained(wrong)
    else:
        wrong = tmp_path / "wrong.pth"
        torch.save(tiny_state(channels=4), wrong)
    with pytest.raises(SnapGenError, match=message):
        convert(None, tmp_path / "at once", parts=named(public) | {name: str(wrong)})
    others = [part for part in named(public) if part != name]
    out = tmp_path / "model"
    convert(None, out, parts=named(public, *others))
    before = files(out)
    with pytest.raises(SnapGenError, match=message):
        convert(None, out, parts={name: str(wrong)})
    assert files(out) == before and not (tmp_path / "at once").exists()


def test_an_autoencoder_of_other_statistics_than_the_transformers(public, tmp_path):
    """The transformer's own stands beside it where it is from."""
    source = tmp_path / "source"
    shutil.copytree(public / "dit", source / "transformer")
    own = VAE | {"latents_mean": [0.5] * 16}
    randomise(AutoencoderKLQwenImage(**own)).save_pretrained(source / "vae")
    with pytest.raises(SnapGenError, match="other latents_mean than the one beside"):
        convert(source, tmp_path / "out", parts=named(public, "vae"))
    convert(source, tmp_path / "out")


def test_a_part_in_the_place_of_another(public, tmp_path):
    with pytest.raises(SnapGenError, match="is of a text_encoder, in the place of a vae"):
        convert(None, tmp_path / "out", parts={"vae": str(public / "clip")})
    with pytest.raises(SnapGenError, match="holds a text_encoder_2, not a text_encoder"):
        convert(None, tmp_path / "out", parts={"text_encoder": str(public / "gemma")})
    with pytest.raises(SnapGenError, match="not a file of TAEHV"):
        torch.save({"decoder.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
        convert(None, tmp_path / "out", parts={"tiny_decoder": str(tmp_path / "other.pth")})


def test_from_the_hub(public, tmp_path, start):
    """Of a whole checkpoint only what is asked for is downloaded."""
    with FakeHub() as hub:
        hub.repos |= {f"org/{name}": public / name for name in ("dit", "whole", "clip", "gemma")}
        args = ["convert", tmp_path / "out", "--tiny-decoder", public / "taew2_1.pth"]
        for option, name in (
            ("transformer", "dit"),
            ("vae", "whole"),
            ("clip", "clip"),
            ("gemma", "gemma"),
        ):
            args += [f"--{option}", f"org/{name}"]
        code = "import sys; from snapgen_mlx.cli.main import main; main(sys.argv[1:])"
        process = start("-c", code, *args, **hub.environment(tmp_path / "cache"))
        out, errors = process.communicate()
        assert process.returncode == 0, errors
        asked = {path for _, path, _ in hub.requests}
        assert not any("whole" in path and "transformer" in path for path in asked)
    assert "wrote" in out and "tiny_decoder: " in out and "the encoder, not called" in out
    assert load_config(tmp_path / "out")["parts"]["vae"]["source"] == "org/whole"
    assert load_config(tmp_path / "out")["parts"]["vae"]["revision"]


# --- the tiny decoder


def test_the_converted_file_decodes_as_the_original(public, model):
    theirs = torch_taehv.Decoder()
    state = torch.load(public / "taew2_1.pth")
    theirs.load_state_dict({k: a for k, a in state.items() if k.startswith("decoder.")})
    latents = mx.random.normal((1, 3, 4, 16), key=mx.random.key(0))
    with torch.no_grad():
        frames = theirs(torch.tensor(np.array(latents)).permute(0, 3, 1, 2)[:, None])
    expected = 2 * frames[:, 0].permute(0, 2, 3, 1).numpy() - 1
    assert (
        np.abs(np.array(load_tiny_decoder(model).decode(latents)) - expected).max() < 2e-5
    )  # of 2
    assert not any(key.startswith("encoder") for key in load_tensors(model / "tiny_decoder"))


def generate(model, *args):
    size = ["--width", "128", "--height", "128", "--steps", STEPS]
    result = CliRunner().invoke(
        main, ["generate", *map(str, ["a red cat", "-m", model, *size, *args])]
    )
    assert "Traceback" not in result.output
    return result


def test_pictures_by_the_tiny_decoder(model, tmp_path):
    picture = tmp_path / "tiny.png"
    preview = ["--preview", tmp_path / "steps"]
    result = generate(model, "--tiny-decoder", "-o", picture, *preview)
    assert result.exit_code == 0, result.output
    pipe = Pipeline.load(model, tiny_decoder=True)
    settings = {"width": 128, "height": 128, "steps": STEPS}
    tiny = np.asarray(pipe.generate("a red cat", **settings), int)
    assert (tiny == np.asarray(Image.open(picture), int)).all()
    full = np.asarray(Pipeline.load(model).generate("a red cat", **settings), int)
    assert np.abs(tiny - full).mean() > 5
    # The same decoder shows steps, and again what it decoded.
    last = Image.open(tmp_path / "steps" / f"tiny-step-{STEPS:02d}.png")
    assert (np.asarray(last, int) == tiny).all()
    args = ["generate", "--from-metadata", picture, "-m", model, "-o", tmp_path / "again.png"]
    result = CliRunner().invoke(main, list(map(str, args)))
    assert result.exit_code == 0, result.output
    assert (np.asarray(Image.open(tmp_path / "again.png"), int) == tiny).all()


def test_a_model_without_one(public, model, tmp_path):
    plain = shutil.copytree(model, tmp_path / "plain", ignore=shutil.ignore_patterns("tiny_*"))
    result = generate(plain, "--tiny-decoder", "-o", tmp_path / "x.png")
    assert result.exit_code == 2 and "has no tiny decoder; add one: " in result.stderr
    result = generate(model, "--tiny-decoder", "--explain")
    assert result.exit_code == 0, result.output
    explained = [r.stdout for r in (result, generate(model, "--explain"))]
    assert explained[0] != explained[1]
