"""What a pipeline asks of an autoencoder and of a text encoder, whichever it is."""

from typing import Protocol

import mlx.core as mx

from ..tensors.weights import Network


class DecoderConfig(Protocol):
    """Sizes of a decoder, known without its weights."""

    @property
    def downsampling(self) -> int:
        """Pixels per latent position and axis."""

    @property
    def image_channels(self) -> int: ...

    @property
    def latent_channels(self) -> int: ...

    @property
    def always_float32(self) -> bool:
        """Whether its weights are loaded as float32 on every machine."""

    def decoding_bytes(self, h: int, w: int, tile: int, size: int) -> int:
        """Predicted bytes of activations for decoding a latent.

        Args:
            h: rows of the latent.
            w: columns of the latent.
            tile: side of a tile in latent positions.
            size: bytes of a number, if the weights are not always float32.
        """


class AutoencoderConfig(DecoderConfig, Protocol):
    """Sizes of an autoencoder, known without its weights."""

    def encoding_bytes(self, h: int, w: int, size: int) -> int:
        """Bytes of activations of encoding a picture, predicted.

        Args:
            h: rows of the latent.
            w: columns of the latent.
            size: bytes of a number.
        """


class Decoder(Network, Protocol):
    """Latents to pictures."""

    @property
    def config(self) -> DecoderConfig: ...

    @property
    def decoder_bytes(self) -> int:
        """Of the weights that ``decode`` reads."""

    def decode(self, latents: mx.array, tile: int | None = None) -> mx.array:
        """Decode normalised latents.

        Args:
            latents: (B, h, w, C).
            tile: side of the parts that are decoded one at a time, in latent positions, to save
                memory.

        Returns:
            Images (B, H, W, image_channels) in [-1, 1].
        """


class Autoencoder(Decoder, Protocol):
    """Pictures to latents and back."""

    @property
    def config(self) -> AutoencoderConfig: ...

    @property
    def encoder_bytes(self) -> int:
        """Of the weights that ``encode`` reads."""

    def encode(self, images: mx.array) -> mx.array:
        """Images (B, H, W, image_channels) in [-1, 1] -> normalised latents (B, h, w, C)."""


class TextStates(Protocol):
    """Token states of texts."""

    @property
    def name(self) -> str:
        """Under which a transformer reads the states (``DiTConfig.text_dims``)."""

    def encode(self, texts: list[str]) -> tuple[mx.array, mx.array]:
        """States (B, L, dim) and mask (B, L) bool; True where a token counts."""


class TextEncoder(TextStates, Protocol):
    """Texts to token states, by a network or a table."""

    @property
    def max_tokens(self) -> int:
        """Of a text that are read."""

    @property
    def nbytes(self) -> int:
        """Of the weights."""

    def token_count(self, text: str) -> int:
        """Tokens of a text, those above ``max_tokens`` as well."""

    def encoding_bytes(self) -> int:
        """Bytes of activations of encoding the longest text, predicted."""
