"""Seconds and memory of a model on this machine, beside the machine's own rate of products and
the memory that was predicted."""

import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import __version__
from .config import DiTConfig
from .device import device_name, matmul_speed, on_gpu, usable_memory
from .flops import decoder_flops, step_flops
from .layout import picture_size
from .models.elastic import group_size
from .models.taehv import TAEHVConfig, TAEHVDecoder
from .models.vae import VAEConfig
from .pipeline import Pipeline
from .sampling import last_step
from .settings import Settings
from .tensors.affine import answer_in_kind
from .tensors.weights import flat_parameters
from .training.elastic_trainer import ElasticOptions
from .training.finetune import make_trainer
from .training.training_memory import TrainingMemory

FORMAT = {"format": "snapgen-mlx bench", "version": 1}
PARTS = ("encode", "step", "decode", "picture", "training")
PROMPTS = ("a red apple", "a smiling cat", "a dog", "a house", "a star")
SLOW = 5.0  # seconds; what takes longer is measured once
MATRIX = {True: 4096, False: 2048}  # side of the products whose rate is measured, GPU or not


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Args:
        variants, sizes, bits: widths, pixels a side, and bits of the transformer's weights; 16
            stands for weights as they are stored.
        rounds: of each, after a warm-up; pictures of slow steps need no warm-up of their own.
        parts: of ``PARTS``.
        batch: pictures of a training step.
    """

    variants: tuple[str, ...]
    sizes: tuple[int, ...]
    bits: tuple[int, ...] = (16,)
    rounds: int = 5
    parts: tuple[str, ...] = PARTS
    batch: int = 4


def machine(dtype: mx.Dtype) -> dict:
    """This machine, and what computes on it."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "usable_memory": usable_memory(),
        "device": device_name(),
        "mlx": version("mlx"),
        "snapgen_mlx": __version__,
        "dtype": str(dtype).rpartition(".")[2],
    }


def _processor() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


@dataclass
class Clock:
    """Seconds of rounds, and the peak of memory in them."""

    rounds: int
    seconds: list[float] = field(default_factory=list)

    def time(self, work: Callable[[], object], slow: bool = False) -> None:
        """Run ``work`` once to warm up, then for the rounds; ``slow`` work is run once in all."""
        rounds = 1
        if not slow:
            started = time.perf_counter()
            work()
            rounds = self.rounds if time.perf_counter() - started < SLOW else 1
        for _ in range(rounds):
            started = time.perf_counter()
            work()
            self.seconds.append(time.perf_counter() - started)

    def row(self, what: str, **of) -> dict:
        s = self.seconds
        spread = {"median": statistics.median(s), "least": min(s), "most": max(s)}
        return {"what": what, **of, "seconds": spread | {"rounds": len(s)}}


class Bench:
    """Measures a model folder (None: the embedded model) by a ``Plan``."""

    def __init__(self, folder, plan: Plan, dtype: mx.Dtype | None = None):
        self.folder, self.plan = folder, plan
        first = Pipeline.load(folder, plan.variants[0], dtype=dtype, force=True)
        self.folder, self.config, self.dtype = first.folder, first.dit_config, first.dtype
        self.size = picture_size(first.config)
        for variant in plan.variants:  # before minutes are spent on others
            first.switch(variant)
        for size in plan.sizes:
            first.settings(PROMPTS[0], width=size, height=size)
        self.rates: list[float] = []

    def rows(self) -> Iterator[dict]:
        """Every measurement as soon as it is made; what does not fit into memory says "skipped"."""
        for variant in self.plan.variants:
            for size in self.plan.sizes:
                for bits in self.plan.bits:
                    self._rate()
                    yield from self._drawing(variant, size, bits)
        if "training" in self.plan.parts and isinstance(self.config, DiTConfig):
            self._rate()
            yield self._training()

    def _rate(self) -> None:
        n = MATRIX[on_gpu()]
        self.rates.append(matmul_speed(n, self.dtype))

    @property
    def rate(self) -> float:
        """GFLOP/s of products of large matrices, the median over the run so far."""
        return statistics.median(self.rates)

    def _drawing(self, variant: str, size: int, bits: int) -> Iterator[dict]:
        _settle()
        before = mx.get_active_memory()
        pipe = Pipeline.load(self.folder, variant, dtype=self.dtype, force=True)
        s = pipe.settings(PROMPTS[0], width=size, height=size, guidance=1.0)
        of = {"variant": variant, "size": size, "bits": bits}
        if not pipe.fits(s):
            yield {"what": "step", **of, "skipped": pipe.memory.excess(variant, pipe.request(s))}
            return
        predicted = pipe.memory.predict(variant, pipe.request(s))
        saved = 0
        if bits < 16:
            saved = pack(pipe, bits)
        parts = self.plan.parts

        def memory(predicted: int) -> dict:
            return {"predicted": predicted - saved, "measured": mx.get_peak_memory() - before}

        clock = Clock(self.plan.rounds)
        if "encode" in parts and pipe.encoders:
            mx.reset_peak_memory()
            clock.time(lambda: mx.eval(pipe.encode([PROMPTS[0]])))
            alone = replace(pipe.request(s), low_ram=True)  # nothing else is loaded yet
            need = pipe.memory.predict(variant, alone).encode
            measured = mx.get_peak_memory() - before
            yield clock.row("encode", **of) | {"memory": {"predicted": need, "measured": measured}}
        mx.eval(pipe.vae.parameters())
        mx.reset_peak_memory()
        clock = Clock(self.plan.rounds)
        latent = self._steps(pipe, s, clock)
        row = clock.row("step", **of) | {"memory": memory(predicted.denoise)}
        slow = row["seconds"]["median"] > SLOW  # then its pictures take minutes
        if "step" in parts:
            yield row | self._speed(row, self._step_flops(pipe, variant, s))
        if "decode" in parts:
            mx.reset_peak_memory()
            clock = Clock(self.plan.rounds)
            clock.time(lambda: pipe.decode(latent))
            row = clock.row("decode", **of) | {"memory": memory(predicted.decode)}
            vae = pipe.memory.vae
            if isinstance(vae, VAEConfig):
                row |= self._speed(row, decoder_flops(vae, *latent.shape[1:3]))
            yield row
            if isinstance(vae, VAEConfig):
                yield self._tiny_decoder(latent, of)
        if "picture" in parts:
            clock, own = Clock(self.plan.rounds), pipe.settings(PROMPTS[0], width=size, height=size)
            clock.time(
                lambda: _draw(pipe, replace(own, prompt=PROMPTS[len(clock.seconds) % 5])), slow
            )
            yield clock.row("picture", **of, steps=own.steps, guidance=own.guidance)

    def _steps(self, pipe: Pipeline, s: Settings, clock: Clock) -> mx.array:
        """Time steps after the first, which loads and compiles; the last latent."""
        started = None
        for step in pipe.stream(replace(s, steps=1 + clock.rounds)):  # noqa: B007
            now = time.perf_counter()
            if started is not None:
                clock.seconds.append(now - started)
                if now - started > SLOW:
                    break
            started = time.perf_counter()
        return step.x

    def _step_flops(self, pipe: Pipeline, variant: str, s: Settings) -> int | None:
        if not isinstance(self.config, DiTConfig):
            return None
        text, _ = pipe.encode([PROMPTS[0]])
        tokens = sum(states.shape[1] for states in text.values())
        config = self.config.variant(self.config.variant_index(variant))
        return step_flops(config, pipe.latent_size(s), tokens)

    def _speed(self, row: dict, flops: int | None) -> dict:
        if flops is None:
            return {}
        rate = flops / row["seconds"]["median"] / 1e9
        return {"gflop": flops / 1e9, "gflops": rate, "share": rate / self.rate}

    def _tiny_decoder(self, latent: mx.array, of: dict) -> dict:
        """The public tiny decoder of the large VAE's latents, with random weights."""
        decoder = TAEHVDecoder(TAEHVConfig())
        decoder.set_dtype(self.dtype)
        clock = Clock(self.plan.rounds)
        clock.time(lambda: mx.eval(decoder.decode(latent)))
        return clock.row("decode, tiny decoder", **of)

    def _training(self) -> dict:
        """A step on all widths' weights: the widest and the narrowest, on random latents."""
        _settle()
        options, batch = ElasticOptions(), self.plan.batch
        of = {"variant": ",".join(self.config.variants), "size": self.size, "batch": batch}
        predictor = TrainingMemory.from_model(self.folder)
        predicted = predictor.peak(options, batch)
        if excess := predictor.excess(options, batch):
            return {"what": "training", **of, "skipped": excess}
        before = mx.get_active_memory()
        trainer = make_trainer(self.folder, options, 0)
        config = trainer.config
        rng = np.random.default_rng(0)
        x0 = mx.array(rng.standard_normal((batch, *predictor.size, config.latent_channels), "f4"))
        tokens = predictor.text_tokens - 1
        text = {k: mx.zeros((batch, tokens, dim)) for k, dim in list(config.text_dims.items())[:1]}
        masks = {k: mx.ones((batch, tokens), mx.bool_) for k in text}
        noise, _ = trainer.draw(rng, mx.random.key(0), x0.shape)
        subnets = [0] if len(config.widths) > 1 else []
        step = [*subnets, len(config.widths) - 1]
        work = sum(step_flops(config.variant(i), predictor.size, tokens) for i in step)
        clock = Clock(self.plan.rounds)
        mx.reset_peak_memory()
        clock.time(lambda: trainer.step(x0, text, masks, noise, subnets))
        row = clock.row("training", **of)
        measured = mx.get_peak_memory() - before
        row["memory"] = {"predicted": predicted, "measured": measured}
        return row | self._speed(row, 3 * batch * work)  # backwards twice the work of forwards


def pack(pipe: Pipeline, bits: int) -> int:
    """Round the transformer's weights to so many bits in memory; the bytes that this saves."""
    dit, config = pipe.dit, pipe.dit_config
    group = group_size(config) if isinstance(config, DiTConfig) else 64

    def is_packed(path: str, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear) and layer.weight.shape[-1] % group == 0

    before = sum(a.nbytes for a in _arrays(dit))
    nn.quantize(dit, group_size=group, bits=bits, class_predicate=is_packed)
    answer_in_kind(dit)
    return before - sum(a.nbytes for a in _arrays(dit))


def _arrays(module: nn.Module) -> list[mx.array]:
    return list(flat_parameters(module).values())


def _draw(pipe: Pipeline, s: Settings) -> None:
    pipe.decode(last_step(pipe.stream(s)).x, s.background)


def _settle() -> None:
    gc.collect()
    mx.clear_cache()
