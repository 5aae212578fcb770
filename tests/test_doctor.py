"""``snapgen-mlx doctor``."""

from click.testing import CliRunner

from snapgen_mlx import Pipeline, doctor
from snapgen_mlx.cli.main import main
from snapgen_mlx.files import file_sha256

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


def test_a_missing_home_and_a_cache_that_is_a_file_are_findings(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file"))
    found = {finding.name: finding for finding in doctor.examine()}
    assert "set HOME" in found["disk"].advice and "set HF_HOME" in found["cache"].advice
    assert found["python"].advice is None


def test_the_cache_and_the_hash_of_a_model_that_was_downloaded(tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(doctor, "matmul_speed", lambda: 100.0)
    repo = cache / "models--org--name"
    model = write_tiny_model(repo / "snapshots" / ("0" * 40))
    weights = model / "vae" / "model.safetensors"
    blob = repo / "blobs" / file_sha256(weights)
    blob.parent.mkdir()
    weights.rename(blob)
    weights.symlink_to(blob)
    digest = Pipeline.load(model).digests["model"]
    result = CliRunner().invoke(main, ["doctor", "-m", str(model)])
    assert result.exit_code == 0 and f"digest {digest}" in result.output, result.output
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1  # a single bit of a weight
    blob.write_bytes(data)
    result = CliRunner().invoke(main, ["doctor", "-m", str(model)])
    assert result.exit_code == 1 and "vae/model.safetensors" in result.output
    assert "cache: " in result.output and str(cache) in result.output
