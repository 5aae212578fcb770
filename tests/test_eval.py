"""``snapgen-mlx eval``: the loss is the training's, recall tells right pictures from wrong."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from snapgen_mlx import Pipeline
from snapgen_mlx.cli.main import main
from snapgen_mlx.evaluation import chance, evaluate, ranks, shares
from snapgen_mlx.hub import embedded_model
from snapgen_mlx.training.pictures import read_folder

from .tiny import write_sticker_model, write_tiny_model

PROMPTS = ["a red heart", "a green book", "the sun", "a blue car"]


def invoke(*args):
    return CliRunner().invoke(main, list(map(str, args)))


def error(result, code: int) -> str:
    assert result.exit_code == code, result.output
    (line,) = result.stderr.splitlines()
    return line


def write_data(folder, images, rows):
    folder.mkdir()
    for i, (image, row) in enumerate(zip(images, rows, strict=True)):
        image.save(folder / f"{i}.png")
        with open(folder / "metadata.jsonl", "a") as f:
            f.write(json.dumps({"file_name": f"{i}.png", **row}) + "\n")
    return folder


def noise_pictures(n: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(n)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    texts = ["a red dog", "a happy cat", "a red dog", "a kitty"]
    folder = tmp_path_factory.mktemp("data") / "data"
    return write_data(folder, noise_pictures(4), [{"text": text} for text in texts])


@pytest.fixture(scope="module")
def drawn():
    """Pictures by the shipped model; ``eval`` draws from other seeds."""
    pipe = Pipeline.load(variant="full")
    return [pipe.generate(prompt, seed=7) for prompt in PROMPTS]


# Ranks


@given(st.integers(0, 2**32 - 1))
def test_ranks_against_sorting(seed):
    """Distances are whole numbers, so that there are ties; a tie does not count against it."""
    rng = np.random.default_rng(seed)
    real = rng.integers(0, 3, (12, 2)).astype(np.float32)
    concepts = [str(c) for c in rng.integers(0, 5, 12)]
    latents = rng.integers(0, 3, (4, 2)).astype(np.float32)
    wanted = [concepts[i] for i in rng.integers(0, 12, 4)]
    for z, want, rank in zip(latents, wanted, ranks(latents, wanted, real, concepts), strict=True):
        nearest = {
            c: min(
                ((z - r) ** 2).sum() for r, other in zip(real, concepts, strict=True) if other == c
            )
            for c in set(concepts)
        }
        assert sorted(nearest.values()).index(nearest[want]) == rank


def test_shares():
    assert shares(np.array([0, 4, 5, 0])) == {"top1": 0.5, "top5": 0.75}
    assert chance(20) == {"top1": 0.05, "top5": 0.25}
    assert chance(3)["top5"] == 1


# The command


def test_models_of_transparent_pictures_learn_and_are_measured(tmp_path):
    """From stickers, whose transparency they keep: every command that takes pictures."""
    folder, pictures = write_sticker_model(tmp_path / "model"), []
    for image in noise_pictures(3):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        pictures.append(image)
    rows = [{"text": text} for text in ("a red dog", "a happy cat", "a kitty")]
    data = write_data(tmp_path / "data", pictures, rows)
    result = invoke("eval", folder, data, "--json", tmp_path / "figures.json")
    assert result.exit_code == 0, result.output
    assert "loss" in json.loads((tmp_path / "figures.json").read_text())["variants"]["tiny"]
    short = ("--steps", 2, "--batch", 2)
    lora, out = ("--lora", 2), tmp_path / "lora"
    result = invoke("finetune", folder, data, "-o", out, *short, *lora)
    assert result.exit_code == 0, result.output
    drawn = ("generate", "a cat", "-m", folder, "--lora", out / "lora.safetensors")
    assert invoke(*drawn, "-o", tmp_path / "cat.png").exit_code == 0
    with Image.open(tmp_path / "cat.png") as picture:
        assert picture.mode == "RGBA"
    kd = ("distill", folder, data, "--method", "kd", "--teacher", folder, "-o", tmp_path / "kd")
    result = invoke(*kd, *short)
    assert result.exit_code == 0, result.output


def test_a_file_that_cannot_be_written_is_told_first(model, data, tmp_path):
    (tmp_path / "text").write_text("")
    line = error(invoke("eval", model, data, "--json", tmp_path / "text" / "x.json"), 1)
    assert "Not a directory" in line


def test_pictures_of_several_shapes(model, tmp_path):
    """The loss is of each in its bucket's shape; those drawn are square, and so are compared."""
    shutil.copytree(model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["sampling"] |= {"size": 192, "steps": 1}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    square, *_ = noise_pictures(1)
    images = [square, square.resize((60, 120)), square.resize((120, 60))]
    rows = [{"text": text} for text in ("a red dog", "a happy cat", "a kitty")]
    folder = write_data(tmp_path / "data", images, rows)
    examples = read_folder(folder)
    *encoded, head, every = evaluate(tmp_path / "model", examples, ["tiny"])
    assert (head["pictures"], head["drawn"], every["steps"]) == (3, 3, 1)
    assert [r["encoded"] for r in encoded if "pictures" in r] == [1, 2, 3], "a batch a bucket"
    alone = [list(evaluate(tmp_path / "model", [e], ["tiny"]))[-1]["loss"] for e in examples]
    assert len({round(loss, 3) for loss in alone}) == 3
    # Noise and times are others alone: of 576 tokens, and t = 1/2 instead of 1/6 to 5/6.
    assert every["loss"] == pytest.approx(np.mean(alone), rel=0.2)


def test_the_loss_is_the_trainings(model, data, tmp_path):
    """Of the averaged weights, which a training writes, on its validation pictures."""
    mx.disable_compile()
    options = ["--steps=2", "--warmup=1", "--batch=3", "--learning-rate=1e-2"]
    command = ["finetune", model, data, "-o", tmp_path / "out", "--validation", data, *options]
    assert invoke(*command).exit_code == 0
    mx.enable_compile()
    record = json.loads((tmp_path / "out" / "run" / "log.jsonl").read_text().splitlines()[-1])
    result = invoke("eval", tmp_path / "out", data, "--count", 0, "--json", tmp_path / "e.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "e.json").read_text())
    assert list(found["variants"]) == ["tiny", "small", "full"]
    for name, figures in found["variants"].items():
        assert figures == {"loss": pytest.approx(record[f"val/{name}"], rel=1e-5)}
    before = {
        r["variant"]: r["loss"] for r in list(evaluate(model, read_folder(data), count=0))[-3:]
    }
    assert all(abs(found["variants"][k]["loss"] / before[k] - 1) > 1e-4 for k in before)
    table = [line.split() for line in result.stdout.splitlines()]
    assert table[0] == ["pictures", "4,", "concepts", "3"]
    assert table[1:] == [[k, f"{v['loss']:.4f}"] for k, v in found["variants"].items()]


def test_loss_of_the_shipped_model(drawn, tmp_path):
    """It knows its own pictures better by their own words than by other ones."""
    right, wrong = (
        write_data(tmp_path / name, drawn, [{"text": PROMPTS[(i + shift) % 4]} for i in range(4)])
        for shift, name in enumerate(("right", "wrong"))
    )
    result = invoke("eval", right, "--variants=full")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "pictures 4, concepts 4" and "pictures are transparent" in lines[1]
    name, loss = lines[2].split()
    *_, record = evaluate(embedded_model(), read_folder(wrong), ["full"])
    assert name == "full" and record["loss"] > float(loss)


def test_concepts(drawn, model, tmp_path):
    rows = [{"text": f"a red dog {i}", "concept": "dog" if i < 2 else 3} for i in range(3)]
    folder = write_data(tmp_path / "data", drawn[:3], rows)
    args = ["eval", model, folder, "--json", tmp_path / "e.json"]
    options = ["--variants", "small,tiny", "--steps=2", "--guidance=1", "--count=1"]
    result = invoke(*args, *options)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "e.json").read_text())
    assert list(found["variants"]) == ["small", "tiny"]
    assert (found["pictures"], found["concepts"], found["drawn"]) == (3, 2, 1)
    assert found["chance"]["top1"] == 0.5
    assert all((v["steps"], v["guidance"]) == (2, 1) for v in found["variants"].values())
    (folder / "metadata.jsonl").unlink()
    result = invoke(*args, "--caption", "a cat")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(
        "pictures 3, concepts 1\nrecall is not measured: all pictures show"
    )
    assert "chance" not in result.stdout


def test_a_width_without_few_steps_draws_as_its_base(model, data, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    lora = {"mid.0.cross.to_k.lora_A.weight": (2, 32), "mid.0.cross.to_k.lora_B.weight": (32, 2)}
    (tmp_path / "model" / "few_step").mkdir()
    path = tmp_path / "model" / "few_step" / "full.safetensors"
    mx.save_safetensors(str(path), {k: mx.zeros(shape) for k, shape in lora.items()})
    *_, tiny, full = evaluate(tmp_path / "model", read_folder(data), ["tiny", "full"], count=1)
    assert (full["steps"], full["guidance"]) == (4, 1)
    base = json.loads((model / "config.json").read_text())["sampling"]
    assert (tiny["steps"], tiny["guidance"]) == (base["steps"], base["guidance"])


def test_the_same_figures_again(model, data, tmp_path):
    for name in ("a", "b"):
        assert invoke("eval", model, data, "--steps=2", "--json", tmp_path / name).exit_code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_bad_requests(model, data, tmp_path):
    assert "no variant 'huge'" in error(invoke("eval", model, data, "--variants=tiny,huge"), 2)
    assert "0 steps; it must be 1" in error(invoke("eval", model, data, "--steps=0"), 2)
    assert "error: " in error(invoke("eval", model, tmp_path / "none"), 1)
    assert "is this a model folder?" in error(invoke("eval", data, data), 1)
    result = invoke("eval", model, model, data)
    assert result.exit_code == 2 and "unexpected extra argument" in result.stderr
    unread = [{"text": "a red dog"}, {"text": "日本語"}]
    unread = write_data(tmp_path / "unread", noise_pictures(2), unread)
    assert "'日本語' has no word that this model knows" in error(invoke("eval", model, unread), 2)
    (unread / "1.png").write_text("nothing")
    assert "1.png (not a picture)" in error(invoke("eval", model, unread), 1)
    assert invoke("eval", model, unread, "--skip-bad", "--count=0").exit_code == 0


def test_finetune_without_a_model_trains_the_shipped_one(data, tmp_path, monkeypatch):
    models = []

    def record(model, *_, **__):
        models.append(model)
        yield {"step": 1000, "done": True, "stopped": False}

    monkeypatch.setattr("snapgen_mlx.training.finetune.finetune", record)
    result = invoke("finetune", data, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    assert models == [embedded_model()]
