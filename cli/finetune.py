"""``snapgen-mlx finetune``: train all widths of an elastic model on a folder of pictures."""

import click

from .arguments import (
    check_output,
    data_options,
    explain_option,
    force_option,
    learning_rate_option,
    left_out_loras,
    model_argument,
    output_option,
    rank_option,
    read_pictures,
    sample_every_option,
    speaker,
    subnets_option,
    training_options,
    validation_option,
    warmup_option,
)
from .training_run import explanation, follow


@click.command()
@model_argument
@click.argument("data", type=click.Path(file_okay=False))
@output_option
@rank_option("Train a LoRA of this rank instead of all weights.")
@data_options
@training_options
@click.option(
    "--repeats",
    type=click.IntRange(1, 9999),
    default=1,
    show_default=True,
    help="Use each picture of DATA this many times as often as one of --prior.",
)
@click.option(
    "--from-lora",
    type=click.Path(exists=True),
    help="Go on from this LoRA; without --lora it keeps its rank.",
)
@validation_option("Folder of held-out pictures.")
@click.option("--flip", is_flag=True, help="Mirror pictures at random.")
@click.option(
    "--prior",
    type=click.Path(exists=True, dir_okay=False),
    help="File of prompts, one in each line. MODEL also learns from its own pictures of them, "
    "so that it forgets less.",
)
@learning_rate_option(default=1e-4, show_default=True)
@subnets_option("Narrower widths trained in a step beside the full one.")
@click.option(
    "--adaptive/--no-adaptive",
    default=True,
    show_default=True,
    help="Scale the narrower widths' gradients to the norm of the full width's.",
)
@warmup_option(1, 100)
@sample_every_option(0, "; 0 for none")
@explain_option
@force_option
def finetune(
    model,
    data,
    output,
    caption,
    skip_bad,
    repeats,
    from_lora,
    validation,
    flip,
    prior,
    minutes,
    batch,
    sample_every,
    resume,
    explain,
    force,
    seed,
    **given,
):
    """Train every width of MODEL together on the pictures in DATA.

    MODEL is a folder, a Hub id, or nothing for the embedded model.
    DATA is a folder of pictures. Their captions stand in metadata.jsonl or metadata.csv, with
    file_name and text, or in a .txt file beside each picture. The result is a model in OUTPUT. With
    --lora it is OUTPUT/lora.safetensors for generate --lora; then MODEL may be quantized.

    OUTPUT/run holds the state of the run. Ctrl-C stops the run, and the same command goes on where
    it stopped. The folder also holds the losses (log.jsonl, loss.png) and samples: pictures by
    every width, at the end beside those from before the training.
    """
    if not explain:
        check_output(output, resume, data, validation)
    from snapgen_mlx.hub import resolve_model
    from snapgen_mlx.prompts import read_prompts
    from snapgen_mlx.training.elastic_trainer import ElasticOptions
    from snapgen_mlx.training.finetune import finetune as run
    from snapgen_mlx.training.loop import RunOptions
    from snapgen_mlx.training.lora_training import read_lora
    from snapgen_mlx.training.report import can_plot
    from snapgen_mlx.training.training_memory import TrainingMemory

    echo = speaker()
    elastic = ElasticOptions(**given)
    options = RunOptions(
        batch=batch,
        seed=seed,
        minutes=minutes,
        log_every=10,
        sample_every=sample_every,
        force=force,
    )
    options.extend = resume
    if repeats > 1 and not prior:
        echo("--repeats changes nothing without --prior: all pictures are drawn as often", err=True)
    if explain:
        if from_lora:
            elastic.lora = read_lora(from_lora, resolve_model(model), elastic.lora)[0]
        echo(explanation(TrainingMemory.from_model(resolve_model(model)), elastic, options))
        return
    if not can_plot():
        echo("no loss.png without matplotlib: pip install 'snapgen-mlx[train]'", err=True)

    def start(stop):
        examples = read_pictures(data, caption, skip_bad, echo)
        for example in examples:
            example.repeats *= repeats
        held_out = read_pictures(validation, caption, skip_bad, echo) if validation else None
        prompts = read_prompts(prior) if prior else None
        source = resolve_model(model)
        return run(
            source,
            examples,
            output,
            options,
            elastic,
            held_out,
            flip,
            prompts,
            stop,
            from_lora=from_lora,
        )

    follow(start, elastic.steps, options, echo)
    echo(f"wrote {output}")
    if note := left_out_loras(resolve_model(model), output, bool(elastic.lora or from_lora)):
        echo(note, err=True)
