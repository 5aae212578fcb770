"""``snapgen-mlx serve``: a page and OpenAI's image API on this machine."""

import click

from .arguments import dtype_option


@click.command()
@click.option(
    "-m",
    "--model",
    "models",
    multiple=True,
    help="Model folder or Hub id; may be given several times (default: the embedded model).",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen at; any other than this machine's needs --token.",
)
@click.option("--port", default=8765, show_default=True, type=click.IntRange(0, 65535))
@click.option("--token", envvar="SNAPGEN_TOKEN", help="Secret that clients must send.")
@click.option(
    "--gallery",
    default="~/Pictures/snapgen-mlx",
    show_default=True,
    help="Folder where the pictures are kept.",
)
@click.option("--queue", default=64, show_default=True, type=click.IntRange(1, 10000))
@click.option(
    "--timeout",
    default=600.0,
    show_default=True,
    type=click.FloatRange(1, 86400),
    help="Longest time for a request in seconds, including its wait.",
)
@dtype_option
@click.option("--open", "show", is_flag=True, help="Open the page in the browser.")
def serve(models, host, port, token, gallery, queue, timeout, dtype, show):
    """Keep models loaded and draw for a web page and for OpenAI's clients.

    Ctrl-C finishes the picture that is being drawn, then stops.
    """
    from snapgen_mlx.errors import SnapGenError, UsageError

    try:
        from snapgen_mlx.serve.server import listen
        from snapgen_mlx.serve.server import serve as answer
    except ModuleNotFoundError as e:
        raise SnapGenError(
            f'{e.name} is missing; install what serve needs: pip install "snapgen-mlx[serve]"'
        ) from e
    from snapgen_mlx.serve.engine import Engine, model_names
    from snapgen_mlx.serve.gallery import Gallery
    from snapgen_mlx.serve.guard import LOOPBACK

    if token is not None and not (token.isascii() and token.isalnum() and len(token) >= 8):
        raise UsageError("a token has at least 8 letters and digits, and nothing else")
    if host not in LOOPBACK and not token:
        raise UsageError(
            f"other machines can reach {host}: give --token, or leave out --host to serve only "
            "this machine"
        )
    listening = listen(host, port)
    engine = Engine(model_names(models), Gallery(gallery), queue, timeout, dtype)
    engine.start()
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listening.getsockname()[1]}/"
    page = f"{address}?token={token}" if token else address
    click.echo(f"page   {page}")
    click.echo(f"API    {address}v1  (described at {address}openapi.json)")
    click.echo(f"keeps  {engine.gallery.folder}, {len(engine.gallery)} pictures")
    if show:
        click.launch(page)
    answer(engine, listening, token)
