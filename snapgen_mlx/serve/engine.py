"""One thread that draws: a queue before it, and a loaded pipeline per model and width."""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import mlx.core as mx
from PIL import Image

from ..device import usable_memory
from ..editing import Edit
from ..errors import SnapGenError, UsageError
from ..pipeline import Pipeline
from ..settings import Settings
from ..tensors.weights import flat_parameters
from ..vocabulary import known_words
from .gallery import Gallery

PIPELINES = 3  # pipelines that are kept at once: the widths of one model


class Busy(SnapGenError):
    """The queue is full."""


class Late(SnapGenError):
    """A picture was not finished in the time that a request may take."""


class Stopping(SnapGenError):
    """The server stops and draws nothing new."""


class UnknownModel(UsageError):
    """A model that this server does not hold."""


@dataclass
class Progress:
    """A step was made."""

    picture: int  # of the request, from 0
    step: int  # steps made
    steps: int
    seconds_left: float  # until this picture is done, as the steps so far went
    preview: Image.Image | None  # of the predicted picture, when asked for


@dataclass
class Picture:
    """A picture is finished, and on disk unless the request said otherwise."""

    picture: int
    image: Image.Image
    settings: dict
    seconds: float  # drawing alone, without waiting
    name: str | None  # in the gallery
    notes: list[str]  # what may surprise about it


@dataclass
class Ended:
    """Nothing more comes: all is drawn (error None), or something went wrong."""

    error: Exception | None = None


@dataclass
class Job:
    """Pictures that were asked for.

    Args:
        prompts: one or more; each is drawn with each seed.
        emit: called in the drawing thread with each Progress and Picture, and at last Ended.
        model, variant: None for the first model, and for the widest width that fits.
        given: settings of a picture beside prompt and seed; None for the model's own.
        edit: a picture to start from.
        files: what the metadata say of it.
        previews: how many steps of a picture come with a preview.
        keep: whether finished pictures go into the gallery.
    """

    prompts: list[str]
    emit: Callable
    seeds: list[int] = field(default_factory=lambda: [0])
    model: str | None = None
    variant: str | None = None
    given: dict = field(default_factory=dict)
    edit: Edit | None = None
    files: dict = field(default_factory=dict)
    previews: int = 0
    keep: bool = True
    cancelled: threading.Event = field(default_factory=threading.Event)
    deadline: float = float("inf")  # by time.monotonic()


class Engine:
    """Draws one job after another in its own thread, in which all of MLX's work is done.

    Args:
        sources: models by the names that requests use, each a folder, a Hub id or None for the
            embedded model. The first is the default.
        gallery: where finished pictures are kept.
        queue_length: most jobs that wait.
        timeout: seconds from the request to its last picture.
        dtype: to compute with, as of ``Pipeline.load``.
    """

    def __init__(
        self,
        sources: dict[str, str | None],
        gallery: Gallery,
        queue_length: int = 64,
        timeout: float = 600,
        dtype: mx.Dtype | None = None,
    ):
        self.sources, self.gallery = sources, gallery
        self.queue_length, self.timeout, self.dtype = queue_length, timeout, dtype
        self.models: dict[str, dict] = {}  # by name: what ``_describe`` says
        self._pipelines: OrderedDict[tuple[str, str | None], Pipeline] = OrderedDict()
        self._waiting: deque[Job] = deque()
        self._current: Job | None = None
        self._change = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="drawing", daemon=True)
        self._started = threading.Event()
        self._failure: Exception | None = None

    def start(self) -> None:
        """Load the models. Raises what ``Pipeline.load`` raises."""
        self._thread.start()
        self._started.wait()
        if self._failure:
            raise self._failure

    def submit(self, job: Job) -> None:
        """Put a job last in the queue. Raises Busy, Stopping, UnknownModel or UsageError."""
        model = self.models.get(job.model or next(iter(self.sources)))
        if model is None:
            raise UnknownModel(f"no model {job.model!r} here; there is: {', '.join(self.models)}")
        if job.variant not in (None, "auto", *model["variants"]):
            known = ", ".join(model["variants"])
            raise UsageError(f"no variant {job.variant!r} in this model; there is: auto, {known}")
        job.deadline = time.monotonic() + self.timeout
        with self._change:
            if self._stopping:
                raise Stopping("the server is stopping")
            if len(self._waiting) >= self.queue_length:
                raise Busy(f"{self.queue_length} requests are waiting already; try again later")
            self._waiting.append(job)
            self._change.notify()

    def cancel(self, job: Job) -> None:
        """Draw no further step of a job."""
        job.cancelled.set()
        with self._change:
            if job in self._waiting:
                self._waiting.remove(job)

    def stop(self) -> None:
        """Refuse what waits and what comes; the picture that is being drawn is finished."""
        with self._change:
            self._stopping = True
            refused = list(self._waiting)
            self._waiting.clear()
            self._change.notify()
        for job in refused:
            job.emit(Ended(Stopping("the server is stopping")))

    def join(self) -> None:
        self._thread.join()

    @property
    def waiting(self) -> int:
        """Jobs that wait or are being drawn."""
        return len(self._waiting) + (self._current is not None)

    def _work(self) -> None:
        try:
            for name in self.sources:
                self.models[name] = _describe(self._pipeline(name, None))
        except Exception as e:
            self._failure = e
            return
        finally:
            self._started.set()
        while True:
            with self._change:
                self._current = None
                while not self._waiting and not self._stopping:
                    self._change.wait()
                if not self._waiting:
                    return
                job = self._current = self._waiting.popleft()
            try:
                self._draw(job)
            except Exception as e:  # told to the client; the next job must be drawn
                job.emit(Ended(e))
            else:
                job.emit(Ended())

    def _pipeline(self, name: str, variant: str | None) -> Pipeline:
        default = self.models.get(name, {}).get("variant")
        if variant in (None, "auto"):
            variant = default
        key = name, variant
        if key in self._pipelines:
            self._pipelines.move_to_end(key)
            return self._pipelines[key]
        while len(self._pipelines) >= PIPELINES:
            self._free_oldest(None)
        pipe = Pipeline.load(self.sources[name], key[1], dtype=self.dtype)
        for (other, _), loaded in self._pipelines.items():
            if other == name:  # the widths of a model share all but the transformer
                pipe.vae, pipe.encoders = loaded.vae, loaded.encoders
        self._make_room(pipe, [pipe.settings("any")])
        for weight in flat_parameters(pipe.dit).values():  # now, not with the first picture
            mx.eval(weight)
        self._pipelines[name, pipe.variant] = pipe
        return pipe

    def _make_room(self, pipe: Pipeline, wanted: list[Settings]) -> None:
        """Free pipelines that were not used for longest, until ``wanted`` fits beside the rest."""
        need = max(pipe.memory.predict(pipe.variant, pipe.request(s)).peak for s in wanted)
        if need > usable_memory():  # it is refused when it is to be drawn
            return
        own = pipe.loaded()

        def beside() -> int:
            held: dict[int, int] = {}
            for other in self._pipelines.values():
                held |= other.loaded() if other is not pipe else {}
            return sum(size for key, size in held.items() if key not in own)

        while beside() + need > usable_memory() and self._free_oldest(pipe):
            pass

    def _free_oldest(self, but: Pipeline | None) -> bool:
        """Whether there was one, beside ``but``."""
        for key, pipe in self._pipelines.items():
            if pipe is not but:
                self._pipelines.pop(key).free("dit", "vae", "encoders", "tiny")
                return True
        return False

    def _draw(self, job: Job) -> None:
        if job.cancelled.is_set():
            return
        self._check(job)
        pipe = self._pipeline(job.model or next(iter(self.sources)), job.variant)
        if job.edit is None:
            settings_of = pipe.settings
        else:
            settings_of = partial(pipe.edit_settings, edit=job.edit)
        wanted = [
            settings_of(prompt, seed=seed, **job.given)
            for prompt in job.prompts
            for seed in job.seeds
        ]
        self._make_room(pipe, wanted)
        notes = [pipe.notes(settings, job.edit) for settings in wanted]
        pipe.prepare(wanted)
        for number, settings in enumerate(wanted):
            if self._stopping and number:
                raise Stopping("the server is stopping")
            started = time.perf_counter()
            steps = max(1, settings.steps - settings.skipped_steps)
            for step in pipe.stream(settings, job.edit):
                if job.cancelled.is_set():
                    return
                self._check(job)
                made = step.index + 1
                preview = None
                if made < steps and _shows(made, steps, job.previews):
                    preview = pipe.decode(step.x0, settings.background, preview=True)
                left = (time.perf_counter() - started) / made * (steps - made)
                job.emit(Progress(number, made, steps, left, preview))
            image = pipe.decode(step.x, settings.background)
            if job.edit is not None:
                image = job.edit.finish(image)
            seconds = time.perf_counter() - started
            metadata = pipe.metadata(settings)
            digests = metadata["digests"] | job.files.get("digests", {})
            metadata |= job.files | {"digests": digests}
            name = self.gallery.add(image, metadata) if job.keep else None
            job.emit(Picture(number, image, metadata, seconds, name, notes[number]))

    def _check(self, job: Job) -> None:
        if time.monotonic() > job.deadline:
            raise Late(f"not finished within {self.timeout:g} seconds; ask for less")


def model_names(models: tuple[str, ...]) -> dict[str, str | None]:
    """Names for requests: the last part of each folder or Hub id, "embedded" without any.

    Raises UsageError for two of the same name.
    """
    if not models:
        return {"embedded": None}
    names: dict[str, str | None] = {
        Path(model.partition("@")[0]).name or model: model for model in models
    }
    if len(names) < len(models):
        raise UsageError("two models have the same name; rename a folder")
    return names


def _describe(pipe: Pipeline) -> dict:
    """What a client needs to know of a model."""
    own = pipe.settings("any")
    return {
        "variant": pipe.variant,  # the default
        "variants": list(pipe.dit_config.variants),
        "transparent": pipe.memory.vae.image_channels == 4,
        "words": known_words(pipe.folder),
        "settings": {name: getattr(own, name) for name in ("steps", "guidance", "width", "height")},
    }


def _shows(made: int, steps: int, previews: int) -> bool:
    """Whether the preview of this step is one of ``previews`` spread evenly over the steps."""
    return made * previews // (steps - 1) > (made - 1) * previews // (steps - 1)
