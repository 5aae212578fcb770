"""Mutated files: none may crash the converter, none may be converted into something else."""

import json
import shutil
import warnings

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from snapgen_mlx.convert.to_mlx import convert
from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.tensors.weights import load_tensors

from . import checkpoints

RUNS = 140  # of each of five kinds


def mutate(data: bytes, rng, end: int | None = None) -> bytes:
    """One random change in ``data[:end]``: bits, bytes, or a piece lost, added, moved, repeated."""
    end = len(data) if end is None else end
    out = bytearray(data)
    a, b = sorted(rng.integers(0, end, 2).tolist())
    b = min(b, a + int(rng.integers(1, 64)))
    noise = rng.integers(0, 256, max(b - a, 1), dtype=np.uint8).tobytes()
    match rng.integers(0, 8):
        case 0:
            out[a] ^= 1 << int(rng.integers(0, 8))
        case 1:
            out[a] = int(rng.integers(0, 256))
        case 2:
            out[a : a + len(noise)] = noise
        case 3:
            out[a:a] = noise
        case 4:
            del out[a : max(b, a + 1)]
        case 5:
            out[a:a] = out[a:b]
        case 6:
            del out[a:]
        case 7:
            for i in rng.integers(0, end, 4):
                out[i] = rng.choice([0, 0xFF, ord("9"), ord("-"), ord('"'), ord("}")])
    return bytes(out)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same small text tower in every format: {kind: (folder, file to change)}."""
    import torch.distributed.checkpoint as dcp

    base = tmp_path_factory.mktemp("fuzz")
    model = checkpoints.clip_model(hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    state, config = model.state_dict(), model.config.to_dict() | {"model_type": "clip_text_model"}
    folders = {}
    for kind in ("safetensors", "index", "torch", "dcp", "config"):
        folders[kind] = base / kind
        folders[kind].mkdir()
        (folders[kind] / "config.json").write_text(json.dumps(config))
    save_file(state, folders["safetensors"] / "model.safetensors")
    save_file(state, folders["config"] / "model.safetensors")
    checkpoints.save_sharded(state, folders["index"], "model", size=6000)
    torch.save({"state_dict": state, "step": 3}, folders["torch"] / "model.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folders["dcp"], no_dist=True)
    return {
        "safetensors": (folders["safetensors"], "model.safetensors"),
        "index": (folders["index"], "model.safetensors.index.json"),
        "torch": (folders["torch"], "model.pt"),
        "dcp": (folders["dcp"], ".metadata"),
        "config": (folders["config"], "config.json"),
    }


@pytest.mark.parametrize("kind", ["safetensors", "index", "torch", "dcp", "config"])
def test_mutated(sources, tmp_path, kind):
    source, name = sources[kind]
    convert(source, tmp_path / "good")
    good = load_tensors(tmp_path / "good" / "text_encoder")
    folder = tmp_path / "in"
    shutil.copytree(source, folder)
    data = (source / name).read_bytes()
    # Inside the tensors of a safetensors file nothing tells a changed bit from a trained one.
    end = 8 + int.from_bytes(data[:8], "little") if kind == "safetensors" else None
    refused = 0
    for seed in range(RUNS):
        changed = mutate(data, np.random.default_rng(seed), end)
        (folder / name).write_bytes(changed)
        out = tmp_path / f"out{seed}"
        try:
            convert(folder, out)
        except SnapGenError as e:
            assert "\n" not in str(e), (seed, str(e))
            assert not out.exists() and not (tmp_path / f".out{seed}.partial").exists(), seed
            refused += 1
            continue
        except Exception as e:
            raise AssertionError(f"{kind} seed {seed}: {type(e).__name__}: {e}") from e
        if kind == "config":  # another head count, epsilon, ...: a valid config of the same shapes
            continue
        ours = load_tensors(out / "text_encoder")
        same = set(ours) == set(good) and all(mx.array_equal(ours[k], good[k]) for k in good)
        assert same, f"{kind} seed {seed} was accepted and gave other weights"
    # A change may hit what carries no meaning (metadata, white space, names of settings).
    assert refused > RUNS * (0.3 if kind == "config" else 0.6), refused
