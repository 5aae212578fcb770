"""``snapgen-mlx eval``: what a model's widths draw right, or how well they know pictures."""

from pathlib import Path

import click

from .arguments import data_options, encoded, read_pictures
from .judging import headline as tasks
from .judging import row as by_task
from .progress import Bar


def model_and_data(ctx, param, values: tuple[str, ...]) -> tuple[str | None, str | None]:
    """Callback of [MODEL] [DATA]; one alone is DATA when it is a folder that holds no model."""
    if len(values) > 2:
        raise click.UsageError(f"Got unexpected extra argument ({values[-1]})", ctx)
    if len(values) == 1:
        folder = Path(values[0])
        models = ("config.json", "model_index.json")
        is_data = folder.is_dir() and not any((folder / name).is_file() for name in models)
        return (None, values[0]) if is_data else (values[0], None)
    model, data = (*values, None, None)[:2]
    return model, data


@click.command("eval")
@click.argument("paths", nargs=-1, callback=model_and_data, metavar="[MODEL] [DATA]")
@data_options
@click.option(
    "--variants", metavar="A,B", help="Widths to measure, such as tiny,full  [default: all]."
)
@click.option("--steps", type=int, help="Denoising steps (default: the model's).")
@click.option("--guidance", type=float, help="Classifier-free guidance (default: the model's).")
@click.option(
    "--count",
    type=click.IntRange(0),
    help="Pictures drawn at each width, at most  [default: all of the judge's prompts from four "
    "seeds, or 100 of DATA]; with DATA, 0 measures only the loss.",
)
@click.option("--json", "path", type=click.Path(dir_okay=False), help="Write the figures here.")
def eval(paths, caption, skip_bad, variants, steps, guidance, count, path):
    """Measure what MODEL draws right, or how well it knows the pictures in DATA, at each width.

    MODEL is a folder, a Hub id, or nothing for the embedded model; DATA is as for finetune.

    Without DATA the model draws prompts of GenEval's six tasks. The judge, a detector that never
    saw a generated picture, says which share of the pictures is right. Two more lines give the
    shares of combinations that the embedded model's training shows ("seen") and that it never shows
    ("held-out"). See docs/judge.md.

    With DATA the command prints the loss: the error of predicted velocities, always on the same
    noise. For a model that draws on white it also prints recall of known drawings: the share of
    drawn pictures whose nearest picture in DATA, or one of the nearest five, shows the prompted
    concept. metadata.jsonl names the concepts; without names, pictures with the same caption show
    one concept.
    """
    from snapgen_mlx.files import write_json
    from snapgen_mlx.names import check_place

    model, data = paths
    if path:
        check_place(Path(path))
    names = [name.strip() for name in variants.split(",")] if variants else None
    if data is None:
        if caption or skip_bad:
            raise click.UsageError("--caption and --skip-bad belong to DATA, which is not given")
        if count == 0:
            raise click.UsageError("--count 0 leaves nothing to judge")
        result = judged(model, names, steps, guidance, count)
    else:
        count = 100 if count is None else count
        examples = read_pictures(data, caption, skip_bad)
        result = known(model, examples, names, steps, guidance, count)
    if path:
        write_json(path, result)


def judged(model, names, steps, guidance, count) -> dict:
    """Print the judge's table, a line at a time; returns all figures."""
    from snapgen_mlx.scoring import score_model

    bar = Bar("picture")
    result: dict = {}
    for record in score_model(model, names, steps, guidance, count):
        if "real" in record:
            result = record | {"variants": {}}
            click.echo("{prompts} prompts, {pictures} pictures at each width".format(**record))
            click.echo(tasks())
            for title, shares in record["real"].items():
                click.echo(by_task(title, shares))
        elif "drawn" in record:
            bar.label = record["variant"]
            bar.update(record["drawn"], result["pictures"])
        else:
            name = record.pop("variant")
            result["variants"][name] = record
            click.echo(by_task(name, record["all"]))
            for part in ("seen", "held_out"):
                click.echo(by_task(f"  {part.replace('_', '-')}", record[part]))
            for what, title in (("frechet", "Frechet distance"), ("diversity", "diversity")):
                if what in record:
                    both = "{drawn:.4g}, of real scenes {real:.4g}".format(**record[what])
                    click.echo(f"  {title} {both}")
    return result


def known(model, examples, names, steps, guidance, count) -> dict:
    """Print loss and recall, a line at a time; returns all figures."""
    from snapgen_mlx.evaluation import evaluate

    result: dict = {}
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
    return result


def headline(record: dict, count: int) -> str:
    """What is measured, and the first rows of the table."""
    lines = ["pictures {pictures}, concepts {concepts}".format(**record)]
    if record["drawn"]:
        drawn = "at each width {drawn} drawn"
        titles = f"{'':<12}{'loss':>8}{'recall':>12}{'in 5':>12}{'steps':>8}{'guidance':>10}"
        lines += [drawn.format(**record), titles, row("chance", record["chance"])]
    elif count:
        why = "all pictures show one concept"
        if record["concepts"] > 1:
            why = "the model's pictures are transparent; without DATA they are judged"
        lines.append(f"recall is not measured: {why}")
    return "\n".join(lines)


def row(name: str, record: dict) -> str:
    loss = f"{record['loss']:.4f}" if "loss" in record else ""
    shares = "".join(f"{100 * record[k]:>10.1f} %" for k in ("top1", "top5") if k in record)
    drawn = f"{record['steps']:>8}{record['guidance']:>10g}" if "steps" in record else ""
    return f"{name:<12}{loss:>8}{shares}{drawn}"
