"""The fast PyTorch model of the pretrainer against the clear reference."""

import pytest
import torch

from recipes.pretrain.model import SnapGenPPTransformer2DModel
from snapgen_mlx.config import DiTConfig

from .reference import torch_dit
from .reference.weights import random_inputs, random_state_dict

SUPERNET = {
    "in_channels": 4,
    "patch_size": 2,
    "hidden_size": 64,
    "head_dim": 8,
    "num_heads": 16,  # 6 heads at width 0.375, which 4 cross heads do not divide
    "num_kv_heads": 8,
    "cross_kv_heads": 4,
    "caption_dim": 24,
    "text_dims": {"clip": 12, "gemma": 20},
    "layers": [1, 3, 2],
    "ffn_ratio": [4, 3, 4],
    "bna_blocks": 16,
    "bna_radius": 1,
    "rope_theta": 10000,
    "widths": [0.375, 0.5, 1.0],
}


def both(config: dict, seed: int = 0):
    """The fast model and the reference, with the same random weights."""
    sd = random_state_dict(config, seed)
    fast = SnapGenPPTransformer2DModel(DiTConfig.from_dict(config))
    fast.load_state_dict(sd, strict=True)
    clear = torch_dit.SnapGenPPTransformer2DModel(config)
    clear.load_state_dict(sd, strict=True)
    return fast, clear


def error(ours, reference) -> float:
    assert ours.shape == reference.shape
    return ((ours - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize(
    "change, size",
    [
        ({}, (16, 16)),
        ({}, (8, 24)),
        ({"bna_blocks": 4}, (16, 16)),
        ({"bna_radius": 2}, (24, 16)),
        ({"bna_blocks": 4, "bna_radius": 4}, (16, 16)),  # every block sees all
        ({"patch_size": 1}, (8, 8)),
        ({"patch_size": 4}, (32, 32)),
        ({"layers": [1, 4, 1], "num_kv_heads": 16}, (16, 16)),
        ({"text_dims": {"words": 16}}, (16, 16)),
        ({"rope_theta": 100, "cross_kv_heads": 2}, (16, 16)),
    ],
    ids=str,
)
def test_velocity(change, size, index):
    config = SUPERNET | change
    fast, clear = both(config)
    x, t, text, masks = random_inputs(config, size, batch=3)
    for mask in masks.values():
        mask[1] = False  # one sample without any text
    ours = fast(x.permute(0, 2, 3, 1), t, text, masks, index)
    assert error(ours.permute(0, 3, 1, 2), clear(x, t, text, masks, index)) <= 1e-5


@pytest.mark.parametrize("kept", [{"clip"}, set()], ids=["one encoder", "no encoder"])
def test_dropped_encoders(kept):
    fast, clear = both(SUPERNET)
    x, t, *given = random_inputs(SUPERNET, (16, 16), batch=2)
    text, masks = ({k: a for k, a in d.items() if k in kept} for d in given)
    ours = fast(x.permute(0, 2, 3, 1), t, text, masks)
    assert error(ours.permute(0, 3, 1, 2), clear(x, t, text, masks)) <= 1e-5


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_gradients(index, checkpointing):
    """Of every parameter; None for those that this width does not use."""
    fast, clear = both(SUPERNET)
    fast.checkpointing = checkpointing
    x, t, text, masks = random_inputs(SUPERNET, (16, 16), batch=2)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (clear(x, t, text, masks, index) * direction).sum().backward()
    ours = fast(x.permute(0, 2, 3, 1), t, text, masks, index)
    (ours.permute(0, 3, 1, 2) * direction).sum().backward()
    expected = {k: p.grad for k, p in clear.named_parameters()}
    floor = 1e-3 * max(g.abs().max() for g in expected.values() if g is not None)
    for k, p in fast.named_parameters():
        assert (p.grad is None) == (expected[k] is None), k
        if p.grad is not None:
            scale = max(expected[k].abs().max(), floor)
            assert (p.grad - expected[k]).abs().max() <= 1e-4 * scale, k


def test_every_width_lets_the_noise_pass_at_the_start():
    """Its first weights keep lengths, and its last ones give 0.8 times the patch back."""
    torch.manual_seed(0)
    model = SnapGenPPTransformer2DModel(DiTConfig.from_dict(SUPERNET))
    patches = torch.randn(1, 5, 16)
    for width in SUPERNET["widths"]:
        d = int(64 * width)
        x = model.patch_embed(patches, width)
        whole = d // 16 * 16  # channels of whole rotations
        lengths = x[..., :whole].norm(dim=-1) / patches.norm(dim=-1)
        torch.testing.assert_close(lengths, torch.full((1, 5), (whole / 16) ** 0.5))
        last = model.final.proj.weight[:, :whole]
        expected = patches * whole / 64 * 0.8
        torch.testing.assert_close(x[..., :whole] @ last.T, expected, rtol=1e-5, atol=1e-5)
