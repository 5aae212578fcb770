"""``snapgen-mlx doctor``."""

from click.testing import CliRunner

from snapgen_mlx import doctor
from snapgen_mlx.cli.main import main

from .tiny import write_tiny_model


def test_all_is_well_then_a_damaged_model_and_slow_matrices_are_told(tmp_path, monkeypatch):
    model = write_tiny_model(tmp_path)
    monkeypatch.setattr(doctor, "matmul_speed", lambda: 100.0)
    result = CliRunner().invoke(main, ["doctor", "-m", str(model)])
    assert result.exit_code == 0 and "BAD" not in result.output, result.output
    weights = model / "transformer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    monkeypatch.setattr(doctor, "matmul_speed", lambda: 3.0)
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    result = CliRunner().invoke(main, ["doctor", "-m", str(model)])
    assert result.exit_code == 1 and result.output.count("BAD") == 2
    assert "libopenblas0" in result.output and str(weights.parent) in result.output
