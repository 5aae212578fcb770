"""``snapgen-mlx distill``: follow a teacher, or learn to draw in four steps."""

from pathlib import Path

import click
from click.core import ParameterSource

from .arguments import (
    Number,
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

# Options that not every method has.
OF_TEACHER = ("teacher", "offload", "lora", "checkpoint", "explain")
OF_KD = ("validation", "subnets", "teacher_cache")
OF_KDMD = ("variant", "few_step_lora", "loss", "critic_steps", "guidance", "noised_real", "fuse")
OTHERS = {"kd": OF_KDMD, "kdmd": OF_KD}
OTHERS["decoder"] = (*OF_TEACHER, *OF_KD[1:], *OF_KDMD, "force")
DEFAULTS = {"kd": 1e-4, "kdmd": 5e-5, "decoder": 5e-4}  # learning rates


@click.command()
@model_argument
@click.argument("data", type=click.Path())
@output_option
@click.option(
    "--method",
    required=True,
    type=click.Choice(["kd", "kdmd", "decoder"]),
    help="kd: many steps, all widths; kdmd: four steps, one width; decoder: a tiny decoder.",
)
@click.option(
    "--teacher", help="Model folder or Hub id. Its full width is the teacher  [default: MODEL]."
)
@click.option(
    "--offload",
    is_flag=True,
    help="Hold the teacher's weights only while it is asked: less memory, more time.",
)
@click.option(
    "--teacher-cache",
    type=click.Path(file_okay=False),
    help="kd: a folder that keeps the teacher's answers for other runs on the same data.",
)
@data_options
@training_options
@learning_rate_option(help="[default: 1e-4 for kd, 5e-5 for kdmd, 5e-4 for decoder]")
@rank_option("Train LoRAs of this rank  [default: 64 for kdmd; kd trains all weights].")
@warmup_option(0, 20)
@sample_every_option(1)
@validation_option("kd, decoder: held-out pictures.")
@subnets_option("kd: narrower widths trained in a step beside the full one.")
@click.option("--variant", help="kdmd: the width to distil  [default: the widest].")
@click.option(
    "--few-step-lora",
    type=click.Path(exists=True, dir_okay=False),
    help="kdmd: few-step LoRA of the teacher  [default: the one in its folder].",
)
@click.option(
    "--loss",
    type=click.Choice(["kdmd", "dmd", "kd"]),
    default="kdmd",
    show_default=True,
    help="kdmd: train with both losses, only with dmd, or only with kd.",
)
@click.option(
    "--critic-steps",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="kdmd: critic steps for each student step.",
)
@click.option(
    "--guidance",
    type=Number(0),
    default=4.0,
    show_default=True,
    help="kdmd: guidance of the teacher.",
)
@click.option("--noised-real", is_flag=True, help="kdmd: start from DATA's pictures with noise.")
@click.option(
    "--fuse", is_flag=True, help="kdmd: also write a 4-step model of this width to OUTPUT."
)
@explain_option
@force_option
def distill(
    model,
    data,
    output,
    method,
    teacher,
    teacher_cache,
    caption,
    skip_bad,
    minutes,
    batch,
    sample_every,
    seed,
    resume,
    validation,
    variant,
    few_step_lora,
    fuse,
    explain,
    force,
    **given,
):
    """Train MODEL to follow a teacher, on the captions and pictures in DATA.

    MODEL is a folder, a Hub id, or nothing for the embedded model. DATA is as for finetune. For
    kdmd it may also be a text file with one prompt in each line. The teacher is any model with the
    same autoencoder, also Qwen-Image.

    kd trains all widths of MODEL and writes a model to OUTPUT. kdmd trains a LoRA,
    OUTPUT/lora.safetensors, with which one width of MODEL draws in four steps without guidance.
    Copy it to MODEL/few_step/VARIANT.safetensors, and generate uses it. decoder trains a small
    decoder to follow MODEL's autoencoder on the pictures in DATA. Copy OUTPUT/tiny_decoder into
    MODEL, and generate --tiny-decoder uses it.

    OUTPUT/run holds state, log and pictures of the run. Ctrl-C stops it, and the same command goes
    on where it stopped.
    """
    if not explain:
        check_output(output, resume, data, validation)
    prompts_only = Path(data).is_file()
    _check_method(method, data if prompts_only else None, given["noised_real"])
    from snapgen_mlx.device import training_dtype
    from snapgen_mlx.hub import resolve_model
    from snapgen_mlx.loading import load_dit
    from snapgen_mlx.prompts import read_prompts
    from snapgen_mlx.training.distill import KDOptions
    from snapgen_mlx.training.few_steps import distill_few_steps, few_steps_memory
    from snapgen_mlx.training.finetune import finetune
    from snapgen_mlx.training.kdmd import KDMDOptions
    from snapgen_mlx.training.loop import RunOptions
    from snapgen_mlx.training.optimizer import AdamOptions
    from snapgen_mlx.training.teacher import Teacher, load_teacher
    from snapgen_mlx.training.teacher_cache import CachedTeacher
    from snapgen_mlx.training.tiny_decoder_training import DecoderOptions, distill_decoder
    from snapgen_mlx.training.training_memory import TrainingMemory

    echo = speaker()

    kinds: dict[str, type[AdamOptions]] = {
        "kd": KDOptions,
        "kdmd": KDMDOptions,
        "decoder": DecoderOptions,
    }
    fields = kinds[method].__dataclass_fields__
    known = {k: v for k, v in given.items() if k in fields and v is not None}
    options = kinds[method](**{"learning_rate": DEFAULTS[method]} | known)
    run = RunOptions(batch=batch, seed=seed, minutes=minutes, log_every=10, force=force)
    run.sample_every = run.validate_every = sample_every
    run.extend = resume

    def source_and_teacher():
        source = resolve_model(model)
        folder = resolve_model(teacher) if teacher else source
        taught: Teacher = load_teacher(folder, source, few_step_lora, options.offload)
        return source, CachedTeacher(taught, teacher_cache) if teacher_cache else taught

    if explain:
        source, taught = source_and_teacher()
        if isinstance(options, KDOptions):
            memory = TrainingMemory.from_model(source, taught.memory)
        else:
            rank = KDMDOptions.lora if options.lora is None else options.lora
            memory = few_steps_memory(
                source, load_dit(source, variant, training_dtype()), taught, rank
            )
        echo(explanation(memory, options, run))
        return

    def start(stop):
        examples = [] if prompts_only else read_pictures(data, caption, skip_bad, echo)
        held_out = validation and read_pictures(validation, caption, skip_bad, echo)
        if isinstance(options, DecoderOptions):
            source = resolve_model(model)
            return distill_decoder(source, examples, output, run, options, held_out, stop)
        source, taught = source_and_teacher()
        if isinstance(options, KDOptions):
            return finetune(
                source, examples, output, run, options, held_out, stop=stop, teacher=taught
            )
        assert isinstance(options, KDMDOptions)
        texts = read_prompts(data) if prompts_only else examples
        run.text_dropout = 0.0  # without guidance the empty text is never asked for
        return distill_few_steps(source, variant, taught, texts, output, run, options, fuse, stop)

    follow(start, options.steps, run, echo)
    echo(f"wrote {output}")
    if method == "decoder":
        return
    whole = isinstance(options, KDOptions) and not options.lora
    if note := left_out_loras(resolve_model(model), output, not whole):
        echo(note, err=True)


def _check_method(method: str, file: str | None, noised_real: bool) -> None:
    """Refuse options of other methods, and a file of prompts where pictures are needed."""
    context = click.get_current_context()
    for name in OTHERS[method]:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} is not for --method {method}")
    if file and (method != "kdmd" or noised_real):
        what = "--noised-real" if method == "kdmd" else f"--method {method}"
        raise click.UsageError(f"{what} learns from pictures, and {file} is a file; name a folder")
