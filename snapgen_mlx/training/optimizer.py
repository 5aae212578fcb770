"""Adam with warm-up, a cosine and a running mean, on flat dictionaries of arrays."""

from dataclasses import dataclass
from functools import partial

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


# One compiled function for each array: MLX's Adam runs a kernel for each product and sum, and a
# whole tree in one function would hold all old and new arrays at once.
@partial(mx.compile, shapeless=True)
def _adam(g, p, m, v, rate, root, betas, eps):
    keep_m, take_m, keep_v, take_v = betas
    m = keep_m * m + take_m * g
    v = keep_v * v + take_v * mx.square(g)
    return p - rate * m / (mx.sqrt(v) * root + eps), m, v


@partial(mx.compile, shapeless=True)
def _average(mean, p, decay):
    return p + decay * (mean - p)


class Adam(optim.Adam):
    """MLX's Adam in one kernel for each array, one array after the other."""

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        """Update the parameters that ``gradients`` names; both are flat, and emptied of them."""
        super().apply_gradients({}, {})  # the step and the learning rate
        return {
            k: self.apply_single(gradients.pop(k), parameters.pop(k), self.state[k])
            for k in list(gradients)
        }

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        rate, root = self.learning_rate, mx.array(1.0)
        if self.bias_correction:
            rate = rate / (1 - self.betas[0] ** self.step)
            root = mx.rsqrt(1 - self.betas[1] ** self.step)
        betas = [mx.array(n) for b in self.betas for n in (b, 1 - b)]  # rounded once
        moments = state["m"], state["v"]
        parameter, state["m"], state["v"] = _adam(
            gradient, parameter, *moments, rate, root, betas, mx.array(self.eps)
        )
        mx.eval(parameter, state["m"], state["v"])  # lazily, old and new arrays would all be held
        return parameter


class Averaged:
    """Flat float32 arrays with their Adam state and running mean."""

    def __init__(self, params: dict[str, mx.array], options: AdamOptions):
        o = self.options = options
        self.params = {k: a.astype(mx.float32) for k, a in params.items()}
        self._mean = dict(self.params) if o.ema else {}
        rates = [optim.linear_schedule(0.0, o.learning_rate, max(o.warmup, 1))]
        decay = max(o.steps - o.warmup, 1)
        rates.append(optim.cosine_decay(o.learning_rate, decay, o.learning_rate * o.final_rate))
        self.optimizer = Adam(optim.join_schedules(rates, [o.warmup]), betas=list(o.betas))
        self.optimizer.init(self.params)

    @property
    def mean(self) -> dict[str, mx.array]:
        """The running mean of the parameters, or themselves where none is kept."""
        return self._mean or self.params

    def begin_with(self, params: dict[str, mx.array]) -> None:
        """Replace some of the parameters; before the first update."""
        self.params |= params
        if self._mean:
            self._mean |= params

    def decay(self, step: mx.array) -> mx.array:
        """Of the running mean after this step."""
        # Young averages forget faster, or the random start would weigh on them for long.
        return mx.minimum(self.options.ema, (1 + step) / (10 + step))

    def update(self, grads: dict[str, mx.array]) -> mx.array:
        """One step of Adam on the parameters that ``grads`` names, which is evaluated.

        Returns:
            The norm of the gradients.
        """
        grads, size = optim.clip_grad_norm(grads, self.options.clip)
        # No other name may hold what is replaced, or all of it would stay until the end.
        names, kept = list(self.params), dict(self.params)
        self.params, self._mean = {}, dict(self._mean)
        updated = self.optimizer.apply_gradients(grads, kept)
        self.params = {k: updated[k] if k in updated else kept[k] for k in names}
        decay = self.decay(self.optimizer.step)
        for k, a in self._mean.items():
            self._mean[k] = _average(a, self.params[k], decay)
            mx.eval(self._mean[k])
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
