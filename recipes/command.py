"""How a recipe's command ends when its input is wrong."""

import functools
import sys
from collections.abc import Callable

from snapgen_mlx.errors import SnapGenError, UsageError


def command(main: Callable[..., None]) -> Callable[..., int]:
    """A command that returns its exit code: one line on stderr and 2 for usage, 1 for failure."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        try:
            main(argv)
        except SnapGenError as e:
            print(f"error: {e}", file=sys.stderr)
            return 2 if isinstance(e, UsageError) else 1
        return 0

    return run
