"""Two thousand mutated LoRA and container files: each is refused in one line, or read right."""

import argparse
import io
import json
import shutil
import zipfile

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from snapgen_mlx.convert.plan import find_components, plan
from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.lora import load_updates
from snapgen_mlx.tensors.stream import all_entries

from .test_convert_fuzz import mutate

RUNS = 250  # of each of eight kinds, and of pickles whose checksum is right
LAYERS = {"mid.0.attn.to_q": (6, 4), "up.1.ffn.fc1": (8, 4)}
LORAS = ("safetensors", "header", "torch", "peft config")
CONTAINERS = ("ema", "shards", "float8", "namespace")


def refusal(read, seed):
    """What ``read`` gives, or None where it refuses in one line; anything else is a fault."""
    try:
        return read()
    except SnapGenError as e:
        assert str(e) and "\n" not in str(e), (seed, str(e))
        return None
    except Exception as e:
        raise AssertionError(f"seed {seed}: {type(e).__name__}: {e}") from e


def header_end(data: bytes) -> int:
    """Behind it are tensors, in which nothing tells a changed bit from a trained one."""
    return 8 + int.from_bytes(data[:8], "little")


def mutated_pickles(path, runs):
    """A torch file's bytes with one change in its pickle, and the checksum made right."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    for seed in range(runs):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for name, data in records.items():
                is_pickle = name.endswith("data.pkl")
                rng = np.random.default_rng(seed)
                archive.writestr(name, mutate(data, rng) if is_pickle else data)
        yield out.getvalue()


# --- LoRA files


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """{kind: (folder, the LoRA in it, the file to change)}"""
    base, generator = tmp_path_factory.mktemp("loras"), torch.Generator().manual_seed(0)
    tensors = {}
    for layer, (rows, columns) in LAYERS.items():
        tensors[f"transformer.{layer}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
        tensors[f"transformer.{layer}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    alphas = {f"transformer.{layer}.alpha": torch.tensor(3.0) for layer in LAYERS}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 3})}
    out = {}
    for kind in LORAS:
        folder = base / kind.replace(" ", "-")
        folder.mkdir()
        name = {"torch": "lora.pt", "peft config": "adapter_model.safetensors"}.get(kind)
        path = changed = folder / (name or "lora.safetensors")
        if kind == "torch":
            torch.save({"state_dict": tensors | alphas, "step": 3}, path)
        elif kind == "header":
            save_file(tensors, path, metadata)
        else:
            save_file(tensors if kind == "peft config" else tensors | alphas, path)
        if kind == "peft config":
            changed = folder / "adapter_config.json"
            changed.write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 3, "r": 2}))
        out[kind] = folder, path, changed
    return out


@pytest.mark.parametrize("kind", LORAS)
def test_lora_files(loras, tmp_path, kind):
    source, path, changed = loras[kind]
    folder = tmp_path / "in"
    shutil.copytree(source, folder)
    path, changed = folder / path.name, folder / changed.name
    good = load_updates(path, LAYERS)
    data = changed.read_bytes()
    is_header = changed.suffix == ".safetensors"
    refused = 0
    for seed in range(RUNS):
        rng = np.random.default_rng(seed)
        changed.write_bytes(mutate(data, rng, header_end(data) if is_header else None))
        updates = refusal(lambda: load_updates(path, LAYERS), seed)
        if updates is None:
            refused += 1
            continue
        assert updates.keys() <= good.keys()
        if kind in ("safetensors", "torch") and updates.keys() != good.keys():
            raise AssertionError(f"seed {seed}: a layer was lost in silence")
        for name, update in updates.items():
            # Of a changed alpha nothing tells whether it was meant; matrices and signs stay.
            assert mx.array_equal(update.a, good[name].a), seed
            if kind in ("safetensors", "torch"):
                assert mx.array_equal(update.b, good[name].b), seed
            else:
                assert mx.isfinite(update.b).all(), seed
    assert refused > RUNS * (0.15 if kind in ("peft config", "header") else 0.5), refused


def test_pickles_of_loras(loras, tmp_path):
    """Their checksum is right again: what they ask for is another thing, but nothing is run."""
    path = tmp_path / "lora.pt"
    for seed, changed in enumerate(mutated_pickles(loras["torch"][1], RUNS)):
        path.write_bytes(changed)
        refusal(lambda: load_updates(path, LAYERS), seed)


# --- containers


@pytest.fixture(scope="module")
def containers(tmp_path_factory):
    """{kind: (folder, the file to change)} of the same tiny autoencoder, wrapped in other ways."""
    from snapgen_mlx.models.autoencoder import SnapGenAutoencoder, SnapGenAutoencoderConfig
    from snapgen_mlx.tensors.weights import flat_parameters

    config = {"encoder_channels": [8, 8], "decoder_channels": [8, 8], "blocks": 1}
    vae = SnapGenAutoencoder(SnapGenAutoencoderConfig.from_dict(config))
    state = {
        key: torch.tensor(np.array(a.transpose(0, 3, 1, 2) if a.ndim == 4 else a))
        for key, a in flat_parameters(vae).items()
    }
    state = {k: v.contiguous() for k, v in state.items()}
    base, out = tmp_path_factory.mktemp("containers"), {}
    for kind in CONTAINERS:
        folder = base / kind
        folder.mkdir()
        text = json.dumps({"_class_name": "SnapGenAutoencoder", **config})
        (folder / "config.json").write_text(text)
        if kind == "shards":
            keys, table = sorted(state), {}
            for i, part in enumerate((keys[:5], keys[5:]), 1):
                name = f"model.fp16-{i:05}-of-00002.safetensors"
                save_file({k: state[k] for k in part}, folder / name)
                table |= dict.fromkeys(part, name)
            file = folder / "model.safetensors.index.fp16.json"
            file.write_text(json.dumps({"weight_map": table}))
        elif kind == "float8":
            file, content = folder / "model.safetensors", dict(state)
            for key, a in state.items():
                if key.endswith(".weight") and a.ndim > 1:
                    content[key] = a.to(torch.float8_e4m3fn)
                    content[key.replace("weight", "weight_scale")] = torch.tensor(0.5)
            save_file({f"net.{k}": v for k, v in content.items()}, file)
        else:
            file = folder / "model.pt"
            content = {"state_dict": state, "state_dict_ema": {k: v / 2 for k, v in state.items()}}
            if kind == "namespace":
                content = {"net": state, "args": argparse.Namespace(lr=np.float64(1e-4))}
            torch.save(content, file)
        out[kind] = folder, file.name
    return out


def planned(folder, ema=False):
    """What a conversion would write, and the copy that it takes."""
    ((_, component),) = find_components(folder)[0].items()
    plan(component, ema=ema)
    tensors = {}
    for row in component.rows:
        a = row.step.apply(component.reader.read(row.source)).astype(row.dtype)
        tensors[row.target] = a
    return all_entries(component.rows), component.is_ema, tensors


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers(containers, tmp_path, kind):
    source, name = containers[kind]
    folder = tmp_path / "in"
    shutil.copytree(source, folder)
    entries, is_ema, tensors = planned(folder)
    assert not is_ema
    data = (source / name).read_bytes()
    end = header_end(data) if name.endswith(".safetensors") else None
    refused = 0
    for seed in range(RUNS):
        (folder / name).write_bytes(mutate(data, np.random.default_rng(seed), end))
        found = refusal(lambda: planned(folder), seed)
        if found is None:
            refused += 1
            continue
        # Whatever was changed, the raw weights are taken, whole and as they are.
        assert found[:2] == (entries, False), seed
        for key, a in tensors.items():
            assert mx.array_equal(found[2][key], a), (seed, key)
    assert refused > RUNS * 0.3, refused


def test_pickles_of_containers(containers, tmp_path):
    source, name = containers["namespace"]
    shutil.copy(source / "config.json", tmp_path)
    for seed, changed in enumerate(mutated_pickles(source / name, RUNS)):
        (tmp_path / name).write_bytes(changed)
        refusal(lambda: planned(tmp_path), seed)
