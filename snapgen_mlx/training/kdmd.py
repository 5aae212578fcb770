"""Four steps without guidance: K-DMD [paper 3.3, Eqs. 9-10, supplement H] (training section 4).

Two LoRAs share a frozen base of one width. The student's draws in four steps. The critic's learns
the velocity of the student's pictures; its difference from the guided teacher changes the student
(DMD). The student also follows a 4-step teacher, or else the guided one [Meng et al. 2023].
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import mlx.core as mx
from mlx.utils import tree_unflatten

from ..device import scalar, training_dtype
from ..models.dit import DiT
from ..sampling import FEW_STEPS, schedule
from .distill import (
    PROJECTOR,
    ProjectorFit,
    feature_loss,
    projector,
    projector_of,
    rows,
    take_rows,
    without_projectors,
)
from .dmd import SHIFT, balanced, by_tau, dmd_loss, per_sample, sample_taus
from .flow_matching import add_noise
from .loop import Inputs
from .lora_training import LoRAWeights, lora_params
from .optimizer import AdamOptions, add_arrays, mean_over_processes
from .teacher import Teacher, velocity_and_tokens

SIGMAS = schedule(int(FEW_STEPS["steps"]), SHIFT)


TERMS = {"kdmd": ("dmd", "out", "features"), "dmd": ("dmd",), "kd": ("out", "features")}


@dataclass
class KDMDOptions(AdamOptions):
    betas: tuple[float, float] = (0.0, 0.99)
    warmup: int = 20
    final_rate: float = 1.0
    ema: float = 0.99
    average_from: int = 200  # step at which the student's running mean begins, half at the latest
    lora: int = 64  # rank of the LoRAs
    loss: str = "kdmd"  # "kdmd", "dmd", or "kd": only the 4-step or guided teacher
    balance: bool = False  # the losses' gradients have one norm; otherwise they are 1:1:1 [paper]
    critic_steps: int = 5  # critic steps for each student step
    guidance: float = 4.0  # guidance of the teacher
    noised_real: bool = False  # x_t comes from real latents, not from the student's own steps

    @property
    def turns(self) -> int:
        """Steps to one of the student's."""
        return 1 if self.loss == "kd" else self.critic_steps

    @property
    def least_steps(self) -> int:
        """The fewest steps that change the student."""
        return self.turns * (2 if self.warmup // self.turns else 1)


class KDMDTrainer:
    """Trains the LoRAs of student and critic beside ``model``, one width with LoRA layers.

    Args:
        teacher: the guided teacher, and the 4-step one if it has a few-step LoRA.
        fingerprints: what a saved state belongs to, by "base" and "teacher".
        watch: called by ``validate``.
    """

    def __init__(
        self,
        model: DiT,
        teacher: Teacher,
        options: KDMDOptions,
        seed: int = 0,
        fingerprints: dict | None = None,
        watch=None,
    ):
        o = self.options = options
        self.model, self.teacher, self.watch = model, teacher, watch
        mx.eval(model.parameters())  # or every compiled function holds its own
        self.fingerprints = fingerprints or {}
        params = lora_params(model.config, o.lora, seed)
        if o.loss != "dmd":
            phi = projector(model.config.hidden_size, teacher.features, mx.random.key(seed))
            params |= {f"{PROJECTOR}.0.{name}": a for name, a in phi.items()}
        turns = o.turns
        own = replace(o, steps=o.steps // turns, warmup=o.warmup // turns)
        self.turns = turns
        self.student = LoRAWeights(params, own, min(o.average_from, o.steps // 2) // turns)
        self.critic = None
        if o.loss != "kd":
            self.critic = LoRAWeights(lora_params(model.config, o.lora, seed), replace(o, ema=0))
        self.steps = mx.array(0)
        if o.checkpoint:
            model.checkpoint_blocks()
        # A compiled graph runs in its own order, which forgoes what checkpointing saves.
        compiled = (lambda f: f) if o.checkpoint else mx.compile
        self._jump = mx.compile(self._jump_fn)
        terms, grads_fn = TERMS[o.loss] if o.balance else [None], self._student_grads_fn
        self._student_grads = {term: compiled(partial(grads_fn, term=term)) for term in terms}
        self._critic_grads = compiled(self._critic_grads_fn)

    ahead = 1  # what the teacher is asked depends on the student of the step

    def look_ahead(self, inputs: list[Inputs]) -> list[Inputs]:
        return inputs

    def bind(self, params: dict[str, mx.array]) -> DiT:
        """The model with these LoRA matrices."""
        own = [(k, a.astype(training_dtype())) for k, a in without_projectors(params).items()]
        self.model.update(tree_unflatten(own))
        return self.model

    def _jump_fn(self, params, x, t, to, text, masks):
        """One Euler step from t (B,) to ``to`` (B,)."""
        v = self.bind(params)(x, t, text, masks).astype(mx.float32)
        return x + (to - t)[:, None, None, None] * v

    def _student_grads_fn(self, student, guide, x_t, t, text, masks, *, term: str | None):
        """Losses, monitors, gradients of ``term`` or of all; ``guide``: of ``_ask``, with c0."""

        def loss(own):
            v, tokens = velocity_and_tokens(self.bind(own), x_t, t, text, masks)
            x0 = x_t - t[:, None, None, None] * v
            metrics = {"x0 mean": x0.mean(), "x0 std": mx.std(x0, axis=(1, 2, 3)).mean()}
            if "c0" in guide:
                c0, r0 = guide["c0"], guide["r0"]
                metrics["loss/dmd"], w = dmd_loss(x0, c0, r0)
                metrics |= {"gap": mx.abs(c0 - r0).mean(), "w": w.mean()}
            if "v" in guide:
                metrics["loss/out"] = (v - guide["v"]).square().mean()
                features = feature_loss(tokens, projector_of(own), guide["tokens"])
                metrics["loss/features"] = features.mean()
            losses = {k: a for k, a in metrics.items() if k.startswith("loss/")}
            return losses[f"loss/{term}"] if term else sum(losses.values()), metrics

        (_, metrics), grads = mx.value_and_grad(loss)(student)
        return metrics, grads

    def _critic_grads_fn(self, critic, y, eps, tau, text, masks):
        """Losses (B,) and gradients of flow matching on what the student draws."""
        x_tau, target = add_noise(y, eps, tau)

        def loss(own):
            v = self.bind(own)(x_tau, tau, text, masks).astype(mx.float32)
            losses = per_sample((v - target).square())
            return losses.mean(), losses

        (_, losses), grads = mx.value_and_grad(loss)(critic)
        return losses, grads

    def draw(self, rng, key: mx.array, shape: tuple) -> tuple[dict[str, mx.array], int]:
        """The random numbers of a step.

        Args:
            rng: source of k.
            key: of the noise.
            shape: of a batch of latents.

        Returns:
            {name: noise}, and k: how many of the four steps are done at x_t.
        """
        keys, noise = mx.random.split(key, 5), {}
        noise["x"] = mx.random.normal(shape, key=keys[0])
        for i, part in enumerate(("critic", "student")):
            noise[f"eps/{part}"] = mx.random.normal(shape, key=keys[2 * i + 1])
            noise[f"tau/{part}"] = sample_taus(keys[2 * i + 2], shape[0])
        return noise, int(rng.integers(len(SIGMAS) - 1))

    def step(self, x0, text, masks, noise: dict, k: int) -> dict[str, mx.array]:
        """One update of the critic and, every ``critic_steps``, of the student before it.

        Args:
            x0: (B, H, W, C), used only with ``noised_real``.
            text: {encoder: states (B, L, dim)}.
            masks: {encoder: (B, L) bool}.
            noise: of ``draw``.
            k: of ``draw``.

        Returns:
            Scalars by name.
        """
        turn = (scalar(self.steps) + 1) % self.turns == 0
        parts = self.options.accumulate
        cuts = rows(len(x0), parts)
        if self.options.loss != "dmd" and scalar(self.steps) == 0:
            self._fit_projector(x0, text, masks, noise)
        # The teacher is asked about the whole batch: an offloaded one reads its weights each time.
        drawn = []
        for cut in cuts:
            own = (take_rows(d, cut) for d in (text, masks, noise))
            drawn.append(self._drawn(x0[cut], *own, k=k))
            mx.eval(drawn[-1])
        made = {name: mx.concatenate([d[name] for d in drawn]) for name in drawn[0]}
        guide = self._ask(made, text, masks, noise, k) if turn else {}
        metrics: dict[str, mx.array] = {}
        of_student: dict[str, mx.array] = {}  # gradients
        of_critic: dict[str, mx.array] = {}
        losses: list[mx.array] = []
        for cut in cuts:
            part = (take_rows(d, cut) for d in (made, guide, text, masks, noise))
            student, critic = self._pass(*part, k=k)
            if student:
                metrics = add_arrays(metrics, student[0]) if metrics else student[0]
                of_student = add_arrays(of_student, student[1]) if of_student else student[1]
            if critic:
                losses.append(critic[0])
                of_critic = add_arrays(of_critic, critic[1]) if of_critic else critic[1]
            # The graph of one micro-batch is freed before the next is built.
            mx.eval(metrics, of_student, of_critic, losses)
        if turn:
            metrics, grads = ({k: a / parts for k, a in d.items()} for d in (metrics, of_student))
            metrics, grads = mean_over_processes(metrics), mean_over_processes(grads)
            if self.options.balance:
                grads, norms = balanced(grads)
                metrics |= norms
            metrics["grad/student"] = self.student.update(grads)
        if self.critic:
            of_all = (mx.concatenate(losses), noise["tau/critic"])
            metrics |= by_tau(*map(mx.distributed.all_gather, of_all))
            grads = {k: a / parts for k, a in of_critic.items()}
            metrics["grad/critic"] = self.critic.update(mean_over_processes(grads))
        self.steps = self.steps + 1
        mx.eval(self.state(), metrics)
        return metrics

    def _fit_projector(self, x0, text, masks, noise) -> None:
        """Begin with the phi that fits best where the undistilled student's four steps lead."""
        fit, few = ProjectorFit(), self.teacher.is_few_step
        for k, sigma in enumerate(SIGMAS[:-1]):
            for cut in rows(len(x0), self.options.accumulate):
                own, seen = (take_rows(d, cut) for d in (text, masks))
                x = self._drawn(x0[cut], own, seen, take_rows(noise, cut), k=k)["x"]
                t = mx.full(len(x), sigma)
                mx.eval(x)
                _, theirs = self.teacher.outputs(x, t, own, seen, 1.0, few)
                _, tokens = velocity_and_tokens(self.bind(self.student.params), x, t, own, seen)
                fit.add(tokens, theirs)
        self.student.begin_with({f"{PROJECTOR}.0.{name}": a for name, a in fit.solve().items()})

    def _drawn(self, x0, text, masks, noise, *, k: int) -> dict[str, mx.array]:
        """x, where k of the student's four steps have led, and y, what it makes of it."""
        t = [mx.full(len(x0), sigma) for sigma in SIGMAS]
        x, params = noise["x"], self.student.params
        if self.options.noised_real:
            x, _ = add_noise(x0, x, t[k])
        else:
            for i in range(k):
                x = self._jump(params, x, t[i], t[i + 1], text, masks)
        if not self.critic:
            return {"x": x}
        return {"x": x, "y": self._jump(params, x, t[k], t[-1], text, masks)}

    def _ask(self, made: dict, text, masks, noise, k: int) -> dict[str, mx.array]:
        """What the teacher says on the student's turn: r0, its guided prediction from y with noise
        (x_tau), and the velocities and tokens that hold the student on course."""
        guide: dict[str, mx.array] = {}
        guidance = self.options.guidance
        if self.critic:
            tau = noise["tau/student"]
            x_tau, _ = add_noise(made["y"], noise["eps/student"], tau)
            v = self.teacher.velocity(x_tau, tau, text, masks, guidance)
            guide |= {"x_tau": x_tau, "r0": x_tau - tau[:, None, None, None] * v}
        if self.options.loss != "dmd":
            few, x = self.teacher.is_few_step, made["x"]
            t, guidance = mx.full(len(x), SIGMAS[k]), 1.0 if few else guidance
            v, tokens = self.teacher.outputs(x, t, text, masks, guidance, few)
            guide |= {"v": v, "tokens": tokens}
        mx.eval(guide)
        return guide

    def _pass(self, made, guide, text, masks, noise, *, k: int):
        """Metrics and gradients of the student, where there is a guide; losses and gradients of
        the critic."""
        student = critic = None
        if guide:
            # What needs no gradient runs outside of it: there attention is fused.
            if self.critic:
                tau, x_tau = noise["tau/student"], guide["x_tau"]
                c0 = self._jump(self.critic.params, x_tau, tau, 0 * tau, text, masks)
                guide = {k: a for k, a in guide.items() if k != "x_tau"} | {"c0": c0}
                mx.eval(c0)
            t = mx.full(len(made["x"]), SIGMAS[k])
            student = self._losses(guide, made["x"], t, text, masks)
        if self.critic:
            eps, tau = noise["eps/critic"], noise["tau/critic"]
            critic = self._critic_grads(self.critic.params, made["y"], eps, tau, text, masks)
        return student, critic

    def _losses(self, *inputs) -> tuple[dict, dict]:
        """Metrics and gradients of the student; to be balanced, they are {"LOSS/name": ...}."""
        grads: dict[str, mx.array] = {}
        for term, of_term in self._student_grads.items():
            metrics, own = of_term(self.student.params, *inputs)
            grads |= {f"{term}/{k}": g for k, g in own.items()} if term else own
            mx.eval(metrics, grads)  # one pass is in memory at a time
        return metrics, grads

    def validate(self, fixed: list) -> dict[str, float]:
        """What ``watch`` says of the pictures that the averaged student draws in four steps."""
        return self.watch(self, fixed)

    def generate(self, noise, text, masks, lora: dict | None = None) -> mx.array:
        """Draw in four steps.

        Args:
            noise: (B, H, W, C).
            text: {encoder: states (B, L, dim)}.
            masks: {encoder: (B, L) bool}.
            lora: matrices of the student; None for the averaged ones.

        Returns:
            Latents (B, H, W, C).
        """
        x, lora = noise, lora or self.student.mean
        t = [mx.full(len(x), sigma) for sigma in SIGMAS]
        for now, to in pairwise(t):
            x = self._jump(lora, x, now, to, text, masks)
        return x

    @property
    def lora(self) -> dict[str, mx.array]:
        """The averaged student's matrices, for ``save_lora``."""
        return without_projectors(self.student.mean)

    def identity(self) -> dict:
        """What a saved state belongs to, beside options and data."""
        return {"model": self.model.config.to_dict(), **self.fingerprints}

    def state(self) -> dict[str, mx.array]:
        """Everything that changes, flat, for ``save_state``."""
        parts = {"student": self.student} | ({"critic": self.critic} if self.critic else {})
        arrays = {f"{name}/{k}": a for name, w in parts.items() for k, a in w.state().items()}
        return arrays | {"steps": self.steps}

    def restore(self, arrays: dict[str, mx.array]) -> None:
        groups: dict[str, dict[str, mx.array]] = {}
        for key, a in arrays.items():
            group, _, path = key.partition("/")
            groups.setdefault(group, {})[path] = a
        self.steps = arrays["steps"]
        self.student.restore(groups["student"])
        if self.critic:
            self.critic.restore(groups["critic"])
