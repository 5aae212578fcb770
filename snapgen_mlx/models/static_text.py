"""The embedded model's text encoder: a fixed table of word vectors, fed as a token sequence."""

from pathlib import Path

import mlx.core as mx
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from ..errors import SnapGenError
from ..weights import load_config, load_tensors

UNKNOWN = "[UNK]"  # the table's first row; stands for no word and pads shorter texts
POSITION_RMS = 0.3  # beside 1 for the words: enough to tell order, too little to hide a word
POSITION_BASE = 100  # wavelengths of 6 to 600 tokens (our choice: texts have at most 32)


class StaticText:
    """Word vectors of a frozen sentence encoder (built by ``recipes.embedded.text_table``).

    table: (V, dim) int8; scale: (V,) float, so that ``table * scale`` has rows of unit length.
    """

    name = "static"

    def __init__(self, table: mx.array, scale: mx.array, vocab: list[str], max_length: int = 32):
        self.table, self.scale = table, scale
        self.max_length = max_length
        ids = {token: i for i, token in enumerate(vocab)}
        self._tokenizer = Tokenizer(WordPiece(ids, unk_token=UNKNOWN))
        self._tokenizer.normalizer = BertNormalizer(lowercase=True, strip_accents=True)
        self._tokenizer.pre_tokenizer = BertPreTokenizer()
        self._positions = _positions(max_length, table.shape[1])

    @classmethod
    def load(cls, folder) -> "StaticText":
        """Load config.json, model.safetensors and vocab.txt of a folder.

        Raises SnapGenError for missing or damaged files and for files of different tables.
        """
        folder = Path(folder)
        config = load_config(folder)
        if config.get("model_type") != "static_text":
            raise SnapGenError(f"{folder / 'config.json'} is not of a static text table")
        length = config.get("max_length")
        if type(length) is not int or length < 1:
            raise SnapGenError(f"{folder / 'config.json'}: max_length is {length!r}, not a count")
        tensors = load_tensors(folder)
        try:
            vocab = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as e:
            raise SnapGenError(f"cannot read {folder / 'vocab.txt'}: {e}") from e
        shapes = {key: tuple(a.shape) for key, a in tensors.items()}
        if shapes != {"table": (len(vocab), config.get("dim")), "scale": (len(vocab),)}:
            raise SnapGenError(f"{folder}: weights, vocab.txt and config.json do not fit together")
        if vocab[:1] != [UNKNOWN] or len(set(vocab)) != len(vocab):
            raise SnapGenError(f"{folder / 'vocab.txt'} is damaged; download or build it again")
        return cls(tensors["table"], tensors["scale"], vocab, length)

    def encode(self, texts: list[str]) -> tuple[mx.array, mx.array]:
        """States (B, L, dim) float32 and mask (B, L) bool, L at most ``max_length``.

        Word entries have about unit variance. Characters without a row are passed over; a text
        without any known token gives a row whose mask is False throughout (L is at least 1).
        """
        rows = [
            [i for i in encoding.ids if i != 0][: self.max_length]
            for encoding in self._tokenizer.encode_batch(texts)
        ]
        longest = max([1, *map(len, rows)])
        ids = mx.array([row + [0] * (longest - len(row)) for row in rows])
        mask = mx.arange(longest) < mx.array([len(row) for row in rows])[:, None]
        dim = self.table.shape[1]
        words = self.table[ids].astype(mx.float32) * self.scale[ids].astype(mx.float32)[..., None]
        states = words * dim**0.5 + self._positions[:longest]
        return mx.where(mask[..., None], states, 0), mask


def _positions(length: int, dim: int) -> mx.array:
    """Sinusoids (length, dim) of root mean square POSITION_RMS, as in "Attention Is All You Need"
    but with POSITION_BASE."""
    frequencies = POSITION_BASE ** (-mx.arange(0, dim, 2) / dim)
    angles = mx.arange(length)[:, None] * frequencies
    waves = mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=1)
    return waves * (POSITION_RMS * 2**0.5)
