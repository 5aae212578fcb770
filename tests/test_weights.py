"""Model folders are read strictly: every way of being wrong is one clear error."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from safetensors.torch import save_file as torch_save

from snapgen_mlx.convert.slice import slice_model
from snapgen_mlx.errors import SnapGenError, UsageError
from snapgen_mlx.files import file_sha256, write_json
from snapgen_mlx.layout import load_config
from snapgen_mlx.loading import load_dit, load_supernet, load_vae
from snapgen_mlx.models.elastic import slice_flat
from snapgen_mlx.tensors.affine import dequantize
from snapgen_mlx.tensors.safetensors_io import save_arrays
from snapgen_mlx.tensors.weights import (
    INDEX,
    SINGLE,
    assign,
    load_infos,
    load_tensors,
    save_tensors,
    weight_files,
)

from .tiny import write_tiny_model
from .toy import toy_config, toy_params

TENSORS = {
    "a": mx.arange(6, dtype=mx.float32).reshape(2, 3),
    "b": mx.array([1.5, -2.0], mx.bfloat16),
    "c": mx.array(7.0),
    "d": mx.zeros((0, 4), mx.float16),
    "e": mx.full((50,), 3.0),
}


def raises(folder, match, call=load_tensors):
    with pytest.raises(SnapGenError, match=match) as e:
        call(folder)
    assert str(folder) in str(e.value) and "\n" not in str(e.value)


def same(a, b):
    assert a.keys() == b.keys()
    for k in a:
        assert a[k].dtype == b[k].dtype and a[k].shape == b[k].shape, k
        assert mx.array_equal(a[k], b[k]), k


@pytest.fixture
def single(tmp_path):
    save_tensors(tmp_path, TENSORS)
    assert [p.name for p in tmp_path.iterdir()] == [SINGLE]
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    """a, b and c together, then d and e: at most 40 bytes or one tensor each."""
    save_tensors(tmp_path, TENSORS, max_shard_bytes=40)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    return tmp_path


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


# Reading


def test_single_round_trip(single):
    same(load_tensors(single), TENSORS)
    assert weight_files(single) == dict.fromkeys(TENSORS, single / SINGLE)


def test_sharded_round_trip(sharded):
    same(load_tensors(sharded), TENSORS)
    files = {k: path.name[6:11] for k, path in weight_files(sharded).items()}
    assert files == {"a": "00001", "b": "00001", "c": "00001", "d": "00001", "e": "00002"}
    index = json.loads((sharded / INDEX).read_text())
    assert index["metadata"]["total_size"] == 24 + 4 + 4 + 0 + 200
    assert {k: info.shape for k, info in load_infos(sharded).items()} == {
        k: a.shape for k, a in TENSORS.items()
    }


def test_no_weights(tmp_path):
    raises(tmp_path, "cannot read .*model.safetensors: No such file")
    raises(tmp_path / "none", "cannot read")


@pytest.mark.parametrize("keep", [7, 8, 100, -1])
def test_a_file_cut_short(single, keep):
    data = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(data[:keep])
    raises(single, "not a whole safetensors file")


def test_an_empty_file(single):
    (single / SINGLE).write_bytes(b"")
    raises(single, "is empty; download it again")


def test_a_file_with_something_behind(single):
    with open(single / SINGLE, "ab") as f:
        f.write(b"\0")
    raises(single, "not a whole safetensors file")


def test_not_safetensors(single):
    (single / SINGLE).write_bytes(b"<html>404 Not Found</html>" * 10)
    raises(single, "is a web page, not the file itself")


def test_a_shard_is_missing(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    raises(sharded, "names 'model-00002-of-00002.safetensors', which is not there")


def test_a_shard_is_cut_short(sharded):
    path = sharded / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    raises(sharded, "model-00002-of-00002.safetensors is not a whole")


def test_the_index_lacks_a_key(sharded):
    edit_index(sharded, lambda index: index["weight_map"].pop("e"))
    # Nothing names the second shard then, so its key is missing only to the module.
    assert load_tensors(sharded).keys() == TENSORS.keys() - {"e"}
    edit_index(sharded, lambda index: index["weight_map"].pop("c"))
    raises(sharded, "does not name 'c' of model-00001-of-00002")


def test_the_index_names_a_key_that_no_shard_has(sharded):
    edit_index(
        sharded, lambda index: index["weight_map"].update(z="model-00001-of-00002.safetensors")
    )
    raises(sharded, "'z' should be in model-00001-of-00002.safetensors and is not")


def test_the_index_swaps_shards(sharded):
    edit_index(
        sharded, lambda index: index["weight_map"].update(a="model-00002-of-00002.safetensors")
    )
    raises(sharded, "does not name 'a' of model-00001-of-00002")


@pytest.mark.parametrize(
    "weight_map",
    [None, [], "x", {"a": 1}, {"a": "../model.safetensors"}, {"a": "/etc/passwd"}],
)
def test_an_index_without_a_valid_weight_map(sharded, weight_map):
    edit_index(sharded, lambda index: index.update(weight_map=weight_map))
    raises(sharded, "has no valid weight_map|is not a file name")


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_an_index_that_names_no_file(sharded, name):
    edit_index(sharded, lambda index: index.update(weight_map={"a": name}))
    raises(sharded, "is not there|is not a file name")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, b"\xff\xfe"])
def test_json_that_is_none(sharded, text):
    for name, call in ((INDEX, load_tensors), ("config.json", load_config)):
        path = sharded / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        raises(sharded, "is not valid JSON" if text else "is empty", call)


def test_json_that_is_no_object(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    raises(tmp_path, "does not hold a JSON object", load_config)
    raises(tmp_path / "none", "cannot read .*config.json: No such file", load_config)


# Writing


def test_an_array_larger_than_a_shard_has_its_own(tmp_path):
    save_tensors(tmp_path, TENSORS, max_shard_bytes=1)
    same(load_tensors(tmp_path), TENSORS)
    assert len(set(weight_files(tmp_path).values())) == 5


def test_saving_where_a_file_stands(tmp_path):
    (tmp_path / "folder").write_text("")
    raises(tmp_path / "folder", "cannot write", lambda folder: save_tensors(folder, TENSORS))


# Modules


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(3, 2), nn.Linear(2, 4, bias=False)]
        self._hidden = mx.zeros(3)


NET = {
    "layers.0.weight": mx.ones((2, 3)),
    "layers.0.bias": mx.ones(2),
    "layers.1.weight": mx.ones((4, 2)),
}


def test_assign_gives_exactly_these_weights():
    net = Net()
    assert assign(net, NET, "here") is net
    same(dict(tree_flatten(net.parameters())), NET)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layers.0.bias": None}, r"here lacks key 'layers\.0\.bias'; is it of another model"),
        ({"layers.0.bias": None, "layers.1.weight": None}, r"'layers\.0\.bias' and 1 more"),
        ({"zzz": mx.ones(1)}, "here has an extra key 'zzz';"),
        ({"_hidden": mx.ones(3)}, "has an extra key '_hidden'"),
        ({"layers.0.weight": mx.ones((3, 2))}, r"'layers\.0\.weight' has shape \(3, 2\), not"),
        ({"layers.0.bias": mx.ones((2, 1))}, r"'layers\.0\.bias' has shape"),
        ({"layers.0.bias": mx.ones(())}, r"'layers\.0\.bias' has shape"),
    ],
)
def test_assign_refuses(change, match):
    net = Net()
    before = dict(tree_flatten(net.parameters()))
    tensors = {k: a for k, a in (NET | change).items() if a is not None}
    with pytest.raises(SnapGenError, match=match):
        assign(net, tensors, "here")
    same(dict(tree_flatten(net.parameters())), before)


@pytest.mark.parametrize(("group", "bits"), [(32, 4), (64, 8), (64, 3)])
def test_dequantize_reads_bits_and_group_from_shapes(group, bits):
    weight = mx.random.normal((8, 128), key=mx.random.key(0))
    packed, scales, biases = mx.quantize(weight, group_size=group, bits=bits)
    tensors = {"x.weight": packed, "x.scales": scales, "x.biases": biases, "x.bias": mx.ones(8)}
    out = dequantize(tensors, {"x.weight": (8, 128)})
    assert out.keys() == {"x.weight", "x.bias"}
    expected = mx.dequantize(packed, scales, biases, group_size=group, bits=bits)
    assert mx.array_equal(out["x.weight"], expected)
    for key in ("x.weight", "x.biases"):
        rest = {k: a for k, a in tensors.items() if k != key}
        with pytest.raises(SnapGenError, match="x is not an affine-quantized layer"):
            dequantize(rest, {"x.weight": (8, 128)})
    with pytest.raises(SnapGenError, match="x is not an affine-quantized layer"):
        dequantize(tensors, {"x.weight": (8, 100)})
    with pytest.raises(SnapGenError, match="x is not an affine-quantized layer"):
        dequantize(tensors, {})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_json(folder / "transformer" / "config.json", toy_config().to_dict())
    save_tensors(folder / "transformer", toy_params(toy_config()))
    return folder


def test_load_dit_slices_one_width(model):
    config, params = load_supernet(model)
    assert config == toy_config()
    for index, name in enumerate(["tiny", "small", "full"]):
        for folder in (model, model / "transformer"):
            dit = load_dit(folder, name, mx.float32)
            same(dict(tree_flatten(dit.parameters())), slice_flat(params, config, index))
    widest = load_dit(model).parameters()
    same(dict(tree_flatten(widest)), dict(tree_flatten(dit.parameters())))
    half = tree_flatten(load_dit(model, "tiny", mx.bfloat16).parameters())
    assert {a.dtype for _, a in half} == {mx.bfloat16}


def test_load_dit_of_an_unknown_width(model):
    with pytest.raises(UsageError, match=r"no variant 'huge' .* tiny, small, full"):
        load_dit(model, "huge")


def test_load_dit_of_another_model(model, tmp_path):
    params = load_tensors(model / "transformer")
    write_json(tmp_path / "config.json", {"_class_name": "UNet2DConditionModel"})
    save_tensors(tmp_path, params)
    with pytest.raises(SnapGenError, match="of UNet2DConditionModel, not of a SnapGen"):
        load_dit(tmp_path)
    write_json(tmp_path / "config.json", toy_config(layers=[2, 0, 0]).to_dict())
    raises(tmp_path, r"lacks key 'down\.1\.", load_dit)
    write_json(tmp_path / "config.json", toy_config(caption_dim=8).to_dict())
    raises(tmp_path, r"has shape \(.*16.*\), not \(.*8.*\)", load_dit)


def stored_as(model, tmp_path, dtype, key="mid.0.attn.to_q.weight"):
    """A copy of the tiny model with one weight in a dtype of torch."""
    folder = shutil.copytree(model, tmp_path / "model")
    file = folder / "transformer" / "model.safetensors"
    tensors = {k: torch.tensor(np.array(a)) for k, a in mx.load(str(file)).items()}
    scale = 100 if "int" in dtype else 1
    tensors[key] = (tensors[key] * scale).to(getattr(torch, dtype))
    torch_save(tensors, file)
    return folder, tensors[key]


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float64"])
def test_unusual_floats_are_read_as_what_they_are(tmp_path, dtype):
    model = write_tiny_model(tmp_path / "plain")
    folder, expected = stored_as(model, tmp_path, dtype)
    ours = load_dit(folder, "full").mid[0].attn.to_q.weight
    np.testing.assert_allclose(np.array(ours), expected.float().numpy(), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "bool", "int32", "int64"])
def test_integers_are_no_weights(tmp_path, dtype):
    model = write_tiny_model(tmp_path / "plain")
    folder, _ = stored_as(model, tmp_path, dtype)
    for read in (load_dit, lambda f: slice_model(f, tmp_path / "cut", "tiny")):
        with pytest.raises(SnapGenError, match=r"'mid.0.attn.to_q.weight' has the dtype"):
            read(folder)
    folder, _ = stored_as(model, tmp_path / "vae", dtype)
    file = folder / "vae" / "model.safetensors"
    tensors = {k: torch.tensor(np.array(a)) for k, a in mx.load(str(file)).items()}
    key = next(iter(tensors))
    torch_save(tensors | {key: tensors[key].to(getattr(torch, dtype))}, file)
    with pytest.raises(SnapGenError, match="has the dtype"):
        load_vae(folder)


def test_the_digest_of_what_is_written_is_that_of_the_file(tmp_path):
    arrays = {"a": mx.arange(6.0).reshape(2, 3), "b": mx.ones((5,), mx.bfloat16)}
    arrays["c"] = mx.zeros((0,))
    digest = save_arrays(tmp_path / "a.safetensors", arrays)
    assert digest == file_sha256(tmp_path / "a.safetensors")
