"""The life of a training run: steps, validation, state on disk, resumption."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from ..config import DiTConfig
from ..errors import SnapGenError, UsageError
from ..models.elastic import slice_flat
from .checkpoint import load_state, save_state
from .data import LatentDataset
from .elastic import ElasticOptions, ElasticTrainer, sample_timesteps, validation_loss


@dataclass
class RunOptions:
    elastic: ElasticOptions = field(default_factory=ElasticOptions)
    batch: int = 32
    text_dropout: float = 0.1
    seed: int = 0
    minutes: float | None = None  # stop after this long; the state is kept
    save_minutes: float = 3.0
    log_every: int = 50
    validate_every: int = 500


def train(
    config: DiTConfig,
    params: dict,
    data: LatentDataset,
    run,
    options: RunOptions,
    validation: LatentDataset | None = None,
) -> Iterator[dict]:
    """Train all widths from the flat supernet ``params``; yields a record every ``log_every``
    steps.

    Resumes from the newest whole state in ``run``; all randomness of a step follows from (seed,
    step), so a resumed run repeats an uninterrupted one. The last record has ``done``, False when
    ``minutes`` ran out. Validation uses the averaged weights on fixed noise. Raises SnapGenError
    when the state in ``run`` is of other data or options.
    """
    o = options
    world = mx.distributed.init()
    if o.batch % world.size():
        raise UsageError(f"the batch of {o.batch} does not divide among {world.size()} processes")
    trainer = ElasticTrainer(config, params, o.elastic)
    settings = asdict(o)
    for name in ("minutes", "save_minutes", "log_every", "validate_every"):
        settings.pop(name)
    identity = {"options": settings, "data": data.fingerprint, "model": config.to_dict()}
    step = 0
    if state := load_state(run):
        arrays, info = state
        for name, value in json.loads(json.dumps(identity)).items():
            if info.get(name) != value:
                raise SnapGenError(f"the run in {run} has other {name}; resume with the same")
        trainer.restore(arrays)
        step = info["step"]

    fixed = list(_fixed_batches(validation, o)) if validation else []
    started = saved = since = time.monotonic()
    window = []
    while step < o.elastic.steps:
        rng = np.random.default_rng([o.seed, step])
        x0, text, masks = data.batch(rng, o.batch, o.text_dropout)
        k_noise, k_time = mx.random.split(mx.random.key((o.seed << 32) + step))
        eps = mx.random.normal(x0.shape, key=k_noise)
        t = sample_timesteps(k_time, o.batch, o.elastic.shift)
        # Every process draws the whole batch and keeps its share, so that n processes repeat one.
        mine = slice(world.rank(), None, world.size())
        x0, eps, t = x0[mine], eps[mine], t[mine]
        text, masks = ({k: a[mine] for k, a in d.items()} for d in (text, masks))
        subnets = [int(rng.integers(trainer.full))] if trainer.full else []
        metrics = trainer.step(x0, eps, t, text, masks, subnets)
        window.append({k: v.item() for k, v in metrics.items()})
        step += 1
        now = time.monotonic()
        # Processes stop together, as soon as one finds the time over.
        over = o.minutes is not None and now - started > o.minutes * 60
        out_of_time = mx.distributed.all_sum(mx.array(int(over))).item() > 0
        last = step == o.elastic.steps or out_of_time
        if step % o.log_every == 0 or last:
            record = {"step": step}
            for name in sorted({k for m in window for k in m}):
                record[name] = float(np.mean([m[name] for m in window if name in m]))
            record["images/s"] = len(window) * o.batch / (now - since)
            if fixed and (step % o.validate_every == 0 or last):
                for i, name in enumerate(config.variants):
                    model = trainer.models[i]
                    model.update(tree_unflatten(list(slice_flat(trainer.ema, config, i).items())))
                    record[f"val/{name}"] = validation_loss(model, fixed)
            if last:
                record |= {"done": step == o.elastic.steps}
            window, since = [], time.monotonic()
        if last or now - saved > o.save_minutes * 60:
            if world.rank() == 0:
                save_state(run, step, trainer.state(), identity)
            saved = time.monotonic()
        if not window:
            yield record
        if last:
            return


def averaged_weights(run) -> dict[str, mx.array]:
    """Flat EMA parameters of the newest whole state in ``run``."""
    state = load_state(run)
    if state is None:
        raise SnapGenError(f"there is no training state in {run}")
    return {k.removeprefix("ema/"): a for k, a in state[0].items() if k.startswith("ema/")}


def _fixed_batches(data: LatentDataset, o: RunOptions):
    """All of ``data`` in order, one caption each, with noise and timesteps that never change."""
    n = len(data.latents)
    rng = np.random.default_rng(0)
    eps = rng.standard_normal(data.latents.shape, dtype=np.float32)
    t = rng.permutation((np.arange(n, dtype=np.float32) + 0.5) / n)
    for i in range(0, n, o.batch):
        rows = slice(i, i + o.batch)
        text, masks = data.text([captions[0] for captions in data.captions[rows]])
        yield mx.array(data.latents[rows]), mx.array(eps[rows]), mx.array(t[rows]), text, masks
