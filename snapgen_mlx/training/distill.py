"""Learning from a frozen teacher: knowledge distillation [paper Eqs. 6-8] (training section 3).

L_KD = S(L_diff, L_out) + L_feat: the flow-matching loss and the distance to the teacher's velocity,
joined by timestep-aware scaling S [after SnapGen; ours], and the distance to the teacher's final
tokens, which a Linear per width, phi, maps the student's to.
"""

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import DiTConfig
from ..device import scalar
from ..models.dit import DiT
from .elastic_trainer import ElasticOptions, ElasticTrainer
from .flow_matching import add_noise
from .loop import Inputs
from .teacher import Teacher, pad_text, velocity_and_tokens

PROJECTOR = "projector"
LARGEST_RATIO = 10.0  # of the flow loss to the teacher's, in ``timestep_aware``
RIDGE = 1e-4  # of the tokens' mean square, in ``ProjectorFit``


def alpha(t: mx.array, shift: float = 1.0) -> mx.array:
    """Density of the training timesteps, divided by its largest value [after SnapGen].

    Args:
        t: timesteps (B,).
        shift: of ``flow_matching.sample_timesteps``.

    Returns:
        (B,): 1 at the most frequent timestep, 0 at both ends.
    """
    # In x = log(t / (1-t)) they are normal around log(shift); the density in t is largest where
    # x = log(shift) + tanh(x / 2), which repetition finds.
    centre = top = math.log(shift)
    for _ in range(50):
        top = centre + math.tanh(top / 2)
    x = mx.log(t / (1 - t))
    largest = math.exp(-0.5 * (top - centre) ** 2) * (2 * math.cosh(top / 2)) ** 2
    return mx.exp(-0.5 * (x - centre).square()) / (largest * t * (1 - t))


def timestep_aware(flow: mx.array, out: mx.array, t: mx.array, shift: float = 1.0) -> mx.array:
    """S of the losses [paper Eq. 6; after SnapGen].

    Where training draws most timesteps it is the flow loss. Elsewhere it is the teacher's loss,
    scaled to the size of the flow loss, but at most by 10: where student and teacher hardly differ
    the scale, and with it the gradient, would have no limit.

    Args:
        flow: flow loss (B,).
        out: distance from the teacher (B,).
        t: timesteps (B,).
        shift: of the timesteps that training draws.

    Returns:
        (B,).
    """
    weight = alpha(t, shift)
    ratio = mx.minimum(mx.stop_gradient(flow / mx.maximum(out, 1e-6)), LARGEST_RATIO)
    return weight * flow + (1 - weight) * ratio * out


def feature_loss(tokens: mx.array, phi: dict[str, mx.array], target: mx.array) -> mx.array:
    """|f_teacher - phi(f_student)|² per sample (B,), on the teacher's grid.

    Args: tokens (B, h, w, d); phi, the Linear's weight (d', d) and bias; target (B, h', w', d').
    """
    error = to_grid(tokens, target.shape[1:3]) @ phi["weight"].T + phi["bias"] - target
    return error.square().mean(axis=(1, 2, 3))


def to_grid(tokens: mx.array, grid: tuple) -> mx.array:
    """Tokens (B, h, w, d) resized to ``grid``."""
    h, w = tokens.shape[1:3]
    if (h, w) == grid:
        return tokens
    return nn.Upsample((grid[0] / h, grid[1] / w), mode="linear")(tokens)


def projector(inputs: int, outputs: int, key: mx.array) -> dict[str, mx.array]:
    """Weight and bias of a fresh phi."""
    bound = inputs**-0.5
    weight = mx.random.uniform(-bound, bound, (outputs, inputs), key=key)
    return {"weight": weight, "bias": mx.zeros(outputs)}


class ProjectorFit:
    """The phi with the least feature loss, from tokens that are added part by part.

    A random phi would at first pull the student to wherever that phi happens to point.
    """

    def __init__(self):
        self.xx, self.xy = mx.array(0.0), mx.array(0.0)

    def add(self, tokens: mx.array, target: mx.array) -> None:
        """Tokens (B, h, w, d) of the student, and (B, h', w', d') of the teacher."""
        x = to_grid(tokens, target.shape[1:3]).reshape(-1, tokens.shape[-1])
        x = mx.concatenate([x, mx.ones((len(x), 1))], axis=1)
        self.xx = self.xx + x.T @ x
        self.xy = self.xy + x.T @ target.reshape(-1, target.shape[-1]).astype(mx.float32)
        mx.eval(self.xx, self.xy)

    def solve(self) -> dict[str, mx.array]:
        """Weight and bias, of all processes' tokens."""
        xx, xy = (
            np.array(mx.distributed.all_sum(a)).astype(np.float64) for a in (self.xx, self.xy)
        )
        diagonal = np.full(len(xx), RIDGE * np.trace(xx[:-1, :-1]) / (len(xx) - 1))
        diagonal[-1] = 0  # the bias is free
        both = np.linalg.solve(xx + np.diag(diagonal), xy)
        return {"weight": mx.array(both[:-1].T, mx.float32), "bias": mx.array(both[-1], mx.float32)}


def without_projectors(params: dict[str, mx.array]) -> dict[str, mx.array]:
    return {k: a for k, a in params.items() if not k.startswith(f"{PROJECTOR}.")}


def projector_of(params: dict[str, mx.array]) -> dict[str, mx.array]:
    """phi of one width's flat parameters."""
    return {name: params[f"{PROJECTOR}.0.{name}"] for name in ("weight", "bias")}


@dataclass
class KDOptions(ElasticOptions):
    # Eq. 5 is off: the teacher's velocity, for the same input and from a better model, takes the
    # place of the full width's.
    distill: float = 0.0


class KDTrainer(ElasticTrainer):
    """Trains every width with L_KD; the phi of each stands in a bank beside its parameters."""

    def __init__(
        self,
        config: DiTConfig,
        params: dict,
        options: KDOptions,
        models=None,
        base="",
        *,
        teacher: Teacher,
    ):
        keys = mx.random.split(mx.random.key(0), len(config.widths))
        for i, key in enumerate(keys):
            phi = projector(int(config.hidden_size * config.widths[i]), teacher.features, key)
            params = params | {f"{PROJECTOR}.{i}.{name}": a for name, a in phi.items()}
        super().__init__(config, params, options, models, base)
        self.teacher = teacher

    def look_ahead(self, inputs: list[Inputs]) -> list[Inputs]:
        """What the teacher says to the noisy latents of some steps, among their noise.

        It depends on no weight of the student: steps of one latent size are asked as one batch.
        """
        out = list(inputs)
        for shape in {step.x0.shape[1:] for step in inputs}:
            rows = [i for i, step in enumerate(inputs) if step.x0.shape[1:] == shape]
            steps = [inputs[i] for i in rows]
            x_t = [add_noise(s.x0, s.noise["eps"], s.noise["t"])[0] for s in steps]
            t = [s.noise["t"] for s in steps]
            answers = self.teacher.outputs(
                mx.concatenate(x_t),
                mx.concatenate(t),
                join_texts([s.text for s in steps]),
                join_texts([s.masks for s in steps]),
            )
            ends = np.cumsum([len(a) for a in t])[:-1].tolist()
            for i, v, tokens in zip(rows, *(mx.split(a, ends) for a in answers), strict=True):
                noise = inputs[i].noise | {"v_teacher": v, "f_teacher": tokens}
                out[i] = inputs[i]._replace(noise=noise)
        return out

    def step(self, x0, text, masks, noise: dict, subnets: list[int]) -> dict[str, mx.array]:
        if scalar(self.weights.optimizer.step) == 0:
            x_t, _ = add_noise(x0, noise["eps"], noise["t"])
            for i in range(len(self.config.widths)):
                fit, model = ProjectorFit(), self.bind(i, self.weights.params)
                for part in rows(len(x0), self.options.accumulate):
                    own, seen = (take_rows(d, part) for d in (text, masks))
                    _, tokens = velocity_and_tokens(model, x_t[part], noise["t"][part], own, seen)
                    fit.add(tokens, noise["f_teacher"][part])
                phi = {f"{PROJECTOR}.{i}.{name}": a for name, a in fit.solve().items()}
                self.weights.begin_with(phi)
            self.release()
        return super().step(x0, text, masks, noise, subnets)

    def objective(self, index, own, batch, target, guide):
        v, tokens = velocity_and_tokens(self._bind(index, own), *batch)
        flow = (v - target).square().mean(axis=(1, 2, 3))
        out = (v - guide["v_teacher"]).square().mean(axis=(1, 2, 3))
        features = feature_loss(tokens, projector_of(own), guide["f_teacher"]).mean()
        loss = timestep_aware(flow, out, batch[1], self.options.shift).mean() + features
        if "v_full" in guide:
            loss = loss + self.options.distill * (v - guide["v_full"]).square().mean()
        return loss, {"loss": flow.mean(), "out": out.mean(), "features": features}, v

    def _bind(self, index: int, own: dict[str, mx.array]) -> DiT:
        return super()._bind(index, without_projectors(own))

    def identity(self) -> dict:
        return super().identity() | {"teacher": self.teacher.fingerprint}


def rows(count: int, parts: int) -> list[slice]:
    """The rows of each of so many equal parts of a batch."""
    n = count // parts
    return [slice(i, i + n) for i in range(0, count, n)]


def take_rows(arrays: dict[str, mx.array], cut: slice) -> dict[str, mx.array]:
    """A part of a batch: of each array (B, ...) the samples ``cut``."""
    return {k: a[cut] for k, a in arrays.items()}


def join_texts(parts: list[dict[str, mx.array]]) -> dict[str, mx.array]:
    """States or masks of some batches along the batch, the shorter texts padded."""
    out = {}
    for name in parts[0]:
        length = max(part[name].shape[1] for part in parts)
        out[name] = mx.concatenate([pad_text(part[name], length) for part in parts])
    return out
