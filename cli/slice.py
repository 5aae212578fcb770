"""``snapgen-mlx slice``: one width of a model as a model of its own."""

import click


@click.command("slice")
@click.argument("model", type=click.Path(file_okay=False))
@click.argument("dest", type=click.Path())
@click.option("--variant", required=True, help="The width to write: tiny, small or full.")
def slice(model, dest, variant):
    """Write one width of the folder MODEL to the new folder DEST.

    The new model draws exactly the same pictures as MODEL with --variant.
    """
    from snapgen_mlx.convert.slice import slice_model
    from snapgen_mlx.hub import resolve_model

    result = slice_model(resolve_model(model), dest, variant)
    click.echo(f"wrote {dest}: {variant}, a transformer of {result['bytes'] / 1e6:.1f} MB")
