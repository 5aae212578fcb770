"""``snapgen-mlx generate``: pictures from words."""

import sys

import click

from .arguments import Seconds, Seed, dtype_option, force_option, lora_files_option
from .replay import Replay


@click.command()
@click.argument("prompts", nargs=-1)
@click.option("-m", "--model", help="Model folder or Hub id (default: embedded).")
@click.option(
    "--variant",
    "variants",
    multiple=True,
    help="auto, tiny, small or full; may be given several times (default: auto, the widest that "
    "fits).",
)
@click.option("--steps", type=int, help="Denoising steps (default: the model's).")
@click.option("--guidance", type=float, help="Classifier-free guidance (default: the model's).")
@click.option("--negative", help="What the picture should not show; needs guidance other than 1.")
@click.option("--width", type=int, help="Pixels, a multiple of 64 (default: the model's).")
@click.option("--height", type=int, help="Pixels, a multiple of 64 (default: the model's).")
@click.option(
    "--seed",
    "seeds",
    type=Seed(),
    multiple=True,
    help="May be given several times (default: 0, so that the same words give the same picture).",
)
@click.option(
    "--count", type=click.IntRange(1, 10000), help="Number of seeds, counted up from --seed."
)
@click.option("--background", help="white, transparent or #rrggbb (default: the model's).")
@click.option("--image", type=click.Path(), help="A picture to start from.")
@click.option(
    "--mask", type=click.Path(), help="Picture in the size of --image; white parts are drawn again."
)
@click.option("--outpaint", metavar="N|L,T,R,B", help="Pixels to add around --image.")
@click.option("--strength", type=float, help="How much of --image changes, from 0 to 1.")
@click.option(
    "--vary", metavar="SEED:AMOUNT", help="Move towards the noise of another seed, such as 8:0.3."
)
@click.option("--preview", type=click.Path(), help="Write a picture of every step to this folder.")
@click.option("--no-metadata", is_flag=True, help="Do not write the settings into the pictures.")
@click.option(
    "--grid",
    type=click.Path(),
    help="Also write one sheet of all pictures: prompts by seeds and widths.",
)
@click.option(
    "-o",
    "--output",
    help="A .png, .jpg or .webp with {prompt}, {seed} or {variant}, a folder, or - for standard "
    "output (default: {prompt}-{seed}.png).",
)
@click.option(
    "--from-metadata",
    "source",
    type=click.Path(),
    help="Draw a picture again from the settings in its file.",
)
@lora_files_option("A LoRA of the transformer (safetensors)")
@click.option(
    "--base",
    is_flag=True,
    help="Draw with the base model and its many steps, without the few-step LoRA.",
)
@click.option(
    "--tiny-decoder", is_flag=True, help="Decode with the model's tiny decoder: faster, less exact."
)
@click.option("--text-encoder", help="Folder or Hub id of another Gemma 3, quantized or not.")
@dtype_option
@click.option(
    "--within",
    type=Seconds(0, min_open=True),
    metavar="SECONDS",
    help="Measure the widths, and choose widths and steps that draw in this time, such as 0.5s.",
)
@force_option
@click.option(
    "--low-ram", is_flag=True, help="Keep only one part of the model in memory at a time; slower."
)
@click.option("-q", "--quiet", is_flag=True, help="Print only notes and errors.")
@click.option(
    "--explain", is_flag=True, help="Print the memory that each width needs, and draw nothing."
)
def generate(
    prompts,
    model,
    variants,
    seeds,
    count,
    output,
    source,
    loras,
    base,
    tiny_decoder,
    text_encoder,
    dtype,
    within,
    force,
    low_ram,
    quiet,
    explain,
    image,
    mask,
    outpaint,
    preview,
    grid,
    no_metadata,
    **given,
):
    """Make a picture of each of PROMPTS with each seed.

    Without PROMPTS, or for a prompt "-", prompts are read from standard input, one a line. A
    prompt with choices in braces, "a {happy,sad} cat", stands for one of each.
    """
    from snapgen_mlx.device import DTYPES
    from snapgen_mlx.errors import UsageError
    from snapgen_mlx.pipeline import Pipeline
    from snapgen_mlx.prompts import expand
    from snapgen_mlx.within import variant_within

    from .drawing import Drawing, Place, given_edit, plan

    if explain:
        sizes = {k: given[k] for k in ("width", "height", "guidance")}
        variant = variants[0] if variants else None
        how = {"low_ram": low_ram, "editing": image is not None}
        parts = (model, text_encoder, variant, base, tiny_decoder, dtype)
        click.echo(_explanation(*parts, sizes=sizes, **how))
        return
    if within and (variants or source):
        raise UsageError("--within chooses the widths; leave out --variant and --from-metadata")
    replay = Replay(source) if source else None
    if replay:
        used = {"loras": loras, "text_encoder": text_encoder}
        replay.check_given(used | {"image": image, "mask": mask, "outpaint": outpaint})
        prompts = prompts or (replay.found["prompt"],)
        variants = variants or (replay.found["variant"],)
        seeds = seeds or (replay.found["seed"],)
        asked_base, base = base, base or not replay.found.get("few_step")
        tiny_decoder = tiny_decoder or replay.found.get("tiny_decoder", False)
        dtype = dtype or DTYPES.get(replay.found.get("dtype", ""))
        given = replay.complete(given)
    if not prompts or "-" in prompts:
        prompts = _with_standard_input(prompts)
    prompts = [prompt.removeprefix("\ufeff") for prompt in prompts]
    if not replay:
        prompts = [each for prompt in prompts for each in expand(prompt)]
    if image is None and (mask or outpaint or given["strength"] is not None):
        raise UsageError("--mask, --outpaint and --strength need --image")
    edit, files = given_edit(image, mask, outpaint)
    seeds = seeds or (0,)
    if count:
        if len(seeds) > 1:
            raise UsageError("--count goes with one --seed")
        seeds = tuple(range(seeds[0], seeds[0] + count))
    number = len(prompts) * len(seeds) * max(1, len(variants))
    place = Place(output, number, len(variants) > 1, given["background"])

    pipe = Pipeline.load(
        model,
        variants[0] if variants else None,
        text_encoder=text_encoder,
        loras=loras,
        base=base,
        tiny_decoder=tiny_decoder,
        low_ram=low_ram,
        keep_encoders=False,
        dtype=dtype,
        editing=edit is not None,
        force=force,
        **{k: given[k] for k in ("width", "height", "guidance")},
    )
    if within:
        settings = pipe.settings(prompts[0], **given)
        variant, measured = variant_within(pipe, settings, within)
        variants, given["steps"] = (variant,), None
        if not quiet:
            click.echo(measured, err=True)
    jobs = plan(pipe, variants or (pipe.variant,), prompts, seeds, edit, given)
    drawing = Drawing(pipe, jobs, place, edit, files, preview, grid, not no_metadata, quiet)
    if replay:
        for line in replay.check(drawing.metadata(jobs[0]), asked_base):
            click.echo(f"note: {line}", err=True)
    drawing.run()


def _with_standard_input(prompts) -> tuple[str, ...]:
    """The prompts with the lines of standard input in the place of "-"."""
    from snapgen_mlx.errors import UsageError
    from snapgen_mlx.prompts import prompt_lines

    if not prompts and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError('no prompt; try: snapgen-mlx generate "a smiling cat"')
    data = b"" if sys.stdin is None else sys.stdin.buffer.read()
    lines = prompt_lines(data, "standard input")
    at = prompts.index("-") if prompts else 0
    return (*prompts[:at], *lines, *prompts[at + 1 :])


def _explanation(
    model, text_encoder, variant, base, tiny_decoder, dtype, *, low_ram, editing, sizes
) -> str:
    from snapgen_mlx.hub import resolve_model
    from snapgen_mlx.layout import few_step_lora, load_config
    from snapgen_mlx.loading import load_tiny_decoder, load_vae
    from snapgen_mlx.memory import ModelMemory, Request
    from snapgen_mlx.settings import Settings
    from snapgen_mlx.text_loading import load_text_encoders
    from snapgen_mlx.widths import parse_widths

    from .info import memory_table

    folder = resolve_model(model)
    encoders = load_text_encoders(folder, text_encoder, dtype)
    tiny = load_tiny_decoder(folder, dtype) if tiny_decoder else None
    memory = ModelMemory(folder, load_vae(folder, dtype), encoders, dtype, tiny)
    name = memory.config.variants[-1] if variant in (None, "auto") else variant
    widths = parse_widths(name, memory.config.variants)
    few_steps = not base and all(few_step_lora(folder, width) for width, _ in widths)
    s = Settings.from_config(load_config(folder), "any", few_steps, **sizes)
    s.check_size(memory.pixel_multiple)
    request = Request(s.width, s.height, s.guidance != 1, low_ram, editing=editing)
    return memory_table(memory, request, variant)
