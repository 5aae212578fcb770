"""What commands share: a model that may be left out, and pictures with captions."""

import click


def optional_model(ctx, param, values: tuple[str, ...]) -> str | None:
    """Callback of a MODEL argument that may be left out before others: None, the embedded model.

    Click fills arguments from the left but for one with ``nargs=-1``, which takes what is over.
    """
    if len(values) > 1:
        raise click.UsageError(f"Got unexpected extra argument ({values[-1]})", ctx)
    return values[0] if values else None


model_argument = click.argument("model", nargs=-1, callback=optional_model, metavar="[MODEL]")


def data_options(command):
    """--caption and --skip-bad, for ``read_pictures``."""
    command = click.option(
        "--skip-bad", is_flag=True, help="Leave out pictures that cannot be used."
    )(command)
    return click.option("--caption", help="For pictures without one, such as: a photo of my dog.")(
        command
    )


def read_pictures(folder, caption: str | None, skip_bad: bool, echo=click.echo) -> list:
    """Examples of a folder; bad ones are an error, or left out and named on standard error."""
    from snapgen_mlx.errors import SnapGenError
    from snapgen_mlx.training.data import read_folder, scan_folder, shorten

    if not skip_bad:
        return read_folder(folder, caption)
    examples, bad = scan_folder(folder, caption)
    if not examples:
        raise SnapGenError(f"{folder}: no picture can be used: {shorten(bad)}")
    if bad:
        echo(f"{folder}: left out {len(bad)} pictures: {shorten(bad)}", err=True)
    return examples


def encoded(record: dict) -> str:
    """One line of a record of ``encode_data``."""
    if "drawn" in record:
        return f"drew {record['drawn']} of {record['prompts']} prompts"
    what = "pictures" if "pictures" in record else "captions"
    return f"encoded {record['encoded']} of {record[what]} {what}"
