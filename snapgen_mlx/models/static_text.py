"""The embedded model's text encoder: a fixed table of word vectors, fed as a token sequence."""

import mlx.core as mx
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

UNKNOWN = "[UNK]"  # the table's first row; stands for no word and pads shorter texts
POSITION_RMS = 0.3  # beside 1 for the words: enough to tell order, too little to hide a word
POSITION_BASE = 100  # wavelengths of 6 to 600 tokens (our choice: texts have at most 32)


class StaticText:
    """Word vectors of a frozen sentence encoder (built by ``recipes.embedded.text_table``).

    table: (V, dim) int8; scale: (V,) float, so that ``table * scale`` has rows of unit length.
    """

    name = "static"
    max_tokens = 32

    def __init__(self, table: mx.array, scale: mx.array, vocab: list[str], max_tokens: int = 32):
        self.table, self.scale = table, scale
        self.max_tokens = max_tokens
        ids = {token: i for i, token in enumerate(vocab)}
        self._tokenizer = Tokenizer(WordPiece(ids, unk_token=UNKNOWN))
        self._tokenizer.normalizer = BertNormalizer(lowercase=True, strip_accents=True)
        self._tokenizer.pre_tokenizer = BertPreTokenizer()
        self._positions = _positions(max_tokens, table.shape[1])

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.table, self.scale, self._positions))

    def encoding_bytes(self) -> int:
        return 0  # a look-up

    def encode(self, texts: list[str]) -> tuple[mx.array, mx.array]:
        """States (B, L, dim) float32 and mask (B, L) bool, L at most ``max_tokens``.

        Word entries have about unit variance. Characters without a row are passed over; a text
        without any known token gives a row whose mask is False throughout (L is at least 1).
        """
        rows = [
            [i for i in encoding.ids if i != 0][: self.max_tokens]
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
