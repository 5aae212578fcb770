"""``snapgen-mlx info``: what a model folder holds, from its headers."""

import json

import click


@click.command()
@click.argument("model", required=False)
@click.option("--words", is_flag=True, help="Only list what the model draws, one thing a line.")
@click.option("--json", "as_json", is_flag=True, help="The same for programs, as JSON.")
def info(model, words, as_json):
    """Print what MODEL holds and the memory it needs; no weight is read.

    MODEL is a folder, a Hub id, or nothing for the embedded model.
    """
    from snapgen_mlx.description import describe
    from snapgen_mlx.errors import UsageError
    from snapgen_mlx.hub import resolve_model
    from snapgen_mlx.vocabulary import known_words

    folder = resolve_model(model)
    known = known_words(folder)
    if words and not known:
        raise UsageError(f"{folder} has no list of what it draws, words.json")
    if words:
        click.echo(json.dumps(known) if as_json else "\n".join(known))
        return
    described = describe(folder)
    if as_json:
        click.echo(json.dumps(described | {"words": known}, indent=2))
        return
    for label, text in _rows(described, len(known)):
        click.echo(f"{label:<16}{text}")
    click.echo("\n" + _own_memory_table(folder))


def _rows(described: dict, words: int) -> list[tuple[str, str]]:
    """What there is, as (label, text)."""
    from snapgen_mlx.errors import format_bytes

    sampling = "{steps} steps, guidance {guidance:g}, shift {shift:g}, {width}x{height}"
    few, source = described["few_steps"], described["source"]
    few_steps = "no LoRA for them"
    if few["variants"]:
        how = "{steps} steps, guidance {guidance:g}, shift {shift:g}".format(**few)
        few_steps = f"{how} by a LoRA of {', '.join(few['variants'])}; generate --base is without"
    made_from = "not recorded"
    if source:
        revision = source["revision"]
        made_from = source["name"] + (f" at revision {revision}" if revision else "")
    stored = {
        name: f"{part['parameters'] / 1e6:.1f} M parameters, {part['bits_per_weight']:.3g} bits "
        f"per weight, {format_bytes(part['bytes'])}"
        for name, part in described["parts"].items()
    }
    rows = [
        ("model", f"{described['folder']}, {format_bytes(described['bytes'])} on disk"),
        ("source", made_from),
        ("sampling", sampling.format(**described["sampling"])),
        ("few steps", few_steps),
        ("text read", ", ".join(f"{k} ({n})" for k, n in described["text_dims"].items())),
    ]
    rows += [(name, f"{described['parts'][name]['kind']}, {text}") for name, text in stored.items()]
    if not any(name.startswith("text_encoder") for name in stored):
        rows.append(("text_encoder", "none: pictures do not depend on the prompt"))
    if words:
        rows.append(("draws", f"{words} things; info --words lists them"))
    return rows


def _own_memory_table(folder) -> str:
    from snapgen_mlx.layout import load_config
    from snapgen_mlx.loading import load_vae
    from snapgen_mlx.memory import ModelMemory, Request
    from snapgen_mlx.settings import Settings
    from snapgen_mlx.text_loading import load_text_encoders

    s = Settings.from_config(load_config(folder), "any")
    memory = ModelMemory(folder, load_vae(folder), load_text_encoders(folder))
    return memory_table(memory, Request(s.width, s.height, s.guidance != 1))


def memory_table(memory, request, variant: str | None = None) -> str:
    """Predicted peaks of every width in each phase, and which one would be taken."""
    from snapgen_mlx.device import usable_memory
    from snapgen_mlx.errors import UsageError, format_bytes

    guided = ", guided" if request.guided else ""
    low_ram = ", --low-ram" if request.low_ram else ""
    phases = {"encoding": "encode", "denoising": "denoise", "decoding": "decode"}
    if request.editing:
        phases = {"the picture": "read", **phases}
    titles = ["parameters", "weights", *phases]
    lines = [
        f"predicted peak of memory at {request.width}x{request.height}{guided}{low_ram}; "
        f"{format_bytes(usable_memory())} can be used here",
        f"{'variant':<12}" + "".join(f"{title:>12}" for title in titles),
    ]
    for name in memory.config.variants:
        predicted = memory.predict(name, request)
        sizes = [memory.weights(name), *(getattr(predicted, phase) for phase in phases.values())]
        cells = [f"{memory.parameters(name) / 1e6:.1f} M", *map(format_bytes, sizes)]
        fits = "" if memory.fits(name, request) else "  does not fit"
        lines.append(f"{name:<12}" + "".join(f"{cell:>12}" for cell in cells) + fits)
    try:
        if variant in (None, "auto"):
            lines.append(f"--variant auto takes {memory.choose(request)}")
        else:
            memory.check(variant, request)
            lines.append(f"{variant} fits")
    except UsageError as e:
        if variant not in (None, "auto", *memory.config.variants):
            raise
        lines.append(str(e))
    return "\n".join(lines)
