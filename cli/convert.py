"""`snapgen-mlx convert`: a PyTorch checkpoint into an MLX model folder."""

import signal

import click

from .arguments import lora_files_option, optional_model
from .progress import Bar

# Options of single parts, and the parts' folders.
PARTS = {"clip": "text_encoder", "gemma": "text_encoder_2"}


def part_option(name: str, what: str):
    text = f"Hub id, folder or file of {what}."
    return click.option(f"--{name.replace('_', '-')}", name, metavar="PART", help=text)


@click.command()
@click.argument("source", nargs=-1, callback=optional_model, metavar="[SOURCE]")
@click.argument("dest")
@part_option("transformer", "SnapGen++ or Qwen-Image")
@part_option("vae", "the autoencoder, e.g. Qwen/Qwen-Image")
@part_option("clip", "the first text encoder, e.g. wkcn/TinyCLIP-ViT-40M-32-Text-19M-LAION400M")
@part_option("gemma", "the second text encoder, e.g. google/gemma-3-4b-it")
@part_option("tiny_decoder", "the file taew2_1 of madebyollin/taehv")
@click.option("--quantize", type=click.Choice(["4", "8"]), help="Bits of the large matrices.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Number format of the weights [default: the source's].",
)
@click.option("--only", help="Components, e.g. transformer,vae [default: all].")
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option("--ema", is_flag=True, help="Use the EMA weights of a training checkpoint.")
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False),
    help="config.json for a SOURCE that is a single file.",
)
@lora_files_option("Fuse a LoRA into the transformer")
@click.option(
    "--few-step-lora",
    type=click.Path(exists=True),
    help="Add a LoRA with which the transformer draws in few steps.",
)
@click.option(
    "--dry-run", is_flag=True, help="Print what the command would write, and write nothing."
)
@click.option(
    "--report", type=click.Path(dir_okay=False), help="Write a JSON table of all tensors."
)
def convert(
    source,
    dest,
    quantize,
    dtype,
    only,
    revision,
    ema,
    config,
    loras,
    few_step_lora,
    dry_run,
    report,
    **named,
):
    """Convert SOURCE, a PyTorch checkpoint, into DEST, a folder for MLX.

    SOURCE is a Hub id (org/name or org/name@revision), a folder of a whole checkpoint or of one
    of its models, or a weight file (.safetensors, .bin, .pt, .pth, .ckpt). An interrupted run
    goes on where it was when started again.

    With --transformer, --vae, --clip, --gemma and --tiny-decoder, single parts come from other
    places, and SOURCE may be left out. If DEST is a converted model, the parts that it lacks are
    added. All parts must fit together.
    """
    parts = {PARTS.get(name, name): where for name, where in named.items() if where}
    if source is None and not parts:
        raise click.UsageError("Missing argument 'SOURCE'.")
    if source is None and (only or revision or config):
        raise click.UsageError("--only, --revision and --config are for SOURCE, which is missing")
    import mlx.core as mx

    from snapgen_mlx.convert.conversion_report import save_report
    from snapgen_mlx.convert.to_mlx import convert as run

    try:
        result = run(
            source,
            dest,
            parts=parts,
            revision=revision,
            only=only.split(",") if only else None,
            dtype=getattr(mx, dtype) if dtype else None,
            quantize=int(quantize) if quantize else None,
            ema=ema,
            config=config,
            loras=loras,
            few_step_lora=few_step_lora,
            dry_run=dry_run,
            progress=Bar("B").update,
        )
    except KeyboardInterrupt:
        click.echo("interrupted; the same command goes on from here", err=True)
        click.get_current_context().exit(128 + signal.SIGINT)
    if report:
        save_report(report, result)
    for name, part in result["components"].items():
        _print_component(name, part, result.get("written", {}).get(name))
    done = {
        "planned": f"would write {result['bytes'] / 1e6:.1f} MB to {dest}",
        "converted": f"wrote {dest}",
        "resumed": f"went on with an interrupted run and wrote {dest}",
        "complete": f"{dest} holds this conversion already; nothing to do",
    }
    click.echo(done[result["status"]])


def _print_component(name, part, written):
    from snapgen_mlx.errors import name_first

    line = f"{name}: {part['parameters'] / 1e6:.1f} M parameters, {part['bytes'] / 1e6:.1f} MB"
    if written:
        layers = ", ".join(f"{n} in {kind}" for kind, n in written["layers"].items())
        line += f", {written['bits_per_weight']:g} bits per weight ({layers})"
    click.echo(line)
    if part["ema"]:
        click.echo("  took the EMA weights")
    if part["not_read"]:
        click.echo(f"  not read: {name_first(part['not_read'], 4)}")
    for prefix, count in part["prefixes"].items():
        click.echo(f"  removed the prefix {prefix!r} from {count} keys")
    reasons: dict[str, list[str]] = {}
    for row in part["dropped"]:
        reasons.setdefault(row["action"], []).append(row["source"])
    for reason, keys in reasons.items():
        click.echo(f"  {reason}: {name_first(keys, 1)}")
