"""Sources named on the command line: local paths and Hub ids, with the Hub on loopback."""

import errno
import json

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

from snapgen_mlx.errors import SnapGenError, UsageError
from snapgen_mlx.hub import commit_of, resolve
from snapgen_mlx.tensors.formats import open_weights

from .fake_hub import COMMIT, FakeHub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with FakeHub() as fake:
        monkeypatch.setattr(constants, "ENDPOINT", fake.url)
        template = fake.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
        fake.repos["org/model"] = repository(tmp_path / "repository")
        yield fake
        huggingface_hub.close_session()


def repository(folder):
    """A sharded transformer, a .bin encoder, and files that conversion has no use for.

    No two files are equal, or the cache would fetch only one of them.
    """
    (folder / "transformer").mkdir(parents=True)
    (folder / "text_encoder").mkdir()
    (folder / "model_index.json").write_text('{"what": "index"}')
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for key, shard in zip("ab", shards, strict=True):
        save_file({key: np.arange(50_000, dtype=np.float32)}, folder / "transformer" / shard)
    index = {"weight_map": dict(zip("ab", shards, strict=True))}
    name = "diffusion_pytorch_model.safetensors.index.json"
    (folder / "transformer" / name).write_text(json.dumps(index))
    (folder / "transformer" / "config.json").write_text('{"what": "transformer"}')
    (folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"double")
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"old format")
    (folder / "text_encoder" / "config.json").write_text('{"what": "encoder"}')
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(b"only this")
    (folder / "everything.safetensors").write_bytes(b"single file copy")
    return folder


def one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def test_local_paths_win(tmp_path):
    assert resolve(tmp_path) == tmp_path
    with pytest.raises(UsageError):
        resolve(tmp_path, revision="v1")
    with pytest.raises(SnapGenError, match="no such file or folder"):
        resolve(tmp_path / "nothing" / "here")


def test_download_takes_what_conversion_needs(hub):
    folder = resolve("org/model")
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert "text_encoder/pytorch_model.bin" in names  # no safetensors there
    assert not any(n.endswith((".fp16.safetensors", "everything.safetensors")) for n in names)
    assert "transformer/diffusion_pytorch_model.bin" not in names
    assert set(open_weights(folder / "transformer").infos) == {"a", "b"}
    assert commit_of(folder / "transformer") == COMMIT
    assert commit_of("/somewhere/else") is None

    before = len(hub.requests)
    assert resolve("org/model@main") == folder
    assert not any(path.endswith(".safetensors") for _, path, _ in hub.requests[before:])


def test_revisions(hub):
    assert resolve("org/model", revision=COMMIT).name == COMMIT
    with pytest.raises(SnapGenError) as e:
        resolve("org/model@v9")
    one_line(e, "org/model", "'v9'")
    with pytest.raises(UsageError):
        resolve("org/model@v9", revision="main")


def test_unknown_repository(hub):
    with pytest.raises(SnapGenError) as e:
        resolve("org/nothing")
    one_line(e, "org/nothing is not on the Hub", "https://huggingface.co/org/nothing")


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_gated(hub, token):
    hub.gated.add("org/model")
    with pytest.raises(SnapGenError) as e:
        resolve("org/model", token=token)
    one_line(e, "accept its terms at https://huggingface.co/org/model", "--text-encoder")


def test_token_opens_the_gate(hub, monkeypatch):
    hub.gated.add("org/model")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert (resolve("org/model") / "transformer" / "config.json").is_file()


@pytest.mark.parametrize("status, words", [(401, "log in again"), (403, "log in"), (503, "later")])
def test_statuses(hub, status, words):
    hub.status["api"] = status
    with pytest.raises(SnapGenError) as e:
        resolve("org/model")
    one_line(e, f"the Hub answered {status}", words)


def test_broken_file_on_the_hub(hub):
    hub.status["transformer/config.json"] = 500
    with pytest.raises(SnapGenError) as e:
        resolve("org/model")
    one_line(e, "500")


def test_cut_connection_resumes_in_the_middle(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    shard = "diffusion_pytorch_model-00002-of-00002.safetensors"
    hub.cut[shard] = 70_000
    folder = resolve("org/model")
    assert set(open_weights(folder / "transformer").infos) == {"a", "b"}
    ranges = [r for m, path, r in hub.requests if m == "GET" and path.endswith(shard)]
    assert len(ranges) == 2 and ranges[0] is None and int(ranges[1].split("=")[1][:-1]) > 0


def test_interrupted_download_goes_on_where_it_was(hub):
    hub.status["text_encoder/config.json"] = 500
    with pytest.raises(SnapGenError):
        resolve("org/model")
    hub.status.clear()
    done = [path for m, path, _ in hub.requests if m == "GET" and "/resolve/" in path]
    folder = resolve("org/model")
    again = [path for m, path, _ in hub.requests if m == "GET" and "/resolve/" in path]
    assert len(again) == len(set(again)), "a file that was whole was fetched twice"
    assert set(done) < set(again)
    assert (folder / "text_encoder" / "config.json").is_file()


@pytest.mark.parametrize("what", ["api", "config.json"])
def test_silence_ends_in_a_timeout(hub, what, monkeypatch):
    name = "HF_HUB_ETAG_TIMEOUT" if what == "api" else "HF_HUB_DOWNLOAD_TIMEOUT"
    monkeypatch.setattr(constants, name, 0.3)
    hub.hang.add(what)
    with pytest.raises(SnapGenError) as e:
        resolve("org/model")
    one_line(e, "did not answer in time")


def test_nobody_there(hub, monkeypatch):
    folder = resolve("org/model")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert resolve("org/model") == folder  # the cache is whole
    with pytest.raises(SnapGenError) as e:
        resolve("org/other")
    one_line(e, "cannot be reached")


def test_offline(hub, monkeypatch):
    folder = resolve("org/model")
    count = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("org/model") == folder
    assert len(hub.requests) == count
    with pytest.raises(SnapGenError) as e:
        resolve("org/other")
    one_line(e, "HF_HUB_OFFLINE")
    (folder / "transformer" / "config.json").unlink()
    with pytest.raises(SnapGenError) as e:
        resolve("org/model")
    one_line(e, "not wholly in the cache")


def test_disk_full(hub, monkeypatch):
    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", no_space)
    with pytest.raises(SnapGenError) as e:
        resolve("org/model")
    one_line(e, "No space left on device")


def test_names_that_cannot_be_hub_ids():
    for name in ("org/na--me", "a/b/c", "org/"):
        with pytest.raises(SnapGenError) as e:
            resolve(name)
        one_line(e, name)
