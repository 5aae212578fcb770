"""Adam with warm-up, a cosine and a running mean, on flat dictionaries of arrays."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten


@dataclass
class AdamOptions:
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: int = 100
    steps: int = 1000
    final_rate: float = 0.05  # part of the learning rate that is left at the end of the cosine
    clip: float = 1.0
    ema: float = 0.999  # decay of the running mean; 0 for none
    accumulate: int = 1  # micro-batches that a step's batch is split into
    checkpoint: bool = False  # compute blocks again for their gradients, to save memory
    offload: bool = False  # keep a teacher's weights in memory only while it computes
    lora: int | None = None  # rank; None trains all weights

    @property
    def least_steps(self) -> int:
        """The fewest steps that change a weight: a warm-up begins at the learning rate 0."""
        return 2 if self.warmup else 1


def global_norm(grads: dict) -> mx.array:
    """Euclidean norm over all arrays of a flat dictionary."""
    return mx.sqrt(sum(g.square().sum() for g in grads.values()))


def add_arrays(a: dict, b: dict) -> dict:
    """Sums of two flat dictionaries of the same keys."""
    return {k: x + b[k] for k, x in a.items()}


def mean_over_processes(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """Means over processes; of a flat dictionary, whose dotted keys MLX would take for a tree."""
    return dict(zip(arrays, nn.average_gradients(list(arrays.values())), strict=True))


class Averaged:
    """Flat float32 arrays with their Adam state and running mean."""

    def __init__(self, params: dict[str, mx.array], options: AdamOptions):
        o = self.options = options
        self.params = {k: a.astype(mx.float32) for k, a in params.items()}
        self._mean = dict(self.params) if o.ema else {}
        rates = [optim.linear_schedule(0.0, o.learning_rate, max(o.warmup, 1))]
        decay = max(o.steps - o.warmup, 1)
        rates.append(optim.cosine_decay(o.learning_rate, decay, o.learning_rate * o.final_rate))
        self.optimizer = optim.Adam(optim.join_schedules(rates, [o.warmup]), betas=list(o.betas))
        self.optimizer.init(self.params)
        self._average = mx.compile(self._average_fn)

    @property
    def mean(self) -> dict[str, mx.array]:
        """The running mean of the parameters, or themselves where none is kept."""
        return self._mean or self.params

    def _average_fn(self, mean, params, step):
        # Young averages forget faster, or the random start would weigh on them for long.
        d = mx.minimum(self.options.ema, (1 + step) / (10 + step))
        return {k: a + (1 - d) * (params[k] - a) for k, a in mean.items()}

    def update(self, grads: dict[str, mx.array]) -> mx.array:
        """One step of Adam on the parameters that ``grads`` names; the gradients' norm. Lazy."""
        grads, size = optim.clip_grad_norm(grads, self.options.clip)
        self.params = self.params | self.optimizer.apply_gradients(grads, self.params)
        self._mean = self._average(self._mean, self.params, self.optimizer.step)
        return size

    def state(self) -> dict[str, mx.array]:
        """Everything that changes, flat: params/PATH, ema/PATH, opt/PATH.m and so on."""
        groups = {"params": self.params, "ema": self._mean}
        groups["opt"] = dict(tree_flatten(self.optimizer.state))
        return {f"{group}/{k}": a for group, arrays in groups.items() for k, a in arrays.items()}

    def restore(self, arrays: dict[str, mx.array]) -> None:
        groups: dict[str, dict[str, mx.array]] = {"params": {}, "ema": {}, "opt": {}}
        for key, a in arrays.items():
            group, _, path = key.partition("/")
            groups[group][path] = a
        self.params, self._mean = groups["params"], groups["ema"]
        # Moments are keyed by the parameter's dotted path, then "m" or "v".
        state: dict = {}
        for path, a in groups["opt"].items():
            head, dot, leaf = path.rpartition(".")
            state.setdefault(head, {}).update({leaf: a}) if dot else state.update({path: a})
        self.optimizer.state = state
