"""Folders to text encoders."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import mlx.core as mx

from .device import inference_dtype, on_gpu, wide
from .errors import SnapGenError
from .hub import resolve
from .layout import TOKENIZERS, load_config
from .models.clip_text import CLIPText, CLIPTextConfig
from .models.gemma_text import GemmaText
from .models.interfaces import TextEncoder
from .models.language_model import Tokenizer, text_keys
from .models.qwen_text import QwenText
from .models.static_text import StaticText
from .models.word_tokens import WordTokens
from .models.word_transformer import WordTransformer, WordTransformerConfig
from .tensors.affine import cast_floats, dequantize_layers
from .tensors.weights import assign, load_tensors
from .tokenizer_files import (
    load_clip_tokenizer,
    load_gemma_tokenizer,
    load_qwen_tokenizer,
    load_word_tokens,
)

# The longest text that the encoder of each name reads, in tokens.
_KINDS = (CLIPText, GemmaText, QwenText, StaticText, WordTransformer)
TEXT_TOKENS = {encoder.name: encoder.max_tokens for encoder in _KINDS}
Model = TypeVar("Model", GemmaText, QwenText)


def load_static_text(folder, tokenizer_folder=None, dtype: mx.Dtype | None = None) -> StaticText:
    """Load a word table: config.json, model.safetensors and vocab.txt of a folder.

    Args:
        folder: of the encoder.
        tokenizer_folder: not used; the vocabulary lies in ``folder``.
        dtype: of the states.

    Raises:
        SnapGenError: files are missing or damaged, or belong to different tables.
    """
    folder = Path(folder)
    config = load_config(folder)
    if config.get("model_type") != "static_text":
        raise SnapGenError(f"{folder / 'config.json'} is not of a static text table")
    tensors = load_tensors(folder)
    words = _word_tokens(folder, config, tensors, config.get("dim"))
    if set(tensors) != {"table", "scale"}:
        raise SnapGenError(f"{folder}: weights, vocab.txt and config.json do not fit together")
    return StaticText(tensors["table"], tensors["scale"], words)


def load_word_transformer(
    folder, tokenizer_folder=None, dtype: mx.Dtype | None = None
) -> WordTransformer:
    """Load a word transformer: config.json, model.safetensors and vocab.txt of a folder.

    Args:
        folder: of the encoder.
        tokenizer_folder: not used; the vocabulary lies in ``folder``.
        dtype: not used; this encoder is float32 on every machine.

    Raises:
        SnapGenError: files are missing or damaged, or the weights belong to another model.
    """
    folder = Path(folder)
    config, tensors = load_config(folder), load_tensors(folder)
    words = _word_tokens(folder, config, tensors, config.get("word_dim"))
    try:
        model = WordTransformer(WordTransformerConfig.from_dict(config), words)
    except (TypeError, ValueError, ZeroDivisionError) as e:
        raise SnapGenError(f"{folder / 'config.json'} does not describe a model: {e}") from e
    frozen = ("table", "scale")
    tensors = {k: a if k in frozen else a.astype(mx.float32) for k, a in tensors.items()}
    return assign(model, tensors, folder)


def _word_tokens(folder: Path, config: dict, tensors: dict, dim) -> WordTokens:
    """The tokenizer of a table (V, dim) among ``tensors``."""
    length = config.get("max_length")
    if type(length) is not int or length < 1:
        raise SnapGenError(f"{folder / 'config.json'}: max_length is {length!r}, not a count")
    words = load_word_tokens(folder, length)
    rows = len(words.vocab)
    shapes = [tuple(tensors[k].shape) if k in tensors else None for k in ("table", "scale")]
    if shapes != [(rows, dim), (rows,)]:
        raise SnapGenError(f"{folder}: weights, vocab.txt and config.json do not fit together")
    return words


def load_clip_text(folder, tokenizer_folder, dtype: mx.Dtype | None = None) -> CLIPText:
    """Load weights and tokenizer of the text tower of a CLIP.

    Args:
        folder: of the encoder.
        tokenizer_folder: of its tokenizer.
        dtype: of the weights; None keeps theirs.

    Raises:
        SnapGenError: files are missing or damaged, or the weights belong to another model.
    """
    config = CLIPTextConfig.from_dict(load_config(folder))
    model = CLIPText(config, load_clip_tokenizer(tokenizer_folder))
    dtype = dtype or inference_dtype()
    assign(model, {k: a.astype(dtype) for k, a in load_tensors(folder).items()}, folder)
    return model


def load_gemma_text(folder, tokenizer_folder, dtype: mx.Dtype | None = None) -> GemmaText:
    """Load a Gemma 3 folder, quantized by mlx-lm or not, and its tokenizer."""
    return _load_language_model(GemmaText, folder, load_gemma_tokenizer(tokenizer_folder), dtype)


def load_qwen_text(folder, tokenizer_folder, dtype: mx.Dtype | None = None) -> QwenText:
    """Load a Qwen2.5-VL folder, quantized by mlx-lm or not, and its tokenizer."""
    return _load_language_model(QwenText, folder, load_qwen_tokenizer(tokenizer_folder), dtype)


def _load_language_model(
    model_class: type[Model], folder, tokenizer: Tokenizer, dtype: mx.Dtype | None
) -> Model:
    """In bfloat16 instead of float16, whose range the states of large ones leave. On a CPU
    quantized layers become float ones, which compute faster there; the embedding table keeps its
    stored type. Raises SnapGenError for missing, damaged or foreign files.
    """
    config, dtype = load_config(folder), wide(dtype)
    model = model_class(config, tokenizer, dtype)
    tensors = text_keys(load_tensors(folder))
    if quantization := config.get("quantization"):
        model.quantize(quantization, tensors)
    table = "model.embed_tokens.weight"
    kept = {table: tensors[table]} if table in tensors else {}
    assign(model, cast_floats(tensors, dtype) | kept, folder)
    if quantization and not on_gpu():
        dequantize_layers(model, dtype)
    return model


# By the model_type of their config.json: functions of the folders of weights and tokenizer, and of
# the type to compute with, of which only those take notice that have a choice.
TEXT_ENCODERS: dict[str, Callable[[Path, Path, mx.Dtype | None], TextEncoder]] = {
    "static_text": load_static_text,
    "word_transformer": load_word_transformer,
    "clip_text_model": load_clip_text,
    "gemma3_text": load_gemma_text,
    "gemma3": load_gemma_text,
    "qwen2_5_vl_text": load_qwen_text,
}


def load_text_encoders(folder, gemma=None, dtype: mx.Dtype | None = None) -> list[TextEncoder]:
    """Load the text encoders of a model folder. A folder may lack one or both.

    Args:
        folder: of the model.
        gemma: folder or Hub id of another Gemma 3 with its tokenizer, quantized by mlx-lm or not,
            to use instead of the model's own.
    """
    folder = Path(folder)
    encoders = []
    for name, tokenizer in TOKENIZERS.items():
        if not (folder / name).is_dir() or (gemma and name == "text_encoder_2"):
            continue
        kind = load_config(folder / name).get("model_type")
        if kind not in TEXT_ENCODERS:
            raise SnapGenError(f"{folder / name / 'config.json'}: unknown text encoder {kind!r}")
        encoders.append(TEXT_ENCODERS[kind](folder / name, folder / tokenizer, dtype))
    return encoders + ([load_gemma(gemma, dtype)] if gemma else [])


def load_gemma(source, dtype: mx.Dtype | None = None) -> GemmaText:
    """A Gemma 3 text encoder from a folder (or Hub id) that holds its tokenizer too."""
    folder = resolve(source)
    kind = load_config(folder).get("model_type")
    if kind not in ("gemma3_text", "gemma3"):
        raise SnapGenError(f"{source} is a {kind or 'model of unknown type'}, not a Gemma 3")
    return load_gemma_text(folder, folder, dtype)
