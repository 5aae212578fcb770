"""``snapgen-mlx finetune``: train all widths of an elastic model on a folder of pictures."""

import click


@click.command()
@click.argument("model", type=click.Path(file_okay=False))
@click.argument("data", type=click.Path(file_okay=False))
@click.option("-o", "--output", required=True, type=click.Path(file_okay=False), help="New model.")
@click.option("--steps", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Stop after this long.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True)
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=1e-4)
@click.option("--warmup", type=click.IntRange(1), default=100, show_default=True)
@click.option("--validation", type=click.Path(file_okay=False), help="Folder of held-out pictures.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def finetune(model, data, output, steps, minutes, batch, learning_rate, warmup, validation, seed):
    """Train every width of MODEL together on the pictures in DATA.

    DATA holds pictures and a metadata.jsonl with file_name and text. The run's state is kept in
    OUTPUT/run: the same command goes on where it stopped.
    """
    from snapgen_mlx.training.elastic import ElasticOptions
    from snapgen_mlx.training.finetune import finetune as run
    from snapgen_mlx.training.loop import RunOptions

    elastic = ElasticOptions(learning_rate=learning_rate, warmup=warmup, steps=steps)
    options = RunOptions(elastic=elastic, batch=batch, minutes=minutes, seed=seed)
    for record in run(model, data, output, options, validation):
        click.echo("  ".join(f"{k} {v:.4g}" for k, v in record.items()))
