"""One step of elastic training [paper 3.2]: the full width and one narrower, one update of both.

What the paper leaves open is ours (training section 2): the narrower width's gradients are scaled
to the full one's norm over the weights they share, then added.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..precision import autocast
from . import distributed, optimizers
from .data import Batch
from .distributed import local, local_slice, split_like, whole
from .model import SnapGenPPTransformer2DModel
from .text import NAME, WordTransformer

RATIO_EMA = 0.99
RATIO_RANGE = (0.2, 5.0)


@dataclass
class Training:
    """The `training` part of a run's configuration; `batch` is over all processes."""

    batch: int = 64
    optimizer: str = "adam"  # or "muon"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup: int = 200
    steps: int | None = None  # None: until stopped, at a constant rate
    final_rate: float = 0.05  # of the learning rate at `steps`, along a cosine; 1: constant
    clip: float = 1.0
    ema: float = 0.9999  # the most it becomes: young averages forget faster
    distill: float = 1.0  # weight of Eq. 5
    adaptive: bool = True
    text_dropout: float = 0.1
    shift: float = 1.0  # of the training timesteps
    bf16: bool = True
    compile: bool = False
    split: bool = False  # parameters over the processes (FSDP2), in place of a copy in each (DDP)
    checkpointing: bool = False
    seed: int = 0
    first_shards: int | None = 1  # seen from the start; None: all that are there at the first step
    steps_per_shard: int = 0  # one more shard is seen after each so many steps; 0: never
    log_every: int = 20
    validate_every: int = 500
    validation_samples: int = 256
    sheet_every: int = 1000
    prompts: tuple[str, ...] = ()

    def rate(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, then constant or a cosine to `steps`."""
        rate = self.learning_rate * min(1.0, (step + 1) / max(self.warmup, 1))
        if self.steps is None or self.final_rate == 1 or step < self.warmup:
            return rate
        share = min((step - self.warmup) / max(self.steps - self.warmup, 1), 1.0)
        low = self.learning_rate * self.final_rate
        return low + (rate - low) * (1 + math.cos(math.pi * share)) / 2


class Network(nn.Module):
    """The transformer and, where it is trained along, the text encoder, as one module."""

    def __init__(self, dit: SnapGenPPTransformer2DModel, text: WordTransformer | None):
        super().__init__()
        self.dit, self.text = dit, text

    def forward(self, x: Tensor, t: Tensor, text: dict, masks: dict, index: int) -> Tensor:
        """text: {"words": ids (B, L)} for the encoder trained along, else states by encoder."""
        if self.text is not None:
            text = {NAME: self.text(text[NAME], masks[NAME])}
        return self.dit(x, t, text, masks, index)


def is_isolated(name: str) -> bool:
    """Whether a parameter belongs to one width alone (architecture section 3)."""
    return "time_embed." in name or "scale_shift_table" in name


def add_noise(batch: Batch) -> tuple[Tensor, Tensor]:
    """x_t = (1-t)·x0 + t·eps and the velocity eps - x0."""
    t = batch.t[:, None, None, None]
    return (1 - t) * batch.latents + t * batch.noise, batch.noise - batch.latents


def each_moment(state: dict, change: Callable[[Tensor, int], Tensor]) -> dict:
    """An optimizer's state with `change(moment, number of its parameter)` for every moment."""
    moments = {
        i: {name: change(a, i) for name, a in moment.items()}
        for i, moment in state["state"].items()
    }
    return state | {"state": moments}


class Elastic:
    """Network, optimizers and running mean; `step` makes one update.

    Args:
        network: with float32 parameters.
        options: of the run.
        forward: what is called in place of `network`, such as its compiled or distributed form.
    """

    def __init__(self, network: Network, options: Training, forward: Callable | None = None):
        self.network, self.options = network, options
        self.forward = forward or network
        self.widths = network.dit.config.widths
        self.full = len(self.widths) - 1
        self.params = dict(network.named_parameters())
        self.split = any(isinstance(p, DTensor) for p in self.params.values())
        self.groups = {f"dit.{k}": g for k, g in network.dit.sliced().items()}
        self.device = next(iter(self.params.values())).device
        self.optimizers = optimizers.build(self.params, options, self.split)
        self.ema = {k: p.detach().clone() for k, p in self.params.items()}
        # |g_full| / |g_s| over the shared slice, a running mean per narrower width; 0: none yet.
        self.ratios = torch.zeros(self.full, device=self.device)
        self.steps = 0

    def autocast(self):
        return autocast(self.device.type) if self.options.bf16 else nullcontext()

    def velocity(self, x_t: Tensor, batch: Batch, index: int) -> Tensor:
        with self.autocast():
            return self.forward(x_t, batch.t, batch.text, batch.masks, index)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One update on a batch; returns scalars, not synchronised with the host."""
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = self.options.rate(self.steps)
        x_t, target = add_noise(batch)
        v_full = self.velocity(x_t, batch, self.full)
        loss = F.mse_loss(v_full, target)
        loss.backward()
        metrics = {"loss/full": distributed.mean(loss.detach())}
        if self.full:
            metrics |= self.add_subnet(x_t, target, batch, v_full.detach())
        size = self.clip()
        for optimizer in self.optimizers:
            optimizer.step()
        self.zero_grad()
        self.average()
        self.steps += 1
        return metrics | {"grad": size}

    def add_subnet(self, x_t, target, batch: Batch, v_full: Tensor) -> dict[str, Tensor]:
        """Backward pass of the narrower width; its gradients join those of the full one."""
        full = self.gradients()
        self.zero_grad()
        i = batch.subnet
        v = self.velocity(x_t, batch, i)
        loss = F.mse_loss(v, target)
        distill = F.mse_loss(v, v_full)
        (loss + self.options.distill * distill).backward()

        shared = [k for k in full if not is_isolated(k)]
        sub = [local(self.params[k].grad) for k in shared]
        own = [local_slice(full[k], self.groups.get(k, ()), self.widths[i]) for k in shared]
        n_full, n_sub = (distributed.global_norm(grads, self.split) for grads in (own, sub))
        # Beyond the slice the narrower width's gradients are 0, and so are the products.
        dot = distributed.dot([local(full[k]) for k in shared], sub, self.split)
        now = n_full / n_sub.clamp(min=1e-12)
        mean = RATIO_EMA * self.ratios[i] + (1 - RATIO_EMA) * now
        self.ratios[i] = torch.where(self.ratios[i] == 0, now, mean)
        weight = self.ratios[i].clamp(*RATIO_RANGE) if self.options.adaptive else torch.tensor(1.0)

        for k, p in self.params.items():
            if p.grad is None:
                p.grad = full.get(k)
            else:
                grad = local(p.grad).mul_(weight)
                if k in full:
                    grad.add_(local(full[k]))
        name = f"{self.widths[i]:g}"
        return {
            f"loss/{name}": distributed.mean(loss.detach()),
            f"distill/{name}": distributed.mean(distill.detach()),
            f"w/{name}": weight,
            f"ratio/{name}": now,
            f"cos/{name}": dot / (n_full * n_sub).clamp(min=1e-12),
        }

    def zero_grad(self) -> None:
        for p in self.params.values():
            p.grad = None

    def gradients(self) -> dict[str, Tensor]:
        return {k: p.grad for k, p in self.params.items() if p.grad is not None}

    def clip(self) -> Tensor:
        """Bring the gradients' norm down to `clip`; returns what it was."""
        grads = [local(g) for g in self.gradients().values()]
        size = distributed.global_norm(grads, self.split)
        torch._foreach_mul_(grads, (self.options.clip / (size + 1e-6)).clamp(max=1.0))
        return size

    @torch.no_grad()
    def average(self) -> None:
        decay = min(self.options.ema, (1 + self.steps) / (10 + self.steps))
        ema, params = ([local(a) for a in d.values()] for d in (self.ema, self.params))
        torch._foreach_lerp_(ema, params, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters and their running mean."""
        for k, p in self.params.items():
            now, mean = local(p), local(self.ema[k])
            kept = now.clone()
            now.copy_(mean)
            mean.copy_(kept)

    @torch.no_grad()
    def validate(self, batches: dict[str, list[Batch]]) -> dict[str, float]:
        """The flow loss of every width with the averaged weights on fixed batches, {"NAME/WIDTH":
        loss} for each name."""
        self.swap()
        try:
            return {
                f"{name}/{width:g}": self._loss(those, i)
                for name, those in batches.items()
                for i, width in enumerate(self.widths)
            }
        finally:
            self.swap()

    def _loss(self, batches: list[Batch], index: int) -> float:
        total = sum(
            F.mse_loss(self.velocity(x_t, batch, index), target, reduction="sum").item()
            for batch in batches
            for x_t, target in [add_noise(batch)]
        )
        return total / sum(batch.latents.numel() for batch in batches)

    def state(self) -> dict:
        """Everything that changes, tensors whole; every process must ask."""
        return {
            "step": self.steps,
            "params": {k: whole(p.detach()) for k, p in self.params.items()},
            "ema": {k: whole(a) for k, a in self.ema.items()},
            "optimizers": [
                each_moment(optimizer.state_dict(), lambda a, i: whole(a))
                for optimizer in self.optimizers
            ],
            "ratios": self.ratios,
        }

    @torch.no_grad()
    def restore(self, state: dict) -> None:
        for k, p in self.params.items():
            p.copy_(split_like(state["params"][k], p))
            self.ema[k].copy_(split_like(state["ema"][k], p))
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            params = optimizer.param_groups[0]["params"]
            optimizer.load_state_dict(
                each_moment(kept, lambda a, i, params=params: split_like(a, params[i]))
            )
        self.ratios.copy_(state["ratios"])
        self.steps = state["step"]
