"""``snapgen-mlx quantize``: a model in few bits, with more for sensitive layers."""

import math
import re
import signal

import click
from click.core import ParameterSource

from .progress import Bar
from .training_run import Stop, awake


def size_option(ctx, param, value: str | None) -> int | None:
    """900MB -> 900000000."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMG]?)B?", value, re.IGNORECASE)
    if not match:
        raise click.BadParameter(f"{value!r} is no size; write it like 900MB or 1.5GB", ctx, param)
    return int(float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}[match[2].upper()])


@click.command()
@click.argument("model")
@click.argument("dest", type=click.Path())
@click.option(
    "--bits",
    type=float,
    help="Average of the codes of the transformer's Linear layers, without scales [default: 4.3].",
)
@click.option(
    "--size", callback=size_option, metavar="900MB", help="Largest size of the whole model."
)
@click.option(
    "--psnr",
    type=float,
    metavar="DB",
    help="Target PSNR of the final latents, in dB (approximate).",
)
@click.option(
    "--recipe", type=click.Path(dir_okay=False), help="Use the recipe.json of an earlier run."
)
@click.option(
    "--method",
    type=click.Choice(["density", "mse"]),
    default="density",
    show_default=True,
    help="How the command chooses the bits of each layer.",
)
@click.option(
    "--backend",
    type=click.Choice(["affine", "palette"]),
    default="affine",
    show_default=True,
    help="affine: packed weights of MLX; palette: smaller files, but no less memory.",
)
@click.option(
    "--prompts",
    type=click.Path(dir_okay=False),
    help="File of prompts, one in each line; give hundreds. Some choose the bits, some score, and "
    "the others tune.",
)
@click.option(
    "--sensitivity",
    type=click.Path(dir_okay=False),
    help="File of the measurement [default: DEST.sensitivity.json].",
)
@click.option(
    "--tune",
    type=click.IntRange(1),
    metavar="STEPS",
    help="Train the float weights this many steps to reduce the rounding error.",
)
@click.option("--plot", type=click.Path(dir_okay=False), help="Draw the measurement as a PNG.")
def quantize(
    model, dest, bits, size, psnr, recipe, method, backend, prompts, sensitivity, tune, plot
):
    """Quantize the float model MODEL into the new folder DEST.

    The command first measures each layer alone. This takes a while. The measurement is kept: a
    stopped run goes on, and another budget needs no new measurement. Then sensitive layers get more
    bits, within --bits, --size or --psnr. DEST/recipe.json also fits models fine-tuned from MODEL.
    --tune trains biases, norms and modulation of all widths together; a few hundred steps suffice.
    """
    context = click.get_current_context()
    for name in ("method", "plot", "sensitivity"):
        if recipe and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"with --recipe nothing is measured: leave --{name} out")
    from snapgen_mlx.errors import format_bytes
    from snapgen_mlx.hub import resolve_model
    from snapgen_mlx.prompts import read_prompts
    from snapgen_mlx.quantization.prompt_sets import BUILT_IN, split_prompts
    from snapgen_mlx.quantization.quantize import quantize as run

    folder = resolve_model(model)
    sets = split_prompts(read_prompts(prompts)) if prompts else BUILT_IN
    bar = Bar("layer")

    def follow(record):
        bar.close()
        if "step" in record:
            losses = [f"{k.split('/')[1]} {v:.2e}" for k, v in record.items() if k[:4] == "out/"]
            click.echo(f"tuning step {record['step']}/{tune}  {' '.join(losses)}")

    with awake(), Stop() as stop:
        try:
            report = run(
                folder,
                dest,
                backend=backend,
                bits=bits,
                size=size,
                target=psnr,
                recipe=recipe,
                method=method,
                prompts=sets,
                sensitivity=sensitivity,
                plot=plot,
                progress=bar.update,
                tuning=tune or 0,
                follow=follow,
            )
        except KeyboardInterrupt:
            click.echo("interrupted; the same command goes on from what is done", err=True)
            context.exit(128 + (stop.signal or signal.SIGINT))
        finally:
            bar.close()
    layers = ", ".join(f"{n} in {b}" for b, n in report["layers"].items())
    every = report["parts"]["transformer"]["bits_per_weight"]
    click.echo(
        f"recipe: codes of {report['bits']:.2f} bits on average in the Linear layers ({layers} "
        f"bits); {every:.2f} bits over all weights of the transformer, as they are on disk"
    )
    for name, part in report["parts"].items():
        size = format_bytes(part["bytes"])
        click.echo(f"{name}: {size}, {part['bits_per_weight']:g} bits per weight on disk")
    click.echo(
        f"against the float model, on {len(sets.score)} prompts that neither chose nor tuned:"
    )
    for variant, p in report["psnr"].items():
        s, peak = report["snr"][variant], report["peak"][variant]
        click.echo(
            f"{variant}: PSNR of latents {p['first step']:.1f} dB after the first step, "
            f"{p['last step']:.1f} dB after the last (peak {peak:.3g}); SNR {s['first step']:.1f} "
            f"and {s['last step']:.1f} dB"
        )
    pictures = report["pictures"]
    same = "unchanged" if math.isinf(pictures) else f"{pictures:.1f} dB"
    click.echo(f"pictures of the same latents: {same}")
    for name, value in report["text"].items():
        click.echo(f"text states of {name}: {value:.1f} dB")
    click.echo(f"wrote {dest}, {format_bytes(report['bytes'])}")
