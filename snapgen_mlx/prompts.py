"""Prompts from files, and several written as one: "a {happy,sad} cat"."""

import codecs
import itertools
import re
from pathlib import Path

from .errors import UsageError

MAX_PROMPTS = 1000  # prompts that one text may give
CHOICES = re.compile(r"\{([^{}]*)\}")


def expand(text: str) -> list[str]:
    """The prompts a text with braces stands for, in order, the last brace changing fastest.

    Args:
        text: "a {happy,sad} cat" stands for "a happy cat" and "a sad cat"; a text without braces
            for itself. Blanks around commas do not count; a choice may be empty.

    Raises:
        UsageError: braces that do not match or are nested, a single choice, or too many prompts.
    """
    parts = CHOICES.split(text)  # texts at even places, choices at odd ones
    if any("{" in part or "}" in part for part in parts[::2]):
        raise UsageError(f"braces do not match in {text!r}; write for example {{happy,sad}}")
    choices = [[c.strip() for c in part.split(",")] for part in parts[1::2]]
    if any(len(c) < 2 for c in choices):
        raise UsageError(f"braces need choices with commas between, as {{happy,sad}}, in {text!r}")
    number = 1
    for c in choices:
        number *= len(c)
    if number > MAX_PROMPTS:
        raise UsageError(f"{text!r} stands for {number} prompts; {MAX_PROMPTS} are the most")
    if not choices:
        return [text]
    out = []
    for chosen in itertools.product(*choices):
        pieces = itertools.chain.from_iterable(
            itertools.zip_longest(parts[::2], chosen, fillvalue="")
        )
        out.append(" ".join("".join(pieces).split()))
    return list(dict.fromkeys(out))


def read_prompts(path) -> list[str]:
    """The lines of a text file that hold something. Raises UsageError when there are none."""
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise UsageError(f"cannot read the prompts in {path}: {e.strerror}") from e
    return prompt_lines(data, path)


def prompt_lines(data: bytes, where) -> list[str]:
    """The lines of a text, with or without a byte order mark, that hold something.

    Raises:
        UsageError: there are none, or the text is not UTF-8.
    """
    try:
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise UsageError(f"line {line} of {where} is not UTF-8; save the text as UTF-8") from e
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UsageError(f"{where} holds no prompt; write one a line")
    return prompts
