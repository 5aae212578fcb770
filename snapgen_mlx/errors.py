"""The two errors a user can meet, and how their messages name things.

Each message is one line: what, where, what to do.
"""

from collections.abc import Iterable


class SnapGenError(Exception):
    """Something failed: a bad file, a missing download, a full disk (exit code 1)."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # names in it may have line ends


class UsageError(SnapGenError):
    """The request itself cannot be met: a bad size, an unknown variant (exit code 2)."""


def shown(value: object) -> str:
    """A value as a message quotes it: in one line, and not too long."""
    return " ".join(repr(value).split())[:60]


def name_first(items: Iterable[str], most: int = 10) -> str:
    """ "a, b, c and 7 more": the first ``most`` of ``items``, and how many follow."""
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def name_keys(keys: Iterable[str], most: int = 4) -> str:
    """``name_first`` of keys in quotes, in order."""
    return name_first(map(repr, sorted(keys)), most)


def format_bytes(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"
