"""What a picture depends on beside the model's weights."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import UsageError, shown
from .layout import picture_size
from .sampling import FEW_STEPS

MAX_PIXELS = 2048  # largest side in pixels
MAX_PROMPT = 4000  # characters; the encoders read at most 256 tokens


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{name} must be a text, not {shown(value)}")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise UsageError(f"{name} holds bytes that are no characters: {shown(value)}; write UTF-8")
    return value


def _whole(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError as e:
        raise UsageError(f"{name} must be a whole number, not {shown(value)}") from e


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError) as e:
        raise UsageError(f"{name} must be a number, not {shown(value)}") from e


KINDS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("prompt", "negative", "background", "vary"), _text),
    **dict.fromkeys(("seed", "steps", "width", "height"), _whole),
    **dict.fromkeys(("guidance", "shift", "strength"), _number),
}


@dataclass
class Settings:
    """Everything a picture depends on beside the model's weights."""

    prompt: str
    seed: int = 0
    steps: int = 4
    guidance: float = 1.0
    shift: float = 3.0
    width: int = 1024  # pixels
    height: int = 1024
    negative: str | None = None
    strength: float | None = None  # how much of the first picture changes, 0 to 1
    # Background of a transparent picture: white, transparent or #rrggbb.
    background: str | None = None
    vary: str | None = None  # "SEED:AMOUNT": how far the noise moves to that of another seed

    def __post_init__(self):
        for name, field in self.__dataclass_fields__.items():
            value = getattr(self, name)
            if value is not None or field.default is not None:
                setattr(self, name, KINDS[name](name, value))
        if not self.prompt.strip():
            raise UsageError("the prompt is empty; say what the picture should show")
        for text in (self.prompt, self.negative or ""):
            if len(text) > MAX_PROMPT:
                raise UsageError(f"a prompt of {len(text)} characters; {MAX_PROMPT} is the most")
        if not 1 <= self.steps <= 1000:
            raise UsageError(f"{self.steps} steps; it must be 1 to 1000")
        if not 0 <= self.guidance <= 100:
            raise UsageError(f"guidance {self.guidance}; it must be 0 to 100")
        if not 0 < self.shift <= 100:
            raise UsageError(f"shift {self.shift}; it must be above 0, and 100 at most")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed {self.seed}; it must be 0 to 2^63 - 1")
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise UsageError(f"strength {self.strength}; it must be 0 to 1")
        self.variation  # noqa: B018 (raises when malformed)

    @classmethod
    def from_config(
        cls, config: dict, prompt: str, few_steps: bool = False, **given: Any
    ) -> "Settings":
        """What is not given (or None) comes from a model's config, or is that of few steps."""
        sampling = config.get("sampling", {}) | (FEW_STEPS if few_steps else {})
        defaults = {"width": picture_size(config), "height": picture_size(config)}
        defaults |= {k: sampling[k] for k in ("steps", "guidance", "shift") if k in sampling}
        if unknown := given.keys() - cls.__dataclass_fields__.keys():
            known = ", ".join(cls.__dataclass_fields__)
            raise UsageError(f"no setting {min(unknown)!r}; there is: {known}")
        return cls(prompt, **defaults | {k: v for k, v in given.items() if v is not None})

    def check_size(self, multiple: int) -> None:
        """Raise UsageError for a size that is too large or no multiple of so many pixels."""
        for n in (self.width, self.height):
            if n % multiple or not 0 < n <= MAX_PIXELS:
                raise UsageError(
                    f"size {self.width}x{self.height}: width and height must be multiples of "
                    f"{multiple} pixels, {MAX_PIXELS} at most"
                )

    @property
    def skipped_steps(self) -> int:
        """Steps at the start that are left out since the picture to start from stands for them.

        The last ``round(strength * steps)`` steps are made, at least one unless strength is 0.
        """
        if not self.strength:
            return self.steps if self.strength == 0 else 0
        return self.steps - max(1, round(self.strength * self.steps))

    @property
    def variation(self) -> tuple[int, float] | None:
        """``vary`` as the other seed and its share. Raises UsageError when it is malformed."""
        if self.vary is None:
            return None
        seed, _, amount = self.vary.partition(":")
        try:
            parsed = int(seed), float(amount)
        except ValueError:
            parsed = -1, -1.0
        if not (0 <= parsed[0] < 2**63 and 0 <= parsed[1] <= 1):
            raise UsageError(f"{self.vary!r} is not SEED:AMOUNT with an amount of 0 to 1, as 8:0.3")
        return parsed

    @property
    def texts(self) -> list[str]:
        """What is to be encoded."""
        return [text for text in (self.prompt, self.negative) if text and text.strip()]
