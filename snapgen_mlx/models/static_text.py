"""The embedded model's text encoder: a fixed table of word vectors, fed as a token sequence."""

import mlx.core as mx

from .word_tokens import WordTokens

POSITION_RMS = 0.3  # words have 1: this is enough to show order and too little to hide a word
POSITION_BASE = 100  # wavelengths of 6 to 600 tokens (our choice: texts have at most 32)


class StaticText:
    """Word vectors of a frozen sentence encoder (built by ``recipes.embedded.text_table``).

    Args:
        table: (V, dim) int8.
        scale: (V,) float, so that ``table * scale`` has rows of unit length.
        words: the table's tokenizer.
    """

    name = "static"
    max_tokens = 32

    def __init__(self, table: mx.array, scale: mx.array, words: WordTokens):
        self.table, self.scale, self.words = table, scale, words
        self.max_tokens = words.max_tokens
        self._positions = positions(self.max_tokens, table.shape[1])

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.table, self.scale, self._positions))

    def token_count(self, text: str) -> int:
        return self.words.count(text)

    def encoding_bytes(self) -> int:
        return 0  # a look-up

    def encode(self, texts: list[str]) -> tuple[mx.array, mx.array]:
        """States (B, L, dim) float32 and mask (B, L) bool, L at most ``max_tokens``.

        Word entries have about unit variance. Emoji count as their names; characters without a
        row are passed over. A text without any known token gives a row whose mask is False
        throughout (L is at least 1).
        """
        ids, mask = (mx.array(a) for a in self.words.batch(texts))
        words = word_states(self.table, self.scale, ids)
        states = words + self._positions[: ids.shape[1]]
        return mx.where(mask[..., None], states, 0), mask


def word_states(table: mx.array, scale: mx.array, ids: mx.array) -> mx.array:
    """Rows (B, L, dim) of a table by their ids (B, L), float32 of about unit variance."""
    rows = table[ids].astype(mx.float32) * scale[ids].astype(mx.float32)[..., None]
    return rows * table.shape[1] ** 0.5


def positions(length: int, dim: int) -> mx.array:
    """Sinusoids (length, dim) as in "Attention Is All You Need", but with POSITION_BASE.

    Their root mean square is POSITION_RMS.
    """
    frequencies = POSITION_BASE ** (-mx.arange(0, dim, 2) / dim)
    angles = mx.arange(length)[:, None] * frequencies
    waves = mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=1)
    return waves * (POSITION_RMS * 2**0.5)
