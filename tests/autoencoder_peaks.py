"""Print the predicted and the measured peaks of an autoencoder's two halves, in bytes, as JSON."""

import json
import sys

import mlx.core as mx

from snapgen_mlx.models.autoencoder import StickerAutoencoder, StickerAutoencoderConfig

config = StickerAutoencoderConfig.from_dict(json.loads(sys.argv[1]))
model = StickerAutoencoder(config)
latents = mx.random.normal((1, 16, 16, config.latent_channels))
images = mx.zeros((1, 16 * config.downsampling, 16 * config.downsampling, 4))
mx.eval(model.parameters(), latents, images)
peaks = {}
for name, run, given, predicted in (
    ("decode", model.decode, latents, config.decoding_bytes(16, 16, 32, 4)),
    ("encode", model.encode, images, config.encoding_bytes(16, 16, 4)),
):
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(run(given))
    peaks[name] = [predicted, mx.get_peak_memory() - before]
print(json.dumps(peaks))
