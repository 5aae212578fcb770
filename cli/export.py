"""`snapgen-mlx export`: an MLX model folder back into the PyTorch contract."""

import click


@click.command()
@click.argument("model")
@click.argument("dest")
def export(model, dest):
    """Write MODEL to DEST as a diffusers-style PyTorch checkpoint.

    MODEL is a folder, a Hub id, or "embedded".
    """
    from snapgen_mlx.convert.to_pytorch import export as run
    from snapgen_mlx.hub import resolve_model

    result = run(resolve_model(model), dest)
    for name, part in result["written"].items():
        click.echo(f"{name}: {part['bytes_on_disk'] / 1e6:.1f} MB")
    for name, layers in result["dequantized"].items():
        click.echo(f"{name}: {layers} quantized layers became floats, and keep their rounding")
    click.echo(f"wrote {dest}")
