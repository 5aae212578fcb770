"""Words to picture: load, encode the text, denoise, decode."""

from pathlib import Path

from .errors import SnapGenError
from .weights import assign, load_config, load_tensors


def load_vae(folder):
    """The autoencoder of a model folder."""
    from .models.autoencoder import SnapGenAutoencoder, SnapGenAutoencoderConfig

    folder = Path(folder) / "vae"
    config = load_config(folder)
    if config.get("_class_name") != "SnapGenAutoencoder":
        raise SnapGenError(f"{folder}: unknown autoencoder {config.get('_class_name')!r}")
    vae = SnapGenAutoencoder(SnapGenAutoencoderConfig.from_dict(config))
    return assign(vae, load_tensors(folder), folder)


def load_text_encoders(folder) -> list:
    """The text encoders of a model folder."""
    from .models.static_text import StaticText

    return [StaticText.load(Path(folder) / "text_encoder")]
