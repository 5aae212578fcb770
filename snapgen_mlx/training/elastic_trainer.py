"""One optimizer step over the widths of an elastic model [paper 3.2] (training section 2).

Every step trains the full width and narrower variants on the same noisy latents: flow matching
(Eq. 4) on all, and the variants also follow the full width's velocity (Eq. 5). A variant's
gradients are added into the leading slices of the full ones after "adaptive scaling", which the
paper leaves undefined; ours brings both to the same norm over the shared slice.

What is trained is a flat dictionary of arrays with the supernet's paths: all weights, or LoRA
matrices, or a few of the weights; the rest stands frozen in the widths' models.
"""

from dataclasses import dataclass
from functools import partial

import mlx.core as mx
from mlx.utils import tree_unflatten

from ..config import DiTConfig
from ..device import training_dtype
from ..models.dit import DiT
from ..models.elastic import bank_index, empty_models, scatter_add, slice_flat
from .flow_matching import add_noise, sample_timesteps, validation_loss
from .loop import Inputs
from .optimizer import AdamOptions, Averaged, add_arrays, global_norm, mean_over_processes

RATIO_EMA = 0.99
RATIO_RANGE = (0.2, 5.0)


@dataclass
class ElasticOptions(AdamOptions):
    shift: float = 1.0  # shift of the training timesteps; ``finetune`` sets ``training_shift``
    distill: float = 1.0  # weight of Eq. 5
    adaptive: bool = True
    subnets: str = "one"  # narrower widths per step: one drawn uniformly, or "all" (sandwich rule)


def shared(params: dict) -> dict:
    """The parameters that widths share (all but the banks)."""
    return {k: a for k, a in params.items() if bank_index(k) is None}


def backward_order(path: str) -> tuple:
    """Sorts parameters as a backward pass comes to them: the last block first."""
    part, _, rest = path.partition(".")
    stages = ("final", "up", "upsample", "mid", "downsample", "down")
    stage = stages.index(part) if part in stages else len(stages)
    number = rest.partition(".")[0]
    return stage, -int(number) if number.isdigit() else 0


class ElasticTrainer:
    """Trains ``params`` at every width; ``step`` makes one update.

    Args: config, of the supernet (or of a single width); params, the flat {path: array} to be
        trained; models, one ``DiT`` per width that holds everything else (when None, ``params``
        are all there is).
    Isolated parameters of a width that a step does not train are left alone entirely: no
    gradient, no moment update, no decay.
    """

    def __init__(
        self, config: DiTConfig, params: dict, options: ElasticOptions, models=None, base: str = ""
    ):
        self.config, self.options, self.base = config, options, base
        self.weights = Averaged(params, options)
        self.full = len(config.widths) - 1
        self.models = models or empty_models(config)
        if options.checkpoint:
            for model in self.models:
                model.checkpoint_blocks()
        # |g_full| / |g_s| over the shared slice, a running mean per narrower width.
        self.ratios = {str(i): mx.array(0.0) for i in range(self.full)}
        # A compiled graph runs in its own order, which forgoes what checkpointing saves.
        compiled = (lambda f: f) if options.checkpoint else mx.compile
        self._grads = [compiled(partial(self._loss_and_grads, i)) for i in range(self.full + 1)]
        self._merges = [mx.compile(partial(self._merge, i)) for i in range(self.full)]

    ahead = 1

    def bind(self, index: int, params: dict[str, mx.array]) -> DiT:
        """The model of one width with these supernet parameters."""
        return self._bind(index, slice_flat(params, self.config, index))

    def _bind(self, index: int, own: dict[str, mx.array]) -> DiT:
        dtype = training_dtype()  # of the copies computed with; those trained stay float32
        cast = [(k, a.astype(dtype)) for k, a in own.items()]
        self.models[index].update(tree_unflatten(cast))
        return self.models[index]

    def release(self) -> None:
        """Let go of the arrays that ``bind`` put into the models: compiled steps bind no others."""
        for i in range(len(self.models)):
            own = slice_flat(self.weights.params, self.config, i)
            self._bind(i, dict.fromkeys(own, mx.array(0.0)))

    def objective(self, index, own, batch, target, guide):
        """What a width minimises, the losses to be reported, and its velocity.

        Args: own, its parameters by its model's paths; batch (x_t, t, text, masks); target, the
            velocity (B, H, W, C); guide, {name: (B, ...)}, what else a step's noise holds,
            such as a teacher's answers, and, for a narrower width, "v_full", the full one's
            velocity.
        """
        v = self._bind(index, own)(*batch).astype(mx.float32)
        loss = flow = (v - target).square().mean()
        if "v_full" in guide:
            loss = loss + self.options.distill * (v - guide["v_full"]).square().mean()
        return loss, {"loss": flow}, v

    def look_ahead(self, inputs: list[Inputs]) -> list[Inputs]:
        return inputs

    def _loss_and_grads(self, index, params, batch, target, guide):
        """Losses, velocity and gradients of one width; the gradients have the variant's shapes."""

        def loss(own):
            return self.objective(index, own, batch, target, guide)

        own = slice_flat(params, self.config, index)
        (_, losses, v), grads = mx.value_and_grad(loss)(own)
        return losses, v, grads

    def _pass(self, index: int, parts: list, guides: list) -> tuple[dict, dict, list]:
        """A width's mean losses and gradients over micro-batches and processes; velocities."""
        losses: dict[str, mx.array] = {}
        grads: dict[str, mx.array] = {}
        velocities = []
        for (batch, target), guide in zip(parts, guides, strict=True):
            new_losses, v, new = self._grads[index](self.weights.params, batch, target, guide)
            velocities.append(v)
            losses = add_arrays(losses, new_losses) if losses else new_losses
            grads = add_arrays(grads, new) if grads else new
            if self.options.checkpoint:
                mx.eval(new_losses, v)
                for path in sorted(grads, key=backward_order):
                    mx.eval(grads[path])
            # The graph of one micro-batch and width is freed before the next is built.
            mx.eval(losses, grads, v)
        # The model must not hold on to weights that the update replaces.
        self._bind(index, {k: mx.zeros(g.shape) for k, g in grads.items()})
        if len(parts) > 1:
            losses, grads = ({k: a / len(parts) for k, a in d.items()} for d in (losses, grads))
        return mean_over_processes(losses), mean_over_processes(grads), velocities

    def _merge(self, index, total, full, sub, ratio):
        """``total`` with ``sub`` by adaptive scaling [our choice]: w = EMA(|g_full| / |g_s|),
        clipped."""
        own = shared(slice_flat(full, self.config, index))
        theirs = shared(sub)
        n_full, n_sub = global_norm(own), global_norm(theirs)
        now = n_full / mx.maximum(n_sub, 1e-12)
        ratio = mx.where(ratio == 0, now, RATIO_EMA * ratio + (1 - RATIO_EMA) * now)
        weight = mx.clip(ratio, *RATIO_RANGE) if self.options.adaptive else mx.array(1.0)
        cosine = sum((own[k] * theirs[k]).sum() for k in own) / mx.maximum(n_full * n_sub, 1e-12)
        sub = {k: weight * g for k, g in sub.items()}
        return scatter_add(total, sub, self.config, index), ratio, weight, cosine

    def draw(self, rng, key: mx.array, shape: tuple) -> tuple[dict[str, mx.array], list[int]]:
        """A step's noise for a batch of latents of ``shape``, and the narrower widths it trains."""
        k_noise, k_time = mx.random.split(key)
        t = sample_timesteps(k_time, shape[0], self.options.shift)
        subnets = list(range(self.full))
        if subnets and self.options.subnets == "one":
            subnets = [int(rng.integers(self.full))]
        return {"eps": mx.random.normal(shape, key=k_noise), "t": t}, subnets

    def step(self, x0, text, masks, noise: dict, subnets: list[int]) -> dict[str, mx.array]:
        """One update of the full width and some narrower ones [paper 3.2].

        Under ``mlx.launch`` each process gives its part of the batch, and gradients are averaged.

        Args:
            x0: latents (B, H, W, C).
            text: {encoder: states (B, L, dim)}.
            masks: {encoder: (B, L) bool}.
            noise: of ``draw``.
            subnets: indices of the narrower widths.

        Returns:
            Scalars by name: the flow loss of each width, w and cosine of each subnet, gradient
                norm.
        """
        x_t, target = add_noise(x0, noise["eps"], noise["t"])
        n = len(x0) // self.options.accumulate
        parts = []
        for i in range(0, len(x0), n):
            cut = [{k: a[i : i + n] for k, a in d.items()} for d in (text, masks)]
            parts.append(((x_t[i : i + n], noise["t"][i : i + n], *cut), target[i : i + n]))
        more = {k: a for k, a in noise.items() if k not in ("eps", "t")}
        guides = [{k: a[i : i + n] for k, a in more.items()} for i in range(0, len(x0), n)]
        names = self.config.variants
        losses, grads, v_full = self._pass(self.full, parts, guides)
        metrics = {f"{k}/{names[self.full]}": a for k, a in losses.items()}
        full = self._into_bank(grads)
        grads = full
        guides = [g | {"v_full": v} for g, v in zip(guides, v_full, strict=True)]
        for i in subnets:
            losses, sub, _ = self._pass(i, parts, guides)
            grads, self.ratios[str(i)], weight, cosine = self._merges[i](
                grads, full, sub, self.ratios[str(i)]
            )
            metrics |= {f"{k}/{names[i]}": a for k, a in losses.items()}
            metrics |= {f"w/{names[i]}": weight, f"cos/{names[i]}": cosine}
        del full
        metrics["grad"] = self.weights.update(grads)
        mx.eval(self.state(), metrics)
        return metrics

    def _into_bank(self, grads: dict) -> dict:
        """Name the full width's isolated gradients by its own bank entry."""
        banks = {k: g for k, g in grads.items() if bank_index(k) is not None}
        return scatter_add(shared(grads), banks, self.config, self.full)

    def validate(self, fixed: list) -> dict[str, float]:
        """The loss of every width with averaged weights on ``fixed`` batches, by name."""
        losses = {
            f"val/{name}": validation_loss(self.bind(i, self.weights.mean), fixed)
            for i, name in enumerate(self.config.variants)
        }
        self.release()
        return losses

    def identity(self) -> dict:
        """What a saved state belongs to, beside options and data."""
        return {"model": self.config.to_dict(), "base": self.base}

    def state(self) -> dict[str, mx.array]:
        """Everything that changes, flat, for ``save_state``."""
        return self.weights.state() | {f"ratio/{k}": a for k, a in self.ratios.items()}

    def restore(self, arrays: dict[str, mx.array]) -> None:
        self.ratios = {k: arrays[f"ratio/{k}"] for k in self.ratios}
        self.weights.restore({k: a for k, a in arrays.items() if not k.startswith("ratio/")})
