"""Frozen teachers: what a trainer asks of one, and any model folder as one.

The loop and the trainers know the protocol alone. A SnapGen++ model and Qwen-Image answer in the
same way; a teacher in memory, an offloaded one and one with its answers on disk do too.
"""

import copy
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from ..config import DiTConfig
from ..device import training_dtype
from ..errors import UsageError
from ..files import file_sha256
from ..layout import few_step_lora
from ..loading import (
    Transformer,
    layer_shapes,
    load_dit,
    load_qwen_image,
    load_transformer_config,
    load_vae_config,
)
from ..lora import Update, add_lora, load_lora, load_updates
from ..models.dit import DiT
from ..models.interfaces import TextEncoder, TextStates
from ..models.qwen_image import TOKENS
from ..sampling import apply_guidance
from ..tensors.weights import load_tensors, parameter_shapes
from ..text_loading import load_text_encoders
from .checkpoint import fingerprint
from .data import LatentDataset, cached_states, encode_text
from .training_memory import TeacherMemory

# Of the states of a teacher's own text encoders, among those of the student's.
TEACHER = "teacher/"
TEXT_FOLDERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


class Teacher(Protocol):
    """What can teach: its velocities are of the student's latents, its tokens of any grid.

    Args: features, channels of its tokens; fingerprint, what a run's state and cached answers of
        it belong to; is_few_step, whether it has a 4-step form; memory, what it needs.
    """

    features: int
    fingerprint: str

    @property
    def is_few_step(self) -> bool: ...

    @property
    def memory(self) -> TeacherMemory: ...

    @property
    def null_text(self) -> str | None:
        """The text that guidance leads away from; None where that is a token of its own."""

    def text_encoders(self) -> list[TextEncoder]:
        """Those that it needs beside the student's."""

    def read_null(self, encoders: Sequence[TextStates]) -> None:
        """Take the states of ``null_text`` from those that know it; before the first question."""

    def velocity(self, x_t, t, text, masks, guidance: float = 1.0) -> mx.array:
        """Velocity (B, H, W, C) float32 at x_t, t (B,), evaluated."""

    def outputs(
        self, x_t, t, text, masks, guidance: float = 1.0, few_step: bool = False
    ) -> tuple[mx.array, mx.array]:
        """Velocity (B, H, W, C) float32 and standardised final tokens (B, h, w, d) float16, of
        the 4-step model when ``few_step``; evaluated."""


class ModelTeacher:
    """A frozen model of one width.

    Args: few_step, the updates of a LoRA that makes it a 4-step model; own_text, the model folder
        whose text encoders it reads, if these are not the student's; fingerprint, see ``Teacher``;
        read, gives the model anew with or without the LoRA: the teacher is offloaded, and
        ``model`` and ``few_step`` tell its sizes alone.
    """

    def __init__(
        self,
        model: Transformer,
        few_step: dict[str, Update] | None = None,
        own_text: Path | None = None,
        fingerprint: str = "",
        read: Callable[[bool], Transformer] | None = None,
    ):
        self.own_text, self.fingerprint, self._read = own_text, fingerprint, read
        self.features = model.config.hidden_size
        self.null_text = model.config.null_text
        self._null: tuple[dict, dict] | None = None
        models = {False: model} | ({True: with_lora(model, few_step)} if few_step else {})
        self.is_few_step = bool(few_step)
        self._names = list(model.config.text_dims)
        self.memory = TeacherMemory.of(models[self.is_few_step])
        self._models = {} if read else models
        # Qwen-Image evaluates its blocks in groups, and cannot be compiled.
        compiled: Any = mx.compile if isinstance(model, DiT) else lambda f: f
        self._ask = {
            few: compiled(partial(velocity_and_tokens, m)) for few, m in self._models.items()
        }

    def text_encoders(self) -> list[TextEncoder]:
        return load_text_encoders(self.own_text) if self.own_text else []

    def read_null(self, encoders: Sequence[TextStates]) -> None:
        if self.null_text is not None:
            self._null = encode_text(encoders, [self.null_text])

    def velocity(self, x_t, t, text, masks, guidance: float = 1.0) -> mx.array:
        return self.outputs(x_t, t, text, masks, guidance)[0]

    def outputs(
        self, x_t, t, text, masks, guidance: float = 1.0, few_step: bool = False
    ) -> tuple[mx.array, mx.array]:
        few_step = few_step and self.is_few_step
        if self._read:
            model = self._read(few_step)
            ask: Callable = partial(velocity_and_tokens, model)
        else:
            model, ask = self._models[few_step], self._ask[few_step]
            mx.eval(model.parameters())  # or every compiled function would hold its own
        text, masks = self._text(text, masks)
        null = self._null if guidance != 1 else None
        # Qwen-Image divides a batch itself, so that each of its weights is read once.
        rows = len(x_t)
        if isinstance(model, DiT):
            rows = max(1, TOKENS // (x_t[0, ..., 0].size // model.config.patch_size**2))
        parts = []
        for i in range(0, len(x_t), rows):
            part = slice(i, i + rows)
            own = [{k: a[part] for k, a in d.items()} for d in (text, masks)]
            v, tokens = ask(x_t[part], t[part], own[0], own[1], guidance, null)
            tokens = mx.fast.layer_norm(tokens, None, None, 1e-6).astype(mx.float16)
            mx.eval(v, tokens)
            parts.append((v, tokens))
        del model, ask
        if self._read:
            mx.clear_cache()
        v, tokens = (mx.concatenate(list(a)) for a in zip(*parts, strict=True))
        return v, tokens

    def _text(self, text: dict, masks: dict) -> tuple[dict, dict]:
        """What it reads: its own states, but for samples whose text the student is not given."""
        if not self.own_text:
            return text, masks
        own = [mask for name, mask in masks.items() if not name.startswith(TEACHER)]
        given = mx.any(mx.concatenate(own, axis=1), axis=1, keepdims=True)
        states, seen = {}, {}
        for name in self._names:
            if TEACHER + name not in text:
                continue
            states[name], seen[name] = text[TEACHER + name], masks[TEACHER + name]
            if self._null is None:
                seen[name] = seen[name] & given
                continue
            length = max(states[name].shape[1], self._null[0][name].shape[1])
            pair = [pad_text(d[name], length) for d in (states, self._null[0])]
            states[name] = mx.where(given[..., None], *pair)
            seen[name] = mx.where(
                given, *(pad_text(d[name], length) for d in (seen, self._null[1]))
            )
        return states, seen


def with_lora(model: Transformer, updates: dict[str, Update]) -> Transformer:
    """A model with LoRA updates beside its layers. It shares all weights with ``model``.

    Args:
        model: stays as it is.
        updates: {layer: update}.
    """
    model = copy.deepcopy(model)  # arrays are not copied
    add_lora(model, updates, fuse=False)
    return model


def pad_text(a: mx.array, length: int) -> mx.array:
    """States (B, L, dim) or a mask (B, L) to ``length`` tokens, of zeros."""
    return mx.pad(a, [(0, 0), (0, length - a.shape[1]), (0, 0)][: a.ndim])


def velocity_and_tokens(
    model: Any, x_t, t, text, masks, guidance: float = 1.0, null: tuple[dict, dict] | None = None
) -> tuple[mx.array, mx.array]:
    """Velocity and final tokens of a transformer, float32.

    Args:
        model: the transformer.
        x_t: (B, H, W, C).
        t: (B,).
        text: {encoder: states (B, L, dim)}.
        masks: {encoder: (B, L) bool}.
        guidance: 1 for none.
        null: states and masks (1, L, dim) that guidance leads away from; None for no text.

    Returns:
        The guided velocity (B, H, W, C), and the tokens (B, h, w, d) given the text.
    """
    B = len(x_t)
    condition = model.condition_text(text, masks, B)
    if guidance != 1:
        away = [{k: mx.repeat(a, B, axis=0) for k, a in d.items()} for d in null or ({}, {})]
        condition = condition.join(model.condition_text(*away, B))
        x_t, t = (mx.concatenate([a, a]) for a in (x_t, t))
    time = model.condition_time(t)
    tokens = model.features(x_t, time, condition)
    v = model.head(tokens, time).astype(mx.float32)
    if guidance != 1:
        v = apply_guidance(model.config, v, guidance)
    return v, tokens[:B].astype(mx.float32)


def load_teacher(folder, student, few_step=None, offload: bool = False) -> ModelTeacher:
    """The full width of a model folder, SnapGen++ or Qwen-Image, as a teacher of the model folder
    ``student``. Its weights are read with the first question.

    Args: few_step, the file of a LoRA that makes it a 4-step model; one that lies in its folder is
        taken when None; offload, read the weights for each question, and let go of them.
    Raises SnapGenError for damaged files and for a LoRA of another model, UsageError for a teacher
    of other latents.
    """
    folder, student = Path(folder), Path(student)
    check_latents(folder, student)
    config = load_transformer_config(folder)
    few_step = few_step or few_step_lora(folder, config.variants[-1])
    theirs, ours = ([path / name for name in TEXT_FOLDERS] for path in (folder, student))
    is_own = config.null_text is not None or fingerprint(*theirs) != fingerprint(*ours)
    digest = fingerprint(folder / "transformer", *theirs)
    if few_step:
        digest += file_sha256(few_step)

    def plain(read_once: bool = False) -> Transformer:
        if isinstance(config, DiTConfig):
            return load_dit(folder, dtype=training_dtype())
        return load_qwen_image(folder, read_once=read_once, dtype=training_dtype())

    def updates(model: Transformer) -> dict[str, Update]:
        if isinstance(config, DiTConfig):
            return load_lora(few_step, config, len(config.widths) - 1, base=folder)
        return load_updates(few_step, layer_shapes(parameter_shapes(model)))

    def read(few: bool) -> Transformer:
        model = plain(read_once=True)
        if few:
            add_lora(model, updates(model), fuse=False)
        return model

    model = plain()
    return ModelTeacher(
        model,
        updates(model) if few_step else None,
        folder if is_own else None,
        digest,
        read if offload else None,
    )


def check_latents(teacher: Path, student: Path) -> None:
    """Raises UsageError unless both models' latents mean the same."""
    theirs, ours = load_vae_config(teacher), load_vae_config(student)
    for name, what in (
        ("latent_channels", "channels of a latent"),
        ("downsampling", "pixels per latent position"),
        ("latents_mean", "means of the latents"),
        ("latents_std", "deviations of the latents"),
    ):
        a, b = getattr(theirs, name, None), getattr(ours, name, None)
        if a != b:
            raise UsageError(
                f"{teacher} has other {what} than {student} ({brief(a)}, not {brief(b)}); a "
                "teacher needs the same autoencoder"
            )
    if theirs != ours:
        raise UsageError(
            f"{teacher} has another autoencoder than {student}; a teacher needs the same one"
        )
    # Rounding apart, as of another dtype. A decoder may be another one: latents are the encoder's.
    pair = [load_tensors(folder / "vae") for folder in (teacher, student)]
    keys = [key for key in pair[0] if key.startswith("encoder.") and pair[0][key].ndim == 4]
    for key in sorted(keys)[:1]:
        a, b = (tensors[key].astype(mx.float32) for tensors in pair)
        if (a * b).sum() < 0.99 * mx.sqrt(a.square().sum() * b.square().sum()):
            raise UsageError(
                f"the autoencoder of {teacher} has other weights than that of {student}; a teacher "
                "needs the same one"
            )


def brief(value: Any) -> str:
    """A number, or a list by its first ones."""
    if isinstance(value, list) and len(value) > 3:
        return f"[{', '.join(f'{a:g}' for a in value[:3])}, ...]"
    return str(value)


class TaughtDataset(LatentDataset):
    """``data`` whose captions come also as a teacher's ``encoders`` read them, never dropped."""

    def __init__(self, data: LatentDataset, encoders: list):
        super().__init__(data.latents, data.captions, data.encoders, data.mirrored, data.repeats)
        self._data, self.taught = data, encoders

    @property
    def fingerprint(self) -> str:
        return self._data.fingerprint

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
    if teacher.null_text is not None:
        texts.append(teacher.null_text)
    states = yield from cached_states(encoders, teacher.fingerprint, texts, cache)
    teacher.read_null(states)
    return [TaughtDataset(data, states) for data in sets]
