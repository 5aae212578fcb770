"""Which width of a model draws which steps: "full", or "tiny:2,full:2" for one after the other."""

from collections.abc import Sequence

from .errors import UsageError, shown

EVERY = 0  # as a count: all steps


def parse_widths(variant, known: Sequence[str]) -> list[tuple[str, int]]:
    """The widths of a variant with the steps that each makes, in order.

    Args: variant, a name of ``known``, which makes every step, or names with counts. Raises
    UsageError for another one.
    """
    if isinstance(variant, str) and ":" in variant:
        parts = []
        for part in variant.split(","):
            name, _, count = part.partition(":")
            if not (count.isascii() and count.isdigit() and int(count)):
                raise UsageError(
                    f"--variant {variant} must name a count of steps for each width, as in "
                    "tiny:2,full:2"
                )
            parts.append((name, int(count)))
    else:
        parts = [(variant, EVERY)]
    for name, _ in parts:
        if not isinstance(name, str) or name not in known:
            raise UsageError(f"no variant {shown(name)} in this model; it has {', '.join(known)}")
    return parts


def total_steps(parts: list[tuple[str, int]]) -> int | None:
    """Steps that a variant with counts makes; None without counts."""
    return sum(count for _, count in parts) or None


def by_step(parts: list[tuple[str, int]], steps: int) -> list[str]:
    """The width of each of so many steps."""
    return [name for name, count in parts for _ in range(count or steps)]
