"""Elastic widths: slicing against the reference's, its gradients, and what is never sliced."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten, tree_unflatten

from snapgen_mlx.config import DiTConfig
from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.models.attention import rope_table
from snapgen_mlx.models.dit import DiT
from snapgen_mlx.models.elastic import bank_index, scatter_add, slice_flat, slice_params

from .reference.torch_dit import SnapGenPPTransformer2DModel, slice_state_dict
from .reference.weights import inputs_to_mlx, random_inputs, random_state_dict, to_mlx

CONFIG = {
    "in_channels": 4,
    "patch_size": 2,
    "hidden_size": 128,
    "head_dim": 8,
    "num_heads": 16,
    "num_kv_heads": 8,
    "cross_kv_heads": 4,
    "caption_dim": 24,
    "text_dims": {"clip": 12, "gemma": 20},
    "layers": [1, 3, 1],
    "ffn_ratio": [4, 3, 4],
    "bna_blocks": 16,
    "bna_radius": 1,
    "rope_theta": 10000,
    "widths": [0.375, 0.5, 1.0],
}
WIDTHS = range(3)
config = DiTConfig.from_dict(CONFIG)


@pytest.fixture(scope="module")
def state_dict():
    return random_state_dict(CONFIG, seed=5)


@pytest.fixture(scope="module")
def supernet(state_dict):
    """Flat MLX parameters."""
    return to_mlx(state_dict)


@pytest.fixture(scope="module")
def inputs():
    return inputs_to_mlx(*random_inputs(CONFIG, (16, 24), batch=2))


@pytest.mark.parametrize("index", WIDTHS)
def test_slices_are_the_references(state_dict, supernet, index):
    """Every key and value of the standalone checkpoint, and its config."""
    expected, standalone = slice_state_dict(state_dict, CONFIG, index)
    expected = to_mlx(expected)
    sliced = slice_flat(supernet, config, index)
    assert sliced.keys() == expected.keys()
    for path, value in expected.items():
        assert sliced[path].shape == value.shape, path
        assert mx.array_equal(sliced[path], value), path
    assert DiTConfig.from_dict(standalone) == config.variant(index)


@pytest.mark.parametrize("index", WIDTHS)
def test_standalone_checkpoint_is_bit_identical(state_dict, supernet, inputs, index):
    sliced = DiT(config.variant(index))
    params = slice_params(tree_unflatten(list(supernet.items())), config, index)
    sliced.load_weights(tree_flatten(params), strict=True)

    expected, c = slice_state_dict(state_dict, CONFIG, index)
    standalone = DiT(DiTConfig.from_dict(c))
    standalone.load_weights(list(to_mlx(expected).items()), strict=True)
    assert mx.array_equal(sliced(*inputs), standalone(*inputs))


@pytest.mark.parametrize("index", WIDTHS)
def test_text_side_is_never_sliced(supernet, index):
    """Keys and values of the text, and all that is per head or per output, stay whole."""
    variant = config.variant(index)
    assert (variant.cross_kv_heads, variant.caption_dim) == (4, 24)
    sliced = slice_flat(supernet, config, index)
    whole = ("text_embed.", ".cross.to_k.", ".cross.to_v.", ".norm_q.", ".norm_k.")
    paths = [p for p in supernet if any(w in p for w in whole)] + ["final.proj.bias"]
    assert len(paths) == 7 + 5 * (2 + 2 * 4) + 1
    for path in paths:
        assert mx.array_equal(sliced[path], supernet[path]), path


@pytest.mark.parametrize("index", [0, 1])
def test_a_head_keeps_its_partners(supernet, inputs, index):
    """The kept query heads read the same keys and values, of image and text, at every width.

    Full-width attention of an input that is zero beyond the narrow channels, with what the other
    heads put out removed, must be the narrow model's attention.
    """
    narrow, full = (DiT(config.variant(i)) for i in (index, 2))
    narrow.load_weights(list(slice_flat(supernet, config, index).items()), strict=True)
    full.load_weights(list(slice_flat(supernet, config, 2).items()), strict=True)
    d, grid = narrow.config.hidden_size, (4, 8)

    _, _, text, masks = inputs
    tokens, mask = full.text_embed(text, masks, 2)
    x = mx.random.normal((2, 32, d), key=mx.random.key(1))
    padded = mx.pad(x, [(0, 0), (0, 0), (0, 128 - d)])
    rope = rope_table(grid, 8, 10000)
    for stage in ("down", "mid"):  # sparse and dense
        block, wide = narrow[stage][0], full[stage][0]
        for layer in (wide.attn, wide.cross):
            layer.to_out.weight = mx.where(mx.arange(128) < d, layer.to_out.weight, 0)
        pairs = [
            (block.attn(x, rope, grid), wide.attn(padded, rope, grid)),
            (
                block.cross(x, block.cross.keys_values(tokens), mask[:, None, None]),
                wide.cross(padded, wide.cross.keys_values(tokens), mask[:, None, None]),
            ),
        ]
        for ours, theirs in pairs:
            assert mx.allclose(ours, theirs[..., :d], rtol=0, atol=1e-5)


def loss_of(index, inputs):
    """A function of a variant's parameter tree."""
    dit = DiT(config.variant(index))
    direction = mx.random.normal(inputs[0].shape, key=mx.random.key(2))

    def loss(params):
        dit.update(params)
        return (dit(*inputs) * direction).sum()

    return loss, direction


@pytest.fixture(scope="module", params=WIDTHS)
def gradients(request, supernet, inputs):
    """index, gradients of the supernet through the slicing, those of the slice: both flat."""
    index = request.param
    loss, _ = loss_of(index, inputs)
    tree = tree_unflatten(list(supernet.items()))
    through = mx.grad(lambda params: loss(slice_params(params, config, index)))(tree)
    of_slice = mx.grad(loss)(slice_params(tree, config, index))
    through, of_slice = dict(tree_flatten(through)), dict(tree_flatten(of_slice))
    mx.eval(through, of_slice)
    return index, through, of_slice


def test_scatter_is_the_gradient_of_slicing(supernet, gradients):
    index, through, of_slice = gradients
    zeros = {path: mx.zeros_like(a) for path, a in supernet.items()}
    scattered = scatter_add(zeros, of_slice, config, index)
    assert scattered.keys() == through.keys() == supernet.keys()
    for path, g in through.items():
        assert mx.array_equal(scattered[path], g), path


def test_scatter_adds(supernet, gradients):
    """On top of another width's gradients, without a bank that those do not hold."""
    index, _, of_slice = gradients
    other = (index + 1) % 3
    # Small integers, so that the sum is exact.
    key = mx.random.key(3)
    full = {
        path: mx.random.randint(-9, 9, a.shape, key=key).astype(mx.float32)
        for path, a in supernet.items()
        if bank_index(path) in (None, other)
    }
    of_slice = {path: mx.round(4 * g) for path, g in of_slice.items()}
    zeros = {path: mx.zeros_like(a) for path, a in supernet.items()}
    alone = scatter_add(zeros, of_slice, config, index)
    both = scatter_add(full, of_slice, config, index)
    assert both.keys() == {p for p in supernet if bank_index(p) in (None, index, other)}
    for path, g in both.items():
        assert mx.array_equal(g, full.get(path, 0) + alone[path]), path
    for path, g in scatter_add(both, of_slice, config, index).items():
        assert mx.array_equal(g, both[path] + alone[path]), path


def test_gradients_match_autograd_of_the_supernet(state_dict, inputs, gradients):
    """Zero outside the slice and in the banks of other widths, the reference's inside."""
    index, through, _ = gradients
    model = SnapGenPPTransformer2DModel(CONFIG)
    model.load_state_dict(state_dict)
    _, direction = loss_of(index, inputs)
    direction = torch.tensor(np.array(direction)).permute(0, 3, 1, 2)
    v = model(*random_inputs(CONFIG, (16, 24), batch=2), width=index)
    (v * direction).sum().backward()
    expected = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    expected = to_mlx(expected)
    # A bias on unrotated keys has gradient 0, which both compute as rounding: hence the floor.
    floor = 1e-3 * max(mx.abs(g).max().item() for g in expected.values())
    for path, g in through.items():
        scale = max(mx.abs(expected[path]).max().item(), floor)
        assert mx.abs(g - expected[path]).max().item() <= 1e-4 * scale, path
        if bank_index(path) not in (None, index):
            assert not mx.any(g), path


def test_widths_that_do_not_divide():
    with pytest.raises(SnapGenError, match=r"width 0\.3 "):
        DiTConfig.from_dict(CONFIG | {"widths": [0.3, 1.0]})
    with pytest.raises(SnapGenError, match=r"width 0\.25 .* 6"):  # 1.5 heads
        DiTConfig.from_dict(CONFIG | {"num_heads": 6, "num_kv_heads": 6, "widths": [0.25, 1.0]})
    # A checkpoint that is not of this config.
    head_gate = {"up.0.attn.head_gate.weight": mx.zeros((6, 128))}
    with pytest.raises(SnapGenError, match=r"up\.0\.attn\.head_gate\.weight"):
        slice_flat(head_gate, config, 0)
