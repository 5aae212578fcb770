"""The branches of GPUs on a CPU, which computes all that they do, slowly."""

import mlx.core as mx


def as_on_a_gpu(monkeypatch, metal: bool = True) -> None:
    """Let the code take the default device for Metal's GPU, or for one of CUDA."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
