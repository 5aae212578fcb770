"""The public tiny decoder for one image against its video decoder in PyTorch."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

from snapgen_mlx.models.taehv import TAEHVConfig, TAEHVDecoder
from snapgen_mlx.tensors.weights import assign

from .reference import torch_taehv

SCALE = 0.01  # of the last layer: most pixels lie between black and white


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    theirs = torch_taehv.Decoder().eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * (0.1 if p.ndim < 2 else (2 / p[0].numel()) ** 0.5))
        theirs.decoder[-1].weight *= SCALE
        theirs.decoder[-1].bias.fill_(0.5)
    tensors = {}
    for key, a in theirs.state_dict().items():
        a = a.permute(0, 2, 3, 1) if a.ndim == 4 else a
        tensors[key] = mx.array(a.contiguous().numpy())
    return theirs, assign(TAEHVDecoder(TAEHVConfig()), tensors, "decoder")


@pytest.mark.parametrize("size", [(4, 4), (3, 6)])
def test_an_image_is_the_video_of_one_latent(pair, size):
    theirs, ours = pair
    mx.random.seed(0)
    latents = 2 * mx.random.normal((2, *size, 16))
    with torch.no_grad():
        frames = theirs(torch.tensor(np.array(latents)).permute(0, 3, 1, 2)[:, None])
    assert frames.shape == (2, 1, 3, 8 * size[0], 8 * size[1])
    expected = 2 * frames[:, 0].permute(0, 2, 3, 1).numpy() - 1
    assert 0.5 < (np.abs(expected) < 1).mean() < 1  # clamped here and there
    decoded = np.array(ours.decode(latents))
    assert decoded.shape == expected.shape and np.abs(decoded - expected).max() < 2e-5  # of 2


def test_keys_and_shapes_are_the_original_ones(pair):
    theirs, ours = pair
    shapes = {k: np.array(a.shape)[[0, 2, 3, 1][: a.ndim]] for k, a in theirs.state_dict().items()}
    assert {k: a.shape for k, a in tree_flatten(ours.parameters())} == {
        k: tuple(n) for k, n in shapes.items()
    }
