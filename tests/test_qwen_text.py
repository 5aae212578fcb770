"""Qwen2.5-VL's language tower against transformers, called as diffusers' pipeline does."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.models import qwen_text
from snapgen_mlx.models.language_model import import_mlx_lm
from snapgen_mlx.models.qwen_text import QwenText
from snapgen_mlx.tensors.weights import assign

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = ["the cat's hat", " ", "A  SMILING cat,\twith 42 cats & {braces} (cafe\u0301) 🐈!"]


@pytest.fixture(scope="module")
def tokenizer():
    words = sorted(ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "cat")]
    words += ["".join(pair) for pair in merges]
    tokenizer = Qwen2Tokenizer(vocab={w: i for i, w in enumerate(words)}, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    return tokenizer


@pytest.fixture(scope="module")
def theirs(tokenizer):
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, vocab_size=len(tokenizer) + 5)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 5e4}
    vision = dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=16, out_hidden_size=32)
    config = Qwen2_5_VLConfig(
        text_config=sizes | {"rope_parameters": rope, "rms_norm_eps": 1e-6}, vision_config=vision
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5))
    return model


@pytest.fixture(scope="module")
def ours(theirs, tokenizer):
    tower = theirs.model.language_model.state_dict()
    tensors = {f"model.{k}": mx.array(a.numpy()) for k, a in tower.items()}
    model = QwenText(theirs.config.to_dict(), lambda text: tokenizer(text)["input_ids"])
    return assign(model, tensors, "text_encoder")


def original(model, tokenizer, texts):
    """States and mask as diffusers' Qwen-Image pipeline makes them."""
    texts = [qwen_text.TEMPLATE.format(text) for text in texts]
    tokenizer.padding_side = "right"
    batch = tokenizer(texts, padding=True, truncation=True, max_length=1058, return_tensors="pt")
    with torch.no_grad():
        out = model(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    return out.hidden_states[-1][:, 34:546].numpy(), batch.attention_mask[:, 34:546].bool().numpy()


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[1:2], ["the cat " * 600, "a"]])
def test_states_and_masks_are_the_original_ones(ours, theirs, tokenizer, texts):
    states, mask = ours.encode(texts)
    expected, valid = original(theirs, tokenizer, texts)
    assert np.array_equal(np.array(mask), valid)
    states = np.array(states)
    assert states.shape == expected.shape
    error = np.abs(states - expected)[valid].max() / np.abs(expected[valid]).max()
    assert error < 1e-5


def test_the_template_is_diffusers_own():
    import inspect

    from diffusers import QwenImagePipeline

    source = inspect.getsource(QwenImagePipeline.__init__).encode().decode("unicode_escape")
    assert qwen_text.TEMPLATE in source
    assert f"prompt_template_encode_start_idx = {qwen_text.UNREAD}" in source


def test_config_defaults_are_those_of_transformers():
    given = {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4}
    theirs = Qwen2_5_VLTextConfig(**given)
    old = given | {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16]}}
    for config in (theirs.to_dict(), old, {"text_config": old}, given):
        args = import_mlx_lm("models.qwen2").ModelArgs.from_dict(qwen_text.text_config(config))
        for key in qwen_text.DEFAULTS:
            assert getattr(args, key) == getattr(theirs, key), key
        assert (args.rope_theta, args.rope_scaling) == (1e6, None)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"use_sliding_window": True},
        {"hidden_act": "gelu"},
    ],
)
def test_what_is_not_computed_is_refused(change):
    with pytest.raises(SnapGenError, match=r"Qwen2\.5-VL config"):
        qwen_text.text_config(change)
