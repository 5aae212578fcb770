"""What rounding took, given back by what stays float [paper, supplement C] (training section 5).

The weights of few bits are frozen. Biases, norms and modulation tables are tuned by
self-distillation, until velocities and final tokens of every width are the float model's:
|v_q - v|² + |f_q - f|².
"""

import shutil
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from ..device import training_dtype, usable_memory
from ..layout import TEXT_FOLDERS
from ..loading import load_supernet
from ..lora import LoRALinear
from ..models.dit import DiT
from ..pipeline import Pipeline
from ..sampling import schedule
from ..tensors.safetensors_io import load_arrays, read_header, save_arrays
from ..tensors.weights import weight_files
from ..training.checkpoint import fingerprint
from ..training.data import LatentDataset, cached_states
from ..training.elastic_trainer import ElasticOptions, ElasticTrainer
from ..training.encoding import draw_prior
from ..training.loop import LOG, RunOptions, train
from ..training.teacher import velocity_and_tokens
from ..training.training_memory import TrainingMemory
from .calibration import load_widths

SAVE_MINUTES = 1.0
FEW = 64  # prompts


@dataclass
class TuningOptions(ElasticOptions):
    learning_rate: float = 1e-3
    steps: int = 300
    warmup: int = 20
    ema: float = 0.99
    adaptive: bool = False
    subnets: str = "all"

    @classmethod
    def from_bits(cls, bits: float, steps: int) -> "TuningOptions":
        """Options for weights of this many bits on average.

        The learning rate halves with every bit, because rounding errors do. With the rate of 4
        bits, tuning at 8 bits would do more harm than rounding.

        Args:
            bits: average over the weights.
            steps: of tuning.
        """
        return cls(steps=steps, learning_rate=cls.learning_rate * min(1, 2 ** (4 - bits)))


def is_tuned(path: str) -> bool:
    """Is it a bias, a norm or a modulation table?"""
    layer, _, name = path.rpartition(".")
    return name == "bias" or "norm" in layer.rpartition(".")[2] or "scale_shift_table" in layer


class TuningTrainer(ElasticTrainer):
    """Brings every width of a quantized model to its float one.

    Args beside ``ElasticTrainer``'s: teachers, the float model of each width; sigmas, those at
    which the model is used.
    """

    def __init__(self, config, params, options, models, base="", *, teachers, sigmas):
        super().__init__(config, params, options, models, base)
        self.teachers, self.sigmas = teachers, mx.array(sigmas)
        mx.eval([model.parameters() for model in (*models, *teachers)])
        wrapped = [
            {path for path, m in model.named_modules() if isinstance(m, LoRALinear)}
            for model in models
        ]
        # A few-step LoRA stands around a packed layer, whose bias it hides.
        self._inner = [{f"{path}.bias": f"{path}.linear.bias" for path in w} for w in wrapped]

    def _bind(self, index: int, own: dict[str, mx.array]) -> DiT:
        inner = self._inner[index]
        return super()._bind(index, {inner.get(k, k): a for k, a in own.items()})

    def draw(self, rng, key: mx.array, shape: tuple) -> tuple[dict[str, mx.array], list[int]]:
        noise, subnets = super().draw(rng, key, shape)
        noise["t"] = self.sigmas[mx.array(rng.integers(len(self.sigmas), size=shape[0]))]
        return noise, subnets

    def _pass(self, index: int, parts: list, guides: list) -> tuple[dict, dict, list]:
        """Asks the teacher outside of the gradients: there attention is fused."""
        asked = [self._asked(index, batch) for batch, _ in parts]
        return super()._pass(index, parts, [g | a for g, a in zip(guides, asked, strict=True)])

    def _asked(self, index: int, batch) -> dict[str, mx.array]:
        v, tokens = velocity_and_tokens(self.teachers[index], *batch)
        answers = {"v": v, "tokens": mx.fast.layer_norm(tokens, None, None, 1e-6)}
        mx.eval(answers)
        return answers

    def objective(self, index, own, batch, target, guide):
        v, tokens = velocity_and_tokens(self._bind(index, own), *batch)
        tokens = mx.fast.layer_norm(tokens, None, None, 1e-6)
        out = (v - guide["v"]).square().mean()
        features = (tokens - guide["tokens"]).square().mean()
        return out + features, {"out": out, "features": features}, v


def tune(
    model, folder, prompts: list[str], run, options: TuningOptions, batch: int = 16
) -> Iterator[dict]:
    """Tune the quantized model ``folder``, in its place, to the float ``model`` it was made from.

    Learned from are pictures that the float model draws of ``prompts``, best many, noised as far
    as the steps of its sampler are; with a few-step LoRA in the folder both have it. Yields the
    records of ``loop.train``, whose state lies in ``run``. Codes, scales and palettes stay as they
    are; types and sizes of what is tuned too. Raises SnapGenError for damaged files.
    """
    model, folder, run = Path(model), Path(folder), Path(run)
    config, params = load_supernet(folder)
    params = {k: a for k, a in params.items() if is_tuned(k)}
    pipes = load_widths(model, training_dtype())
    settings = [pipe.settings("any") for pipe in pipes]
    options = options_that_fit(model, folder, params, options, batch)
    data = yield from draw_pictures(model, pipes[-1], prompts, run / "cache")
    trainer = TuningTrainer(
        *(config, params, options, [pipe.dit for pipe in load_widths(folder, training_dtype())]),
        fingerprint(model / "transformer", folder / "transformer"),
        teachers=[pipe.dit for pipe in pipes],
        sigmas=sorted({t for s in settings for t in schedule(s.steps, s.shift)[:-1]}),
    )
    # What guidance is against needs no text.
    dropout = 0.1 if any(s.guidance != 1 for s in settings) else 0.0
    o = RunOptions(
        batch, text_dropout=dropout, save_minutes=SAVE_MINUTES, log_every=10, sample_every=0
    )
    yield from train(trainer, data, run, o)
    replace_tensors(folder / "transformer", trainer.weights.mean)


def draw_pictures(
    model: Path, pipe: Pipeline, prompts: list[str], cache: Path
) -> Generator[dict, None, LatentDataset]:
    """The data set of a picture of each prompt, or two of few, by the widest variant of a model.

    Args:
        model: folder of the model that draws.
        pipe: a pipeline with its text encoders.
        prompts: what to draw.
        cache: folder that keeps the pictures.

    Yields:
        The records of ``encoding.draw_prior`` and ``data.cached_states``.
    """
    drawn = prompts * (2 if len(prompts) < FEW else 1)
    latents = yield from draw_prior(model, drawn, cache)
    text = fingerprint(*(model / name for name in TEXT_FOLDERS))
    encoders = yield from cached_states(pipe.encoders, text, prompts, cache)
    pipe.free("encoders")
    return LatentDataset(latents, [[p] for p in drawn], encoders)


def options_that_fit(
    model: Path, folder: Path, params: dict, options: TuningOptions, batch: int
) -> TuningOptions:
    """``options``, with a batch in parts or with checkpointing if memory needs it.

    Args:
        model: folder of the float model.
        folder: of the quantized model.
        params: what is tuned.
        options: as asked for.
        batch: pictures in a step.

    Raises:
        UsageError: nothing fits.
    """
    ours, theirs = TrainingMemory.from_model(folder), TrainingMemory.from_model(model)
    trained = sum(a.size for a in params.values())
    memory = replace(ours, beside=ours.frozen + theirs.frozen, trained=trained)
    ways = [options, *(o for _, o in memory.alternatives(options, batch) if not o.lora)]
    usable = usable_memory()
    for fit in ways:
        if memory.peak(fit, batch) <= usable:
            return fit
    memory.check(options, batch)  # raises
    return options


def remove_run(run: Path) -> None:
    """Remove the state of a tuning that is done."""
    shutil.rmtree(run / "cache", ignore_errors=True)
    for file in (*run.glob("state-*"), run / LOG):
        file.unlink(missing_ok=True)
    with suppress(OSError):  # something else is in it
        run.rmdir()


def replace_tensors(folder, arrays: dict[str, mx.array]) -> None:
    """Put ``arrays`` in the place of a component's tensors of these names, in their types."""
    for file in sorted(set(weight_files(folder).values())):
        order, old = read_header(file), load_arrays(file)
        save_arrays(file, {k: arrays.get(k, old[k]).astype(old[k].dtype) for k in order})
