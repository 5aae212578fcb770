"""``snapgen-mlx generate``: pictures from words."""

import re
import sys
import time
from pathlib import Path

import click

from .arguments import lora_files_option

ENCODED_AT_ONCE = 64  # pictures; a heavy text encoder is loaded once for them


def output_path(pattern: str, prompt: str, seed: int) -> Path:
    """``pattern`` with {prompt} and {seed} filled in; the prompt becomes a short safe name."""
    name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "picture"
    path = Path(pattern.replace("{prompt}", name).replace("{seed}", str(seed)))
    return path if path.suffix.lower() == ".png" else path.with_name(path.name + ".png")


@click.command()
@click.argument("prompts", nargs=-1)
@click.option("-m", "--model", help="Model folder or Hub id (default: the embedded model).")
@click.option("--variant", help="auto, tiny, small or full (default: auto, the widest that fits).")
@click.option("--steps", type=int, help="Denoising steps (default: the model's).")
@click.option("--guidance", type=float, help="Classifier-free guidance (default: the model's).")
@click.option("--negative", help="What the picture should not show; needs guidance above 1.")
@click.option("--width", type=int, help="Pixels, a multiple of 64 (default: the model's).")
@click.option("--height", type=int, help="Pixels, a multiple of 64 (default: the model's).")
@click.option("--seed", "seeds", type=int, multiple=True, help="May be given several times.")
@click.option("--count", type=click.IntRange(1, 10000), help="That many seeds, from --seed on.")
@click.option("--background", help="white, transparent or #rrggbb (default: the model's).")
@click.option("--image", type=click.Path(), help="A picture to start from.")
@click.option("--mask", type=click.Path(), help="White where --image is to be drawn anew.")
@click.option("--outpaint", metavar="N|L,T,R,B", help="Pixels to add around --image.")
@click.option("--strength", type=float, help="How much of --image changes, 0 to 1.")
@click.option("--vary", metavar="SEED:AMOUNT", help="Noise between two seeds, as 8:0.3.")
@click.option("--preview", type=click.Path(), help="Folder for a picture of every step.")
@click.option("--no-metadata", is_flag=True, help="Leave the settings out of the PNGs.")
@click.option("--grid", type=click.Path(), help="Also a sheet of all, prompts by seeds (PNG).")
@click.option("-o", "--output", default="{prompt}-{seed}.png", show_default=True)
@click.option("--from-metadata", "source", type=click.Path(), help="Repeat a PNG made before.")
@lora_files_option("A LoRA of the transformer (safetensors)")
@click.option("--base", is_flag=True, help="With the base's many steps, where few are the default.")
@click.option("--text-encoder", help="Another Gemma 3: a folder or Hub id, quantized or not.")
@click.option("--low-ram", is_flag=True, help="Hold one part of the model at a time; slower.")
@click.option("--explain", is_flag=True, help="Only print the memory that each width would need.")
def generate(
    prompts,
    model,
    variant,
    seeds,
    count,
    output,
    source,
    loras,
    base,
    text_encoder,
    low_ram,
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
    from tqdm import tqdm

    from snapgen_mlx.editing import Edit, parse_margins, read_picture
    from snapgen_mlx.errors import UsageError
    from snapgen_mlx.pipeline import Pipeline
    from snapgen_mlx.png import read_metadata, save_png
    from snapgen_mlx.prompts import expand
    from snapgen_mlx.sheet import save_sheet

    if explain:
        sizes = {k: given[k] for k in ("width", "height", "guidance")}
        click.echo(_explanation(model, text_encoder, variant, base, low_ram, sizes))
        return
    found = {}
    if source:
        found = read_metadata(source)
        needed = {"loras": loras, "text_encoder": text_encoder}
        needed |= {"image": image, "mask": mask, "outpaint": outpaint}
        for option, here in needed.items():
            if found.get(option) and not here:
                names = " ".join(found[option]) if option == "loras" else found[option]
                flag = option.rstrip("s").replace("_", "-")
                raise UsageError(f"{source} was made with --{flag} {names}; give it again")
        prompts, variant = prompts or (found.pop("prompt"),), variant or found.pop("variant")
        seeds = seeds or (found.pop("seed"),)
        base = base or not found.get("few_step")
        given = {k: found.get(k) if v is None else v for k, v in given.items()} | {
            "shift": found["shift"]
        }
    if not prompts or "-" in prompts:
        if not prompts and sys.stdin.isatty():
            raise UsageError('no prompt; try: snapgen-mlx generate "a smiling cat"')
        lines = [line.strip() for line in sys.stdin if line.strip()]
        at = prompts.index("-") if prompts else 0
        prompts = (*prompts[:at], *lines, *prompts[at + 1 :])
        if not prompts:
            raise UsageError("no prompt on standard input")
    if not source:
        prompts = tuple(each for prompt in prompts for each in expand(prompt))
    if image is None and (mask or outpaint or given["strength"] is not None):
        raise UsageError("--mask, --outpaint and --strength need --image")
    files = {"image": image and Path(image).name, "mask": mask and Path(mask).name}
    files = {k: v for k, v in (files | {"outpaint": outpaint}).items() if v}
    edit = None
    if image is not None:
        margins = parse_margins(outpaint) if outpaint else None
        edit = Edit(read_picture(image), mask and read_picture(mask), margins)
    seeds = seeds or (0,)
    if count:
        if len(seeds) > 1:
            raise UsageError("--count goes with one --seed")
        seeds = tuple(range(seeds[0], seeds[0] + count))
    jobs = [
        (prompt, seed, output_path(output, prompt, seed)) for prompt in prompts for seed in seeds
    ]
    if len(jobs) > 1 and not re.search(r"\{prompt\}|\{seed\}", output):
        raise UsageError(f"{len(jobs)} pictures need {{prompt}} or {{seed}} in -o {output}")

    pipe = Pipeline.load(
        model,
        variant,
        text_encoder=text_encoder,
        loras=loras,
        base=base,
        low_ram=low_ram,
        keep_encoders=False,
        **{k: given[k] for k in ("width", "height", "guidance")},
    )
    if not pipe.encoders:
        click.echo("note: this model has no text encoder; the prompt has no effect", err=True)
    differ = [k for k, v in found.get("digests", {}).items() if pipe.digests.get(k) != v]
    if differ:
        raise UsageError(
            f"{source} was drawn with another {' and another '.join(differ)} than is given here; "
            "name its own with -m, --lora or --text-encoder, or give the prompt and --seed instead"
        )
    notes = {prompt: pipe.unknown_words(prompt) for prompt in prompts}

    def settings_of(prompt, seed):
        if edit is None:
            return pipe.settings(prompt, seed=seed, **given)
        return pipe.edit_settings(prompt, edit, seed=seed, **given)

    drawn: dict[str, list] = {}
    wanted = [settings_of(prompt, seed) for prompt, seed, _ in jobs]
    for i, (settings, (_, _, path)) in enumerate(zip(wanted, jobs, strict=True)):
        if i % ENCODED_AT_ONCE == 0:
            pipe.prepare(wanted[i : i + ENCODED_AT_ONCE])
            _say_unknown(notes)
            notes = {}
        started = time.perf_counter()
        steps = pipe.stream(settings, edit)
        total = max(1, settings.steps - settings.skipped_steps)
        with tqdm(total=total, desc=settings.prompt[:40], unit="step") as bar:
            for step in steps:
                seconds = (time.perf_counter() - started) / (step.index + 1)
                bar.set_postfix_str(f"{seconds:.2f} s/step", refresh=False)
                bar.update()
                if preview:
                    name = f"{path.stem}-step-{step.index + 1:02d}.png"
                    shown = pipe.decode(step.x0, settings.background)
                    save_png(shown, Path(preview) / name, None)
        picture = pipe.decode(step.x, settings.background)
        picture = edit.finish(picture) if edit else picture
        if grid:
            drawn.setdefault(settings.prompt, []).append(picture)
        metadata = None if no_metadata else pipe.metadata(settings) | files
        written = save_png(picture, path, metadata)
        click.echo(f"{written}  {time.perf_counter() - started:.1f} s")
    if grid:
        columns = [f"seed {seed}" for seed in seeds]
        click.echo(save_sheet(grid, list(drawn.values()), list(drawn), columns))


def _say_unknown(notes: dict[str, list[str]]) -> None:
    for prompt, words in notes.items():
        if words:
            click.echo(f"note: {prompt!r}: the model does not know: {', '.join(words)}", err=True)


def _explanation(model, text_encoder, variant, base, low_ram, sizes) -> str:
    from snapgen_mlx.hub import resolve_model
    from snapgen_mlx.layout import few_step_lora, load_config
    from snapgen_mlx.loading import load_vae
    from snapgen_mlx.memory import ModelMemory, Request
    from snapgen_mlx.settings import Settings
    from snapgen_mlx.text_loading import load_text_encoders

    from .info import memory_table

    folder = resolve_model(model)
    memory = ModelMemory(folder, load_vae(folder), load_text_encoders(folder, text_encoder))
    name = memory.config.variants[-1] if variant in (None, "auto") else variant
    few_steps = not base and few_step_lora(folder, name) is not None
    s = Settings.from_config(load_config(folder), "any", few_steps, **sizes)
    s.check_size(memory.pixel_multiple)
    request = Request(s.width, s.height, s.guidance != 1, low_ram)
    return memory_table(memory, request, variant)
