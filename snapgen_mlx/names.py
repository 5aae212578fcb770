"""Names of picture files: from a pattern and a prompt, checked before anything is drawn."""

import errno
import os
import unicodedata
from pathlib import Path

from PIL import Image

from .errors import SnapGenError, UsageError
from .files import name_limit

STDOUT = "-"  # standard output instead of a file
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
WORDS = 60  # characters of a prompt in a file name


def file_words(text: str) -> str:
    """The letters and digits of a text, of any script, as a part of a name: "A Cat!" is "a-cat".

    Emoji stand for their names.
    """
    text = unicodedata.normalize("NFC", text)
    spelt = "".join(_spelt(c) for c in text).lower()
    return "-".join(spelt.split())[:WORDS].strip("-") or "picture"


def _spelt(c: str) -> str:
    if unicodedata.category(c) == "So":
        return f" {unicodedata.name(c, '').replace('-', ' ')} "
    is_mark_of_emoji = unicodedata.name(c, "").startswith("VARIATION SELECTOR")
    return c if unicodedata.category(c)[0] in "LMN" and not is_mark_of_emoji else " "


def output_pattern(output: str | None, widths: bool = False) -> str:
    """The pattern of names that an output stands for.

    Args:
        output: a pattern with {prompt}, {seed} and {variant}, a folder, "-", or None.
        widths: whether pictures of several widths need names.

    Raises:
        UsageError: a kind of file that is not written.
    """
    own = "{prompt}-{seed}-{variant}.png" if widths else "{prompt}-{seed}.png"
    if output in (None, STDOUT):
        return output or own
    path = Path(output or "")
    if not output or "\0" in output:
        raise UsageError(f"-o {output!r} is not a file name")
    if output.endswith("/") or path.name in ("", "..") or os.path.isdir(path):
        return str(path / own)
    suffix = path.suffix.lower()
    if suffix in FORMATS:
        return output
    if suffix in Image.registered_extensions():
        raise UsageError(f"-o {output}: pictures are written as {', '.join(FORMATS)}; choose one")
    return f"{output}.png"


def fill_in(pattern: str, prompt: str, seed: int, variant: str) -> Path:
    """The path of one picture."""
    known = {"prompt": file_words(prompt), "seed": str(seed), "variant": file_words(variant)}
    for name, value in known.items():
        pattern = pattern.replace(f"{{{name}}}", value)
    return Path(pattern)


def check_place(path: Path) -> None:
    """Raise an error unless a file can be written at ``path``, whose folders may be missing.

    Raises:
        UsageError: a name that is too long.
        SnapGenError: no folder, or one that cannot be written.
    """
    folder = path.parent
    try:
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            raise NotADirectoryError(0, "Not a directory")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(0, "Permission denied")
    except OSError as e:
        if e.errno != errno.ENAMETOOLONG:
            raise SnapGenError(f"cannot write {path}: {e.strerror}; choose another place") from e
        folder = Path("/")
    limit = name_limit(folder)
    for part in path.parts:
        if len(os.fsencode(part)) > limit:
            raise UsageError(
                f"the name {part[:40]}... has {len(os.fsencode(part))} bytes, and {limit} is the "
                "most here; choose a shorter -o"
            )
