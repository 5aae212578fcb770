"""How a training is shown and stopped."""

import contextlib
import os
import shutil
import signal
import subprocess
import time

import click

from .arguments import encoded

COMPILER_FAILED = ("[Compile::", "C++ shared library")  # in MLX's messages


def follow(start, steps: int, options, echo) -> None:
    """Print the records of a training, which ``start`` gives when it is told how to ask whether to
    stop. Exits as signals do when it was stopped."""
    from snapgen_mlx.errors import SnapGenError

    started, context = None, click.get_current_context()
    with awake(), Stop() as stop:
        try:
            for record in stop.watch(start(stop)):
                if "encoded" in record or "drawn" in record:
                    echo(encoded(record))
                elif "note" in record:
                    echo(f"note: {record['note']}", err=True)
                elif "step" in record:
                    last = record
                    stop.running = "done" not in record
                    started = started or time.monotonic()
                    echo(progress(record, steps, options, time.monotonic() - started))
                else:
                    echo(changes(record))
        except KeyboardInterrupt:
            echo("stopped; the same command goes on from what is saved", err=True)
            context.exit(128 + (stop.signal or signal.SIGINT))
        except RuntimeError as e:
            if "[ring]" not in str(e):
                raise
            raise SnapGenError(
                "another process of this training ended or cannot be reached; start all again, "
                "and they go on from the last saved state"
            ) from e
    if not last["done"]:
        echo(
            f"stopped after step {last['step']} of {steps}; the same command goes on from there",
            err=True,
        )
    if last["stopped"] and not last["done"]:
        context.exit(128 + (stop.signal or signal.SIGINT))


def explanation(memory, options, run) -> str:
    """The peak that ``memory`` predicts of this training, and of the same with less memory, in
    each process."""
    import mlx.core as mx

    from snapgen_mlx.device import usable_memory
    from snapgen_mlx.errors import format_bytes
    from snapgen_mlx.training.loop import check_run

    check_run(run, options)
    batch, usable = run.batch // mx.distributed.init().size(), usable_memory()
    lines = [("as asked", options), *memory.alternatives(options, batch)]
    width = max(len(flags) for flags, _ in lines)
    out = [f"training in batches of {batch}, {format_bytes(usable)} can be used here (predicted)"]
    for flags, o in lines:
        peak = memory.peak(o, batch)
        out.append(f"{flags:{width}}  {format_bytes(peak):>8}" + "  too large" * (peak > usable))
    return "\n".join(out)


def progress(record: dict, steps: int, options, elapsed: float) -> str:
    """One line of a record of the training loop; ``elapsed`` seconds so far."""
    parts = [f"step {record['step']}/{steps}"]
    for title in ("loss", "val"):
        losses = [(k.split("/")[1], v) for k, v in record.items() if k.startswith(f"{title}/")]
        if losses:
            parts.append(" ".join([title, *(f"{name} {v:.4f}" for name, v in losses)]))
    if "images/s" in record:
        parts += [f"{record['images/s']:.3g} images/s", f"{record['peak GB']:.2f} GB"]
        left = (steps - record["step"]) * options.batch / record["images/s"]
        if options.minutes:
            left = min(left, max(0, options.minutes * 60 - elapsed))
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def changes(record: dict[str, float]) -> str:
    """One line of how much weights, or pictures, of each width changed."""
    pairs = [(name.split("/"), value) for name, value in record.items()]
    if pairs[0][0][0] == "change":
        return "weights changed: " + ", ".join(f"{name} {100 * v:.3g} %" for (_, name), v in pairs)
    levels = ", ".join(f"{name} {v:.3g}" for (_, name), v in pairs)
    return f"pictures changed, in levels of 255: {levels}"


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@contextlib.contextmanager
def awake():
    """Keeps a Mac from sleeping; does nothing on other systems."""
    command = shutil.which("caffeinate")
    process = command and subprocess.Popen([command, "-i", "-w", str(os.getpid())])
    try:
        yield
    finally:
        if process:
            process.terminate()
            process.wait()


class Stop:
    """Ctrl-C and SIGTERM end a run after its step; at once before the first step, after the last,
    or given twice.

    Called by the run after each step: is it to stop?
    """

    def __init__(self):
        self.running = False
        self.signal: int | None = None

    def __call__(self) -> bool:
        self.running = True
        return self.signal is not None

    def watch(self, records):
        """Pass the records on. On a CPU, MLX waits for a compiler, and Ctrl-C in a terminal ends
        that one too. MLX then reports a failure; it counts as an interruption."""
        try:
            yield from records
        except RuntimeError as e:
            if self.signal is None or not any(words in str(e) for words in COMPILER_FAILED):
                raise
            raise KeyboardInterrupt from e

    def __enter__(self) -> "Stop":
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.before = {n: signal.signal(n, self.receive) for n in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        again, self.signal = self.signal is not None, number
        if again or not self.running:
            raise KeyboardInterrupt
        os.write(2, b"stopping after this step; once more stops at once\n")
