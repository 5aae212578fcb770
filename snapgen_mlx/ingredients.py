"""What a picture is made with beside its settings, by name and by digest."""

from pathlib import Path

from .digest import digest
from .hub import resolve
from .layout import TEXT_FOLDERS
from .lora_file import find_file


def ingredients(
    folder: Path, few_steps: list[Path], loras, text_encoder, tiny_decoder: Path | None = None
) -> dict[str, str]:
    """Digests of a model, and of the LoRAs and the text encoder that go with it.

    Args:
        folder: of the model.
        few_steps: the LoRAs with which its widths draw in few steps, if they do.
        loras: pairs (LoRA file, scale).
        text_encoder: a folder or Hub id; None for the model's own.
        tiny_decoder: the folder of the decoder that takes the place of the autoencoder's.
    """
    found = {"model": digest(*(folder / name for name in ("transformer", "vae", *TEXT_FOLDERS)))}
    if few_steps:
        found["few-step LoRA"] = digest(*few_steps)
    if tiny_decoder:
        found["tiny decoder"] = digest(tiny_decoder)
    if loras:
        found["LoRA"] = digest(*(find_file(path) for path, _ in loras))
    if text_encoder:
        found["text encoder"] = digest(resolve(text_encoder))
    return found


def names_of(loras, text_encoder) -> dict:
    """How metadata name what goes with a model."""
    named: dict = {"text_encoder": Path(text_encoder).name} if text_encoder else {}
    if loras:
        named["loras"] = [f"{Path(path).name}:{scale:g}" for path, scale in loras]
    return named


def differences(found: dict, here: dict, base: bool = False) -> list[str]:
    """What a picture was drawn with that is not the same here, in words, such as "another model".

    Args:
        found: settings of a picture (``read_metadata``).
        here: what a picture that is drawn now would carry (``Pipeline.metadata``). Another width
            or decoder than the picture's was asked for, and so was another of what goes with it.
        base: whether to draw without a few-step LoRA was asked for.
    """
    before, now = found.get("digests"), here.get("digests", {})
    if before is None:  # of an early version: all that is known is a name
        return ["another model"] if found.get("model") != here.get("model") else []
    words = []
    asked = {"few-step LoRA"} if base else set()
    if found.get("tiny_decoder") != here.get("tiny_decoder"):
        asked.add("tiny decoder")
    has_both = all("few-step LoRA" in digests for digests in (before, now))
    if found.get("variant") != here.get("variant") and has_both:
        asked.add("few-step LoRA")
    for name in dict.fromkeys([*before, *now]):
        # Earlier versions of the server wrote no digests of pictures to start from.
        is_unknown = name in ("image", "mask") and name not in before and name in found
        if before.get(name) == now.get(name) or name in asked or is_unknown:
            continue
        if name not in before:
            words.append(f"no {name}")
        else:
            words.append(f"another {name}" if name in now else f"a {name}, which is not here")
    scales = [
        [name.rpartition(":")[2] for name in metadata.get("loras", [])]
        for metadata in (found, here)
    ]
    if before.get("LoRA") == now.get("LoRA") and scales[0] != scales[1]:
        words.append(f"LoRA scale {', '.join(scales[0])}")
    return words
