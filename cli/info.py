"""``snapgen-mlx info``: what a model folder holds, from its headers."""

from math import prod
from pathlib import Path

import click


@click.command()
@click.argument("model", required=False)
def info(model):
    """Print what MODEL holds and the memory it needs; no weight is read.

    MODEL is a folder, a Hub id, or nothing for the embedded model.
    """
    from snapgen_mlx.errors import format_bytes
    from snapgen_mlx.files import folder_bytes
    from snapgen_mlx.hub import resolve_model
    from snapgen_mlx.layout import load_config
    from snapgen_mlx.loading import load_vae
    from snapgen_mlx.memory import ModelMemory, Request
    from snapgen_mlx.settings import Settings
    from snapgen_mlx.text_loading import load_text_encoders

    folder = resolve_model(model)
    config = load_config(folder)
    s = Settings.from_config(config, "any")
    vae, encoders = load_vae(folder), load_text_encoders(folder)
    memory = ModelMemory(folder, vae, encoders)
    rows = [
        ("model", f"{folder}, {format_bytes(folder_bytes(folder))} on disk"),
        ("source", _source(config.get("source"))),
        (
            "sampling",
            f"{s.steps} steps, guidance {s.guidance:g}, shift {s.shift:g}, {s.width}x{s.height}",
        ),
        ("few steps", _few_steps(folder, memory.config.variants)),
        ("transformer", _stored(folder / "transformer")),
        ("text read", ", ".join(f"{k} ({n})" for k, n in memory.config.text_dims.items())),
        ("vae", f"{type(vae).__name__}, {_stored(folder / 'vae')}"),
    ]
    for name in ("text_encoder", "text_encoder_2"):
        if (folder / name).is_dir():
            kind = load_config(folder / name).get("model_type")
            rows.append((name, f"{kind}, {_stored(folder / name)}"))
    if not encoders:
        rows.append(("text_encoder", "none: pictures do not depend on the prompt"))
    for label, text in rows:
        click.echo(f"{label:<16}{text}")
    request = Request(s.width, s.height, s.guidance != 1)
    click.echo("\n" + memory_table(memory, request))


def _few_steps(folder: Path, variants: list[str]) -> str:
    from snapgen_mlx.layout import few_step_lora
    from snapgen_mlx.sampling import FEW_STEPS

    names = [name for name in variants if few_step_lora(folder, name)]
    if not names:
        return "no LoRA for them"
    how = "{steps} steps, guidance {guidance:g}, shift {shift:g}".format(**FEW_STEPS)
    return f"{how} by a LoRA of {', '.join(names)}; generate --base is without"


def memory_table(memory, request, variant: str | None = None) -> str:
    """Predicted peaks of every width in each phase, and which one would be taken."""
    from snapgen_mlx.device import usable_memory
    from snapgen_mlx.errors import UsageError, format_bytes

    guided = ", guided" if request.guided else ""
    low_ram = ", --low-ram" if request.low_ram else ""
    lines = [
        f"predicted peak of memory at {request.width}x{request.height}{guided}{low_ram}; "
        f"{format_bytes(usable_memory())} can be used here",
        f"{'variant':<12}{'parameters':>12}{'weights':>10}{'encoding':>10}{'denoising':>11}"
        f"{'decoding':>10}",
    ]
    for name in memory.config.variants:
        p = memory.predict(name, request)
        sizes = [format_bytes(n) for n in (memory.weights(name), p.encode, p.denoise, p.decode)]
        parameters = f"{memory.parameters(name) / 1e6:.1f} M"
        weights, encode, denoise, decode = sizes
        fits = "" if memory.fits(name, request) else "  does not fit"
        lines.append(
            f"{name:<12}{parameters:>12}{weights:>10}{encode:>10}{denoise:>11}{decode:>10}{fits}"
        )
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


def _source(source) -> str:
    if not isinstance(source, dict):
        return "not recorded"
    name = source.get("name") or source.get("source") or "not recorded"
    revision = source.get("revision")
    return f"{name} at revision {revision}" if revision else str(name)


def _stored(folder: Path) -> str:
    """ "12.3 M parameters, 8.5 bits per weight, 13 MB" """
    from snapgen_mlx.errors import SnapGenError, format_bytes
    from snapgen_mlx.layout import load_config
    from snapgen_mlx.tensors.palette import float_shape
    from snapgen_mlx.tensors.weights import load_infos

    infos = load_infos(folder)
    quantization = load_config(folder).get("quantization") or {}
    count = 0
    for key, i in infos.items():
        layer, _, part = key.rpartition(".")
        scales, palette = infos.get(f"{layer}.scales"), infos.get(f"{key}.palette")
        try:
            if palette:
                count += prod(float_shape(i.shape, palette.shape))
            elif scales and part == "weight":
                count += prod(scales.shape) * quantization.get(layer, quantization)["group_size"]
            elif part == "bias" or not (scales or part == "palette"):
                count += prod(i.shape)
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise SnapGenError(f"{folder} does not say how {layer} is quantized") from e
    size = sum(i.nbytes for i in infos.values())
    bits = 8 * size / max(count, 1)
    return f"{count / 1e6:.1f} M parameters, {bits:.3g} bits per weight, {format_bytes(size)}"
