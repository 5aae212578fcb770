import json
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from recipes.embedded import text_table
from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.models.word_tokens import WordTokens
from snapgen_mlx.text_loading import load_static_text

WORDS = ["[UNK]", "a", "cat", "kitty", "kit", "##ty", "##s", "rocket", "!", "cafe"]


@pytest.fixture
def folder(tmp_path):
    """A table of ten words in which "kitty" lies near "cat"."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((len(WORDS), 128))
    vectors[3] = vectors[2] + 0.5 * vectors[3]
    text_table.save(tmp_path / "text_encoder", WORDS, *text_table.quantize(vectors), {})
    return tmp_path / "text_encoder"


def direction(encoder, word):
    """A word's unit vector, without the position of the first place."""
    states, _ = encoder.encode([word])
    v = states[0, 0] - encoder._positions[0]
    return v / mx.linalg.norm(v)


def test_choice_of_rows():
    pieces = ["[UNK]", "the", "cat", "##s", "kowalski", "of", "42", "kitty"]
    common = {"cat", "crochet", "crocheted", "frost", "frosting", "Kiel", "don't", "the"}
    kept, words = text_table.choose(pieces, common, {"kitty", "frosting", "tabby"})
    assert kept == ["the", "cat", "##s", "of", "42", "kitty"]
    assert words == ["crochet", "frost", "frosting", "tabby"]


def test_states_and_mask(folder):
    encoder = load_static_text(folder)
    states, mask = encoder.encode(["A Cat!", "kittys", "", "café"])
    assert states.shape == (4, 3, 128) and states.dtype == mx.float32
    assert mask.tolist() == [
        [True, True, True],
        [True, True, False],  # the whole word, not kit ##ty ##s
        [False, False, False],
        [True, False, False],  # without its accent
    ]
    assert mx.all(mx.where(mask[..., None], 0, states) == 0)
    words = states - mx.where(mask[..., None], encoder._positions[:3], 0)
    variance = (words * words).mean(axis=-1)
    assert mx.allclose(variance[mask_index(mask)], mx.array(1.0), rtol=0.01)
    assert abs(float(mx.sqrt((encoder._positions**2).mean())) - 0.3) < 0.01


def mask_index(mask):
    rows, columns = np.nonzero(np.array(mask))
    return mx.array(rows), mx.array(columns)


def test_neighbours_survive_quantization(folder):
    encoder = load_static_text(folder)
    cat, kitty, rocket = (direction(encoder, w) for w in ("cat", "kitty", "rocket"))
    assert float(cat @ kitty) > 0.75 > 0.3 > abs(float(cat @ rocket))


def test_order_changes_the_states(folder):
    encoder = load_static_text(folder)
    states, _ = encoder.encode(["cat rocket", "rocket cat"])
    moved = states[0, 0] - states[1, 1]  # the same word at two places
    assert 0 < float(mx.sqrt((moved * moved).mean())) < 0.6


def test_a_text_does_not_depend_on_its_batch(folder):
    encoder = load_static_text(folder)
    alone, _ = encoder.encode(["a cat"])
    batch, _ = encoder.encode(["kitty rocket cat cat", "a cat"])
    assert mx.array_equal(alone[0], batch[1, :2])


def test_long_and_foreign_texts(folder):
    encoder = load_static_text(folder)
    states, mask = encoder.encode(["cat " * 5000, "猫", "x" * 20000])
    assert states.shape == (3, 32, 128) and mask.sum(axis=1).tolist() == [32, 0, 0]
    states, mask = encoder.encode([""])
    assert states.shape == (1, 1, 128) and not mask.any()


def test_quantize_keeps_directions():
    vectors = np.random.default_rng(1).standard_normal((200, 128)) * 7
    table, scale = text_table.quantize(vectors)
    assert table.dtype == np.int8 and scale.dtype == np.float16
    got = table.astype(np.float64) * scale[:, None]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert np.abs(np.linalg.norm(got, axis=1) - 1).max() < 0.01
    assert ((got * unit).sum(axis=1) / np.linalg.norm(got, axis=1)).min() > 0.9995


def test_project_keeps_what_spans_few_dimensions():
    rng = np.random.default_rng(2)
    vectors = rng.standard_normal((300, 6)) @ rng.standard_normal((6, 40)) + 3
    reduced = text_table.project(vectors, 8)
    centred = vectors - vectors.mean(axis=0)
    assert reduced.shape == (300, 8)
    assert np.allclose(reduced @ reduced.T, centred @ centred.T, atol=1e-6)


def test_table_vocabulary_reads_every_ascii_text():
    pieces = ["[PAD]", "[unused0]", "[UNK]", "the", "##s", "1987", "19", "é", "猫", "##ß"]
    singles = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    pieces += singles + [f"##{c}" for c in singles if c.isalnum()]
    kept = text_table.useful(pieces)
    assert not {"[PAD]", "[unused0]", "[UNK]", "1987", "é", "猫", "##ß"} & set(kept)
    assert {"the", "##s", "19"} <= set(kept)
    vocab = ["[UNK]", *kept]
    text = "".join(map(chr, range(32, 127)))
    ids = WordTokens(vocab, {}, 200)._tokenizer.encode(text).ids
    assert ids and 0 not in ids


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "config.json").write_text("{"), "JSON"),
        (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "static text"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "static_text"}'),
            "max_length is None",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
        (lambda f: cut(f / "model.safetensors"), "not a whole safetensors file"),
        (lambda f: (f / "vocab.txt").unlink(), "vocab.txt"),
        (lambda f: cut(f / "vocab.txt"), "do not fit"),
        (lambda f: (f / "vocab.txt").write_bytes(b"\xff\n" * 10), "vocab.txt"),
        (lambda f: (f / "vocab.txt").write_text("cat\n" * 10), "vocab.txt is damaged"),
    ],
)
def test_damaged_folders_are_named(folder, damage, message):
    damage(folder)
    with pytest.raises(SnapGenError, match=message) as e:
        load_static_text(folder)
    assert str(folder) in str(e.value) and "\n" not in str(e.value)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_config_is_written_in_model_folder_form(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "static_text" and config["dim"] == 128
    assert config["max_length"] == 32 and config["vocab_size"] == len(WORDS)


def test_import_needs_no_transformers():
    code = "import sys, snapgen_mlx.models.static_text; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
