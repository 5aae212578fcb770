"""A model folder with a LoRA per width for four steps: drawn with by default, carried along."""

import shutil

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from snapgen_mlx.cli.main import main
from snapgen_mlx.convert.slice import slice_model
from snapgen_mlx.convert.to_mlx import convert
from snapgen_mlx.convert.to_pytorch import export
from snapgen_mlx.digest import base_digest
from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.files import read_json, write_json
from snapgen_mlx.hub import embedded_model
from snapgen_mlx.layout import load_config
from snapgen_mlx.loading import load_dit
from snapgen_mlx.lora_file import LoRAFile
from snapgen_mlx.picture_file import read_metadata
from snapgen_mlx.pipeline import Pipeline
from snapgen_mlx.settings import Settings
from snapgen_mlx.training.lora_training import lora_params, save_lora
from snapgen_mlx.training.teacher import load_teacher
from snapgen_mlx.vocabulary import known_words

from .tiny import tiny_config, write_tiny_model

PROMPT = "a smiling cat"
WIDTHS = ("tiny", "small", "full")


def save_random_lora(path, config, seed: int) -> None:
    params = lora_params(config, 2, seed)
    keys = mx.random.split(mx.random.key(seed), len(params))
    save_lora(
        path,
        {
            k: mx.random.normal(a.shape, key=key) * 0.3 if k.endswith("lora_b") else a
            for (k, a), key in zip(params.items(), keys, strict=True)
        },
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Each width has its own LoRA, in its own sizes."""
    folder = write_tiny_model(tmp_path_factory.mktemp("few") / "model")
    for i, name in enumerate(WIDTHS):
        save_random_lora(folder / "few_step" / f"{name}.safetensors", tiny_config().variant(i), i)
    return folder


def picture(folder, variant, **options) -> np.ndarray:
    return np.asarray(Pipeline.load(folder, variant, **options).generate(PROMPT))


def command(*args):
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("variant", WIDTHS)
def test_a_width_draws_with_its_own_lora(model, variant):
    pipe = Pipeline.load(model, variant)
    s = pipe.settings(PROMPT)
    assert (s.steps, s.guidance, s.shift) == (4, 1.0, 3.0)
    given = [(model / "few_step" / f"{variant}.safetensors", 1.0)]
    plain = Pipeline.load(model, variant, base=True, loras=given)
    four = plain.generate(PROMPT, steps=4, guidance=1.0)
    assert np.array_equal(pipe.generate(PROMPT), four)
    others = [picture(model, name) for name in WIDTHS if name != variant]
    assert not any(np.array_equal(four, other) for other in others)


def test_the_base_remains(model, tmp_path):
    bare = shutil.copytree(model, tmp_path / "bare", ignore=lambda *_: ["few_step"])
    pipe = Pipeline.load(model, "tiny", base=True)
    assert pipe.settings(PROMPT) == Settings(PROMPT, 0, 3, 2.0, 3.0, 64, 64)
    assert np.array_equal(pipe.generate(PROMPT), picture(bare, "tiny"))
    assert not np.array_equal(pipe.generate(PROMPT), picture(model, "tiny"))


def test_a_width_without_a_lora_is_the_base(model, tmp_path):
    some = shutil.copytree(model, tmp_path / "some")
    (some / "few_step" / "tiny.safetensors").unlink()
    assert Pipeline.load(some, "tiny").settings(PROMPT).steps == 3
    assert np.array_equal(picture(some, "tiny"), picture(model, "tiny", base=True))
    assert Pipeline.load(some).settings(PROMPT).steps == 4


def test_another_lora_comes_on_top(model, tmp_path):
    path = tmp_path / "mine.safetensors"
    save_random_lora(path, tiny_config(), 9)
    both = picture(model, "small", loras=[(path, 1.0)])
    few = [(model / "few_step" / "small.safetensors", 1.0), (path, 1.0)]
    plain = Pipeline.load(model, "small", base=True, loras=few)
    assert np.array_equal(both, plain.generate(PROMPT, steps=4, guidance=1.0))


def test_the_command(model, tmp_path):
    few, base, again = (tmp_path / f"{name}.png" for name in ("few", "base", "again"))
    args = ["-m", model, "--variant", "small"]
    command("generate", PROMPT, *args, "-o", few)
    command("generate", PROMPT, *args, "--base", "-o", base)
    assert read_metadata(few)["few_step"] and read_metadata(few)["steps"] == 4
    assert "few_step" not in read_metadata(base) and read_metadata(base)["steps"] == 3
    assert few.read_bytes() != base.read_bytes()
    for source in (few, base):
        command("generate", "-m", model, "--from-metadata", source, "-o", again)
        assert again.read_bytes() == source.read_bytes()
        again.unlink()
    out = command("info", model)
    assert "4 steps, guidance 1, shift 3 by a LoRA of tiny, small, full; generate --base" in out
    assert "3 steps, guidance 2" in out
    # Guidance is what the base needs twice the memory of activations for.
    assert ", guided" not in command("generate", "-m", model, "--explain")
    assert ", guided" in command("generate", "-m", model, "--explain", "--base")


def test_a_picture_of_few_steps_needs_its_lora(model, tmp_path):
    """Without it the base would draw something else in so few steps."""
    few, again = tmp_path / "few.png", tmp_path / "again.png"
    command("generate", PROMPT, "-m", model, "--variant", "small", "-o", few)
    bare = shutil.copytree(model, tmp_path / "bare", ignore=lambda *_: ["few_step"])
    args = ["generate", "-m", str(bare), "--from-metadata", str(few), "-o", str(again)]
    for more in ([], ["--variant", "tiny"]):
        result = CliRunner().invoke(main, [*args, *more])
        assert result.exit_code == 2 and not again.exists(), result.output
        assert "drawn with a few-step LoRA, which is not here; name" in result.stderr
    assert CliRunner().invoke(main, [*args, "--base"]).exit_code == 0  # asked for


def test_auto_beside_other_widths_is_the_widest(model, tmp_path):
    given = ["--variant", "tiny", "--variant", "auto", "-o", tmp_path / "{variant}.png"]
    command("generate", PROMPT, "-m", model, *given)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full.png", "tiny.png"]


def test_slices_carry_theirs(model, tmp_path):
    slice_model(model, tmp_path / "small", "small")
    assert [p.name for p in (tmp_path / "small" / "few_step").iterdir()] == ["small.safetensors"]
    assert np.array_equal(picture(tmp_path / "small", "small"), picture(model, "small"))


def test_export_and_convert_carry_them(model, tmp_path):
    export(model, tmp_path / "torch")
    convert(tmp_path / "torch", tmp_path / "back")
    for name in WIDTHS:
        assert np.array_equal(picture(tmp_path / "back", name), picture(model, name))
    # They belong to the conversion's identity.
    assert convert(tmp_path / "torch", tmp_path / "back")["status"] == "complete"
    files = load_config(tmp_path / "back")["source"]["files"]
    assert "few_step/tiny.safetensors" in files
    convert(tmp_path / "torch", tmp_path / "vae", only=["vae"])
    assert not (tmp_path / "vae" / "few_step").exists()


def test_load_dit_is_the_base(model):
    with_lora = Pipeline.load(model, "tiny").dit
    ours, theirs = (dit.down[0].attn.to_q.weight for dit in (load_dit(model, "tiny"), with_lora))
    assert not mx.array_equal(ours, theirs)


@pytest.mark.parametrize("variant", ["tiny", "small", "full"])
def test_the_shipped_loras_say_what_they_are_for(tmp_path, variant):
    folder = embedded_model()
    path = folder / "few_step" / f"{variant}.safetensors"
    about = LoRAFile.read(path).about
    assert about == {
        **{"base": base_digest(folder), "widths": [variant], "captions": []},
        **{"rank": 16, "alpha": 32},
    }
    other = "tiny" if variant == "full" else "full"
    args = ["generate", "a cat", "--lora", str(path), "-o", str(tmp_path / "a.png")]
    result = CliRunner().invoke(main, [*args, "--variant", other, "--base", "--steps", "1"])
    assert result.exit_code == 1 and not (tmp_path / "a.png").exists()
    assert f"made only for width {variant}, not for {other}" in result.stderr
    fits = CliRunner().invoke(main, [*args, "--variant", variant, "--base", "--steps", "1"])
    assert fits.exit_code == 0


def test_a_shipped_lora_under_another_widths_name_is_refused(tmp_path):
    model = shutil.copytree(embedded_model(), tmp_path / "model")
    shutil.copy(model / "few_step" / "small.safetensors", model / "few_step" / "tiny.safetensors")
    with pytest.raises(SnapGenError, match="made only for width small, not for tiny"):
        Pipeline.load(model, "tiny").generate("a cat", steps=1)


# --- through a conversion


def with_base(folder, base) -> None:
    """Make the few-step LoRAs of a folder say which weights they were trained on."""
    for i, name in enumerate(WIDTHS):
        params = lora_params(tiny_config().variant(i), 2, i)
        about = {"base": base, "widths": [name], "captions": []}
        save_lora(folder / "few_step" / f"{name}.safetensors", params, about)


def test_a_fused_lora_keeps_the_few_step_ones(model, tmp_path):
    """They stand beside it, as at run time; without it the model still knows which it has."""
    own = shutil.copytree(model, tmp_path / "own")
    with_base(own, base_digest(own))
    export(own, tmp_path / "torch")
    save_random_lora(tmp_path / "mine.safetensors", tiny_config(), 9)
    mine = (tmp_path / "mine.safetensors", 1.0)
    convert(tmp_path / "torch", tmp_path / "out", loras=[mine])
    ours = np.asarray(picture(tmp_path / "out", "small"), int)
    theirs = np.asarray(picture(own, "small", loras=[mine]), int)
    assert np.abs(ours - theirs).max() <= 1
    assert load_config(tmp_path / "out")["base"] != base_digest(own)
    # So does one that is named, for a checkpoint of one width.
    slice_model(own, tmp_path / "cut", "small")
    few = own / "few_step" / "small.safetensors"
    export(tmp_path / "cut", tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / "few_step")
    save_random_lora(tmp_path / "cut.safetensors", tiny_config().variant(1), 9)
    fuse = [(tmp_path / "cut.safetensors", 1.0)]
    convert(tmp_path / "one", tmp_path / "both", loras=fuse, few_step_lora=few)
    ours = np.asarray(picture(tmp_path / "both", "small"), int)
    theirs = np.asarray(picture(tmp_path / "cut", "small", loras=fuse), int)
    assert np.abs(ours - theirs).max() <= 1


def test_an_exported_transformer_that_was_trained_is_another(model, tmp_path):
    own = shutil.copytree(model, tmp_path / "own")
    with_base(own, base_digest(own))
    export(own, tmp_path / "torch")
    file = tmp_path / "torch" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = {k: a * 1.01 for k, a in mx.load(str(file)).items()}
    mx.save_safetensors(str(file), tensors, {"format": "pt"})
    convert(tmp_path / "torch", tmp_path / "out")
    with pytest.raises(SnapGenError, match="trained on other weights"):
        Pipeline.load(tmp_path / "out", "tiny").generate(PROMPT)
    with pytest.raises(SnapGenError, match="trained on other weights"):
        load_teacher(tmp_path / "out", tmp_path / "out")
    save_random_lora(tmp_path / "mine.safetensors", tiny_config(), 9)
    convert(tmp_path / "torch", tmp_path / "fits", loras=[(tmp_path / "mine.safetensors", 1.0)])
    with pytest.raises(SnapGenError, match="trained on other weights"):  # still
        Pipeline.load(tmp_path / "fits", "tiny").generate(PROMPT)
    lora = tmp_path / "lora.safetensors"
    about = {"base": base_digest(own), "widths": list(WIDTHS), "captions": []}
    save_lora(lora, lora_params(tiny_config(), 2), about)
    with pytest.raises(SnapGenError, match="trained on other weights"):
        convert(tmp_path / "torch", tmp_path / "old", loras=[(lora, 1.0)])
    export(model, tmp_path / "other")
    index = read_json(tmp_path / "other" / "model_index.json") | {"base": "of another"}
    write_json(tmp_path / "other" / "model_index.json", index)
    with pytest.raises(SnapGenError, match="trained on other weights"):
        convert(tmp_path / "other", tmp_path / "fused", loras=[(lora, 1.0)])


def test_a_named_transformer_brings_its_own_sampling(model, tmp_path):
    own = shutil.copytree(model, tmp_path / "own")
    with_base(own, base_digest(own))
    export(own, tmp_path / "torch")
    export(write_tiny_model(tmp_path / "else", seed=5), tmp_path / "elsewhere")
    parts = {"transformer": str(tmp_path / "torch")}
    convert(tmp_path / "elsewhere", tmp_path / "out", parts=parts)
    head = load_config(tmp_path / "out")
    assert head["sampling"] == load_config(own)["sampling"] and head["base"] == base_digest(own)
    assert Pipeline.load(tmp_path / "out", "tiny").settings(PROMPT).steps == 4
    Pipeline.load(tmp_path / "out", "tiny").generate(PROMPT)


def test_a_damaged_transformer_is_made_again_beside_its_loras(model, tmp_path):
    own = shutil.copytree(model, tmp_path / "own")
    with_base(own, base_digest(own))
    export(own, tmp_path / "torch")
    out = tmp_path / "out"
    convert(tmp_path / "torch", out)
    before = picture(out, "small")
    shutil.rmtree(out / "transformer")
    (tmp_path / "torch" / "few_step" / "small.safetensors").unlink()
    assert convert(tmp_path / "torch", out, only=["transformer"])["status"] == "converted"
    assert np.array_equal(picture(out, "small"), before)


def test_another_transformer_is_not_drawn_with_the_old_loras(model, tmp_path):
    """A message says to remove the transformer; its LoRAs and words go with it."""
    export(model, tmp_path / "torch")
    out = tmp_path / "out"
    convert(tmp_path / "torch", out)
    write_json(out / "words.json", ["cat"])
    other = write_tiny_model(tmp_path / "other", seed=3)
    export(other, tmp_path / "new")
    shutil.rmtree(out / "transformer")
    with pytest.raises(SnapGenError, match="few_step holds LoRAs of the transformer that was"):
        convert(tmp_path / "new", out, only=["transformer"])
    shutil.rmtree(out / "few_step")
    assert convert(tmp_path / "new", out, only=["transformer"])["status"] == "converted"
    assert not (out / "few_step").exists() and not (out / "words.json").exists()
    shutil.rmtree(out / "transformer")
    write_json(tmp_path / "torch" / "words.json", ["dog"])
    convert(tmp_path / "torch", out, only=["transformer"])
    assert known_words(out) == ["dog"]
    assert np.array_equal(picture(out, "tiny"), picture(model, "tiny"))
