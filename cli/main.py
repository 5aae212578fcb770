"""The ``snapgen-mlx`` command. Subcommands load lazily, so that ``--help`` answers at once."""

import importlib
import os
import signal
import sys

import click

from snapgen_mlx.errors import SnapGenError, UsageError

COMMANDS = {
    "generate": "Make pictures from words.",
    "pack": "Draw a pack of stickers in the sizes that chats use.",
    "serve": "Start a web page and a server with OpenAI's image API.",
    "doctor": "Check this machine and say what to do.",
    "info": "Print the parts of a model and the memory it needs.",
    "convert": "Turn a PyTorch checkpoint into an MLX model.",
    "quantize": "Quantize a model, with more bits for sensitive layers.",
    "export": "Write an MLX model back as a PyTorch checkpoint.",
    "push": "Upload a model to the Hub, with a card.",
    "slice": "Write one width of a model as a model of its own.",
    "init": "Write a model with random weights, for tests and benchmarks.",
    "finetune": "Train all widths of a model on your own pictures.",
    "distill": "Train a model to follow a teacher, or to draw in four steps.",
    "bench": "Measure how fast this machine draws, and the memory that it takes.",
    "eval": "Measure what a model draws right, or how well it knows pictures.",
}


class Commands(click.Group):
    """Loads a command when it is asked for and turns errors into one line.

    Exit code 2 for a request that cannot be met, 1 for a failure.
    """

    def main(self, *args, **options):
        _open_closed_streams()
        return super().main(*args, **options)

    def invoke(self, ctx):
        try:
            result = super().invoke(ctx)
            if sys.stdout is not None:
                sys.stdout.flush()  # now, where an error can be told
            return result
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(128 + signal.SIGINT)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as e:
            if ctx.params["debug"]:
                raise
            if isinstance(e, SnapGenError):
                line = str(e)
            elif isinstance(e, OSError) and e.strerror:
                line = ": ".join(filter(None, (_name(e.filename), e.strerror)))
            else:
                line = f"unexpected {type(e).__name__}: {e} (--debug shows where)"
            # Names of files may hold bytes that are no characters.
            line = line.encode(errors="replace").decode()
            click.echo("error: " + " ".join(line.split()), err=True)
            ctx.exit(2 if isinstance(e, UsageError) else 1)

    def list_commands(self, ctx):
        return list(COMMANDS)

    def get_command(self, ctx, name):
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f".{name}", __package__)
        return getattr(module, name)

    def format_commands(self, ctx, formatter):
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _open_closed_streams() -> None:
    """Keep files from getting the numbers of standard streams that are closed: what is written to
    standard error would end up in a picture."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (to the end of the process)


def _name(filename) -> str:
    return "" if filename is None else str(filename)


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(package_name="snapgen-mlx")
def main(debug):
    """SnapGen++ text-to-image in MLX."""
