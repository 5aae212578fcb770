"""Tokenizers of the text encoders, from the files that stand beside their weights."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from .errors import SnapGenError
from .files import read_json
from .models.word_tokens import UNKNOWN, WordTokens

WORD_FILES = ("vocab.txt", "emoji.json")  # files of a word table; the second may be missing
BOS, EOS = "<|startoftext|>", "<|endoftext|>"  # CLIP's tokens
QWEN_TURNS = ("<|im_start|>", "<|im_end|>")
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Turns whatever a tokenizer's files raise into a SnapGenError."""
    try:
        yield
    except SnapGenError:
        raise
    except Exception as e:  # the tokenizers library raises nothing more precise
        raise SnapGenError(f"cannot read the tokenizer in {folder}: {e}") from e


def load_clip_tokenizer(folder) -> Tokenizer:
    """CLIP's tokenizer from tokenizer.json, or from vocab.json and merges.txt.

    Raises SnapGenError when the files are missing or damaged.
    """
    folder = Path(folder)
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    with _reading(folder):
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            tokenizer.no_padding()
            return tokenizer
        if not (vocab.is_file() and merges.is_file()):
            raise SnapGenError(f"{folder} has neither tokenizer.json nor vocab.json and merges.txt")
        bpe = BPE.from_file(str(vocab), str(merges), end_of_word_suffix="</w>", unk_token=EOS)
    # The rest is fixed for CLIP and therefore not in those two files.
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens([BOS, EOS])
    end, begin = ((token, tokenizer.token_to_id(token) or 0) for token in (EOS, BOS))
    tokenizer.post_processor = processors.RobertaProcessing(
        end, begin, trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


def load_gemma_tokenizer(folder) -> Callable[[str], list[int]]:
    """A function, text -> ids with <bos> first, from tokenizer.json or else tokenizer.model.

    Raises SnapGenError when the files are missing or damaged.
    """
    folder = Path(folder)
    extra = folder / "tokenizer_config.json"
    extra = read_json(extra) if extra.is_file() else {}
    bos_token = extra.get("bos_token") or "<bos>"
    bos_token = bos_token["content"] if isinstance(bos_token, dict) else bos_token
    with _reading(folder):
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
    if bos is None:
        raise SnapGenError(f"the tokenizer in {folder} has no {bos_token} token")
    start = [bos] if extra.get("add_bos_token", True) else []
    return lambda text: start + encode(text)


def load_qwen_tokenizer(folder) -> Callable[[str], list[int]]:
    """A function, text -> ids, from tokenizer.json or else vocab.json and merges.txt, with the
    tokens that tokenizer_config.json or added_tokens.json adds.

    Raises SnapGenError when the files are missing or damaged.
    """
    folder = Path(folder)
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    with _reading(folder):
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            tokenizer.no_padding()
            tokenizer.no_truncation()
        elif vocab.is_file() and merges.is_file():
            tokenizer = Tokenizer(BPE.from_file(str(vocab), str(merges)))
            tokenizer.normalizer = normalizers.NFC()
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
            added = _added_tokens(folder)
            tokenizer.add_special_tokens([added[i] for i in sorted(added)])
            if any(tokenizer.token_to_id(token) != i for i, token in added.items()):
                raise SnapGenError(f"{folder}: added tokens do not follow {vocab.name}")
        else:
            raise SnapGenError(f"{folder} has neither tokenizer.json nor vocab.json and merges.txt")
    for token in QWEN_TURNS:
        if tokenizer.token_to_id(token) is None:
            raise SnapGenError(f"the tokenizer in {folder} has no {token} token; is it Qwen's?")
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _added_tokens(folder: Path) -> dict[int, str]:
    """{id: token} of what a vocabulary file does not hold."""
    config, table = folder / "tokenizer_config.json", folder / "added_tokens.json"
    if table.is_file():
        return {i: token for token, i in read_json(table).items()}
    entries = read_json(config).get("added_tokens_decoder", {}) if config.is_file() else {}
    return {int(i): entry["content"] for i, entry in entries.items()}


def load_word_tokens(folder, max_tokens: int) -> WordTokens:
    """Load the tokenizer of a word table: vocab.txt and, if it is there, emoji.json.

    Args:
        folder: of the table.
        max_tokens: longest text in tokens.

    Raises:
        SnapGenError: a file is missing or damaged.
    """
    vocab, emoji = (Path(folder) / name for name in WORD_FILES)
    try:
        words = vocab.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as e:
        raise SnapGenError(f"cannot read {vocab}: {e}") from e
    if words[:1] != [UNKNOWN] or len(set(words)) != len(words):
        raise SnapGenError(f"{vocab} is damaged; download or build it again")
    names = read_json(emoji) if emoji.exists() else {}
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise SnapGenError(f"{emoji} does not map emoji to names; download or build it again")
    return WordTokens(words, names, max_tokens)


def copy_word_files(source: Path, target: Path) -> None:
    """Copy what ``load_word_tokens`` reads, where it is there."""
    for name in WORD_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
