"""The life of a training run: steps, validation, state on disk, resumption."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from ..device import scalar, set_limits
from ..errors import SnapGenError, UsageError
from ..files import atomic_write
from .checkpoint import load_state, locked, save_state
from .data import LatentDataset
from .optimizer import AdamOptions

LOG = "log.jsonl"
# Options that a run may go on with others of: they change nothing but, some, how sums round.
NO_MATTER = (
    *("minutes", "save_minutes", "log_every", "validate_every", "sample_every"),
    *("accumulate", "checkpoint", "offload", "extend", "force"),
)


@dataclass
class RunOptions:
    batch: int = 32
    text_dropout: float = 0.1
    seed: int = 0
    minutes: float | None = None  # minutes after which the run stops; the state is kept
    save_minutes: float = 3.0
    log_every: int = 50
    validate_every: int = 500
    sample_every: int = 500  # steps between pictures of ``report.Report``; 0 for none
    extend: bool = False  # a finished run may go on to more steps
    force: bool = False  # go on although memory is predicted not to suffice; a record says "note"


class Inputs(NamedTuple):
    """All that a step depends on beside the trainer's state."""

    x0: mx.array  # (B, H, W, C)
    text: dict[str, mx.array]  # {encoder: (B, L, dim)}
    masks: dict[str, mx.array]  # {encoder: (B, L)}
    noise: dict[str, mx.array]  # {name: (B, ...)}
    choice: Any


class Trainer(Protocol):
    """What ``train`` drives; it needs no more of a method than is said here."""

    @property
    def options(self) -> AdamOptions: ...

    @property
    def ahead(self) -> int:
        """Steps whose inputs ``look_ahead`` takes at once."""

    def look_ahead(self, inputs: list[Inputs], /) -> list[Inputs]:
        """The inputs of the next steps with what can be computed before the first of them."""

    def draw(self, rng: np.random.Generator, key: mx.array, shape: tuple, /) -> tuple[dict, Any]:
        """A step's noise for a batch of latents of ``shape``, by name, and another choice."""

    def step(
        self, x0: mx.array, text: dict, masks: dict, noise: dict, choice: Any, /
    ) -> dict[str, mx.array]:
        """One update; scalars by name."""

    def validate(self, fixed: list, /) -> dict[str, float]:
        """How good the averaged weights are on ``fixed_batches``, by name."""

    def identity(self) -> dict:
        """What a saved state belongs to, beside options and data."""

    def state(self) -> dict[str, mx.array]:
        """Everything that changes."""

    def restore(self, arrays: dict[str, mx.array], /) -> None:
        """Go on from a ``state``."""


def train(
    trainer: Trainer,
    data: LatentDataset,
    run,
    options: RunOptions,
    validation: LatentDataset | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[dict]:
    """Make the steps of a trainer.

    A run resumes from the newest whole state in ``run``. All random numbers of a step follow from
    (seed, step), so a resumed run repeats one without a stop. Validation uses the averaged weights
    on fixed noise. With ``extend`` a finished run goes on to more steps, at the learning rates that
    a run of so many steps has from there on.

    Args:
        trainer: makes the steps.
        data: what it learns from.
        run: folder of the state and log.jsonl. The log is the same however often the run was
            stopped; only a last record that comes early does not go there.
        options: of the run.
        validation: held-out data.
        stop: asked after each step; True ends the run.

    Yields:
        A record every ``log_every`` steps and after each validation. The last one has ``done``:
        False if ``minutes`` are over, or if ``stop`` said so (``stopped``).

    Raises:
        SnapGenError: the state is of other data or options or cannot be written, the loss became
            NaN, or another process trains in ``run``.
    """
    with locked(run) if mx.distributed.init().rank() == 0 else nullcontext():
        yield from _train(trainer, data, Path(run), options, validation, stop)


def _train(
    trainer: Trainer,
    data: LatentDataset,
    run: Path,
    options: RunOptions,
    validation: LatentDataset | None,
    stop: Callable[[], bool],
) -> Iterator[dict]:
    set_limits()
    o, steps = options, trainer.options.steps
    world = mx.distributed.init()
    check_run(o, trainer.options)
    settings = asdict(o) | asdict(trainer.options)
    for name in NO_MATTER:
        settings.pop(name)
    identity = {"options": settings, "data": data.fingerprint, **trainer.identity()}
    step = 0
    window: list[dict[str, float]] = []  # metrics since the last record
    if state := load_state(run):
        arrays, info = state
        finished = info.get("options", {}).get("steps") == info["step"]
        extends = o.extend and finished and steps > info["step"]
        _check_identity(run, info, json.loads(json.dumps(identity)), extends)
        # In the order of a fresh trainer: norms sum over arrays, and round by their order.
        trainer.restore({key: arrays[key] for key in trainer.state()})
        step, window = info["step"], info.get("window", [])
    _check_processes(step, identity)
    if world.rank() == 0:
        _trim_log(run / LOG, step)
    if step == steps:
        yield {"step": step, "done": True, "stopped": False}

    fixed = list(fixed_batches(validation, o.batch)) if validation else []
    mx.reset_peak_memory()
    started = saved = since = time.monotonic()
    mark = step
    waiting: list[Inputs] = []
    while step < steps:
        if not waiting:
            following = range(step, min(step + trainer.ahead, steps))
            waiting = trainer.look_ahead([_inputs(trainer, data, o, i) for i in following])
        metrics = trainer.step(*waiting.pop(0))
        window.append({k: scalar(v) for k, v in metrics.items()})
        step += 1
        if not all(map(math.isfinite, window[-1].values())):
            raise SnapGenError(
                f"the loss became NaN at step {step}; train into another folder with "
                "a lower learning rate"
            )
        now = time.monotonic()
        late = o.minutes is not None and now - started > o.minutes * 60
        # Processes stop together, as soon as one is told to or finds the time over.
        votes = mx.distributed.all_sum(mx.array([stop(), late], mx.int32))
        stopped, over = bool(votes[0]), bool(votes[1])
        done = step == steps
        last = bool(done or stopped or over)
        validate = bool(fixed) and step % o.validate_every == 0
        due = done or validate or step % o.log_every == 0
        if due or last:
            record: dict[str, float] = {"step": step}
            for name in sorted({k for m in window for k in m}):
                record[name] = float(np.mean([m[name] for m in window if name in m]))
            record["images/s"] = (step - mark) * o.batch / (now - since)
            record["peak GB"] = mx.get_peak_memory() / 1e9
            if validate or (fixed and last and not stopped):
                record |= trainer.validate(fixed)
        if due:
            window = []
            if world.rank() == 0:
                _append_log(run / LOG, record)
        if last or now - saved > o.save_minutes * 60:
            if world.rank() == 0:
                save_state(run, step, trainer.state(), {**identity, "window": window})
            saved = time.monotonic()
        if due or last:
            yield record | ({"done": done, "stopped": bool(stopped)} if last else {})
            mark, since = step, time.monotonic()  # without what was done with the record
        if last:
            return


def _inputs(trainer: Trainer, data: LatentDataset, o: RunOptions, step: int) -> Inputs:
    """Of this process. Every process draws the whole batch and keeps its share, so that n
    processes repeat one."""
    rng, world = np.random.default_rng([o.seed, step]), mx.distributed.init()
    x0, text, masks = data.batch(rng, o.batch, o.text_dropout)
    noise, choice = trainer.draw(rng, mx.random.key((o.seed << 32) + step), x0.shape)
    mine = slice(world.rank(), None, world.size())
    noise, text, masks = ({k: a[mine] for k, a in d.items()} for d in (noise, text, masks))
    return Inputs(x0[mine], text, masks, noise, choice)


def check_run(options: RunOptions, adam: AdamOptions) -> None:
    """Raises UsageError for a batch that does not divide into its parts, and for too few steps."""
    if adam.steps < adam.least_steps:
        why = "the learning rate begins at 0"
        if adam.least_steps > 2:
            why = "the student learns only after several steps of the critic"
        raise UsageError(
            f"a training of {adam.steps} steps changes nothing, since {why}; give --steps "
            f"{adam.least_steps} or more"
        )
    size = mx.distributed.init().size()
    if options.batch % (size * adam.accumulate):
        each = f" on each of {size} processes" if size > 1 else ""
        raise UsageError(
            f"the batch of {options.batch} does not divide into {adam.accumulate} parts{each}"
        )


def _check_identity(run, info: dict, identity: dict, extends: bool) -> None:
    """Raises SnapGenError that says in what a state differs from this run.

    Args: extends, whether it is to have more steps than that of the state.
    """
    for name, now in identity.items():
        before: dict = info.get(name, {})
        if name == "options":
            # An option that came later is as if it had been off.
            before = {k: before.get(k, False if v is False else None) for k, v in now.items()}
            if extends:
                before["steps"] = now["steps"]
        if before == now:
            continue
        what = {
            "data": "other pictures or captions, or with another --flip, --prior or --repeats",
            "model": "another width, or a model of other sizes",
            "base": "other weights of the model, or another --from-lora",
            "teacher": "another teacher",
        }
        if name == "options":
            differ = [k for k in now if before.get(k) != now[k]]
            what["options"] = ", ".join(f"{k} {before.get(k)}, not {now[k]}" for k in differ)
            if differ == ["steps"] and info["step"] == before["steps"] < now["steps"]:
                raise SnapGenError(
                    f"the run in {run} is finished after {before['steps']} steps; --resume makes "
                    f"it go on to {now['steps']}"
                )
        raise SnapGenError(
            f"the run in {run} was started with {what[name]}; go on with the same as then, or "
            "train into another folder"
        )


def _check_processes(step: int, identity: dict) -> None:
    """Raises SnapGenError unless all processes start from the same."""
    digest = hashlib.sha256(json.dumps([step, identity]).encode()).digest()[:8]
    digests = mx.distributed.all_gather(mx.array([list(digest)]))
    if mx.any(digests != digests[:1]).item():
        raise SnapGenError(
            "the processes have different data, options or training states; they need the same "
            "files and a folder for the run that all of them see"
        )


def _trim_log(path: Path, step: int) -> None:
    """Drop the records after ``step``, which a resumed run writes again, and one cut short."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return
    except OSError as e:
        raise SnapGenError(f"cannot read {path}: {e.strerror}") from e
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    with atomic_write(path) as tmp:
        tmp.write_text("".join(kept), encoding="utf-8")


def _append_log(path: Path, record: dict) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")
    except OSError as e:
        raise SnapGenError(f"cannot write {path}: {e.strerror}; free some space") from e


def fixed_batches(data: LatentDataset, size: int):
    """All of ``data`` by bucket, one caption each, with noise and timesteps that never change."""
    n = len(data.latents)
    rng = np.random.default_rng(0)
    eps = [rng.standard_normal(a.shape, dtype=np.float32) for a in data.latents]
    t = rng.permutation((np.arange(n, dtype=np.float32) + 0.5) / n)
    for bucket in data.buckets:
        for i in range(0, len(bucket), size):
            rows = bucket[i : i + size]
            x0, noise = (mx.array(np.stack([a[j] for j in rows])) for a in (data.latents, eps))
            text, masks = data.text([data.captions[j][0] for j in rows])
            yield x0, noise, mx.array(t[rows]), text, masks
