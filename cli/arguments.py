"""What commands share: a model that may be left out, and pictures with captions."""

import math
import random
from pathlib import Path

import click


def optional_model(ctx, param, values: tuple[str, ...]) -> str | None:
    """Callback of a MODEL argument that may be left out before others: None, the embedded model.

    Click fills arguments from the left but for one with ``nargs=-1``, which takes what is over.
    """
    if len(values) > 1:
        raise click.UsageError(f"Got unexpected extra argument ({values[-1]})", ctx)
    return values[0] if values else None


model_argument = click.argument("model", nargs=-1, callback=optional_model, metavar="[MODEL]")


class Seed(click.ParamType):
    """A number, or "random" for one by chance."""

    name = "n|random"

    def convert(self, value, param, ctx) -> int:
        if value == "random":
            return random.randrange(2**32)
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a whole number nor random", param, ctx)


class Number(click.FloatRange):
    """A float in a range; none is infinite, or no number, which a range lets through."""

    def convert(self, value, param, ctx):
        value = super().convert(value, param, ctx)
        return value if math.isfinite(value) else self.fail(f"{value} is no finite number.")


output_option = click.option(
    "-o", "--output", type=click.Path(file_okay=False), help="New folder.  [required]"
)
explain_option = click.option(
    "--explain", is_flag=True, help="Print the memory that the training needs, and train nothing."
)


DTYPES = ("float16", "bfloat16", "float32")  # those of ``device``, which takes long to import


def _dtype(ctx, param, value: str | None):
    """The name of a type -> MLX's type."""
    from snapgen_mlx import device

    return value and device.DTYPES[value]


dtype_option = click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    callback=_dtype,
    help="Type of numbers to compute with (default: float16 on a GPU, float32 on a CPU).",
)


class Seconds(Number):
    """A time, as 0.5s or 0.5."""

    name = "seconds"

    def convert(self, value, param, ctx):
        return super().convert(
            value.removesuffix("s") if isinstance(value, str) else value, param, ctx
        )


force_option = click.option(
    "--force", is_flag=True, help="Go on even if the predicted memory does not fit."
)


def data_options(command):
    """--caption and --skip-bad, for ``read_pictures``."""
    command = click.option(
        "--skip-bad", is_flag=True, help="Leave out pictures that cannot be used."
    )(command)
    return click.option(
        "--caption", help="Caption for pictures that have none, such as: a photo of my dog."
    )(command)


def training_options(command):
    """Options of every training's run, for ``RunOptions`` and ``AdamOptions``, and --resume."""
    positive = Number(0, min_open=True)
    options = [
        click.option("--steps", type=click.IntRange(1), default=1000, show_default=True),
        click.option("--minutes", type=positive, help="Stop after this many minutes."),
        click.option("--batch", type=click.IntRange(1), default=8, show_default=True),
        click.option(
            "--accumulate",
            type=click.IntRange(1),
            default=1,
            show_default=True,
            help="Compute each batch in this many parts, which needs less memory.",
        ),
        click.option(
            "--checkpoint", is_flag=True, help="Use less memory, but about a third more time."
        ),
        click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True),
        click.option(
            "--resume", is_flag=True, help="Go on with the run in OUTPUT; fail if there is none."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def learning_rate_option(**how):
    return click.option("--learning-rate", type=Number(0, min_open=True), **how)


def rank_option(text: str):
    """--lora, a rank to train."""
    return click.option("--lora", type=click.IntRange(1, 1024), help=text)


def warmup_option(least: int, default: int):
    return click.option(
        "--warmup",
        type=click.IntRange(least),
        default=default,
        show_default=True,
        help="Warm-up steps.",
    )


def sample_every_option(least: int, text: str = ""):
    return click.option(
        "--sample-every",
        type=click.IntRange(least),
        default=500,
        show_default=True,
        help=f"Draw a grid of sample pictures every so many steps{text}.",
    )


def validation_option(text: str):
    return click.option("--validation", type=click.Path(file_okay=False), help=text)


def subnets_option(text: str):
    return click.option(
        "--subnets",
        type=click.Choice(["one", "all"]),
        default="one",
        show_default=True,
        help=text,
    )


def lora_files_option(text: str):
    """--lora, files to use: pairs (path, scale)."""
    return click.option(
        "--lora",
        "loras",
        multiple=True,
        metavar="PATH[:SCALE]",
        callback=_lora_files,
        help=f"{text}; may be given several times.",
    )


def _lora_files(ctx, param, values: tuple[str, ...]) -> list[tuple[str, float]]:
    """PATH[:SCALE] -> (path, scale)."""
    pairs = []
    for value in values:
        path, _, scale = value.rpartition(":")
        try:
            pair = (path, float(scale)) if path else (value, 1.0)
        except ValueError:
            pair = value, 1.0  # the colon belongs to the path
        if not math.isfinite(pair[1]):
            raise click.BadParameter(f"{scale} is no scale", ctx, param)
        pairs.append(pair)
    return pairs


def speaker():
    """``click.echo`` on the first of a training's processes, silence on the others."""
    import mlx.core as mx

    return click.echo if mx.distributed.init().rank() == 0 else lambda *_, **__: None


def check_output(output, resume: bool, *data) -> None:
    """Raise UsageError without --output, where it lies in ``data``, folders of pictures (or None),
    and when --resume finds no run."""
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    for folder in data:
        if folder and Path(output).resolve().is_relative_to(Path(folder).resolve()):
            raise click.UsageError(
                f"{output} lies in the pictures of {folder}; choose another folder"
            )
    if resume and not any(Path(output, "run").glob("state-*.json")):
        raise click.UsageError(f"there is no run in {output} to resume; leave out --resume")


def read_pictures(folder, caption: str | None, skip_bad: bool, echo=click.echo) -> list:
    """Examples of a folder; bad ones are an error, or left out and named on standard error."""
    from snapgen_mlx.errors import SnapGenError, name_first
    from snapgen_mlx.training.picture_list import left_out
    from snapgen_mlx.training.pictures import read_folder, scan_folder

    if Path(folder).is_dir() and (lines := left_out(folder)):
        echo(f"{folder}: left out pictures: {'; '.join(lines)}", err=True)
    if not skip_bad:
        return read_folder(folder, caption)
    examples, bad = scan_folder(folder, caption)
    if not examples:
        raise SnapGenError(f"{folder}: no picture can be used: {name_first(bad)}")
    if bad:
        echo(f"{folder}: left out {len(bad)} pictures: {name_first(bad)}", err=True)
    return examples


def left_out_loras(model: Path, output, lora: bool) -> str | None:
    """A line for a training of all weights, after which a model's few-step LoRAs fit no more."""
    from snapgen_mlx.layout import few_step_loras

    names = [file.stem for file in few_step_loras(model)]
    if lora or not names:
        return None
    return (
        f"left out the few-step LoRAs ({', '.join(names)}), which fit the weights before: {output} "
        f"draws in many steps; make new ones with: snapgen-mlx distill {output} DATA --method kdmd "
        "--loss kd --variant WIDTH -o DIR"
    )


def encoded(record: dict) -> str:
    """One line of a record of ``encode_data``."""
    if "drawn" in record:
        return f"drew {record['drawn']} of {record['prompts']} prompts"
    what = "pictures" if "pictures" in record else "captions"
    return f"encoded {record['encoded']} of {record[what]} {what}"
