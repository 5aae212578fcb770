"""The parts of a model, each from its own place, and whether they fit together."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import QWEN_IMAGE, DiTConfig, QwenImageConfig
from ..errors import SnapGenError
from ..files import read_json
from ..hub import commit_of, resolve
from ..layout import COMPONENTS, TINY_DECODER, load_config
from ..loading import build_autoencoder
from ..models.clip_text import CLIPText
from ..models.gemma_text import GemmaText
from ..models.qwen_text import QwenText
from ..models.static_text import StaticText
from ..models.vae import VAEConfig
from ..models.word_transformer import WordTransformer
from .plan import PlannedComponent, find_components, find_part

PARTS = (*COMPONENTS, TINY_DECODER)
# The name of a text encoder's states, and the key of their dimension, by its config's model_type.
STATES = {
    "clip_text_model": (CLIPText.name, "hidden_size"),
    "gemma3_text": (GemmaText.name, "hidden_size"),
    "qwen2_5_vl_text": (QwenText.name, "hidden_size"),
    "static_text": (StaticText.name, "dim"),
    "word_transformer": (WordTransformer.name, "dim"),
}
STATISTICS = ("latents_mean", "latents_std")


def gather(
    source,
    named: dict[str, str],
    only: Sequence[str] | None = None,
    config=None,
    revision: str | None = None,
    token: str | None = None,
) -> tuple[dict[str, PlannedComponent], dict]:
    """The parts of a source and those that are named, which take the place of the source's.

    Args:
        source: a Hub id, a folder or a weight file; None for named parts alone.
        named: {part: Hub id, folder or weight file}.
        only: parts of the source to take.
        config: config.json of a source that is a single file.
        revision: of the source on the Hub.
        token: for the Hub.

    Returns:
        {part: component}, and the ``model_index.json`` beside the transformer, or beside the other
        parts where there is no transformer; {} if there is none.
    """
    found: dict[str, PlannedComponent] = {}
    index: dict = {}
    if source is not None:
        path = resolve(source, revision, token, only)
        found, index = find_components(path, only, config)
        for component in found.values():
            component.origin, component.root = str(source), path if path.is_dir() else path.parent
    for name, where in named.items():
        path = resolve(where, None, token, [name])
        found[name] = component = find_part(path, name)
        component.origin, component.root = str(where), path if path.is_dir() else path.parent
        component.is_named = True
        if name == "transformer":
            place = component.root / "model_index.json"
            index = read_json(place) if place.is_file() else {}
    return {name: found[name] for name in PARTS if name in found}, index


def origin(component: PlannedComponent) -> dict[str, Any]:
    """Where a part is from, for a model's config.json."""
    return {"source": component.origin, "revision": commit_of(component.root)}


def check_fit(parts: dict[str, PlannedComponent], folder: Path) -> None:
    """Raises SnapGenError unless the planned parts, and those in ``folder``, are of one model."""
    configs = {
        name: load_config(folder / name)
        for name in PARTS
        if (folder / name / "config.json").is_file()
    } | {name: part.config for name, part in parts.items()}
    vae = build_autoencoder(configs["vae"]).config if "vae" in configs else None
    if "transformer" in configs:
        config = _transformer(configs["transformer"])
        if vae and vae.latent_channels != config.latent_channels:
            raise SnapGenError(
                f"the transformer draws latents of {config.latent_channels} channels, but the "
                f"autoencoder has {vae.latent_channels}; choose another of the two"
            )
        for name in ("text_encoder", "text_encoder_2"):
            if name in configs:
                _check_text(configs[name], config.text_dims, name)
    if vae and "transformer" in parts:
        _check_statistics(parts["transformer"], configs["vae"])
    if vae and TINY_DECODER in configs:
        _check_tiny(configs[TINY_DECODER], configs["vae"])


def _transformer(config: dict) -> DiTConfig | QwenImageConfig:
    if config.get("_class_name") == QWEN_IMAGE:
        return QwenImageConfig.from_dict(config)
    return DiTConfig.from_dict(config)


def _check_text(config: dict, dims: dict[str, int], name: str) -> None:
    encoder, key = STATES[config["model_type"]]
    reads = ", ".join(f"{k} with {n}" for k, n in dims.items())
    if dims.get(encoder) != config.get(key):
        raise SnapGenError(
            f"{name} gives {encoder} states with {config.get(key)} channels, but the transformer "
            f"reads {reads}; choose another text encoder"
        )


def _check_statistics(transformer: PlannedComponent, vae: dict) -> None:
    """Latents mean the same as beside the transformer where it is from."""
    beside = transformer.root / "vae"
    if not (beside / "config.json").is_file():
        return
    theirs = load_config(beside)
    for key in STATISTICS:
        if key in theirs and theirs[key] != vae.get(key):
            raise SnapGenError(
                f"the autoencoder has other {key} than the one beside the transformer in "
                f"{transformer.origin}; the transformer's latents need its own"
            )


def _check_tiny(decoder: dict, vae: dict) -> None:
    """A public decoder is for latents that are normalised as Qwen-Image's."""
    channels = build_autoencoder(vae).config.latent_channels
    if decoder.get("latent_channels") != channels:
        raise SnapGenError(
            f"the tiny decoder reads latents of {decoder.get('latent_channels')} channels, but the "
            f"autoencoder has {channels}; choose the one made for it"
        )
    usual = VAEConfig()
    if decoder.get("_class_name") == "TAEHVDecoder" and any(
        vae.get(key, getattr(usual, key)) != getattr(usual, key) for key in STATISTICS
    ):
        raise SnapGenError(
            "the tiny decoder reads latents of Qwen-Image's own means and deviations, and this "
            "autoencoder has others; choose the one made for it"
        )
