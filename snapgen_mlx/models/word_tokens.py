"""Text to rows of a word table: emoji characters to their names, words to word pieces."""

import re

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

UNKNOWN = "[UNK]"  # first row of the table, for unknown words and padding
# Variation selectors and skin tones: they change how an emoji looks, not what it is called.
MODIFIERS = re.compile("[\ufe0e\ufe0f\U0001f3fb-\U0001f3ff]")
ENDINGS = re.compile("e?s|'s|i?e?d|i?er|i?ers|i?est|ing|ings|i?ly|i?ness|ations?|y")


class WordTokens:
    """The tokenizer of a word table.

    Args:
        vocab: a word or word piece ("##s") per row of the table, UNKNOWN first.
        emoji: names by emoji, keys without variation selectors and skin tones.
        max_tokens: most tokens of a text.
    """

    def __init__(self, vocab: list[str], emoji: dict[str, str], max_tokens: int):
        self.vocab, self.max_tokens = vocab, max_tokens
        ids = {token: i for i, token in enumerate(vocab)}
        self._tokenizer = Tokenizer(WordPiece(ids, unk_token=UNKNOWN))
        self._tokenizer.normalizer = BertNormalizer(lowercase=True, strip_accents=True)
        self._tokenizer.pre_tokenizer = BertPreTokenizer()
        self._emoji = emoji
        # The longest first: a family of three begins like a single man.
        keys = sorted(emoji, key=len, reverse=True)
        self._any_emoji = re.compile("|".join(map(re.escape, keys))) if keys else None

    def plain(self, text: str) -> str:
        """The text with every known emoji replaced by its name."""
        text = MODIFIERS.sub("", text)
        if self._any_emoji is None:
            return text
        return self._any_emoji.sub(lambda match: f" {self._emoji[match[0]]} ", text)

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Rows of the table per text, at most ``max_tokens``; what has no row is passed over."""
        return [self._all_ids(text)[: self.max_tokens] for text in texts]

    def count(self, text: str) -> int:
        """Rows of a text, those above ``max_tokens`` as well."""
        return len(self._all_ids(text))

    def _all_ids(self, text: str) -> list[int]:
        return [i for i in self._tokenizer.encode(self.plain(text)).ids if i != 0]

    def batch(self, texts: list[str]) -> tuple[list[list[int]], list[list[bool]]]:
        """Ids (B, L), padded with 0, and the mask of those that count; L is at least 1."""
        rows = self.ids(texts)
        longest = max([1, *map(len, rows)])
        ids = [row + [0] * (longest - len(row)) for row in rows]
        return ids, [[i < len(row) for i in range(longest)] for row in rows]

    def unknown_words(self, text: str) -> list[str]:
        """Words of the text without a row of their own, in order, each once.

        A regular derivation ("smilingly") of a word with a row counts as known, and so do numbers.
        """
        normal = self._tokenizer.normalizer.normalize_str(self.plain(text))
        out = []
        for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(normal):
            first, *rest = self._tokenizer.model.tokenize(word)
            tail = "".join(piece.value.removeprefix("##") for piece in rest)
            known = first.id != 0 and (
                not rest or word.isdigit() or (len(first.value) >= 3 and ENDINGS.fullmatch(tail))
            )
            if not known and word not in out:
                out.append(word)
        return out
