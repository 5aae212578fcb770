"""``snapgen-mlx bench``: how fast this machine draws, and the memory that it takes."""

import click

from .arguments import dtype_option, optional_model

PARTS = ("encode", "step", "decode", "picture", "training")  # of ``snapgen_mlx.bench``


@click.command()
@click.argument("model", nargs=-1, callback=optional_model, metavar="[MODEL]")
@click.option(
    "--geometry",
    type=click.Choice(["full", "small", "tiny", "embedded"]),
    help="Measure random weights of this geometry instead of a model.",
)
@click.option("--variant", "variants", multiple=True, help="Widths (default: all).")
@click.option(
    "--size",
    "sizes",
    type=click.IntRange(64, 2048),
    multiple=True,
    help="Pixels a side (default: the model's own; 512 and 1024 for models of 1024).",
)
@click.option(
    "--bits",
    type=click.Choice(["16", "8", "4"]),
    multiple=True,
    help="Weights of the transformer (default: 16; on a GPU 16, 8 and 4).",
)
@click.option("--only", type=click.Choice(PARTS), multiple=True, help="Parts (default: all).")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--batch", type=click.IntRange(1), default=4, show_default=True, help="Of the training step."
)
@dtype_option
@click.option("--json", "file", type=click.Path(dir_okay=False), help="Also write a file to post.")
def bench(model, geometry, variants, sizes, bits, only, rounds, batch, dtype, file):
    """Measure MODEL: steps, text encoders, decoders, whole pictures and a training step.

    MODEL is a folder, a Hub id, or nothing for the embedded model. Each figure is the median of
    rounds after a warm-up, with the least and the most. GFLOP/s stand beside those of the product
    of two large matrices, measured in the same run. Peaks of memory stand beside those predicted.
    """
    import contextlib
    import tempfile
    from pathlib import Path

    from snapgen_mlx.bench import FORMAT, Bench, Plan, machine
    from snapgen_mlx.convert.init import init
    from snapgen_mlx.device import on_gpu
    from snapgen_mlx.errors import UsageError
    from snapgen_mlx.files import write_json
    from snapgen_mlx.hub import resolve_model
    from snapgen_mlx.layout import load_config, picture_size
    from snapgen_mlx.loading import load_transformer_config
    from snapgen_mlx.names import check_place

    if file:
        check_place(Path(file))
    if model and geometry:
        raise UsageError("give a MODEL or --geometry, not both")
    packed = tuple(int(n) for n in bits) or ((16, 8, 4) if on_gpu() else (16,))
    if min(packed) < 16 and not on_gpu():
        raise UsageError("--bits: on a CPU packed weights are unpacked as they are loaded; use 16")
    with contextlib.ExitStack() as stack:
        if geometry:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / geometry
            click.echo(f"writing random weights of the {geometry} geometry", err=True)
            init(folder, geometry, 0)
        else:
            folder = resolve_model(model)
        own = picture_size(load_config(folder))
        plan = Plan(
            variants or tuple(load_transformer_config(folder).variants),
            sizes or ((512, 1024) if own == 1024 else (own,)),
            packed,
            rounds,
            only or PARTS,
            batch,
        )
        measured = Bench(folder, plan, dtype)
        about = machine(measured.dtype)
        for key, value in about.items():
            click.echo(f"{key:<16}{value}")
        click.echo("\n" + HEAD)
        rows = []
        for row in measured.rows():
            rows.append(row)
            click.echo(line(row))
        click.echo(f"\nproducts of large matrices: {measured.rate:.0f} GFLOP/s")
    if file:
        name = f"random, {geometry}" if geometry else model or "embedded"
        document = {"machine": about, "model": name, "matmul_gflops": measured.rate, "rows": rows}
        write_json(file, FORMAT | document)
        click.echo(f"wrote {file}")


HEAD = (
    f"{'what':<22}{'variant':<17}{'size':>5}{'bits':>5}  {'seconds (least to most)':<28}"
    f"{'GFLOP/s':>9}{'of rate':>9}{'predicted':>11}{'measured':>10}"
)


def line(row: dict) -> str:
    """One row of the table."""
    from snapgen_mlx.errors import format_bytes

    bits = row.get("bits", "")
    start = f"{row['what']:<22}{row['variant']:<17}{row['size']:>5}{bits:>5}"
    if "skipped" in row:
        return f"{start}  skipped: {row['skipped']}"
    s = row["seconds"]
    times = f"{s['median']:.3g} ({s['least']:.3g} to {s['most']:.3g})"
    rate = f"{row['gflops']:.0f}" if "gflops" in row else ""
    share = f"{100 * row['share']:.0f} %" if "share" in row else ""
    memory = row.get("memory", {})
    sizes = [format_bytes(memory[k]) if memory else "" for k in ("predicted", "measured")]
    return f"{start}  {times:<28}{rate:>9}{share:>9}{sizes[0]:>11}{sizes[1]:>10}".rstrip()
