"""Which tensors of a training file are the model's, and which copy of it is taken.

Training loops and other tools wrap a model's keys in names of their own. What they are called is
not known here: a copy of the model is a set of keys with one common prefix, behind which stand the
names that the model's rules know.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from ..errors import SnapGenError, name_keys
from ..tensors.readers import Info
from ..tensors.scaled import SCALES
from ..tensors.stream import Step
from .rules.interface import Drop, Rules

# Segments that wrap a module inside a model.
INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
EMA = {"ema", "shadow", "swa", "averaged", "average"}  # words in the prefixes of averaged weights
# Names under which training loops keep what is no weight.
TRAINING = {"optimizer", "optimizers", "optimizer_states", "optimizer_state_dict", "optim", "opt"}
TRAINING |= {"lr_scheduler", "lr_schedulers", "scheduler", "scaler", "grad_scaler", "exp_avg"}
TRAINING |= {"exp_avg_sq", "momentum_buffer", "callbacks", "loops", "rng_state", "random_states"}
COUNTERS = {"n_averaged", "num_updates", "decay", "step", "initted", "global_step", "epoch"}
COUNTERS |= {"iteration", "iterations", "optimization_step", "num_batches_tracked"}
INTEGERS = {"I16", "I32", "I64", "U16", "U32", "U64", "BOOL"}  # without the types of packed weights
UNNAMED = re.compile(r"(.*\.)?(shadow_params|shadow)\.\d+")
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


@dataclass
class Copy:
    """Keys with one prefix that are some or all of the model."""

    prefix: str
    routes: dict[str, dict[str, Step]] = field(default_factory=dict)  # by the source's key
    wrappers: dict[str, int] = field(default_factory=dict)  # {prefix in the source: keys}
    fits: bool = True  # every shape equals the model's

    @property
    def targets(self) -> set[str]:
        return {target for targets in self.routes.values() for target in targets}

    @property
    def is_training(self) -> bool:
        return any(part in TRAINING for part in self.prefix.split("."))

    @property
    def is_ema(self) -> bool:
        return not self.is_training and is_ema(self.prefix)


@dataclass
class Found:
    """The copy of the model that is taken, and what becomes of every other key."""

    copy: Copy
    dropped: dict[str, str]  # {key: reason}


def is_ema(prefix: str) -> bool:
    """Whether a prefix says that its weights are averages over the training."""
    return any(word.lower() in EMA for word in WORDS.findall(prefix))


def find_model(
    rules: Rules,
    infos: dict[str, Info],
    shapes: dict[str, tuple[int, ...]],
    ema: bool,
    where: Path,
) -> Found:
    """Find the model in a file.

    Args: shapes of the model's parameters; ema, take the averaged weights. Without it the raw ones
        are taken, the averaged where there are no others.
    Raises SnapGenError unless one copy can be told from all others and every key is accounted for.
    """
    copies, dropped, unknown = _sort(rules, infos, shapes)
    _add_undotted(copies, unknown, infos, shapes)
    chosen = _choose(list(copies.values()), shapes, ema, where, unknown)
    for copy in copies.values():
        if copy is not chosen:
            dropped |= dict.fromkeys(copy.routes, _reason(copy, chosen))
    names = []
    for key in unknown:
        reason = _baggage(key, infos[key], chosen.prefix)
        if reason:
            dropped[key] = reason
        else:
            names.append(key)
    if names:
        raise SnapGenError(
            f"{where}: no rule for {name_keys(names)}; is it this model, and is its config right?"
        )
    _check_doubles([c for c in copies.values() if _stands_inside(c, chosen)], where)
    return Found(chosen, dropped)


def _stands_inside(copy: Copy, chosen: Copy) -> bool:
    """Whether some of its keys might as well be meant for the chosen copy."""
    if copy is chosen or copy.is_training or copy.is_ema is not chosen.is_ema:
        return copy is chosen
    return copy.prefix.startswith(chosen.prefix)


def _check_doubles(copies: list[Copy], where: Path) -> None:
    filled: dict[str, list[str]] = {}
    for copy in copies:
        for key, targets in copy.routes.items():
            for target in targets:
                filled.setdefault(target, []).append(key)
    for target, keys in filled.items():
        if len(keys) > 1:
            raise SnapGenError(f"{where}: {name_keys(keys)} all claim to be {target}")


def _clean(key: str) -> list[str]:
    return [part for part in key.split(".") if part not in INSIDE]


def _sort(
    rules: Rules, infos: dict[str, Info], shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Copy], dict[str, str], list[str]]:
    """Copies by their prefixes, {key: reason} of what the rules drop, and all other keys.

    Of a key the longest ending that the rules know counts.
    """
    copies: dict[str, Copy] = {}
    dropped: dict[str, str] = {}
    unknown = []
    for key, info in infos.items():
        parts = _clean(key)
        for i in range(len(parts)):
            targets = rules.route(".".join(parts[i:]))
            if isinstance(targets, Drop):
                dropped[key] = targets.reason
                break
            if all(target in shapes for target in targets):
                prefix = "".join(f"{part}." for part in parts[:i])
                copy = copies.setdefault(prefix, Copy(prefix))
                _add(copy, key, targets, info, shapes)
                wrapped = "".join(f"{part}." for part in INSIDE if part in key.split("."))
                if wrapper := wrapped + prefix:
                    copy.wrappers[wrapper] = copy.wrappers.get(wrapper, 0) + 1
                break
        else:
            unknown.append(key)
    return copies, dropped, unknown


def _add(
    copy: Copy,
    key: str,
    targets: dict[str, Step],
    info: Info,
    shapes: dict[str, tuple[int, ...]],
) -> None:
    copy.routes[key] = targets
    copy.fits = copy.fits and all(
        result_shape(info, step) == tuple(shapes[target]) for target, step in targets.items()
    )


def result_shape(info: Info, step: Step) -> tuple[int, ...] | None:
    """Of a tensor after a step; None where it is unfit for it."""
    try:
        return tuple(step.apply(mx.zeros(info.shape)).shape)  # lazy: nothing is allocated
    except (ValueError, IndexError, TypeError, OverflowError):
        return None


def _add_undotted(
    copies: dict[str, Copy],
    unknown: list[str],
    infos: dict[str, Info],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    """Averaged weights whose names lost their dots (a buffer's name has none): they are told by
    the raw weights beside them."""
    raw = [copy for copy in copies.values() if not copy.is_ema and not copy.is_training]
    known: dict[str, dict[str, Step]] = {}
    for copy in raw:
        for key, targets in copy.routes.items():
            parts = _clean(key)
            known |= {"".join(parts[i:]): targets for i in range(copy.prefix.count(".") + 1)}
    for key in list(unknown):
        prefix, _, name = key.rpartition(".")
        if is_ema(prefix) and name in known:
            copy = copies.setdefault(f"{prefix}.", Copy(f"{prefix}."))
            _add(copy, key, known[name], infos[key], shapes)
            copy.wrappers[copy.prefix] = copy.wrappers.get(copy.prefix, 0) + 1
            unknown.remove(key)


def _choose(copies: list[Copy], shapes, ema: bool, where: Path, unknown: list[str]) -> Copy:
    weights = [copy for copy in copies if not copy.is_training]
    groups = [[c for c in weights if c.is_ema is kind] for kind in (ema, not ema)]
    if ema and not groups[0]:
        if any(UNNAMED.fullmatch(key) for key in unknown):
            raise SnapGenError(
                f"{where} holds its EMA weights as a list without names; copy them into the model "
                "(`ema.copy_to(model.parameters())`), save that, and convert it without --ema"
            )
        raise SnapGenError(f"{where} holds no EMA weights; convert without --ema")
    for group in groups[:1] if ema else groups:
        whole = [copy for copy in group if copy.targets == set(shapes)]
        whole = [copy for copy in whole if copy.fits] or whole
        if len(whole) > 1:
            raise SnapGenError(
                f"{where} holds the model {len(whole)} times, as "
                f"{name_keys(copy.prefix for copy in whole)}; save the one to use alone"
            )
        if whole:
            return whole[0]
        if group is groups[0] and group and not ema and _is_whole(groups[1], shapes):
            raise SnapGenError(
                f"{where} holds the EMA weights whole, but only a part of the raw ones; convert "
                "with --ema, or download or save it again"
            )
    # None is whole: the largest part, by which an error can say what is missing.
    best = groups[0] or weights
    return max(best, key=lambda copy: len(copy.targets), default=Copy(""))


def _is_whole(copies: list[Copy], shapes: dict[str, tuple[int, ...]]) -> bool:
    return any(copy.targets == set(shapes) for copy in copies)


def _reason(copy: Copy, chosen: Copy) -> str:
    if copy.is_training:
        return "training state, not a weight"
    if copy.is_ema and not chosen.is_ema:
        return "the EMA weights (--ema takes them)"
    if chosen.is_ema and not copy.is_ema and copy.targets == chosen.targets:
        return "the raw weights (--ema was given)"
    return f"not of the model under {chosen.prefix!r}"


def _baggage(key: str, info: Info, prefix: str) -> str | None:
    """Why a key that no rule knows is left out; None for one that may be a weight."""
    parts = _clean(key)
    if parts[-1] in SCALES:  # of no weight here: then some weight lacks it
        return None
    if any(part in TRAINING for part in parts[:-1]):
        return "training state, not a weight"
    if info.shape in ((), (1,)) and parts[-1] in COUNTERS:
        return "a counter, not a weight"
    if 0 in info.shape:
        return "empty"
    if info.dtype in INTEGERS:
        return "integers, not a weight"
    if UNNAMED.fullmatch(key):
        return "EMA weights without names"
    if not ".".join(parts).startswith(prefix):
        return f"not of the model under {prefix!r}"
    return None
