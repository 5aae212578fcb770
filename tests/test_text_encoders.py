"""CLIP and Gemma 3 against transformers: states, masks, tokenizers, folders as they are found."""

import json
import resource

import mlx.core as mx
import numpy as np
import pytest
import sentencepiece
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Gemma3TextConfig,
    Gemma3TextModel,
    GemmaTokenizer,
)

from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.models import clip_text, gemma_text
from snapgen_mlx.models.clip_text import CLIPText
from snapgen_mlx.models.language_model import import_mlx_lm
from snapgen_mlx.notes import kept_text
from snapgen_mlx.tensors.weights import save_tensors
from snapgen_mlx.text_loading import load_clip_text, load_gemma_text
from snapgen_mlx.tokenizer_files import BOS, EOS, load_clip_tokenizer, load_gemma_tokenizer

from .gpu import as_on_a_gpu

TEXTS = [
    "the cat's hat",
    "",
    "A  SMILING cat,\twith 42 cats & the café (cafe\u0301) 🐈!",
    "the cat " * 60,
]


def rel(a, b) -> float:
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def randomise(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim == 1 else p.shape[1] ** -0.5))
    return model.eval()


def to_mlx(state, prefix: str = "") -> dict[str, mx.array]:
    return {prefix + k: mx.array(a.detach().numpy()) for k, a in state.items()}


def write_model(folder, config: dict, tensors: dict):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_tensors(folder, tensors)
    return folder


# CLIP


@pytest.fixture(scope="module")
def clip_words():
    """CLIP's 512 byte symbols, four merges, and the two special tokens last."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("t", "h"), ("th", "e</w>")]
    words = letters + [c + "</w>" for c in letters] + [a + b for a, b in merges]
    words += [BOS, EOS]
    return {word: i for i, word in enumerate(words)}, merges


@pytest.fixture(scope="module")
def clip_tokenizers(clip_words, tmp_path_factory):
    """transformers' tokenizer, a folder as it saves one, and a folder of the old two files."""
    vocab, merges = clip_words
    theirs = CLIPTokenizer(vocab=vocab, merges=merges)
    new, old = tmp_path_factory.mktemp("new"), tmp_path_factory.mktemp("old")
    theirs.save_pretrained(new)
    (old / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (old / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return theirs, new, old


def clip_config(vocab: dict, **changes) -> CLIPTextConfig:
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    eos = vocab[EOS]
    ids = dict(bos_token_id=eos - 1, eos_token_id=eos, pad_token_id=eos)
    return CLIPTextConfig(vocab_size=len(vocab), **{**sizes, **ids, **changes})


@pytest.mark.parametrize("act", ["quick_gelu", "gelu", "gelu_new"])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("files", ["new", "old"])
def test_clip_states_and_mask(clip_words, clip_tokenizers, tmp_path, act, legacy, files):
    tokenizer, new, old = clip_tokenizers
    config = clip_config(clip_words[0], hidden_act=act, **({"eos_token_id": 2} if legacy else {}))
    theirs = randomise(CLIPTextModel(config))
    folder = write_model(tmp_path / "clip", config.to_dict(), to_mlx(theirs.state_dict()))
    encoder = load_clip_text(folder, new if files == "new" else old)
    states, mask = encoder.encode(TEXTS)
    kept = [kept_text(encoder, text) for text in TEXTS]
    assert kept[:3] == [None] * 3 and TEXTS[3].startswith(kept[3])
    assert encoder.token_count(kept[3]) <= 77 < encoder.token_count(kept[3] + " cat cat")
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        expected = theirs(**batch)
    valid = batch["attention_mask"].bool().numpy()
    assert np.array_equal(np.array(mask), valid)
    assert mask.sum(axis=1).tolist()[1:] == [2, valid[2].sum(), 77]
    expected_states = expected.last_hidden_state.numpy()
    assert rel(np.array(states)[valid], expected_states[valid]) < 1e-5
    # The end token that transformers pools is the last valid one here.
    ends = np.array(mask).sum(axis=1) - 1
    assert rel(np.array(states)[np.arange(len(TEXTS)), ends], expected.pooler_output) < 1e-5


def test_clip_mask_stops_at_the_first_end_token(clip_words):
    model = CLIPText(clip_text.CLIPTextConfig.from_dict(clip_config(clip_words[0]).to_dict()))
    eos = model.config.eos_token_id
    mask = model.valid(mx.array([[eos - 1, 5, eos, eos], [eos - 1, eos, 7, eos]]))
    assert mask.tolist() == [[True, True, True, False], [True, True, False, False]]
    with pytest.raises(SnapGenError, match="different models"):
        model.valid(mx.array([[1, 2, 3]]))


def test_clip_takes_the_text_part_of_a_whole_config():
    whole = {"model_type": "clip", "text_config": {"hidden_size": 256, "hidden_act": "gelu"}}
    config = clip_text.CLIPTextConfig.from_dict(whole)
    assert (config.hidden_size, config.hidden_act) == (256, "gelu")
    with pytest.raises(SnapGenError, match="hidden_act"):
        clip_text.CLIPTextConfig.from_dict({"hidden_act": "swish"})


# Gemma

PIECES = ["<pad>", "<eos>", "<bos>", "<unk>"]


@pytest.fixture(scope="module")
def gemma_tokenizers(tmp_path_factory):
    """transformers' tokenizer with a folder for it, and one with a SentencePiece model alone."""
    folder, spm = tmp_path_factory.mktemp("json"), tmp_path_factory.mktemp("spm")
    (spm / "text").write_text("the cat sat on the mat with a hat\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(spm / "text"),
        model_prefix=str(spm / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        **{f"{p.strip('<>')}_{k}": v for i, p in enumerate(PIECES) for k, v in _spm(i, p)},
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(spm / "tokenizer.model"))
    vocab = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    # BPE merges in the order in which SentencePiece scores their results.
    ranked = sorted((w for w in vocab if len(w) > 1 and w[0] != "<"), key=vocab.get)
    merges = [
        (w[:i], w[i:]) for w in ranked for i in range(1, len(w)) if {w[:i], w[i:]} <= vocab.keys()
    ]
    theirs = GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)
    theirs.save_pretrained(folder)
    return theirs, folder, spm


def _spm(i, piece):
    return (("id", i), ("piece", piece))


def gemma_config(**changes) -> Gemma3TextConfig:
    sizes = dict(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=4,
        max_position_embeddings=512,
        query_pre_attn_scalar=16,
    )
    return Gemma3TextConfig(**(sizes | changes))


ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
}


@pytest.fixture(scope="module")
def gemma():
    return randomise(Gemma3TextModel(gemma_config(rope_parameters=ROPE)))


@pytest.fixture(scope="module")
def gemma_folder(gemma, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    return write_model(folder, gemma.config.to_dict(), to_mlx(gemma.state_dict()))


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_gemma_states_under_padding(gemma, gemma_folder, gemma_tokenizers, side):
    ours = load_gemma_text(gemma_folder, gemma_tokenizers[1])
    generator = np.random.default_rng(0)
    ids, lengths = generator.integers(4, 300, (3, 12)), (12, 7, 1)
    start = {"left": lambda n: 12 - n, "right": lambda n: 0, "both": lambda n: (12 - n) // 2}[side]
    mask = np.array([[0 <= i - start(n) < n for i in range(12)] for n in lengths])
    with torch.no_grad():
        expected = gemma(torch.tensor(ids), attention_mask=torch.tensor(mask).long())
    states = np.array(ours(mx.array(ids), mx.array(mask)))
    assert np.isfinite(states).all()
    assert rel(states[mask], expected.last_hidden_state.numpy()[mask]) < 1e-5


@pytest.mark.parametrize("files", ["json", "spm"])
def test_gemma_encodes_text_as_the_original(gemma, gemma_folder, gemma_tokenizers, files):
    tokenizer, folder, spm = gemma_tokenizers
    ours = load_gemma_text(gemma_folder, folder if files == "json" else spm)
    states, mask = ours.encode(TEXTS)
    tokenizer.padding_side = "right"
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    assert [ours._tokenizer(t) for t in TEXTS] == [tokenizer(t)["input_ids"] for t in TEXTS]
    valid = batch["attention_mask"].bool().numpy()
    assert np.array_equal(np.array(mask), valid)
    assert valid.sum(axis=1).tolist()[1] == 1  # <bos> alone
    with torch.no_grad():
        expected = gemma(batch["input_ids"], attention_mask=batch["attention_mask"])
    assert rel(np.array(states)[valid], expected.last_hidden_state.numpy()[valid]) < 1e-5


def test_gemma_cuts_long_texts(gemma_folder, gemma_tokenizers):
    encoder = load_gemma_text(gemma_folder, gemma_tokenizers[1])
    kept = kept_text(encoder, "z" * 1000)
    assert kept and set(kept) == {"z"} and encoder.token_count(kept) == 256
    assert kept_text(encoder, kept) is None
    _, mask = encoder.encode(["z" * 1000, "a"])
    assert mask.shape == (2, 256)
    assert mask.sum(axis=1).tolist()[0] == 256


@pytest.mark.parametrize(
    "prefix", ["language_model.model.", "model.language_model.", "model.", "language_model."]
)
def test_gemma_from_a_multimodal_folder(gemma, gemma_folder, gemma_tokenizers, tmp_path, prefix):
    config = gemma.config.to_dict()
    tensors = to_mlx(gemma.state_dict(), prefix)
    for other in ("vision_tower.a.weight", "model.multi_modal_projector.b", "lm_head.weight"):
        tensors[other] = mx.zeros((2, 2))
    config = {"model_type": "gemma3", "text_config": config, "vision_config": {}}
    folder = write_model(tmp_path / "m", config, tensors)
    texts = ["the cat", "a hat"]
    a, _ = load_gemma_text(folder, gemma_tokenizers[1]).encode(texts)
    b, _ = load_gemma_text(gemma_folder, gemma_tokenizers[1]).encode(texts)
    assert mx.array_equal(a, b)


@pytest.mark.parametrize("keep", [False, True])
def test_gemma_quantized_by_mlx_lm(gemma, gemma_tokenizers, tmp_path, monkeypatch, keep):
    """A 4-bit folder with one 8-bit layer equals the same weights quantized and back, by hand."""
    utils = import_mlx_lm("utils")
    gemma3 = import_mlx_lm("models.gemma3_text")
    config = gemma.config.to_dict() | {"model_type": "gemma3_text", "vocab_size": 320}
    model = gemma3.Model(gemma3.ModelArgs.from_dict(gemma_text.text_config(config)))
    weights = model.sanitize(to_mlx(gemma.state_dict(), "model."))
    model.load_weights(list(weights.items()), strict=True)

    def predicate(path, _):
        return {"group_size": 32, "bits": 8} if path.endswith("layers.1.mlp.up_proj") else True

    model, new_config = utils.quantize_model(
        model, dict(config), group_size=32, bits=4, quant_predicate=predicate
    )
    utils.save_model(tmp_path / "q", model)
    utils.save_config(new_config, tmp_path / "q" / "config.json")

    def rounded(key, a):
        if a.ndim < 2 or a.shape[-1] % 32:
            return a
        bits = 8 if key.endswith("layers.1.mlp.up_proj.weight") else 4
        packed = mx.quantize(a, group_size=32, bits=bits)
        return mx.dequantize(*packed, group_size=32, bits=bits)

    tensors = {k: rounded(k, a) for k, a in to_mlx(gemma.state_dict()).items()}
    write_model(tmp_path / "f", config, tensors)
    if keep:
        as_on_a_gpu(monkeypatch)
    ours = load_gemma_text(tmp_path / "q", gemma_tokenizers[1], mx.float32)
    assert ("scales" in ours.model.layers[0].mlp.up_proj) is keep
    expected = load_gemma_text(tmp_path / "f", gemma_tokenizers[1], mx.float32)
    assert rel(ours.encode(TEXTS[:3])[0], expected.encode(TEXTS[:3])[0]) < 1e-5


def test_gemma_config_defaults_are_those_of_transformers():
    """The published 4b config leaves out most numbers."""
    given = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    given |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    theirs = Gemma3TextConfig(**given)
    args = import_mlx_lm("models.gemma3_text").ModelArgs.from_dict(
        gemma_text.text_config({"text_config": given})
    )
    for key in [*gemma_text.DEFAULTS, "query_pre_attn_scalar", "rms_norm_eps"]:
        assert getattr(args, key) == getattr(theirs, key), key
    for config in (theirs.to_dict(), given):
        text = gemma_text.text_config(config)
        args = import_mlx_lm("models.gemma3_text").ModelArgs.from_dict(text)
        assert (args.rope_theta, args.rope_local_base_freq) == (1e6, 1e4)
        assert args.rope_scaling["factor"] == 8.0
        assert args.sliding_window_pattern == 6


def test_gemma_config_refuses_what_is_not_computed():
    for config in (
        {"use_bidirectional_attention": True},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"] * 2},
    ):
        with pytest.raises(SnapGenError):
            gemma_text.text_config(config)


def test_importing_mlx_lm_leaves_the_file_limit():
    import subprocess
    import sys

    code = (
        "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (1024, 3000));"
        "from snapgen_mlx.models.language_model import import_mlx_lm as i; i('models.gemma3_text');"
        "assert r.getrlimit(r.RLIMIT_NOFILE) == (1024, 3000)"
    )
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= 3000
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("load", [load_clip_tokenizer, load_gemma_tokenizer])
def test_missing_and_damaged_tokenizers(tmp_path, load):
    with pytest.raises(SnapGenError, match="has neither"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SnapGenError, match="cannot read"):
        load(tmp_path)


def test_weights_of_another_model_are_refused(clip_words, clip_tokenizers, tmp_path):
    config = clip_config(clip_words[0])
    tensors = to_mlx(CLIPTextModel(config).state_dict())
    tensors.pop("final_layer_norm.bias")
    folder = write_model(tmp_path, config.to_dict(), tensors)
    with pytest.raises(SnapGenError, match=r"final_layer_norm\.bias"):
        load_clip_text(folder, clip_tokenizers[1])
