"""``snapgen-mlx doctor``: whether this machine is fit to draw."""

import click


@click.command()
@click.option("-m", "--model", help="Model folder or Hub id (default: the embedded model).")
@click.pass_context
def doctor(ctx, model):
    """Check Python, device, speed, memory, disk and a model.

    The exit code is 1 if one of them is bad.
    """
    from snapgen_mlx.doctor import examine

    findings = examine(model)
    for finding in findings:
        mark = "ok  " if finding.advice is None else "BAD "
        click.echo(f"{mark} {finding.name}: {finding.found}")
        if finding.advice:
            click.echo(f"     {finding.advice}")
    ctx.exit(any(finding.advice for finding in findings))
