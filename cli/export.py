"""`snapgen-mlx export`: an MLX model folder back into the PyTorch contract."""

import click


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False))
@click.argument("dest")
def export(model, dest):
    """Write MODEL, an MLX folder, to DEST as a diffusers-style PyTorch checkpoint."""
    from snapgen_mlx.convert.to_pytorch import export as run

    result = run(model, dest)
    for name, part in result["written"].items():
        click.echo(f"{name}: {part['bytes_on_disk'] / 1e6:.1f} MB")
    for name, layers in result["dequantized"].items():
        click.echo(f"{name}: {layers} quantized layers became floats, and keep their rounding")
    click.echo(f"wrote {dest}")
