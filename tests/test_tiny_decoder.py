"""The tiny decoder and the small autoencoder: size, geometry, gradients, and that they learn."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

from snapgen_mlx.models.autoencoder import SnapGenAutoencoder, SnapGenAutoencoderConfig
from snapgen_mlx.models.tiny_decoder import (
    TinyDecoder,
    TinyDecoderConfig,
    depth_to_space,
    depthwise3x3,
    space_to_depth,
    upsample_nearest,
)

SMALL = dict(encoder_channels=(16, 24), decoder_channels=(32, 16), blocks=1)


def count(module) -> int:
    return sum(a.size for _, a in tree_flatten(module.parameters()))


def rel(a, b) -> float:
    return (mx.abs(a - b).max() / mx.abs(b).max()).item()


def test_the_default_decoder_has_1_38_million_parameters():
    assert abs(count(TinyDecoder(TinyDecoderConfig())) - 1.38e6) < 0.01e6


def test_the_default_autoencoder_is_small_and_its_encoder_a_third():
    model = SnapGenAutoencoder(SnapGenAutoencoderConfig())
    assert 0.6e6 < count(model) < 1.6e6
    assert 0.25 < count(model.encoder) / count(model) < 0.4


@pytest.mark.parametrize(("channels", "patch"), [((16, 16, 8, 8), 1), ((16, 8), 4)])
def test_decoder_enlarges_eight_times(channels, patch):
    decoder = TinyDecoder(TinyDecoderConfig(4, channels, blocks=1, patch=patch))
    images = decoder.decode(100 * mx.random.normal((2, 3, 5, 4)))
    assert images.shape == (2, 24, 40, 3)
    assert images.min().item() == -1
    assert images.max().item() == 1


def test_depthwise_convolution_and_its_gradient_equal_torch():
    mx.random.seed(0)
    x, w, g = (mx.random.normal(s) for s in [(2, 7, 5, 6), (6, 3, 3, 1), (2, 7, 5, 6)])
    tx = torch.tensor(np.array(x)).permute(0, 3, 1, 2).requires_grad_()
    tw = torch.tensor(np.array(w)).permute(0, 3, 1, 2).requires_grad_()
    ty = torch.nn.functional.conv2d(tx, tw, padding=1, groups=6)
    ty.backward(torch.tensor(np.array(g)).permute(0, 3, 1, 2))
    (y,), grads = mx.vjp(depthwise3x3, [x, w], [g])
    for ours, theirs in zip((y, *grads), (ty, tx.grad, tw.grad), strict=True):
        assert rel(ours, mx.array(theirs.detach().permute(0, 2, 3, 1).numpy())) < 1e-5


def test_space_to_depth_is_undone_and_ordered_row_major():
    x = mx.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    y = space_to_depth(x, 2)
    assert mx.array_equal(y[0, 0, 1], mx.concatenate([x[0, 0, 2:4], x[0, 1, 2:4]]).reshape(-1))
    assert mx.array_equal(depth_to_space(y, 2), x)
    assert mx.array_equal(upsample_nearest(x)[:, 1::2, 1::2], x)
    assert mx.array_equal(upsample_nearest(x)[:, ::2, 1::2], x)


def test_autoencoder_normalises_its_latents():
    config = SnapGenAutoencoderConfig(**SMALL)
    model = SnapGenAutoencoder(config)
    images = mx.random.uniform(-1, 1, (2, 32, 48, 3))
    raw = model.encode(images)
    assert raw.shape == (2, 32 // config.downsampling, 48 // config.downsampling, 16)
    config.latents_mean, config.latents_std = [0.5] * 16, [2.0, *[4.0] * 15]
    z = model.encode(images)
    assert rel(z[..., 0], (raw[..., 0] - 0.5) / 2) < 1e-6
    assert rel(z[..., 1:], (raw[..., 1:] - 0.5) / 4) < 1e-6
    reconstruction, latents = model(images)
    assert rel(latents, raw) < 1e-6
    assert rel(model.decode(z), mx.clip(reconstruction, -1, 1)) < 1e-5


def test_config_survives_json():
    import dataclasses
    import json

    config = SnapGenAutoencoderConfig(**SMALL)
    d = json.loads(json.dumps(dataclasses.asdict(config) | {"_class_name": "SnapGenAutoencoder"}))
    shapes = [
        [(k, a.shape) for k, a in tree_flatten(SnapGenAutoencoder(c).parameters())]
        for c in (config, SnapGenAutoencoderConfig.from_dict(d))
    ]
    assert shapes[0] == shapes[1]


def test_autoencoder_learns():
    mx.random.seed(0)
    model = SnapGenAutoencoder(SnapGenAutoencoderConfig(**SMALL))
    colours = mx.random.uniform(-1, 1, (8, 4, 4, 3))
    images = mx.repeat(mx.repeat(colours, 8, axis=1), 8, axis=2)

    def loss_fn(model):
        return mx.abs(model(images)[0] - images).mean()

    optimizer = optim.Adam(2e-3)
    step = nn.value_and_grad(model, loss_fn)
    losses = []
    for _ in range(60):
        loss, grads = step(model)
        optimizer.update(model, grads)
        mx.eval(model.state, optimizer.state)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
