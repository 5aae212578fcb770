"""``snapgen-mlx init``: a model of random weights."""

import click


@click.command()
@click.argument("dest", type=click.Path())
@click.option(
    "--geometry",
    required=True,
    type=click.Choice(["full", "small", "tiny", "embedded"]),
    help="full: the 1.6 B model with three widths; small, tiny: one width of it; embedded: "
    "the sizes of the embedded model's first edition.",
)
@click.option("--random", "seed", required=True, type=click.IntRange(0), help="Seed.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["mlx", "pytorch"]),
    default="mlx",
    show_default=True,
    help="Format of the checkpoint.",
)
def init(dest, geometry, seed, form):
    """Write a model with random float32 weights to the new folder DEST.

    It is for tests and benchmarks. It has an autoencoder but no text encoder, and its pictures are
    noise.
    """
    from snapgen_mlx.convert.init import init as run

    result = run(dest, geometry, seed, form)
    click.echo(f"wrote {dest}, {result['bytes'] / 1e6:.1f} MB; its pictures are noise")
