"""What a model says that it draws: ``words.json`` of its folder, a list of plain names."""

import json
import shutil
from pathlib import Path

from .errors import SnapGenError

FILE = "words.json"


def known_words(folder) -> list[str]:
    """Names of the things that a model was taught, in order; none when its folder lists none.

    Raises:
        SnapGenError: the list is damaged.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return []
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise SnapGenError(f"cannot read {path}: {e}") from e
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise SnapGenError(f"{path} is not a list of words; download or build the model again")
    return words


def copy_words(source, target) -> None:
    """Copy a model's list, where it has one."""
    if (Path(source) / FILE).is_file():
        shutil.copyfile(Path(source) / FILE, Path(target) / FILE)
