"""The ``snapgen-mlx`` command. Subcommands load lazily, so that ``--help`` answers at once."""

import importlib

import click

from snapgen_mlx.errors import SnapGenError, UsageError

COMMANDS = {
    "generate": "Make pictures from words.",
    "pack": "Draw a sticker pack in the sizes that chats take.",
    "serve": "Keep a model loaded: a web page and OpenAI's image API.",
    "doctor": "Look whether this machine is fit to draw, and say what to do.",
    "info": "Print what a model folder holds and the memory it needs.",
    "convert": "Turn a PyTorch checkpoint into an MLX model.",
    "quantize": "Write a model in few bits, more of them where they matter.",
    "export": "Write an MLX model back as a PyTorch checkpoint.",
    "slice": "Cut one width of a model out to a model of its own.",
    "init": "Write a model of random weights, for tests and benchmarks.",
    "finetune": "Train all widths of a model on your own pictures.",
    "distill": "Train a model to do what a teacher does, or in four steps.",
    "eval": "Measure how well a model knows a folder of pictures.",
}


class Commands(click.Group):
    """Loads a command when it is asked for and turns errors into one line.

    Exit code 2 for a request that cannot be met, 1 for a failure.
    """

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as e:
            if ctx.params["debug"]:
                raise
            known = isinstance(e, SnapGenError)
            line = str(e) if known else f"unexpected {type(e).__name__}: {e} (--debug shows where)"
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


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(package_name="snapgen-mlx")
def main(debug):
    """SnapGen++ text-to-image in MLX."""
