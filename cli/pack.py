"""``snapgen-mlx pack``: a set of stickers in the sizes and formats that chats take."""

import click

from .arguments import Seed, dtype_option
from .progress import Bar


@click.command()
@click.argument("prompts", nargs=-1, required=True)
@click.option(
    "--styles",
    multiple=True,
    help="Styles to draw each prompt in, such as 3d,flat; may be given several times.",
)
@click.option("-m", "--model", help="Model folder or Hub id (default: the embedded model).")
@click.option("--variant", help="auto, tiny, small or full (default: auto, the widest that fits).")
@click.option("--seed", type=Seed(), default=0, show_default=True)
@click.option("--count", default=1, show_default=True, type=click.IntRange(1, 1000))
@dtype_option
@click.option("-o", "--output", required=True, type=click.Path(), help="A new folder.")
def pack(prompts, styles, model, variant, seed, count, dtype, output):
    """Draw PROMPTS with {choices} as a pack: stickers, emoji, icons, a sheet and a manifest."""
    from pathlib import Path

    from snapgen_mlx.files import atomic_folder
    from snapgen_mlx.names import file_words
    from snapgen_mlx.packs import Sticker, write_pack
    from snapgen_mlx.pipeline import Pipeline
    from snapgen_mlx.prompts import expand
    from snapgen_mlx.sampling import last_step

    styles = [style.strip() for value in styles for style in value.split(",")] or [""]
    texts = [text for prompt in prompts for text in expand(prompt)]
    texts = list(dict.fromkeys(f"{text}, {s}" if s else text for text in texts for s in styles))
    with atomic_folder(output) as folder:
        pipe = Pipeline.load(model, variant, keep_encoders=False, dtype=dtype)
        wanted = [pipe.settings(text, seed=s) for text in texts for s in range(seed, seed + count)]
        pipe.prepare(wanted)

        bar = Bar("picture")
        for line in dict.fromkeys(line for settings in wanted for line in pipe.notes(settings)):
            click.echo(f"note: {line}", err=True)

        def stickers():
            names = set()
            for i, settings in enumerate(wanted):
                stem = f"{file_words(settings.prompt)}-{settings.seed}"
                name, n = stem, 1
                while name in names:
                    n += 1
                    name = f"{stem}-{n}"
                names.add(name)
                image = pipe.decode(last_step(pipe.stream(settings)).x)
                yield Sticker(name, image, pipe.metadata(settings))
                bar.update(i + 1, len(wanted))

        entries = write_pack(folder, Path(output).name, stickers())
    click.echo(f"{output}  {len(entries)} stickers, sheet.png, manifest.json")
