"""What requests may hold: OpenAI's fields, and this model's own."""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..errors import UsageError

MAX_PICTURES = 64  # pictures in one request: prompts times n
SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")

NoEffect = Annotated[str | None, Field(description="Accepted for OpenAI's clients; no effect.")]
# The API's words for a background, and those of settings.
BACKGROUNDS = {"auto": None, "transparent": "transparent", "opaque": "white"}


class Generation(BaseModel):
    """Pictures from words. The fields down to ``user`` are OpenAI's."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(description="What to draw; {a,b} makes one picture of each.")
    model: str | None = Field(None, description="A model of GET /v1/models (default: the first).")
    n: int = Field(1, ge=1, le=MAX_PICTURES, description="Pictures of each prompt.")
    size: str = Field("auto", description="WIDTHxHEIGHT in pixels, or auto for the model's own.")
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    output_format: Literal["png", "webp", "jpeg"] | None = "png"
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Quality of webp and jpeg (default: lossless, 95)."
    )
    background: Literal["auto", "transparent", "opaque"] | None = "auto"
    stream: bool | None = False
    partial_images: int = Field(0, ge=0, le=1000, description="Previews of each picture.")
    quality: NoEffect = None
    style: NoEffect = None
    moderation: NoEffect = None
    user: NoEffect = None

    variant: str | None = Field(None, description="The width of the model, or auto.")
    seed: int | None = Field(None, description="Of the first picture (default: by chance).")
    steps: int | None = None
    guidance: float | None = None
    negative: str | None = None
    vary: str | None = Field(None, description="SEED:AMOUNT, noise between two seeds, as 8:0.3.")
    progress: bool = Field(False, description="With stream: an event for every step.")
    keep: bool = Field(True, description="Whether the gallery keeps the pictures.")

    @model_validator(mode="after")
    def _fits_together(self):
        for text in (self.prompt, self.negative or ""):
            if any("\ud800" <= c <= "\udfff" for c in text):
                raise ValueError("half a character (a lone surrogate) in the text")
        if self.size != "auto" and not SIZE.fullmatch(self.size):
            raise ValueError(f"size {self.size!r} is not WIDTHxHEIGHT or auto")
        if self.response_format == "url" and not self.keep:
            raise ValueError("response_format url needs keep: true")
        if self.background == "transparent" and self.output_format == "jpeg":
            raise ValueError("JPEG has no transparency; use png or webp")
        return self

    @property
    def given(self) -> dict:
        """Settings of a picture; None for the model's own."""
        width, height = (None, None) if self.size == "auto" else map(int, self.size.split("x"))
        return {
            "width": width,
            "height": height,
            "steps": self.steps,
            "guidance": self.guidance,
            "negative": self.negative,
            "vary": self.vary,
            "background": BACKGROUNDS[self.background or "auto"],
        }

    def seeds(self, first: int) -> list[int]:
        """Seeds of the ``n`` pictures of each prompt."""
        first = first if self.seed is None else self.seed
        return [first + i for i in range(self.n)]


class Editing(Generation):
    """A picture made from another; the files ``image`` and ``mask`` come beside these fields."""

    input_fidelity: NoEffect = None
    strength: float | None = Field(None, description="How much changes, 0 to 1.")
    outpaint: str | None = Field(None, description="Pixels to add around: 32 or L,T,R,B.")

    @property
    def given(self) -> dict:
        return super().given | {"strength": self.strength}


def check_number(prompts: list[str], n: int) -> None:
    """Raise UsageError for too many pictures."""
    if len(prompts) * n > MAX_PICTURES:
        raise UsageError(
            f"{len(prompts)} prompts times {n} pictures; {MAX_PICTURES} pictures are the most"
        )
