"""Words, emoji and what the word table does not know; the encoder on top of it, in PyTorch."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

from recipes.pretrain.text import WordTransformer, pad
from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.models.static_text import StaticText
from snapgen_mlx.models.word_tokens import WordTokens
from snapgen_mlx.models.word_transformer import WordTransformer as MLXWordTransformer
from snapgen_mlx.models.word_transformer import WordTransformerConfig
from snapgen_mlx.tokenizer_files import load_word_tokens

TABLE = Path(__file__).parents[1] / "snapgen_mlx" / "assets" / "embedded" / "text_encoder"
EMOJI = {
    "🐱": "cat face",
    "👨": "man",
    "👨‍🚀": "man astronaut",
    "❤": "red heart",
    "🤝": "handshake",
}


@pytest.fixture(scope="module")
def words():
    return WordTokens(load_word_tokens(TABLE, 32).vocab, EMOJI, 32)


@pytest.mark.parametrize(
    "text, plain",
    [
        ("a 🐱", "a cat face"),
        ("🐱🐱", "cat face cat face"),
        ("👨‍🚀 and 👨", "man astronaut and man"),
        ("👨🏽‍🚀", "man astronaut"),  # a skin tone
        ("❤️", "red heart"),  # a variation selector
        ("two cats", "two cats"),
    ],
)
def test_emoji(words, text, plain):
    assert words.ids([text]) == words.ids([plain])
    assert words.unknown_words(text) == []


@pytest.mark.parametrize(
    "text, unknown",
    [
        ("A smiling Cat, two café boxes!", []),
        ("347 light-blue cats smilingly", []),
        ("a qwzrt and a 猫", ["qwzrt", "猫"]),
        ("qwzrt Qwzrt", ["qwzrt"]),
        ("🦄", ["🦄"]),
        ("", []),
    ],
)
def test_unknown_words(words, text, unknown):
    assert words.unknown_words(text) == unknown


def test_same_tokens_as_the_static_table(words):
    texts = ["a red apple, 3 cats", "naïve smilingly 347 qwzrt", "word " * 50, ""]
    rows = mx.load(str(TABLE / "model.safetensors"))
    states, mask = StaticText(rows["table"], rows["scale"], words).encode(texts)
    assert [len(row) for row in words.ids(texts)] == mask.sum(axis=1).tolist()
    # Without layers, projection and norm, the transformer's inputs are the static states.
    encoder = WordTransformer.from_table(TABLE, dim=128, layers=0)
    encoder.proj = encoder.norm = torch.nn.Identity()
    ours = encoder(*pad(words.ids(texts)))
    assert (ours - torch.tensor(states.tolist())).abs().max() <= 1e-5


def test_padding_changes_nothing(words):
    torch.manual_seed(0)
    encoder = WordTransformer.from_table(TABLE, dim=32, layers=2)
    texts = ["a cat to the left of a dog", "cat", "a dog to the left of a cat", "qwzrt 猫", ""]
    rows = words.ids(texts)
    states = encoder(*pad(rows, 16))
    for row, got in zip(rows, states, strict=True):
        alone = encoder(*pad([row]))[0]
        assert torch.allclose(got[: len(row)], alone[: len(row)], atol=1e-5)
        assert (got[len(row) :] == 0).all()
    assert (states[0, 1] - states[2, 1]).abs().max() > 0.01  # the words' order is seen


@pytest.mark.parametrize("content", ["{", "[]", '{"🐱": 3}'])
def test_damaged_emoji(tmp_path, content):
    (tmp_path / "vocab.txt").write_bytes((TABLE / "vocab.txt").read_bytes())
    (tmp_path / "emoji.json").write_text(content)
    with pytest.raises(SnapGenError, match=r"emoji\.json"):
        load_word_tokens(tmp_path, 32)
    (tmp_path / "emoji.json").write_text(json.dumps(EMOJI))
    assert len(load_word_tokens(tmp_path, 32).ids(["🐱"])[0]) == 2


def test_missing_table(tmp_path):
    with pytest.raises(SnapGenError, match="cannot read the word table"):
        WordTransformer.from_table(tmp_path)
    with pytest.raises(SnapGenError, match=r"vocab\.txt"):
        load_word_tokens(tmp_path, 32)


def test_mlx_states_equal_torch(words):
    torch.manual_seed(0)
    encoder = WordTransformer.from_table(TABLE, dim=48, layers=3, heads=3)
    for name, p in encoder.named_parameters():
        torch.nn.init.normal_(p, std=0.2, mean=float(".norm" in name and name.endswith("weight")))
    config = WordTransformerConfig.from_dict(encoder.config.to_dict())
    ours = MLXWordTransformer(config, words)
    arrays = [(k, mx.array(a.numpy())) for k, a in encoder.state_dict().items()]
    ours.load_weights(arrays, strict=True)
    texts = ["a 🐱 to the left of a dog", "cat", "word " * 50, "qwzrt 猫", ""]
    states, mask = ours.encode(texts)
    ids, expected_mask = pad(words.ids(texts))
    assert mask.tolist() == expected_mask.tolist()
    expected = encoder(ids, expected_mask).detach()
    error = np.abs(np.array(states) - expected.numpy()).max() / expected.abs().max().item()
    assert error <= 1e-5
