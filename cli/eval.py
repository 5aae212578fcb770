"""``snapgen-mlx eval``: validation loss and alignment of a model's widths."""

import json

import click

from .arguments import data_options, encoded, model_argument, read_pictures


@click.command("eval")
@model_argument
@click.argument("data", type=click.Path(file_okay=False))
@data_options
@click.option(
    "--variants", metavar="A,B", help="Widths to measure, such as tiny,full  [default: all]."
)
@click.option("--steps", type=int, help="Denoising steps (default: the model's).")
@click.option("--guidance", type=float, help="Classifier-free guidance (default: the model's).")
@click.option(
    "--count",
    type=click.IntRange(0),
    default=100,
    show_default=True,
    help="Pictures drawn at each width, at most; 0 measures only the loss.",
)
@click.option("--json", "path", type=click.Path(dir_okay=False), help="Write the figures here.")
def eval(model, data, caption, skip_bad, variants, steps, guidance, count, path):
    """Measure how well MODEL knows the pictures in DATA, at each of its widths.

    MODEL is a folder, a Hub id, or nothing for the embedded model; DATA is as for finetune.

    Loss: how far predicted velocities are off, on noise that is always the same. Nearest: the
    share of drawn pictures whose nearest one in DATA shows the concept they were asked for, first
    and among the first five. Concepts are named in metadata.jsonl; else pictures with the same
    caption are one.
    """
    from snapgen_mlx.evaluation import evaluate
    from snapgen_mlx.files import atomic_write

    names = [name.strip() for name in variants.split(",")] if variants else None
    examples = read_pictures(data, caption, skip_bad)
    for record in evaluate(model, examples, names, steps, guidance, count):
        if "encoded" in record:
            click.echo(encoded(record), err=True)
        elif "concepts" in record:
            result = record | {"variants": {}}
            click.echo(headline(record, count))
        else:
            name = record.pop("variant")
            result["variants"][name] = record
            click.echo(row(name, record))
    if path:
        with atomic_write(path) as tmp:
            tmp.write_text(json.dumps(result, indent=2) + "\n")


def headline(record: dict, count: int) -> str:
    """What is measured, and the first rows of the table."""
    lines = ["pictures {pictures}, concepts {concepts}".format(**record)]
    if record["drawn"]:
        drawn = "at each width {drawn} drawn"
        titles = f"{'':<12}{'loss':>8}{'nearest':>12}{'in 5':>12}{'steps':>8}{'guidance':>10}"
        lines += [drawn.format(**record), titles, row("chance", record["chance"])]
    elif count:
        lines.append("all pictures show one concept, so alignment is not measured")
    return "\n".join(lines)


def row(name: str, record: dict) -> str:
    loss = f"{record['loss']:.4f}" if "loss" in record else ""
    shares = "".join(f"{100 * record[k]:>10.1f} %" for k in ("top1", "top5") if k in record)
    drawn = f"{record['steps']:>8}{record['guidance']:>10g}" if "steps" in record else ""
    return f"{name:<12}{loss:>8}{shares}{drawn}"
