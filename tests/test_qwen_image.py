"""Qwen-Image's transformer against diffusers'."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from mlx.utils import tree_flatten

from snapgen_mlx.config import QwenImageConfig
from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.models import qwen_image
from snapgen_mlx.models.qwen_image import QwenImage
from snapgen_mlx.tensors.weights import assign

from .settled import active_memory

TINY = dict(
    patch_size=2,
    in_channels=16,
    out_channels=4,
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=3,
    joint_attention_dim=16,
    axes_dims_rope=(8, 4, 4),
)


def pair(**changes):
    """The original with random weights everywhere, and ours with the same."""
    torch.manual_seed(0)
    theirs = QwenImageTransformer2DModel(**(TINY | changes)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim < 2 else p.shape[1] ** -0.5))
    tensors = {k: mx.array(a.numpy()) for k, a in theirs.state_dict().items()}
    config = QwenImageConfig.from_dict(dict(theirs.config))
    return theirs, assign(QwenImage(config), tensors, "transformer")


@pytest.fixture(scope="module")
def tiny():
    return pair()


def rel(a, b) -> float:
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def pack(x):
    """(B, H, W, C) -> the pipeline's (B, HW/4, 4C), as diffusers' ``_pack_latents``."""
    B, H, W, C = x.shape
    x = torch.tensor(np.array(x)).permute(0, 3, 1, 2).reshape(B, C, H // 2, 2, W // 2, 2)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, H * W // 4, 4 * C)


def original(theirs, x, t, states, mask):
    """Velocity and last tokens, as diffusers' pipeline calls the model."""
    B, H, W, C = x.shape
    tokens = []
    block = theirs.transformer_blocks[-1]
    hook = block.register_forward_hook(lambda _, __, out: tokens.append(out[1]))
    with torch.no_grad():
        v = theirs(
            pack(x),
            torch.tensor(np.array(states)),
            None if mask is None else torch.tensor(np.array(mask)),
            torch.tensor(np.array(t)),
            img_shapes=[[(1, H // 2, W // 2)]] * B,
        ).sample
    hook.remove()
    v = v.reshape(B, H // 2, W // 2, C, 2, 2).permute(0, 1, 4, 2, 5, 3).reshape(B, H, W, C)
    return v.numpy(), tokens[0].reshape(B, H // 2, W // 2, -1).numpy()


def inputs(B=2, H=8, W=12, L=5):
    mx.random.seed(1)
    x, states = mx.random.normal((B, H, W, 4)), mx.random.normal((B, L, 16))
    return x, mx.array([0.9, 0.31, 0.5][:B]), states


@pytest.mark.parametrize("changes", [{}, {"num_layers": 5, "num_attention_heads": 2}])
@pytest.mark.parametrize("size", [(8, 8), (8, 12), (14, 6)])
def test_equals_the_original(changes, size):
    theirs, ours = pair(**changes)
    x, t, states = inputs(3, *size)
    mask = mx.arange(5) < mx.array([[5], [3], [1]])
    for m in (mask, None):
        v, tokens = original(theirs, x, t, states, m)
        masks = {} if m is None else {"qwen": m}
        time, text = ours.condition_time(t), ours.condition_text({"qwen": states}, masks, 3)
        assert rel(ours.features(x, time, text), tokens) < 1e-5
        assert rel(ours(x, t, {"qwen": states}, masks), v) < 1e-5


def test_a_padded_text_is_the_cut_text(tiny):
    x, t, states = inputs(1)
    mask = mx.arange(5)[None] < 3
    padded = tiny[1](x, t, {"qwen": states}, {"qwen": mask})
    assert rel(padded, tiny[1](x, t, {"qwen": states[:, :3]})) < 1e-5


def test_joined_conditions_are_each_alone(tiny):
    """As guidance needs it: two texts of different lengths, one time of one row."""
    ours = tiny[1]
    x, t, states = inputs(1)
    time = ours.condition_time(t)
    texts = [ours.condition_text({"qwen": states[:, :n]}, {}, 1) for n in (5, 2)]
    both = ours.denoise(mx.concatenate([x, x]), time, texts[0].join(texts[1]))
    for i, text in enumerate(texts):
        assert rel(both[i : i + 1], ours.denoise(x, time, text)) < 1e-5


def test_without_text_nothing_is_nan(tiny):
    ours = tiny[1]
    x, t, states = inputs(2)
    none = ours(x, t, {})
    masked = ours(x, t, {"qwen": states}, {"qwen": mx.zeros((2, 5), mx.bool_)})
    assert mx.all(mx.isfinite(none)) and rel(masked, none) < 1e-5


def test_one_row_of_a_schedule_is_that_timestep(tiny):
    ours = tiny[1]
    x, _, states = inputs(2)
    times = ours.condition_time(mx.array([1.0, 0.9, 0.75, 0.5]))
    text = ours.condition_text({"qwen": states}, {}, 2)
    alone = ours(x, mx.full((2,), 0.75), {"qwen": states})
    assert rel(ours.denoise(x, times[2:3], text), alone) < 1e-5


@pytest.mark.parametrize("tokens", [24, 48, 1000])
def test_a_batch_in_parts_is_the_whole(tiny, monkeypatch, tokens):
    x, t, states = inputs(3)
    mask = mx.arange(5) < mx.array([[5], [3], [1]])
    whole = tiny[1](x, t, {"qwen": states}, {"qwen": mask})
    monkeypatch.setattr(qwen_image, "TOKENS", tokens)
    assert rel(tiny[1](x, t, {"qwen": states}, {"qwen": mask}), whole) < 1e-6


def test_read_once_holds_a_group_of_blocks_at_most(tmp_path, monkeypatch):
    """Of weights read lazily from a file, and for a batch in two parts."""
    config = QwenImageConfig(**(TINY | {"num_layers": 12, "num_attention_heads": 8}))
    mx.random.seed(0)
    weights = dict(tree_flatten(QwenImage(config).parameters()))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    size = sum(a.nbytes for a in weights.values())
    del weights
    monkeypatch.setattr(qwen_image, "GROUP", 2)
    monkeypatch.setattr(qwen_image, "TOKENS", 4)
    x, t, states = mx.random.normal((2, 4, 4, 4)), mx.array([0.5, 0.9]), inputs()[2]
    mx.eval(x, t, states)
    peaks, results = [], []
    for read_once in (True, False):
        model = QwenImage(config, read_once)
        assign(model, mx.load(str(tmp_path / "model.safetensors")), "transformer")
        mx.synchronize()
        mx.reset_peak_memory()
        before = active_memory()
        results.append(model(x, t, {"qwen": states}))
        mx.eval(results)
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[0] < size / 3 and peaks[1] > size
    assert mx.array_equal(*results)


def test_full_geometry_has_the_published_size():
    ours = dict(tree_flatten(QwenImage(QwenImageConfig()).parameters()))
    with torch.device("meta"):
        theirs = QwenImageTransformer2DModel()
    assert {k: tuple(a.shape) for k, a in ours.items()} == {
        k: tuple(a.shape) for k, a in theirs.state_dict().items()
    }
    assert len(ours) == 1933 and round(sum(a.size for a in ours.values()) / 1e9, 2) == 20.43


@pytest.mark.parametrize(
    "change",
    [
        {"zero_cond_t": True},
        {"guidance_embeds": True},
        {"num_layers": 0},
        {"in_channels": 64},
        {"axes_dims_rope": (8, 4, 6)},
        {"axes_dims_rope": (8, 8)},
    ],
)
def test_other_variants_are_refused(change):
    with pytest.raises(SnapGenError, match="Qwen-Image config"):
        QwenImageConfig.from_dict(TINY | change)
