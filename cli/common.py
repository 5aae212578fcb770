"""What every command shares: one clear line instead of a traceback."""

import functools
import sys

import click


def friendly(command):
    """Turn SnapGenError into one line: exit code 2 for usage, 1 for failure.

    ``snapgen-mlx --debug`` lets the traceback through.
    """

    @functools.wraps(command)
    def wrapper(*args, **kwargs):
        from snapgen_mlx.errors import SnapGenError, UsageError

        try:
            return command(*args, **kwargs)
        except SnapGenError as e:
            root = click.get_current_context().find_root()
            if root.params.get("debug"):
                raise
            click.echo(f"error: {e}", err=True)
            sys.exit(2 if isinstance(e, UsageError) else 1)

    return wrapper
