"""Learning from a frozen teacher: knowledge distillation [paper Eqs. 6-8] (training section 3).

L_KD = S(L_diff, L_out) + L_feat: the flow-matching loss and the distance to the teacher's velocity,
joined by timestep-aware scaling S [after SnapGen; ours], and the distance to the teacher's final
tokens, which a Linear per width, phi, maps the student's to.
"""

import copy
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..config import DiTConfig
from ..device import training_dtype
from ..errors import UsageError
from ..files import file_sha256
from ..layout import few_step_lora, load_config
from ..loading import load_dit
from ..lora import LoRALinear, Update, load_lora
from ..models.dit import DiT
from ..models.interfaces import TextEncoder
from ..models.sizes import weight_bytes
from ..sampling import guide
from ..text_loading import load_text_encoders
from .checkpoint import fingerprint
from .data import LatentDataset, cached_states, encode_text
from .elastic_trainer import ElasticOptions, ElasticTrainer

# Of the states of a teacher's own text encoders, among those of the student's.
TEACHER = "teacher/"
PROJECTOR = "projector"
TEXT_FOLDERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


class Teacher(Protocol):
    """What can teach: its velocities are of the student's latents, its tokens of any grid.

    Args: features, channels of its tokens; fingerprint, what a run's state and cached texts of it
        belong to; nbytes, of its weights; is_few_step, whether it has a 4-step form.
    """

    features: int
    fingerprint: str

    @property
    def is_few_step(self) -> bool: ...

    @property
    def nbytes(self) -> int: ...

    def text_encoders(self) -> list[TextEncoder]:
        """Those that it needs beside the student's."""

    def velocity(self, x_t, t, text, masks, guidance: float = 1.0) -> mx.array:
        """Velocity (B, H, W, C) float32 at x_t, t (B,); guided against the empty text."""

    def outputs(
        self, x_t, t, text, masks, guidance: float = 1.0, few_step: bool = False
    ) -> tuple[mx.array, mx.array]:
        """Velocity (B, H, W, C), guided against the empty text, and final tokens (B, h, w, d), of
        the 4-step model when ``few_step``; tokens are standardised, both float32."""


class ModelTeacher:
    """A frozen SnapGen++ model of one width.

    Args: few_step, the updates of a LoRA that makes it a 4-step model; own_text, the model folder
        whose text encoders it reads, if these are not the student's; fingerprint, see ``Teacher``.
    """

    def __init__(
        self,
        model: DiT,
        few_step: dict[str, Update] | None = None,
        own_text: Path | None = None,
        fingerprint: str = "",
    ):
        self.own_text, self.fingerprint = own_text, fingerprint
        self.features = model.config.hidden_size
        self._names = list(model.config.text_dims)
        mx.eval(model.parameters())
        self._model = model
        self._few_step = with_lora(model, few_step) if few_step else None

    @property
    def is_few_step(self) -> bool:
        return self._few_step is not None

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return weight_bytes(self._model)

    def text_encoders(self) -> list[TextEncoder]:
        """Those that it needs beside the student's."""
        return load_text_encoders(self.own_text) if self.own_text else []

    def velocity(self, x_t, t, text, masks, guidance: float = 1.0) -> mx.array:
        """Velocity (B, H, W, C) float32 at x_t, t (B,); guided against the empty text."""
        return self.outputs(x_t, t, text, masks, guidance)[0]

    def outputs(
        self, x_t, t, text, masks, guidance: float = 1.0, few_step: bool = False
    ) -> tuple[mx.array, mx.array]:
        """Velocity (B, H, W, C), guided against the empty text, and final tokens (B, h, w, d), of
        the 4-step model when ``few_step``; tokens are standardised, both float32."""
        model = self._few_step if few_step and self._few_step else self._model
        v, tokens = velocity_and_tokens(model, x_t, t, *self._text(text, masks), guidance)
        return v, mx.fast.layer_norm(tokens, None, None, 1e-6)

    def _text(self, text: dict, masks: dict) -> tuple[dict, dict]:
        """What it reads: its own states, but for samples whose text the student is not given."""
        if not self.own_text:
            return text, masks
        own = [mask for name, mask in masks.items() if not name.startswith(TEACHER)]
        given = mx.any(mx.concatenate(own, axis=1), axis=1, keepdims=True)
        names = [name for name in self._names if TEACHER + name in text]
        return (
            {name: text[TEACHER + name] for name in names},
            {name: masks[TEACHER + name] & given for name in names},
        )


def with_lora(model: DiT, updates: dict[str, Update]) -> DiT:
    """A model with LoRA updates beside its layers. It shares all weights with ``model``.

    Args:
        model: stays as it is.
        updates: {layer: update}.
    """
    model = copy.deepcopy(model)  # arrays are not copied
    modules = dict(model.named_modules())
    dtype = model.text_embed.null.dtype
    new = [
        (path, LoRALinear(modules[path], Update(*(m.astype(dtype) for m in update))))
        for path, update in updates.items()
    ]
    model.update_modules(tree_unflatten(new))
    return model


def velocity_and_tokens(
    model: DiT, x_t, t, text, masks, guidance: float = 1.0
) -> tuple[mx.array, mx.array]:
    """A model's velocity (B, H, W, C), guided against the empty text, and its final layer's tokens
    (B, h, w, d) given the text, float32."""
    B = len(x_t)
    condition = model.condition_text(text, masks, B)
    if guidance != 1:
        condition = condition.join(model.condition_text({}, {}, B))
        x_t, t = (mx.concatenate([a, a]) for a in (x_t, t))
    time = model.condition_time(t)
    tokens = model.features(x_t, time, condition)
    v = model.head(tokens, time).astype(mx.float32)
    if guidance != 1:
        v = guide(v[:B], v[B:], guidance)
    return v, tokens[:B].astype(mx.float32)


def load_teacher(folder, student, few_step=None) -> ModelTeacher:
    """A model folder's full width as a teacher of the model folder ``student``.

    few_step: the file of a LoRA that makes it a 4-step model; one that lies in its folder is taken
    when None. Raises SnapGenError for damaged files and UsageError for a teacher of other latents.
    """
    folder, student = Path(folder), Path(student)
    if load_config(folder / "vae") != load_config(student / "vae"):
        raise UsageError(
            f"{folder} has another autoencoder than {student}; a teacher needs the same one"
        )
    config = DiTConfig.from_dict(load_config(folder / "transformer"))
    few_step = few_step or few_step_lora(folder, config.variants[-1])
    updates = few_step and load_lora(few_step, config, len(config.widths) - 1)
    theirs, ours = ([path / name for name in TEXT_FOLDERS] for path in (folder, student))
    own_text = folder if fingerprint(*theirs) != fingerprint(*ours) else None
    digest = fingerprint(folder / "transformer", *theirs)
    if few_step:
        digest += file_sha256(few_step)
    return ModelTeacher(load_dit(folder, dtype=training_dtype()), updates, own_text, digest)


class TaughtDataset(LatentDataset):
    """``data`` whose captions come also as a teacher's ``encoders`` read them, never dropped."""

    def __init__(self, data: LatentDataset, encoders: list):
        super().__init__(data.latents, data.captions, data.encoders, data.mirrored)
        self.taught = encoders

    def text(self, prompts: list[str]) -> tuple[dict, dict]:
        own, theirs = super().text(prompts), encode_text(self.taught, prompts)
        states, masks = ({TEACHER + k: a for k, a in d.items()} for d in theirs)
        return own[0] | states, own[1] | masks


def teach(
    teacher: Teacher, sets: list[LatentDataset], cache: Path
) -> Generator[dict, None, list[LatentDataset]]:
    """``sets`` with captions as the teacher reads them too; yields as ``data.cached_states``."""
    encoders = teacher.text_encoders()
    if not encoders:
        return sets
    texts = [text for data in sets for captions in data.captions for text in captions]
    states = yield from cached_states(encoders, teacher.fingerprint, texts, cache)
    return [TaughtDataset(data, states) for data in sets]


def alpha(t: mx.array) -> mx.array:
    """rho(t) / rho(1/2) of the logit-normal density rho: 1 in the middle, 0 at both ends."""
    return mx.exp(-0.5 * mx.log(t / (1 - t)).square()) / (4 * t * (1 - t))


def timestep_aware(flow: mx.array, out: mx.array, t: mx.array) -> mx.array:
    """S of the losses [paper Eq. 6; after SnapGen].

    Where training draws most timesteps it is the flow loss. Elsewhere it is the teacher's loss,
    scaled to the size of the flow loss.

    Args:
        flow: flow loss (B,).
        out: distance from the teacher (B,).
        t: timesteps (B,).

    Returns:
        (B,).
    """
    weight = alpha(t)
    ratio = mx.stop_gradient(flow / mx.maximum(out, 1e-6))
    return weight * flow + (1 - weight) * ratio * out


def feature_loss(tokens: mx.array, phi: dict[str, mx.array], target: mx.array) -> mx.array:
    """|f_teacher - phi(f_student)|² per sample (B,), on the teacher's grid.

    Args: tokens (B, h, w, d); phi, the Linear's weight (d', d) and bias; target (B, h', w', d').
    """
    (h, w), grid = tokens.shape[1:3], target.shape[1:3]
    if (h, w) != grid:
        tokens = nn.Upsample((grid[0] / h, grid[1] / w), mode="linear")(tokens)
    error = tokens @ phi["weight"].T + phi["bias"] - target
    return error.square().mean(axis=(1, 2, 3))


def projector(inputs: int, outputs: int, key: mx.array) -> dict[str, mx.array]:
    """Weight and bias of a fresh phi."""
    bound = inputs**-0.5
    weight = mx.random.uniform(-bound, bound, (outputs, inputs), key=key)
    return {"weight": weight, "bias": mx.zeros(outputs)}


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
        self._outputs = mx.compile(partial(_outputs, teacher))

    def guides(self, x_t, t, text, masks) -> dict[str, mx.array]:
        guide = self._outputs(x_t, t, text, masks)
        mx.eval(guide)  # frees the teacher's activations
        return guide

    def objective(self, index, own, batch, target, guide):
        v, tokens = velocity_and_tokens(self._bind(index, own), *batch)
        flow = (v - target).square().mean(axis=(1, 2, 3))
        out = (v - guide["v_teacher"]).square().mean(axis=(1, 2, 3))
        features = feature_loss(tokens, projector_of(own), guide["f_teacher"]).mean()
        loss = timestep_aware(flow, out, batch[1]).mean() + features
        if "v_full" in guide:
            loss = loss + self.options.distill * (v - guide["v_full"]).square().mean()
        return loss, {"loss": flow.mean(), "out": out.mean(), "features": features}, v

    def _bind(self, index: int, own: dict[str, mx.array]) -> DiT:
        return super()._bind(index, without_projectors(own))

    def identity(self) -> dict:
        return super().identity() | {"teacher": self.teacher.fingerprint}


def _outputs(teacher: Teacher, x_t, t, text, masks) -> dict[str, mx.array]:
    v, features = teacher.outputs(x_t, t, text, masks)
    return {"v_teacher": v, "f_teacher": features}
