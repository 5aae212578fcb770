"""The judge's table."""

from snapgen_mlx.geneval import TASKS

TITLES = ("single", "two", "counting", "colors", "position", "attribution")


def headline() -> str:
    titles = "".join(f"{title:>13}" for title in (*TITLES, "overall", "style"))
    return f"{'':<22}{titles}"


def row(name: str, shares: dict) -> str:
    """A line of shares by task; a dash where nothing was drawn."""
    cells = (shares.get(task) for task in (*TASKS, "overall", "style"))
    return f"{name:<22}" + "".join(f"{'-' if s is None else f'{s:.3f}':>13}" for s in cells)
