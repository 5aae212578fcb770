"""Gemma 3 as a text encoder: mlx-lm's layers under a forward pass with a padding mask."""

import resource
from importlib import import_module
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from tokenizers import Tokenizer

from ..errors import SnapGenError
from ..weights import assign, compute_dtype, load_config, load_tensors, read_json

MAX_TOKENS = 256
# What a config.json leaves out means transformers' defaults, which are not mlx-lm's.
DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
}
UNSUPPORTED = (
    "attention_bias",
    "attn_logit_softcapping",
    "use_bidirectional_attention",
)


def import_mlx_lm(name: str):
    """Import a module of mlx-lm without its side effect on the limit of open files.

    Importing it takes over a second, and lowers the limit for good (or fails where the hard
    limit is below what it asks for).
    """
    with mock.patch.object(resource, "setrlimit"):
        return import_module(f"mlx_lm.{name}")


def text_config(config: dict) -> dict:
    """mlx-lm's arguments from a config.json: text-only or multimodal, old or new RoPE keys.

    Raises SnapGenError for what mlx-lm's layers do not compute.
    """
    text = DEFAULTS | config.get("text_config", config) | {"model_type": "gemma3_text"}
    for key in UNSUPPORTED:
        if text.get(key):
            raise SnapGenError(f"Gemma config: {key} = {text[key]!r} is not supported")
    if rope := text.get("rope_parameters"):
        full, sliding = rope.get("full_attention", {}), rope.get("sliding_attention", {})
        text["rope_theta"] = full.get("rope_theta", 1e6)
        text["rope_local_base_freq"] = sliding.get("rope_theta", 1e4)
        text["rope_scaling"] = full if full.get("rope_type", "default") != "default" else None
    text["sliding_window_pattern"] = (
        text.get("sliding_window_pattern") or text.get("_sliding_window_pattern") or 6
    )
    if kinds := text.get("layer_types"):
        full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        period = full[0] + 1 if full else len(kinds) + 1
        if full != list(range(period - 1, len(kinds), period)):
            raise SnapGenError("Gemma config: layer_types is not one full layer in every n")
        text["sliding_window_pattern"] = period
    return text


def text_keys(tensors: dict) -> dict:
    """Rename the keys of any Gemma 3 checkpoint to ``model.*``; drop vision tower and LM head."""
    out = {}
    for key, a in tensors.items():
        path = key.removeprefix("language_model.").replace("model.language_model.", "model.", 1)
        if path.startswith(("embed_tokens.", "layers.", "norm.")):
            path = f"model.{path}"
        vision = ("vision_tower.", "multi_modal_projector.")
        if not path.removeprefix("model.").startswith((*vision, "lm_head.")):
            out[path] = a
    return out


class GemmaText(nn.Module):
    name = "gemma"

    def __init__(self, config: dict, tokenizer=None):
        """config: the dictionary of a config.json; tokenizer: a function, text -> ids."""
        super().__init__()
        gemma3 = import_mlx_lm("models.gemma3_text")
        args = gemma3.ModelArgs.from_dict(text_config(config))
        self.args = args
        self.model = gemma3.Gemma3Model(args)
        self._tokenize = tokenizer
        self._dtype = mx.float32

    @classmethod
    def load(cls, folder, tokenizer_folder, dtype: mx.Dtype | None = None) -> "GemmaText":
        """Load a Gemma 3 folder, quantized by mlx-lm or not, and its tokenizer.

        On a CPU, quantized layers become float ones, which compute faster there; the embedding
        table keeps its stored type. Raises SnapGenError for missing, damaged or foreign files.
        """
        config = load_config(folder)
        model = cls(config, load_tokenizer(tokenizer_folder))
        model._dtype = dtype or compute_dtype()
        tensors = text_keys(load_tensors(folder))
        if quantization := config.get("quantization"):
            model._quantize(quantization, tensors)
        table = "model.embed_tokens.weight"
        tensors = {
            k: a.astype(model._dtype) if mx.issubdtype(a.dtype, mx.floating) and k != table else a
            for k, a in tensors.items()
        }
        assign(model, tensors, folder)
        if quantization and mx.default_device() == mx.cpu:
            model._dequantize()
        return model

    def _quantize(self, quantization: dict, tensors: dict) -> None:
        """Make the layers that are stored quantized quantized ones."""
        overrides = text_keys({f"{k}.": v for k, v in quantization.items() if isinstance(v, dict)})
        defaults = {k: v for k, v in quantization.items() if k in ("group_size", "bits", "mode")}

        def predicate(path, _):
            return f"{path}.scales" in tensors and overrides.get(f"{path}.", defaults)

        nn.quantize(self, **defaults, class_predicate=predicate)

    def _dequantize(self) -> None:
        layers = []
        for path, m in self.named_modules():
            if isinstance(m, nn.QuantizedLinear):
                layer = nn.Linear(1, 1, bias=False)
                layer.weight = mx.dequantize(
                    m.weight, m.scales, m.get("biases"), m.group_size, m.bits, mode=m.mode
                ).astype(self._dtype)
                layers.append((path, layer))
        self.update_modules(tree_unflatten(layers))

    def __call__(self, ids: mx.array, mask: mx.array) -> mx.array:
        """Ids and mask of valid tokens (B, L) -> last hidden states after the norm (B, L, dim).

        Padding may stand on either side; its own states mean nothing.
        """
        create_mask = import_mlx_lm("models.base").create_causal_mask
        L = ids.shape[1]
        # A padding token sees itself, or its softmax would have no term and spread NaN.
        keys = mask[:, None, None] | mx.eye(L, dtype=mx.bool_)
        full = create_mask(L) & keys
        sliding = create_mask(L, window_size=self.args.sliding_window) & keys
        # In bfloat16 the factor is rounded as well, as in the original.
        h = self.model.embed_tokens(ids).astype(self._dtype)
        h = h * mx.array(self.args.hidden_size**0.5, self._dtype)
        for layer in self.model.layers:
            h = layer(h, sliding if layer.self_attn.is_sliding else full)
        return self.model.norm(h)

    def encode(self, texts: list[str]) -> tuple[mx.array, mx.array]:
        """States (B, L, dim) and mask (B, L) of the raw texts, at most 256 tokens each."""
        rows = [self._tokenize(text)[:MAX_TOKENS] for text in texts]
        longest = max(len(row) for row in rows)
        ids = mx.array([row + [0] * (longest - len(row)) for row in rows])
        mask = mx.arange(longest) < mx.array([len(row) for row in rows])[:, None]
        return self(ids, mask), mask


def load_tokenizer(folder):
    """A function, text -> ids with <bos> first, from tokenizer.json or else tokenizer.model.

    Raises SnapGenError when the files are missing or damaged.
    """
    folder = Path(folder)
    extra = folder / "tokenizer_config.json"
    extra = read_json(extra) if extra.is_file() else {}
    bos_token = extra.get("bos_token") or "<bos>"
    bos_token = bos_token["content"] if isinstance(bos_token, dict) else bos_token
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            tokenizer.no_padding()
            tokenizer.no_truncation()
            bos = tokenizer.token_to_id(bos_token)

            def encode(text):
                return tokenizer.encode(text, add_special_tokens=False).ids

        elif (folder / "tokenizer.model").is_file():
            from sentencepiece import SentencePieceProcessor

            pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
            bos, encode = pieces.piece_to_id(bos_token), pieces.encode
            bos = None if pieces.is_unknown(bos) else bos
        else:
            raise SnapGenError(f"{folder} has neither tokenizer.json nor tokenizer.model")
    except SnapGenError:
        raise
    except Exception as e:  # the tokenizers library raises nothing more precise
        raise SnapGenError(f"cannot read the tokenizer in {folder}: {e}") from e
    if bos is None:
        raise SnapGenError(f"the tokenizer in {folder} has no {bos_token} token")
    start = [bos] if extra.get("add_bos_token", True) else []
    return lambda text: start + encode(text)
