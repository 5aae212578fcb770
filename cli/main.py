"""The ``snapgen-mlx`` command. Subcommands load lazily, so that ``--help`` answers at once."""

import importlib

import click

COMMANDS = {
    "finetune": "Train all widths of a model on your own pictures.",
}


class LazyGroup(click.Group):
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


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(package_name="snapgen-mlx")
def main(debug):
    """SnapGen++ text-to-image in MLX."""
