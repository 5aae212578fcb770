"""``snapgen-mlx generate``: pictures from words."""

import re
import sys
import time
from pathlib import Path

import click


def output_path(pattern: str, prompt: str, seed: int) -> Path:
    """``pattern`` with {prompt} and {seed} filled in; the prompt becomes a short safe name."""
    name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "picture"
    path = Path(pattern.replace("{prompt}", name).replace("{seed}", str(seed)))
    return path if path.suffix.lower() == ".png" else path.with_name(path.name + ".png")


@click.command()
@click.argument("prompts", nargs=-1)
@click.option("-m", "--model", help="Model folder or Hub id (default: the embedded model).")
@click.option("--variant", help="Width of the model: tiny, small or full (default: the widest).")
@click.option("--steps", type=int, help="Denoising steps (default: the model's).")
@click.option("--guidance", type=float, help="Classifier-free guidance (default: the model's).")
@click.option("--negative", help="What the picture should not show; needs guidance above 1.")
@click.option("--width", type=int, help="Pixels, a multiple of 64 (default: the model's).")
@click.option("--height", type=int, help="Pixels, a multiple of 64 (default: the model's).")
@click.option("--seed", "seeds", type=int, multiple=True, help="May be given several times.")
@click.option("--count", type=click.IntRange(1, 10000), help="That many seeds, from --seed on.")
@click.option("-o", "--output", default="{prompt}-{seed}.png", show_default=True)
@click.option("--from-metadata", "source", type=click.Path(), help="Repeat a PNG made before.")
def generate(prompts, model, variant, seeds, count, output, source, **given):
    """Make a picture of each of PROMPTS with each seed.

    Without PROMPTS, or for a prompt "-", prompts are read from standard input, one a line.
    """
    from tqdm import tqdm

    from snapgen_mlx.errors import UsageError
    from snapgen_mlx.pipeline import Pipeline, read_metadata, save_png

    if source:
        found = read_metadata(source)
        prompts, variant = prompts or (found.pop("prompt"),), variant or found.pop("variant")
        seeds = seeds or (found.pop("seed"),)
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
    seeds = seeds or (0,)
    if count:
        if len(seeds) > 1:
            raise UsageError("--count goes with one --seed")
        seeds = tuple(range(seeds[0], seeds[0] + count))
    jobs = [
        (prompt, seed, output_path(output, prompt, seed)) for prompt in prompts for seed in seeds
    ]
    if len({path for *_, path in jobs}) < len(jobs):
        raise UsageError(f"{len(jobs)} pictures need {{prompt}} or {{seed}} in -o {output}")

    pipe = Pipeline.load(model, variant)
    jobs = [(pipe.settings(prompt, seed=seed, **given), path) for prompt, seed, path in jobs]
    for settings, path in jobs:
        started = time.perf_counter()
        steps = pipe.stream(settings)
        with tqdm(total=settings.steps, desc=settings.prompt[:40], unit="step") as bar:
            for step in steps:
                seconds = (time.perf_counter() - started) / (step.index + 1)
                bar.set_postfix_str(f"{seconds:.2f} s/step", refresh=False)
                bar.update()
        written = save_png(pipe.decode(step.x), path, pipe.metadata(settings))
        click.echo(f"{written}  {time.perf_counter() - started:.1f} s")
