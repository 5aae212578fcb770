"""Readers of checkpoint files against the libraries that write them."""

import json
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.tensors import formats
from snapgen_mlx.tensors.formats import open_weights
from snapgen_mlx.tensors.safetensors_io import load_arrays, read_header, write_tensors

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
DTYPES += (torch.int8, torch.uint8, torch.bool)


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {str(d)[6:]: (10 * torch.randn(3, 5)).to(d) for d in DTYPES}
    return {**tensors, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}


def assert_same(reader, tensors):
    assert set(reader.infos) == set(tensors)
    for key, expected in tensors.items():
        got = reader.read(key)
        assert reader.infos[key].shape == got.shape == tuple(expected.shape)
        assert str(got.dtype).split(".")[-1].rstrip("_") == str(expected.dtype).split(".")[-1]
        if expected.dtype == torch.bfloat16:
            got, expected = got.view(mx.uint16), expected.view(torch.uint16)
        assert np.array_equal(np.array(got), expected.numpy())


def refused(path, *words):
    with pytest.raises(SnapGenError) as e:
        reader = open_weights(path)
        for key in reader.infos:
            reader.read(key)
    assert "\n" not in str(e.value)
    for word in words:
        assert word in str(e.value)


def test_safetensors(tmp_path):
    save_file(some_tensors(), tmp_path / "model.safetensors", {"format": "pt"})
    assert_same(open_weights(tmp_path), some_tensors())


def test_float64_becomes_float32(tmp_path):
    save_file({"x": torch.tensor([1.5, -2.0], dtype=torch.float64)}, tmp_path / "x.safetensors")
    torch.save({"x": torch.tensor([1.5, -2.0], dtype=torch.float64)}, tmp_path / "x.pt")
    for name in ("x.safetensors", "x.pt"):
        reader = open_weights(tmp_path / name)
        assert reader.infos["x"].dtype == "F64"
        assert reader.read("x").dtype == mx.float32 and reader.read("x").tolist() == [1.5, -2.0]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_code_of_float8_is_read_as_torch_reads_it(tmp_path, dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    save_file({"w": codes, "half": torch.ones(2)}, tmp_path / "x.safetensors")
    expected = codes.float().numpy()
    path = tmp_path / "x.safetensors"
    for ours in (open_weights(path).read("w"), load_arrays(path)["w"]):
        assert ours.dtype == mx.bfloat16
        np.testing.assert_array_equal(np.array(ours.astype(mx.float32)), expected)
    torch.save({"w": codes}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "_rebuild_tensor_v3")


def test_dtypes_without_an_array_are_refused_by_name(tmp_path):
    header = {"w": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(SnapGenError, match="'w' has the dtype C64"):
        open_weights(tmp_path / "x.safetensors").read("w")


def test_what_is_written_is_what_the_libraries_read(tmp_path):
    arrays = {k: mx.array(v.float().numpy()) for k, v in some_tensors().items()}
    arrays["bf16"] = mx.random.normal((7, 3)).astype(mx.bfloat16).T
    infos = {k: (a.dtype, a.shape) for k, a in arrays.items()}
    write_tensors(tmp_path / "a.safetensors", infos, arrays.items())
    mx.save_safetensors(str(tmp_path / "b.safetensors"), arrays)
    assert set(read_header(tmp_path / "b.safetensors")) == set(arrays)
    loaded = mx.load(str(tmp_path / "a.safetensors"))
    for key, array in arrays.items():
        assert mx.array_equal(loaded[key], array) and loaded[key].dtype == array.dtype
    from safetensors import safe_open

    with safe_open(tmp_path / "a.safetensors", "np") as f:
        assert set(f.keys()) == set(arrays)


def test_write_refuses_what_was_not_promised(tmp_path):
    infos = {"a": (mx.float32, (2,))}
    for array in (mx.zeros(3), mx.zeros(2, mx.float16)):
        with pytest.raises(SnapGenError):
            write_tensors(tmp_path / "a.safetensors", infos, [("a", array)])


# --- torch zip files


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_torch_zip(tmp_path, protocol):
    torch.save(some_tensors(), tmp_path / "x.bin", pickle_protocol=protocol)
    assert_same(open_weights(tmp_path / "x.bin"), some_tensors())


def test_torch_views_ties_and_parameters(tmp_path):
    big = torch.randn(6, 8, dtype=torch.bfloat16)
    conv = torch.randn(4, 3, 2, 2)
    tensors = {
        "rows": big[2:4],
        "step": big[1:5:2, ::3],
        "transposed": big.T,
        "tied": big,
        "channels_last": conv.contiguous(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(3),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "tail": big.flatten()[-2:],
    }
    torch.save(tensors, tmp_path / "x.pt")
    plain = {k: v.detach().contiguous() for k, v in tensors.items()}
    assert_same(open_weights(tmp_path / "x.pt"), plain)


def test_torch_training_checkpoint(tmp_path):
    """Tables in tables become dotted keys; step counts and settings are left out."""
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    content = {
        "state_dict": layer.state_dict(),
        "ema": OrderedDict(weight=layer.weight.detach() / 2),
        "optimizer": optimizer.state_dict(),
        "step": 12,
        "pair": (torch.ones(1), 5),
        "args": {"name": "x", "lr": 1e-4, "size": torch.Size([1, 2]), "dtype": torch.bfloat16},
    }
    torch.save(content, tmp_path / "x.pt")
    reader = open_weights(tmp_path / "x.pt")
    assert {k for k in reader.infos if not k.startswith("optimizer.")} == {
        "state_dict.weight",
        "state_dict.bias",
        "ema.weight",
        "pair.0",
    }
    assert "optimizer.state.0.exp_avg" in reader.infos
    assert np.array_equal(np.array(reader.read("ema.weight")), layer.weight.detach().numpy() / 2)


class Boom:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


def test_torch_runs_nothing(tmp_path):
    """Neither a call, nor a class with state, nor one smuggled in by an allowed name."""
    ran = tmp_path / "ran"
    dangerous = {
        "posix.system": Boom(os.system, f"touch {ran}"),
        "__builtin__.eval": Boom(eval, f"open({str(ran)!r}, 'w')"),
        "io.open": Boom(open, str(ran), "w"),
        "torch.serialization.load": Boom(torch.load, str(ran)),
        "tests.test_formats.Plain": Plain(),
    }
    for i, (name, value) in enumerate(dangerous.items()):
        torch.save({"w": torch.ones(2), "x": value}, tmp_path / f"{i}.pt")
        refused(tmp_path / f"{i}.pt", f"asks to run {name}")
    assert not ran.exists()


class Plain:
    def __init__(self):
        self.x = 1


@pytest.mark.parametrize(
    "code",
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n}(X\x08\x00\x00\x00__code__X\x01\x00\x00\x00xub.",
        b"ccollections\nOrderedDict\n}(X\x08\x00\x00\x00__init__X\x01\x00\x00\x00xub.",
        b"\x80\x02r\xff\xff\xff\x7f}.",  # memo index of two thousand million
        b"\x80\x02]q\x00h\x00a.",  # a list that holds itself
        b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",  # a table that holds itself
        b"\x80\x02Y",  # no such opcode
        b"\x80\x02ctorch\nFloatStorage\n.",
        b"cbuiltins\ngetattr\n.",
        b"ctorch._utils\n__builtins__\n.",
        b"ccollections\nOrderedDict.__init__\n.",
        b"\x80\x02(X\x07\x00\x00\x00storageX\x03\x00\x00\x00F32X\x01\x00\x00\x000NK\x04tQ.",
        b"",
    ],
)
def test_forged_pickles(tmp_path, code):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as z:
        z.writestr("x/data.pkl", code)
    try:
        assert open_weights(tmp_path / "x.pt").infos == {}
    except SnapGenError as e:
        assert "\n" not in str(e)


def rewritten(source, target, change):
    """A copy of a torch file with ``change(name, data)`` applied to its records."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)


def test_torch_lies(tmp_path):
    source, path = tmp_path / "x.pt", tmp_path / "y.pt"
    torch.save({"w": torch.arange(6.0)}, source)
    rewritten(source, path, lambda n, d: d[:-4] if n.endswith("data/0") else d)
    refused(path, "wrong length")
    rewritten(source, path, lambda n, d: None if n.endswith("data/0") else d)
    refused(path, str(path))
    rewritten(source, path, lambda n, d: b"big" if n.endswith("byteorder") else d)
    refused(path, "big-endian")
    rewritten(source, path, lambda n, d: None if n.endswith("data.pkl") else d)
    refused(path, "data.pkl")
    shape = b"K\x06\x85"  # (6,) as size; then make it 7
    rewritten(source, path, lambda n, d: d.replace(shape, b"K\x07\x85", 1))
    refused(path, "beyond its storage")

    data = bytearray(source.read_bytes())
    data[data.index(np.arange(6, dtype=np.float32).tobytes()) + 5] ^= 1
    path.write_bytes(data)
    refused(path, "CRC")


def test_torch_other_archives(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pt", "save it again")
    (tmp_path / "junk.bin").write_bytes(b"\x80\x02}.")
    refused(tmp_path / "junk.bin", "save it again")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    refused(tmp_path / "script.pt", "TorchScript")
    torch.save({"x": torch.ones(2).to_sparse()}, tmp_path / "sparse.pt")
    refused(tmp_path / "sparse.pt", "_rebuild_sparse_tensor")


# --- DCP


def dcp_save(folder, content):
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(content, checkpoint_id=folder, no_dist=True)


def test_dcp(tmp_path):
    dcp_save(tmp_path / "d", {"model": some_tensors(), "step": 3})
    expected = {f"model.{k}": v for k, v in some_tensors().items()}
    assert_same(open_weights(tmp_path / "d"), expected)

    data = tmp_path / "d" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-100])
    refused(tmp_path / "d", "cut short")
    data.unlink()
    refused(tmp_path / "d", "missing")


def test_dcp_of_two_ranks():
    """What FSDP writes: each rank its part of every tensor, split unevenly.

    `python -m tests.two_ranks` wrote the files, in two processes.
    """
    folder = Path(__file__).parent / "data" / "two_ranks"
    assert len(list(folder.glob("*.distcp"))) == 2
    x = torch.arange(35.0).reshape(5, 7)
    assert_same(open_weights(folder), {"dim0": x, "dim1": x, "bf16": x.bfloat16()})


def test_dcp_runs_nothing(tmp_path):
    dcp_save(tmp_path / "d", {"w": torch.ones(2)})
    metadata = tmp_path / "d" / ".metadata"
    metadata.write_bytes(pickle.dumps(Boom(os.system, f"touch {tmp_path}/ran")))
    refused(tmp_path / "d", "posix.system")
    assert not (tmp_path / "ran").exists()


# --- shards and folders


def sharded(folder, extension="safetensors"):
    folder.mkdir()
    shards = {}
    for i, key in enumerate("abc"):
        name = f"model-{i + 1:05}-of-00003.{extension}"
        save = save_file if extension == "safetensors" else torch.save
        save({key: torch.full((2,), float(i))}, folder / name)
        shards[key] = name
    index = folder / f"model.{extension}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return index, shards


@pytest.mark.parametrize("extension", ["safetensors", "bin"])
def test_shards(tmp_path, extension):
    index, shards = sharded(tmp_path / "m", extension)
    expected = {key: torch.full((2,), float(i)) for i, key in enumerate("abc")}
    assert_same(open_weights(tmp_path / "m"), expected)
    assert_same(open_weights(index), expected)
    assert len(open_weights(index).files) == 4

    def write(weight_map):
        index.write_text(json.dumps({"weight_map": weight_map}))

    write({**shards, "d": shards["a"]})
    refused(index, "'d'", "should be in")
    write({k: v for k, v in shards.items() if k != "b"} | {"c": shards["b"]})
    refused(index)
    write({"a": shards["a"], "b": shards["b"]})
    assert set(open_weights(index).infos) == {"a", "b"}
    write({**shards, "a": "../" + shards["a"]})
    refused(index, "not a file name")
    write({**shards, "a": None})
    refused(index, "not a file name")
    write(["a"])
    refused(index, "weight_map")
    index.write_text("{")
    refused(index, str(index))
    write(shards)
    (tmp_path / "m" / shards["b"]).unlink()
    refused(tmp_path / "m", shards["b"], "not there")
    index.unlink()
    refused(tmp_path / "m", "without their index")


def test_key_that_the_index_leaves_out(tmp_path):
    save_file(
        {"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "model-00001-of-00001.safetensors"
    )
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, "does not name 'b'")


def test_which_files_of_a_folder(tmp_path):
    assert formats.weight_names(
        ["model.safetensors", "pytorch_model.bin", "model.fp16.safetensors"]
    ) == ["model.safetensors"]
    assert formats.weight_names(["config.json", "ours.pt"]) == ["ours.pt"]
    with pytest.raises(SnapGenError, match="give the one to use"):
        formats.weight_names(["a.pt", "b.pt"])
    refused(tmp_path, "holds no weights")
    refused(tmp_path / "nothing", "does not exist")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "model.gguf", "unknown kind")


@pytest.mark.parametrize("size", [0, 4, 8, 40, -1])
def test_truncated(tmp_path, size):
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / "x.safetensors")
    torch.save({"a": torch.ones(4)}, tmp_path / "x.pt")
    for name in ("x.safetensors", "x.pt"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:size])
        refused(tmp_path / name, name)


def header(path, change):
    """Rewrite a safetensors header through ``change(dict)``."""
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + n])
    text = change(table) or json.dumps(table)
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data[8 + n :])


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda h: h["a"].update(dtype="F31"), "F31"),
        (lambda h: h["a"].update(dtype="F16"), "cannot hold"),
        (lambda h: h["a"].update(shape=[5]), "cannot hold"),
        (lambda h: h["a"].update(shape=[-4]), "shape"),
        (lambda h: h["a"].update(shape=[4.0]), "shape"),
        (lambda h: h["a"].update(shape=[True, 4]), "shape"),
        (lambda h: h["a"].update(shape="4"), "shape"),
        (lambda h: h["a"].update(data_offsets=[0, 1 << 60], shape=[1 << 58]), "overlap"),
        (lambda h: h["a"].update(data_offsets=[-16, 0]), "offsets"),
        (lambda h: h["a"].update(data_offsets=[0]), "offsets"),
        (lambda h: h["a"].update(data_offsets=[16, 32]), "overlap"),
        (lambda h: h["a"].update(extra=1), "malformed"),
        (lambda h: h.update(b=[1]), "malformed"),
        (lambda h: h.pop("a"), "overlap"),
        (lambda h: h.update(__metadata__={"x": 1}), "__metadata__"),
        (lambda h: json.dumps(h)[:-1] + ', "a": {}}', "twice"),
        (lambda h: "[" * 100_000, "JSON"),
        (lambda h: "[]", "not a JSON object"),
        (lambda h: "\x00", "JSON"),
    ],
)
def test_lying_headers(tmp_path, change, word):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, path)

    def apply(table):
        result = change(table)
        return result if isinstance(result, str) else None

    header(path, apply)
    refused(path, word, str(path))


def test_lying_header_length(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4)}, path)
    data = path.read_bytes()
    for n in (0, 1, 5000, 1 << 40, (1 << 64) - 1):
        path.write_bytes(n.to_bytes(8, "little") + data[8:])
        refused(path, str(path))


def test_reading_needs_no_torch(tmp_path):
    """The `.pt` and DCP readers must work where torch is not installed."""
    import subprocess
    import sys

    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt")
    dcp_save(tmp_path / "d", {"w": torch.ones(2)})
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from snapgen_mlx.tensors.formats import open_weights\n"
        f"for p in ({str(tmp_path / 'x.pt')!r}, {str(tmp_path / 'd')!r}):\n"
        "    assert open_weights(p).read('w').tolist() == [1, 1]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
