"""One optimizer step over the widths of an elastic model [paper 3.2] (training section 2).

Every step trains the full width and one narrower variant on the same noisy latents: flow matching
(Eq. 4) on both, and the variant also follows the full width's velocity (Eq. 5). The variant's
gradients are added into the leading slices of the full ones after "adaptive scaling", which the
paper leaves undefined; ours brings both to the same norm over the shared slice.
"""

from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from ..config import DiTConfig
from ..models.dit import DiT
from ..models.elastic import bank_index, scatter_add, slice_flat

RATIO_EMA = 0.99
RATIO_RANGE = (0.2, 5.0)


@dataclass
class ElasticOptions:
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: int = 100
    steps: int = 1000
    final_rate: float = 0.05  # of the learning rate, at the end of the cosine
    clip: float = 1.0
    ema: float = 0.999
    shift: float = 1.0  # of the training timesteps: 1 for small latents, 3 at 1024² px
    distill: float = 1.0  # weight of Eq. 5
    adaptive: bool = True
    subnets: str = "one"  # narrower widths per step: one drawn uniformly, or "all" (sandwich rule)


def sample_timesteps(key: mx.array, batch: int, shift: float) -> mx.array:
    """t (B,) of u = sigmoid(N(0, 1)), shifted: shift·u / (1 + (shift-1)·u) (training section 1)."""
    u = mx.sigmoid(mx.random.normal((batch,), key=key))
    return shift * u / (1 + (shift - 1) * u)


def add_noise(x0: mx.array, eps: mx.array, t: mx.array) -> tuple[mx.array, mx.array]:
    """x_t = (1-t)·x0 + t·eps and the velocity eps - x0; x0, eps (B, H, W, C), t (B,)."""
    t = t[:, None, None, None]
    return (1 - t) * x0 + t * eps, eps - x0


def norm(grads: dict) -> mx.array:
    """Euclidean norm over all arrays of a flat dictionary."""
    return mx.sqrt(sum(g.square().sum() for g in grads.values()))


def shared(params: dict) -> dict:
    """The parameters that widths share (all but the banks)."""
    return {k: a for k, a in params.items() if bank_index(k) is None}


def average(grads: dict, loss: mx.array) -> tuple[dict, mx.array]:
    """Mean of flat gradients and a loss over the processes of ``mlx.launch``."""
    *arrays, loss = nn.average_gradients([*grads.values(), loss])
    return dict(zip(grads, arrays, strict=True)), loss


class ElasticTrainer:
    """Supernet parameters, Adam state and EMA; ``step`` makes one update.

    ``params`` is the supernet's flat {path: float32 array}. State is held in flat dictionaries;
    isolated parameters of a width that a step does not train are left alone entirely: no
    gradient, no moment update, no decay.
    """

    def __init__(self, config: DiTConfig, params: dict, options: ElasticOptions):
        self.config, self.options = config, options
        self.params = {k: a.astype(mx.float32) for k, a in params.items()}
        self.ema = dict(self.params)
        self.full = len(config.widths) - 1
        self.models = [
            DiT(config.variant(i) if len(config.widths) > 1 else config)
            for i in range(len(config.widths))
        ]
        # |g_full| / |g_s| over the shared slice, a running mean per narrower width.
        self.ratios = {str(i): mx.array(0.0) for i in range(self.full)}
        o = options
        rates = [optim.linear_schedule(0.0, o.learning_rate, max(o.warmup, 1))]
        decay = max(o.steps - o.warmup, 1)
        rates.append(optim.cosine_decay(o.learning_rate, decay, o.learning_rate * o.final_rate))
        self.optimizer = optim.Adam(optim.join_schedules(rates, [o.warmup]), betas=list(o.betas))
        self.optimizer.init(self.params)
        self._grads = [mx.compile(partial(self._loss_and_grads, i)) for i in range(self.full + 1)]
        self._merges = [mx.compile(partial(self._merge, i)) for i in range(self.full)]
        self._average = mx.compile(self._average_fn)

    def _loss_and_grads(self, index, params, batch, target, v_full):
        """Loss, velocity and gradients of one width; the gradients have the variant's shapes."""
        model = self.models[index]

        def loss(p):
            model.update(tree_unflatten(list(p.items())))
            v = model(*batch).astype(mx.float32)
            flow = (v - target).square().mean()
            if v_full is None:
                return flow, flow, v
            return flow + self.options.distill * (v - v_full).square().mean(), flow, v

        sub = slice_flat(params, self.config, index)
        (_, flow, v), grads = mx.value_and_grad(loss)(sub)
        return flow, v, grads

    def _merge(self, index, grads, sub, ratio):
        """Adaptive scaling [our choice]: w = EMA(|g_full| / |g_s|), clipped."""
        own = shared(slice_flat(grads, self.config, index))
        theirs = shared(sub)
        n_full, n_sub = norm(own), norm(theirs)
        now = n_full / mx.maximum(n_sub, 1e-12)
        ratio = mx.where(ratio == 0, now, RATIO_EMA * ratio + (1 - RATIO_EMA) * now)
        weight = mx.clip(ratio, *RATIO_RANGE) if self.options.adaptive else mx.array(1.0)
        cosine = sum((own[k] * theirs[k]).sum() for k in own) / mx.maximum(n_full * n_sub, 1e-12)
        sub = {k: weight * g for k, g in sub.items()}
        return scatter_add(grads, sub, self.config, index), ratio, weight, cosine

    def _average_fn(self, ema, params, step):
        # Young averages forget faster, or the random start would weigh on them for long.
        d = mx.minimum(self.options.ema, (1 + step) / (10 + step))
        return {k: d * ema[k] + (1 - d) * params[k] for k in ema}

    def step(self, x0, eps, t, text, masks, subnets: list[int]) -> dict[str, mx.array]:
        """One update on latents x0 (B, H, W, C), noise eps alike, t (B,), encoder states.

        Under ``mlx.launch`` each process gives its share of the batch; gradients are averaged.
        ``subnets``: indices of the narrower widths trained beside the full one. Returns scalars
        by name: the flow loss of each width trained, w and cosine per subnet, gradient norm.
        """
        x_t, target = add_noise(x0, eps, t)
        batch = (x_t, t, text, masks)
        names = self.config.variants
        loss, v_full, grads = self._grads[self.full](self.params, batch, target, None)
        # The full width's graph is freed before the narrower one is built.
        mx.eval(loss, v_full, grads)
        grads, loss = average(grads, loss)
        metrics = {f"loss/{names[self.full]}": loss}
        grads = self._into_bank(grads)
        for i in subnets:
            loss, _, sub = self._grads[i](self.params, batch, target, v_full)
            sub, loss = average(sub, loss)
            grads, self.ratios[str(i)], weight, cosine = self._merges[i](
                grads, sub, self.ratios[str(i)]
            )
            metrics |= {f"loss/{names[i]}": loss, f"w/{names[i]}": weight}
            metrics[f"cos/{names[i]}"] = cosine
        grads, metrics["grad"] = optim.clip_grad_norm(grads, self.options.clip)
        self.params = self.params | self.optimizer.apply_gradients(grads, self.params)
        self.ema = self._average(self.ema, self.params, self.optimizer.step)
        mx.eval(self.params, self.ema, self.optimizer.state, self.ratios, metrics)
        return metrics

    def _into_bank(self, grads: dict) -> dict:
        """Name the full width's isolated gradients by its own bank entry."""
        banks = {k: g for k, g in grads.items() if bank_index(k) is not None}
        return scatter_add(shared(grads), banks, self.config, self.full)

    def state(self) -> dict[str, mx.array]:
        """Everything that changes, flat, for ``save_state``."""
        groups = {"params": self.params, "ema": self.ema, "ratio": self.ratios}
        groups["opt"] = dict(tree_flatten(self.optimizer.state))
        return {f"{group}/{k}": a for group, arrays in groups.items() for k, a in arrays.items()}

    def restore(self, arrays: dict[str, mx.array]) -> None:
        groups = {"params": {}, "ema": {}, "ratio": {}, "opt": {}}
        for key, a in arrays.items():
            group, _, path = key.partition("/")
            groups[group][path] = a
        self.params, self.ema, self.ratios = groups["params"], groups["ema"], groups["ratio"]
        # Moments are keyed by the parameter's dotted path, then "m" or "v".
        state = {}
        for path, a in groups["opt"].items():
            head, dot, leaf = path.rpartition(".")
            state.setdefault(head, {}).update({leaf: a}) if dot else state.update({path: a})
        self.optimizer.state = state


def validation_loss(model: DiT, batches) -> float:
    """Mean flow loss of one width over ``batches`` of (x0, eps, t, text, masks) (paper, 4)."""
    total, n = 0.0, 0
    for x0, eps, t, text, masks in batches:
        x_t, target = add_noise(x0, eps, t)
        error = model(x_t, t, text, masks).astype(mx.float32) - target
        total += error.square().mean().item() * len(x0)
        n += len(x0)
    return total / n
