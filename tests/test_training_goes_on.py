"""Trainings that go on from another, and those that could train nothing."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from snapgen_mlx.cli.main import main
from snapgen_mlx.errors import SnapGenError, UsageError
from snapgen_mlx.loading import load_dit_config
from snapgen_mlx.lora import load_lora
from snapgen_mlx.tensors.weights import load_tensors
from snapgen_mlx.training.checkpoint import load_state
from snapgen_mlx.training.data import LatentDataset
from snapgen_mlx.training.encoding import encode_data
from snapgen_mlx.training.few_steps import to_watch
from snapgen_mlx.training.kdmd import KDMDOptions
from snapgen_mlx.training.loop import RunOptions, check_run
from snapgen_mlx.training.lora_training import lora_params, save_lora
from snapgen_mlx.training.optimizer import AdamOptions
from snapgen_mlx.training.picture_list import left_out
from snapgen_mlx.training.pictures import read_folder

from .tiny import tiny_config, write_tiny_model
from .toy import ToyText, toy_run

pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def draw(folder, *names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        colour = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(colour).save(folder / name, "PNG")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = draw(tmp_path_factory.mktemp("data"), "1.png", "2.png")
    for i in (1, 2):
        (folder / f"{i}.txt").write_text("a cat")
    return folder


def finetune(*args, **options):
    options = {
        "steps": 4,
        "batch": 2,
        "warmup": 1,
        "sample-every": 0,
        "learning-rate": 1e-2,
    } | options
    flags = [f"--{k}={v}" for k, v in options.items()]
    return CliRunner().invoke(main, ["finetune", *map(str, args), *flags])


# --- folders of sd-scripts, and repeats


def test_folders_that_say_how_often_theirs_are_drawn(tmp_path):
    draw(tmp_path, "3_a cat/1.png", "3_a cat/2.png", "12_dog/1.jpg", "0.png", "others/9.png")
    (tmp_path / "3_a cat" / "2.txt").write_text("a red cat")
    (tmp_path / "0.txt").write_text("a house")
    found = {e.file.relative_to(tmp_path).as_posix(): e for e in read_folder(tmp_path)}
    said = {name: (e.captions, e.repeats) for name, e in found.items()}
    assert said == {
        "0.png": (["a house"], 1),
        "3_a cat/1.png": (["a cat"], 3),
        "3_a cat/2.png": (["a red cat"], 3),
        "12_dog/1.jpg": (["dog"], 12),
    }
    (line,) = left_out(tmp_path)
    assert line.startswith("1 stand in folders below")


def test_a_table_may_say_how_often(tmp_path):
    draw(tmp_path, "1.png", "2.png")
    (tmp_path / "metadata.csv").write_text("file_name,text,repeats\n1.png,a,5\n2.png,b,1\n")
    assert [e.repeats for e in read_folder(tmp_path)] == [5, 1]
    for bad in ("0", "-2", "x", "1.5", "10000"):
        (tmp_path / "metadata.csv").write_text(f"file_name,text,repeats\n1.png,a,{bad}\n")
        with pytest.raises(SnapGenError, match="repeats is"):
            read_folder(tmp_path)


def dataset(repeats):
    latents = [np.full((2, 2, 1), i, np.float32) for i in range(3)]
    return LatentDataset(latents, [["a cat"]] * 3, [ToyText()], repeats=repeats)


def test_pictures_are_drawn_as_often_as_they_are_repeated():
    data, rng = dataset([6, 1, 1]), np.random.default_rng(0)
    drawn = np.concatenate([np.array(data.batch(rng, 400)[0])[:, 0, 0, 0] for _ in range(4)])
    shares = np.bincount(drawn.astype(int)) / len(drawn)
    np.testing.assert_allclose(shares, [6 / 8, 1 / 8, 1 / 8], atol=0.03)
    assert data.fingerprint != dataset(None).fingerprint
    assert dataset([1, 1, 1]).fingerprint == dataset(None).fingerprint
    assert len({int(a[0, 0, 0]) for a in to_watch(data).latents}) == 3


def test_repeats_count_beside_a_prior(model, tmp_path, monkeypatch):
    """Each picture's own are multiplied; those that the model draws count once."""
    draw(tmp_path / "data", "3_a cat/1.png", "12_dog/1.png")
    prior, sets = tmp_path / "prior.txt", []
    prior.write_text("a dog\n")

    def stopped(*args):
        sets.extend((yield from encode_data(*args)))
        raise SnapGenError("enough")

    monkeypatch.setattr("snapgen_mlx.training.finetune.encode_data", stopped)
    options = {"lora": 2, "repeats": 7}
    alone = finetune(model, tmp_path / "data", "-o", tmp_path / "a", **options)
    assert "--repeats changes nothing" in alone.stderr and "enough" in alone.stderr
    assert sorted(sets[0].repeats) == [21, 84]
    beside = finetune(model, tmp_path / "data", "-o", tmp_path / "b", prior=prior, **options)
    assert "--repeats" not in beside.stderr
    assert sorted(sets[1].repeats) == [1, 21, 84]


# --- on from a LoRA


def test_on_from_a_lora(model, data, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert finetune(model, data, "-o", first, lora=3).exit_code == 0
    lora = first / "lora.safetensors"
    slow = {"learning-rate": 1e-5}
    result = finetune(model, data, "-o", second, **slow, **{"from-lora": lora})
    assert result.exit_code == 0, result.output
    # At so small a learning rate it is the LoRA that it began with, and hardly anything changed.
    config = load_dit_config(model)
    ours, theirs = (load_lora(d / "lora.safetensors", config, None) for d in (second, first))
    assert ours.keys() == theirs.keys()
    for name, update in ours.items():
        assert update.a.shape[0] == 3
        expected = theirs[name].b @ theirs[name].a
        assert mx.allclose(update.b @ update.a, expected, rtol=1e-3, atol=1e-4), name
    changes = [line for line in result.stdout.splitlines() if line.startswith("weights changed")]
    assert all(0 < float(part.split()[1]) < 0.05 for part in changes[0].split(": ")[1].split(", "))
    # A run is resumed with the same LoRA alone.
    other = shutil.copy(second / "lora.safetensors", tmp_path / "other.safetensors")
    result = finetune(model, data, "-o", second, **slow, **{"from-lora": other})
    assert result.exit_code == 1 and "another --from-lora" in result.stderr


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({}, {"lora": 4}, "has the rank 2, and can go on with one rank alone, not with --lora 4"),
        ({"final.proj.lora_a": (2, 64), "final.proj.lora_b": (64, 2)}, {}, "'final.proj', which"),
        (
            {"up.0.attn.to_q.lora_a": (3, 64), "up.0.attn.to_q.lora_b": (64, 3)},
            {},
            "the rank 2 and 3",
        ),
    ],
)
def test_loras_that_cannot_go_on(model, data, tmp_path, change, options, words):
    params = lora_params(tiny_config(), 2) | {k: mx.ones(shape) for k, shape in change.items()}
    save_lora(tmp_path / "lora.safetensors", params)
    options |= {"from-lora": tmp_path / "lora.safetensors"}
    result = finetune(model, data, "-o", tmp_path / "out", **options)
    assert result.exit_code == 2 and words in result.stderr, result.output


def test_a_lora_of_another_base_or_width_does_not_go_on(model, data, tmp_path):
    path = tmp_path / "lora.safetensors"
    for about, words in (
        ({"base": "abc"}, "other weights"),
        ({"widths": ["full"]}, "only for width full, not for tiny, small"),
    ):
        save_lora(path, lora_params(tiny_config(), 2), about)
        result = finetune(model, data, "-o", tmp_path / "out", **{"from-lora": path})
        assert result.exit_code == 1 and words in result.stderr


# --- a finished run


def test_a_finished_run_is_extended(tmp_path):
    def run(steps, **options):
        return list(toy_run(tmp_path / "run", steps, **options))

    run(6)
    with pytest.raises(SnapGenError, match="finished after 6 steps; --resume makes it go on to 9"):
        run(9)
    records = run(9, extend=True)
    assert [r["step"] for r in records] == [8, 9] and records[-1]["done"]
    assert load_state(tmp_path / "run")[1]["options"]["steps"] == 9
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [2, 4, 6, 8, 9]
    for steps, options in ((7, {"extend": True}), (12, {"extend": True, "batch": 2})):
        with pytest.raises(SnapGenError, match="was started with"):
            run(steps, **options)
    assert [r["step"] for r in run(9, extend=True)] == [9]


def test_an_unfinished_run_is_not_extended(tmp_path):
    run = tmp_path / "run"
    next(iter(toy_run(run, 6, save_minutes=0)))
    with pytest.raises(SnapGenError, match="steps 6, not 9"):
        list(toy_run(run, 9, extend=True))


def test_the_command_extends_a_model(model, data, tmp_path):
    out = tmp_path / "out"
    assert finetune(model, data, "-o", out).exit_code == 0
    before = load_tensors(out / "transformer")
    assert finetune(model, data, "-o", out, steps=6).exit_code == 1
    result = finetune(model, data, "-o", out, "--resume", steps=6)
    assert result.exit_code == 0 and "step 6/6" in result.stdout, result.output
    after = load_tensors(out / "transformer")
    assert any(not mx.array_equal(after[k], before[k]) for k in before)


# --- what cannot train, or must not be written there


@pytest.mark.parametrize(
    ("adam", "least"),
    [
        (AdamOptions(), 2),
        (AdamOptions(warmup=0), 1),
        (KDMDOptions(), 10),
        (KDMDOptions(warmup=0), 5),
        (KDMDOptions(warmup=4), 5),  # less than one of the student's steps
        (KDMDOptions(critic_steps=2), 4),
        (KDMDOptions(loss="kd"), 2),
    ],
)
def test_steps_that_train_nothing_are_refused_at_the_start(adam, least):
    assert adam.least_steps == least
    for steps in {least, least + 1}:
        adam.steps = steps
        check_run(RunOptions(), adam)
    if least > 1:
        adam.steps = least - 1
        with pytest.raises(UsageError, match=f"changes nothing.* --steps {least} or more"):
            check_run(RunOptions(), adam)


def test_the_fewest_steps_do_train(model, data, tmp_path):
    result = finetune(model, data, "-o", tmp_path / "a", steps=1)
    assert result.exit_code == 2 and "the learning rate begins at 0" in result.stderr
    assert not (tmp_path / "a").exists()
    args = ["distill", model, data, "-o", tmp_path / "b", "--method", "kdmd", "--lora", "2"]
    args += ["--batch", "1", "--critic-steps", "2", "--steps"]
    short, enough = (CliRunner().invoke(main, [*map(str, args), n]) for n in ("3", "4"))
    assert short.exit_code == 2 and "steps of the critic; give --steps 4" in short.stderr
    assert enough.exit_code == 0, enough.output


@pytest.mark.parametrize("place", ["", "below"])
@pytest.mark.parametrize("command", [["finetune"], ["distill", "--method=kd"]])
def test_the_pictures_folder_is_no_output(model, data, tmp_path, command, place):
    pictures = shutil.copytree(data, tmp_path / "pictures")
    before = sorted(pictures.rglob("*"))
    args = [*command, str(model), str(pictures), "-o", str(pictures / place)]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 2 and "lies in the pictures of" in result.stderr
    args = [*command, str(model), str(data), "-o", str(pictures), f"--validation={pictures}"]
    assert CliRunner().invoke(main, args).exit_code == 2
    assert sorted(pictures.rglob("*")) == before


def test_few_step_loras_that_are_left_out_are_named(model, data, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    config = load_dit_config(folder).variant(2)
    save_lora(folder / "few_step" / "full.safetensors", lora_params(config, 2))
    out = tmp_path / "out"
    result = finetune(folder, data, "-o", out)
    assert result.exit_code == 0 and not (out / "few_step").exists()
    assert "left out the few-step LoRAs (full)" in result.stderr
    assert f"snapgen-mlx distill {out} DATA --method kdmd" in result.stderr
    result = finetune(folder, data, "-o", tmp_path / "lora", lora=2, steps=2)
    assert result.exit_code == 0 and "left out the few-step" not in result.stderr
