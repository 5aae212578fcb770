"""The MLX transformer against the plain PyTorch reference, in float32 on tiny geometries."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten

from snapgen_mlx.config import DiTConfig
from snapgen_mlx.models.dit import DiT
from snapgen_mlx.models.elastic import slice_params

from .reference.torch_dit import SnapGenPPTransformer2DModel, slice_state_dict
from .reference.weights import inputs_to_mlx, random_inputs, random_state_dict, to_mlx
from .settled import active_memory

SUPERNET = {
    "in_channels": 4,
    "patch_size": 2,
    "hidden_size": 128,
    "head_dim": 8,
    "num_heads": 16,  # 6 heads at width 0.375, which 4 cross heads do not divide
    "num_kv_heads": 8,
    "cross_kv_heads": 4,
    "caption_dim": 24,
    "text_dims": {"clip": 12, "gemma": 20},
    "layers": [2, 3, 2],
    "ffn_ratio": [4, 3, 4],
    "bna_blocks": 16,
    "bna_radius": 1,
    "rope_theta": 10000,
    "widths": [0.375, 0.5, 1.0],
}
PLAIN = SUPERNET | {"hidden_size": 48, "num_heads": 6, "num_kv_heads": 3, "widths": [1.0]}
DENSE = {"attention": ["dense"] * 3, "num_kv_heads": 1, "ffn_ratio": [3, 3, 3], "mid_skips": False}
ABLATIONS = {
    "A": DENSE | {"downsample": False, "layers": [0, 4, 0]},
    "B": DENSE | {"layers": [2, 3, 2]},
    "C": DENSE | {"layers": [2, 3, 2], "attention": ["assa", "dense", "assa"]},
    "D": {"layers": [2, 4, 3]},
}


def relative_error(ours: mx.array, reference: torch.Tensor) -> float:
    ours, reference = np.array(ours), reference.detach().numpy()
    assert ours.shape == reference.shape
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def load_mlx(config: dict, sd: dict, index: int = -1) -> DiT:
    """The MLX model of one width, with weights sliced by the library."""
    index %= len(config["widths"])
    config = DiTConfig.from_dict(config)
    dit = DiT(config.variant(index))
    params = slice_params(tree_unflatten(list(to_mlx(sd).items())), config, index)
    dit.load_weights(tree_flatten(params), strict=True)
    return dit


def load_torch(config: dict, sd: dict) -> SnapGenPPTransformer2DModel:
    model = SnapGenPPTransformer2DModel(config)
    model.load_state_dict(sd, strict=True)
    return model


@torch.no_grad()
def check(config: dict, size=(16, 16), batch: int = 2, index: int = -1, change=None) -> None:
    """Velocity and last-layer tokens of both models agree. `change(text, masks)` edits the text."""
    sd = random_state_dict(config, seed=1)
    x, t, text, masks = random_inputs(config, size, batch)
    if change:
        change(text, masks)
    index %= len(config["widths"])
    expected, features = load_torch(config, sd)(x, t, text, masks, index, return_features=True)

    dit = load_mlx(config, sd, index)
    x, t, text, masks = inputs_to_mlx(x, t, text, masks)
    v = dit(x, t, text, masks)
    tokens = dit.features(x, dit.condition_time(t), dit.condition_text(text, masks, batch))
    assert relative_error(v.transpose(0, 3, 1, 2), expected) <= 1e-5
    assert relative_error(tokens.flatten(1, 2), features) <= 1e-5


def remove(*names):
    def change(text, masks):
        for name in names:
            del text[name], masks[name]

    return change


def invalidate(sample: int, *names):
    def change(text, masks):
        for name in names:
            masks[name][sample] = False

    return change


TEXTS = {
    "both encoders": None,
    "clip missing": remove("clip"),
    "gemma missing": remove("gemma"),
    "both missing": remove("clip", "gemma"),
    "one sample without gemma": invalidate(0, "gemma"),
    "one sample without text": invalidate(1, "clip", "gemma"),
    "no sample with text": lambda text, masks: [mask.fill_(False) for mask in masks.values()],
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("index", range(3))
def test_widths_and_texts(index, text):
    check(SUPERNET, index=index, batch=3, change=TEXTS[text])


def test_times():
    """From 0 to 1 in steps of 0.1: sines of angles of up to 1000."""
    check(PLAIN, size=(8, 8), batch=11)


# Token grids 4x4 (blocks of one token), 4x12 and 12x4 (3 tokens a block), 12x20 (15 a block):
# in all but the second, no or few block borders fall on the ends of rows.
@pytest.mark.parametrize("size", [(8, 8), (8, 24), (24, 8), (24, 40)])
@pytest.mark.parametrize("radius", [1, 2])
def test_sizes(size, radius):
    check(PLAIN | {"bna_radius": radius}, size=size)


@pytest.mark.parametrize("name", ABLATIONS)
@pytest.mark.parametrize("size", [(16, 16), (24, 16)])
def test_ablations(name, size):
    check(PLAIN | ABLATIONS[name], size=size)


@pytest.mark.parametrize(
    "change",
    [
        {"num_heads": 5, "num_kv_heads": 5},
        {"num_heads": 8, "num_kv_heads": 2, "cross_kv_heads": 3},  # heads need not fill the width
        {"num_heads": 4, "num_kv_heads": 1, "cross_kv_heads": 6, "head_dim": 16},
        {"patch_size": 1},
        {"patch_size": 4, "in_channels": 3},
        {"layers": [0, 2, 0]},
        {"layers": [1, 1, 0]},
        {"layers": [1, 0, 1]},
        {"layers": [1, 5, 1]},
        {"attention": ["dense", "assa", "assa"], "bna_blocks": 4},
        {"bna_radius": 0},
        {"bna_blocks": 4, "bna_radius": 4},  # every block sees all
        {"text_dims": {"static": 16}},
        {"rope_theta": 100},
        {"ffn_ratio": [1.5, 2, 0.5]},
    ],
    ids=str,
)
def test_other_geometries(change):
    check(PLAIN | change)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 3),
    cross=st.integers(1, 5),
    width=st.sampled_from([0.25, 0.5, 0.75, 1.0]),
    blocks=st.sampled_from([2, 4, 8, 16]),
    radius=st.integers(0, 3),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    layers=st.tuples(st.integers(0, 1), st.integers(0, 4), st.integers(1, 1)),
)
def test_any_geometry(kv_heads, group, cross, width, blocks, radius, rows, columns, layers):
    config = SUPERNET | {
        "num_heads": 4 * kv_heads * group,
        "num_kv_heads": 4 * kv_heads,
        "hidden_size": 32,
        "cross_kv_heads": cross,
        "widths": [width, 1.0] if width < 1 else [1.0],
        "bna_blocks": blocks,
        "bna_radius": radius,
        "layers": list(layers),
    }
    check(config, size=(8 * rows, 8 * columns), index=0)


@pytest.mark.parametrize("index", range(3))
def test_padding_does_not_leak(index):
    """What stands in padding tokens, or in the other samples of a batch, changes nothing."""
    dit = load_mlx(SUPERNET, random_state_dict(SUPERNET, seed=2), index)
    x, t, text, masks = inputs_to_mlx(*random_inputs(SUPERNET, (16, 16), batch=3))
    masks["clip"][1], masks["gemma"][1] = False, False
    v = dit(x, t, text, masks)
    garbage = {
        name: mx.where(masks[name][..., None], states, 1e4 * mx.ones_like(states))
        for name, states in text.items()
    }
    assert mx.array_equal(dit(x, t, garbage, masks), v)
    for b in range(3):
        alone = [{name: a[b : b + 1] for name, a in d.items()} for d in (text, masks)]
        one = dit(x[b : b + 1], t[b : b + 1], *alone)
        assert mx.allclose(one[0], v[b], rtol=0, atol=1e-5 * mx.abs(v).max().item())


@pytest.mark.parametrize("change", [{}, ABLATIONS["A"], ABLATIONS["C"]], ids=["D", "A", "C"])
def test_gradients(change):
    """mx.grad equals torch autograd for every parameter and for x."""
    config = PLAIN | change
    sd = random_state_dict(config, seed=3)
    x, t, text, masks = random_inputs(config, (16, 24), batch=2)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))

    model = load_torch(config, sd)
    x_torch = x.clone().requires_grad_()
    (model(x_torch, t, text, masks) * direction).sum().backward()
    expected = to_mlx({name: p.grad for name, p in model.named_parameters()})

    dit = load_mlx(config, sd)
    x, t, text, masks = inputs_to_mlx(x, t, text, masks)
    direction = mx.array(direction.permute(0, 2, 3, 1).contiguous().numpy())

    def loss(params, x):
        dit.update(params)
        return (dit(x, t, text, masks) * direction).sum()

    grads, grad_x = mx.grad(loss, argnums=(0, 1))(dit.trainable_parameters(), x)
    grads = dict(tree_flatten(grads))
    assert grads.keys() == expected.keys()
    assert relative_error(grad_x.transpose(0, 3, 1, 2), x_torch.grad) <= 1e-4
    # Without rotation a bias on k adds the same to all scores of a query: its true gradient is 0,
    # and what both compute instead is rounding. Hence the floor.
    floor = 1e-3 * max(mx.abs(g).max().item() for g in expected.values())
    for path, g in grads.items():
        scale = max(mx.abs(expected[path]).max().item(), floor)
        assert mx.abs(g - expected[path]).max().item() <= 1e-4 * scale, path


def count_mlx(config: dict) -> int:
    """Parameters of the MLX model; its arrays are lazy and stay unevaluated."""
    before = active_memory()
    count = sum(a.size for _, a in tree_flatten(DiT(DiTConfig.from_dict(config)).parameters()))
    assert mx.get_active_memory() - before < 1e6
    return count


def count_torch(config: dict) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in SnapGenPPTransformer2DModel(config).parameters())


FULL = {
    "in_channels": 16,
    "patch_size": 2,
    "hidden_size": 2048,
    "head_dim": 64,
    "num_heads": 32,
    "num_kv_heads": 16,
    "cross_kv_heads": 4,
    "caption_dim": 2048,
    "text_dims": {"clip": 512, "gemma": 2560},
    "layers": [8, 10, 10],
    "ffn_ratio": [4, 3, 4],
    "bna_blocks": 16,
    "bna_radius": 1,
    "rope_theta": 10000,
    "widths": [0.375, 0.5, 1.0],
}


@pytest.mark.parametrize("index, count", [(0, 257_608_216), (1, 428_390_752), (2, 1_595_545_216)])
def test_parameter_counts(index, count):
    """1.6 B, 0.4 B and 0.3 B in the paper."""
    with torch.device("meta"):
        supernet = SnapGenPPTransformer2DModel(FULL).state_dict()
    sd, config = slice_state_dict(supernet, FULL, index)
    assert sum(value.numel() for value in sd.values()) == count
    assert count_torch(config) == count
    assert count_mlx(config) == count


@pytest.mark.parametrize(
    "change, millions",
    [
        (ABLATIONS["A"] | {"layers": [0, 28, 0]}, 341),
        (ABLATIONS["B"] | {"layers": [6, 14, 8]}, 349),
        (ABLATIONS["C"] | {"layers": [6, 14, 8]}, 350),
    ],
    ids="ABC",
)
def test_ablation_parameter_counts(change, millions):
    config = FULL | {"hidden_size": 1024, "num_heads": 16, "num_kv_heads": 8, "widths": [1.0]}
    count = count_torch(config | change)
    assert round(count / 1e6) == millions
    assert count_mlx(config | change) == count


def test_presets_are_the_contract():
    assert DiTConfig.from_preset("full") == DiTConfig.from_dict(FULL)
    for index, name in enumerate(["tiny", "small"]):
        with torch.device("meta"):
            supernet = SnapGenPPTransformer2DModel(FULL).state_dict()
        config = slice_state_dict(supernet, FULL, index)[1]
        assert DiTConfig.from_preset(name) == DiTConfig.from_dict(config)
