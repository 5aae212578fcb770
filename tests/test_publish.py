"""``snapgen-mlx push``: a model to the Hub, here on loopback."""

import json

import huggingface_hub
import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from snapgen_mlx import Pipeline
from snapgen_mlx.cli.main import main
from snapgen_mlx.files import write_json
from snapgen_mlx.models.tiny_decoder import TinyDecoder, TinyDecoderConfig
from snapgen_mlx.publish import model_card
from snapgen_mlx.tensors.weights import flat_parameters, save_tensors

from .fake_hub import COMMIT, FakeHub
from .tiny import write_tiny_model


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with FakeHub() as fake:
        monkeypatch.setenv("HF_TOKEN", fake.token)
        monkeypatch.setattr(constants, "ENDPOINT", fake.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield fake
        huggingface_hub.close_session()


@pytest.fixture
def model(tmp_path):
    """A tiny model that was trained for two steps."""
    folder = write_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["source"] = {"name": "org/base", "revision": "abc"}
    (folder / "config.json").write_text(json.dumps(config))
    sizes = {"channels": [8, 8], "blocks": 1, "patch": 4}
    decoder = TinyDecoder(TinyDecoderConfig.from_dict(sizes))
    write_json(folder / "tiny_decoder" / "config.json", {"_class_name": "TinyDecoder", **sizes})
    save_tensors(folder / "tiny_decoder", flat_parameters(decoder))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\nOf my dog.\n")
    (folder / "run").mkdir()
    (folder / "run" / "log.jsonl").write_text(
        '{"step": 1, "loss/tiny": 0.75, "val/tiny": 0.875}\n{"step": 2, "loss/tiny": 0.5}\n'
    )
    state = {"step": 2, "options": {"batch": 4, "learning_rate": 0.001, "validate": None}}
    (folder / "run" / "state-00000002.json").write_text(json.dumps(state))
    (folder / "run" / "state-00000002.safetensors").write_bytes(b"large")
    (folder / ".hidden.json").write_text("{}")
    return folder


def push(*args):
    return CliRunner().invoke(main, ["push", *map(str, args)])


def test_what_is_pushed_draws_the_same_and_has_a_card(hub, model, tmp_path):
    result = push(model, "me/dog", "--private")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{hub.url}/me/dog/commit/{COMMIT}\n" and hub.private == {"me/dog"}
    files = hub.pushed["me/dog"]
    assert not any("run" in name or "hidden" in name for name in files)
    for name, data in files.items():
        path = tmp_path / "back" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    ours, theirs = (Pipeline.load(folder, "tiny") for folder in (model, tmp_path / "back"))
    assert ours.generate("a cat") == theirs.generate("a cat")
    assert "tiny_decoder/model.safetensors" in files
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: snapgen-mlx\n") and "base_model: org/base" in card
    assert card.count("license: mit") == 0 and "Of my dog." in card
    assert "| `tiny_decoder` | TinyDecoder |" in card
    assert "2 steps. Options: batch 4, learning rate 0.001." in card
    assert "| tiny | 0.5000 | 0.8750 |" in card and "-m me/dog" in card


def test_what_an_earlier_upload_left_is_gone(hub, model):
    """An index of shards that are no more would be read before the one file."""
    left = ["transformer/model.safetensors.index.json", "few_step/tiny.safetensors", "words.json"]
    foreign = ["notes.md", "samples/cat.png", "eval.json"]
    hub.pushed["me/dog"] = {name: b"{}" for name in left + foreign}
    for _ in range(2):
        assert push(model, "me/dog").exit_code == 0
        files = hub.pushed["me/dog"]
        assert not files.keys() & set(left) and files.keys() > {*foreign, "config.json"}


def test_a_repository_of_a_pytorch_model_is_left_alone(hub, model):
    hub.pushed["me/dog"] = dict.fromkeys(["model_index.json", "transformer/x.safetensors"], b"{}")
    result = push(model, "me/dog")
    assert result.exit_code == 2 and "holds a PyTorch model" in result.stderr
    assert len(hub.pushed["me/dog"]) == 2


def test_the_card_says_what_is_so(model):
    """Losses of a distillation are no widths, and a folder named a/b is not on the Hub."""
    with open(model / "run" / "log.jsonl", "a") as log:
        log.write('{"step": 3, "loss/dmd": 0.1, "loss/critic": 0.2}\n')
    config = json.loads((model / "config.json").read_text())
    config["source"] = {"name": "checkpoints/pytorch", "revision": None}
    (model / "config.json").write_text(json.dumps(config))
    card = model_card(model, "me/dog")
    assert "| tiny | 0.5000 |" in card and "dmd" not in card and "critic" not in card
    assert "base_model" not in card and "Made from checkpoints/pytorch." in card


def test_the_card_of_the_embedded_model_names_what_it_draws():
    card = model_card(Pipeline.load(None, "tiny").folder, "me/stickers")
    assert 'generate "airplane" -m me/stickers' in card and "4 steps, guidance 1" in card
    assert "## Training" not in card.split("# The embedded model")[0]


@pytest.mark.parametrize(
    ("token", "repo", "code", "word"),
    [
        (None, "me/dog", 2, "hf auth login"),
        ("hf_bad", "me/dog", 1, "may not write"),
        ("hf_good", "dog", 2, "org/name"),
        ("hf_good", "me/../x", 2, "org/name"),
    ],
)
def test_what_cannot_be_pushed_is_one_line(hub, model, monkeypatch, token, repo, code, word):
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    result = push(model, repo)
    assert result.exit_code == code and word in result.stderr, result.output
    assert len(result.stderr.splitlines()) == 1 and not hub.pushed


def test_a_hub_that_does_not_answer(hub, model, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    result = push(model, "me/dog")
    assert result.exit_code == 1 and "cannot push to me/dog" in result.stderr
    assert len(result.stderr.splitlines()) == 1
