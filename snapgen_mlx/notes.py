"""What may surprise about a picture, told in one line each before it is drawn."""

from collections.abc import Sequence

from .models.interfaces import TextEncoder
from .settings import Settings

SHOWN = 40  # characters of a text that a note shows


def notes(
    s: Settings, encoders: Sequence[TextEncoder], size: int | None, few_step: bool
) -> list[str]:
    """Notes on the settings of a picture.

    Args:
        encoders: of the model.
        size: pixels a side that the model was trained for; None for one that draws many sizes.
        few_step: whether it draws in few steps.
    """
    found = []
    is_guided = s.guidance != 1
    for text in s.texts if is_guided else [s.prompt]:
        shown = repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
        if words := unknown_words(encoders, text):
            found.append(
                f"{shown}: the model does not know: {', '.join(words)}; "
                "`snapgen-mlx info --words` lists what it draws"
            )
        for encoder in encoders:
            if kept := kept_text(encoder, text):
                found.append(
                    f"{shown}: the text encoder {encoder.name} reads {encoder.max_tokens} of "
                    f"{encoder.token_count(text)} tokens, up to {kept[-SHOWN:].lstrip()!r}"
                )
    if s.negative and not is_guided:
        found.append("the negative text has no effect at guidance 1; try guidance 4")
    if is_guided and few_step:
        found.append(
            f"guidance {s.guidance:g}: the model learned to draw in few steps without guidance; "
            "--base draws with it"
        )
    if size is not None and (s.width, s.height) != (size, size):
        found.append(
            f"{s.width}x{s.height}: the model was trained for {size}x{size}; other sizes look worse"
        )
    return found


def unknown_words(encoders: Sequence[TextEncoder], text: str) -> list[str]:
    """Words of a text that no encoder knows; [] where an encoder reads any text."""
    found = [getattr(encoder, "words", None) for encoder in encoders]
    tables = [table for table in found if table is not None]
    if not tables or len(tables) < len(found):
        return []
    unknown = [table.unknown_words(text) for table in tables]
    return [word for word in unknown[0] if all(word in words for words in unknown)]


def kept_text(encoder: TextEncoder, text: str) -> str | None:
    """The beginning of a text that an encoder reads; None where it reads all of it."""
    if encoder.token_count(text) <= encoder.max_tokens:
        return None
    low, high = 0, len(text)  # characters that fit, and that do not
    while high - low > 1:
        middle = (low + high) // 2
        fits = encoder.token_count(text[:middle]) <= encoder.max_tokens
        low, high = (middle, high) if fits else (low, middle)
    kept = text[:low]
    # A part of a word may fit where the word does not.
    whole = kept if text[low].isspace() else kept.rpartition(" ")[0]
    return whole.rstrip() or kept
