"""The stickers' autoencoder: MLX equal to PyTorch, its training, and damaged files."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import torch

from recipes.embedded import autoencoder_training
from recipes.embedded.autoencoder import (
    WEIGHTS,
    Autoencoder,
    Config,
    load_autoencoder,
    main,
    save_autoencoder,
)
from recipes.embedded.autoencoder_training import DECODER, JOINT, measure, scene_pool, train
from snapgen_mlx.convert.to_mlx import convert
from snapgen_mlx.convert.to_pytorch import export
from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.layout import load_config
from snapgen_mlx.loading import load_vae
from snapgen_mlx.tensors.weights import load_tensors

TINY = dict(
    latent_channels=6,
    channels=(8, 12, 16),
    encoder_blocks=(1, 1, 1),
    decoder_blocks=(1, 1, 2),
    plain_stages=2,
)
SHORT = replace(JOINT, steps=4, batch=2, crop=64, warmup=2)


def random_autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    mean, std = torch.randn(6).tolist(), (torch.rand(6) + 0.5).tolist()
    model = Autoencoder(Config(**TINY, latents_mean=mean, latents_std=std)).eval()
    for p in model.parameters():  # blocks start as the identity
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.5)
    return model


@pytest.fixture
def pictures() -> np.ndarray:
    """Premultiplied discs of random colours on transparent ground (4, 64, 64, 4)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64]
    out = np.zeros((4, 64, 64, 4), np.uint8)
    for image in out:
        cy, cx, r = *rng.integers(20, 44, 2), rng.integers(10, 24)
        image[(y - cy) ** 2 + (x - cx) ** 2 < r * r] = [*rng.integers(0, 256, 3), 255]
    return out


def rel(ours: mx.array, theirs: torch.Tensor) -> float:
    ours, theirs = np.array(ours), theirs.permute(0, 2, 3, 1).numpy()
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def test_mlx_equals_pytorch_after_conversion_and_back(tmp_path):
    model = random_autoencoder()
    save_autoencoder(model, tmp_path / "torch" / "vae")
    convert(tmp_path / "torch", tmp_path / "mlx")
    ours = load_vae(tmp_path / "mlx")
    images = torch.rand(2, 4, 64, 96) * 2 - 1
    latents = torch.randn(2, 6, 4, 6)
    with torch.no_grad():
        z, y = model.encode(images), model.decode(latents)
    assert z.shape == (2, 6, 4, 6) and y.shape == (2, 4, 64, 96)
    assert 0 < y.abs().mean() < 0.9  # not all clamped
    assert rel(ours.encode(mx.array(images.permute(0, 2, 3, 1).numpy())), z) <= 1e-5
    assert rel(ours.decode(mx.array(latents.permute(0, 2, 3, 1).numpy())), y) <= 1e-5
    assert ours.config.downsampling == model.config.factor == 16

    export(tmp_path / "mlx", tmp_path / "again")
    again = load_autoencoder(tmp_path / "again" / "vae").state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(again[key], value), key


def test_layout_is_transposed_nothing_else(tmp_path):
    save_autoencoder(random_autoencoder(), tmp_path / "torch" / "vae")
    convert(tmp_path / "torch", tmp_path / "mlx")
    tensors = load_tensors(tmp_path / "mlx" / "vae")
    assert tensors["encoder.conv_in.weight"].shape == (8, 3, 3, 64)
    assert tensors["encoder.downsamplers.0.weight"].shape == (12, 32)
    assert load_config(tmp_path / "mlx" / "vae")["_class_name"] == "StickerAutoencoder"


@pytest.mark.parametrize(
    "sizes",
    [
        {"channels": [96, 192], "encoder_blocks": [1, 2], "decoder_blocks": [2, 3]},  # 8-fold
        {},  # 16-fold
        {"channels": [64, 128], "encoder_blocks": [1, 1], "decoder_blocks": [1, 1]}
        | {"plain_stages": 1},
    ],
    ids=["8", "16", "one plain stage"],
)
def test_prediction_against_the_peak(start, sizes):
    """In a process of its own: what earlier tests free during the run would lower the peak."""
    printed, errors = start("-m", "tests.autoencoder_peaks", json.dumps(sizes)).communicate()
    assert printed, errors
    for name, (predicted, measured) in json.loads(printed).items():
        assert predicted == pytest.approx(measured, rel=0.2), name


def test_training_resumes_bit_for_bit(pictures, tmp_path):
    def start() -> Autoencoder:
        torch.manual_seed(0)
        return Autoencoder(Config(**TINY))

    whole = start()
    records = list(train(whole, pictures, tmp_path / "whole", SHORT))
    assert records[-1]["step"] == 4

    class Stop(Exception):
        pass

    def stopped(images, step, o):
        if step == 2:
            raise Stop
        return batch_of(images, step, o)

    batch_of = autoencoder_training.batch_of
    often = replace(SHORT, save_every=0)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(autoencoder_training, "batch_of", stopped)
        list(train(start(), pictures, tmp_path / "parts", often))
    resumed = start()
    for p in resumed.parameters():  # what it starts with must not matter
        torch.nn.init.ones_(p)
    list(train(resumed, pictures, tmp_path / "parts", SHORT))
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert whole.config == resumed.config

    # What was written is the model that training gave.
    loaded = load_autoencoder(tmp_path / "whole")
    assert loaded.config.latents_std == whole.config.latents_std
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in whole.state_dict().items())


def test_training_learns_and_its_latents_are_normalised(pictures, tmp_path):
    torch.manual_seed(0)
    model = Autoencoder(Config(**TINY))
    before = measure(model, pictures)["psnr"]
    options = replace(SHORT, steps=60, batch=4, learning_rate=4e-3, ema=0.9)
    list(train(model, pictures, tmp_path, options))
    after = measure(model, pictures)
    assert after["psnr"] > before + 3 and 0 < after["iou"] <= 1
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        z = model.encode(x)
    assert z.mean((0, 2, 3)).abs().max() < 0.05 and (z.std((0, 2, 3)) - 1).abs().max() < 0.1


def test_decoder_alone_leaves_the_latents_as_they_are(pictures, tmp_path):
    model = random_autoencoder()
    save_autoencoder(model, tmp_path)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    options = replace(DECODER, steps=2, batch=2, crop=64)
    list(train(model, pictures, tmp_path, options))
    after = load_autoencoder(tmp_path)
    for key, value in after.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith("encoder."), key
    assert after.config == model.config == random_autoencoder().config


def test_cut_state_and_another_network_are_one_line(pictures, tmp_path):
    def attempt(**changes):
        list(train(Autoencoder(Config(**TINY | changes)), pictures, tmp_path, SHORT))

    attempt()
    with pytest.raises(SnapGenError, match="of another network"):
        attempt(latent_channels=8)
    (file,) = (tmp_path / "run").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SnapGenError, match=r"no training state .* is whole"):
        attempt()


@pytest.mark.parametrize("damage", ["cut", "shape", "json", "missing"])
def test_damaged_weights_are_one_line(tmp_path, damage):
    save_autoencoder(random_autoencoder(), tmp_path)
    weights, config = tmp_path / WEIGHTS, tmp_path / "config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "shape":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"latent_channels": 7}))
    elif damage == "json":
        config.write_text("{")
    else:
        weights.unlink()
    with pytest.raises(SnapGenError) as e:
        load_autoencoder(tmp_path)
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def test_a_cut_pool_and_no_world_are_one_line(tmp_path, capsys):
    file = tmp_path / "train.npy"
    np.save(file, np.zeros((2, 8, 8, 4), np.uint8))
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(SnapGenError, match="damaged; remove it"):
        scene_pool(tmp_path, "train", 2, file)
    assert main([str(tmp_path / "nothing"), str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert not list((tmp_path / "out").glob("*.npy"))
