"""``snapgen-mlx push``: a model to the Hub."""

import click


@click.command()
@click.argument("model")
@click.argument("repo", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="A new repository that only you can see.")
def push(model, repo, private):
    """Upload MODEL to the Hub as ORG/NAME, with a card of what it is and how it was trained.

    Files of an earlier upload that MODEL does not have are removed; the repository's history keeps
    them. The command needs a token that may write: `hf auth login`, or HF_TOKEN.
    """
    from snapgen_mlx.publish import push as run

    click.echo(run(model, repo, private))
