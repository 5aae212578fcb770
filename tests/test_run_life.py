"""A run's life: killed, stopped, resumed, on a full disk, with damaged states, on two processes."""

import json
import os
import random
import resource
import shutil
import signal
import time

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from snapgen_mlx import load_dit
from snapgen_mlx.cli.main import main
from snapgen_mlx.cli.training_run import duration
from snapgen_mlx.errors import SnapGenError, UsageError
from snapgen_mlx.layout import load_config
from snapgen_mlx.tensors.weights import load_tensors, save_tensors
from snapgen_mlx.training.checkpoint import load_state, save_state
from snapgen_mlx.training.elastic_trainer import ElasticTrainer
from snapgen_mlx.training.loop import train
from snapgen_mlx.training.report import Report

from .tiny import write_tiny_model
from .toy import toy_config, toy_data, toy_options, toy_run, toy_trainer

pytestmark = pytest.mark.usefixtures("uncompiled")

STEPS = 21
COMMAND = ("-c", "from snapgen_mlx.cli.main import main; main()")
MEASURED = ("images/s", "peak GB", "done", "stopped")


def losses(record: dict) -> dict:
    return {k: v for k, v in record.items() if k not in MEASURED}


def log(run) -> list[dict]:
    return [losses(json.loads(line)) for line in (run / "log.jsonl").read_text().splitlines()]


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    run = tmp_path_factory.mktemp("reference")
    records = list(toy_run(run, STEPS))
    assert [r["step"] for r in records] == [*range(2, STEPS, 2), STEPS]
    assert records[-1]["done"] and not records[-1]["stopped"]
    assert all("done" not in r for r in records[:-1])
    assert [r["step"] for r in records if "val/full" in r] == [8, 16, STEPS]
    assert log(run) == [losses(r) for r in records]
    assert names(run) == ["log.jsonl", "state-00000021.json", "state-00000021.safetensors"]
    return run


# Interrupted and resumed


def test_killed_at_random_moments(start, tmp_path, reference):
    """Ten kills, also while a state is written; losses and weights as if there were none."""
    run, expected = tmp_path / "run", log(reference)
    first, killed = [], 0
    while killed < 10:
        process = start("-m", "tests.toy", run, STEPS, 0.0005)
        line = process.stdout.readline()
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        record = losses(json.loads(line or "{}"))
        if not line or record == {"step": STEPS}:  # all steps were made before this kill
            shutil.rmtree(run)
        else:
            assert record in expected
            first.append(record["step"])
    assert max(first) > min(first), first  # some went on from a state
    # What a kill amid writing leaves, whether or not one hit it.
    run.mkdir(exist_ok=True)
    (run / ".state-00000007.abc.safetensors").write_bytes(b"half")
    with open(run / "log.jsonl", "a") as f:
        f.write('{"step": 99, "loss/full": 0.1}\n{"step": 3, "lo')
    (run / f"state-{STEPS:08d}.json").unlink(missing_ok=True)
    last = list(toy_run(run, STEPS))
    assert last[-1]["done"]
    assert log(run) == expected
    (state, info), (state2, info2) = load_state(run), load_state(reference)
    assert same(state, state2) and info["step"] == info2["step"] == STEPS
    assert len(names(run)) in (3, 5) and not [n for n in names(run) if n.startswith(".")]
    assert list(toy_run(run, STEPS)) == [{"step": STEPS, "done": True, "stopped": False}]


def test_stopped_after_any_step(tmp_path, reference):
    """Also between two records: their means reach over the interruption."""
    asked = 0

    def stop():
        nonlocal asked
        asked += 1
        return asked % 5 == 0

    def session():
        trainer, held_out = toy_trainer(steps=STEPS), toy_data(6, seed=1)
        return list(train(trainer, toy_data(), tmp_path, toy_options(), held_out, stop))

    for last in (5, 10, 15, 20):
        records = session()
        assert (records[-1]["step"], records[-1]["done"]) == (last, False)
        assert records[-1]["stopped"] and load_state(tmp_path)[1]["step"] == last
    assert session()[-1]["done"]
    assert log(tmp_path) == log(reference)
    assert same(load_state(tmp_path)[0], load_state(reference)[0])


def test_minutes(tmp_path):
    records = list(toy_run(tmp_path, STEPS, minutes=1e-9))
    assert [r["step"] for r in records] == [1]
    assert not records[0]["done"] and not records[0]["stopped"] and "val/tiny" in records[0]
    assert load_state(tmp_path)[1]["step"] == 1


def test_states_are_saved_by_time_and_two_are_kept(tmp_path):
    for record in toy_run(tmp_path, 5, save_minutes=0, log_every=1):
        kept = {name[6:14] for name in names(tmp_path) if name.startswith("state")}
        assert kept == {f"{n:08d}" for n in (record["step"], record["step"] - 1) if n > 0}


# Other data, options, model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainer": {"learning_rate": 1e-4}}, r"learning_rate 0\.003, not 0\.0001; go on with"),
        ({"options": {"batch": 8, "seed": 1}}, "batch 4, not 8, seed 0, not 1; go on"),
        ({"trainer": {"steps": 22, "learning_rate": 1e-4}}, "not 22"),
        ({"data": toy_data(17)}, "another --flip, --prior or --repeats; go on"),
        ({"model": {"layers": [2, 0, 0]}}, "a model of other sizes; go on"),
        ({"base": "other"}, "other weights of the model, or another --from-lora; go on"),
    ],
)
def test_resuming_with_something_else(reference, change, message):
    before = {p: p.read_bytes() for p in reference.iterdir()}
    config = toy_config(**change.get("model", {}))
    trainer = toy_trainer(config, **{"steps": STEPS, **change.get("trainer", {})})
    trainer.base = change.get("base", "")
    options = toy_options(**change.get("options", {}))
    with pytest.raises(SnapGenError, match=message) as e:
        next(train(trainer, change.get("data", toy_data()), reference, options))
    assert f"the run in {reference} was started with" in str(e.value)
    assert {p: p.read_bytes() for p in reference.iterdir()} == before


def test_other_captions(reference):
    data = toy_data()
    data.captions[0] = ["a dog"]
    with pytest.raises(SnapGenError, match="other pictures or captions, or with"):
        next(train(toy_trainer(steps=STEPS), data, reference, toy_options()))


def test_what_does_not_change_the_losses_may_differ(reference):
    options = dict(minutes=5.0, save_minutes=1.0, log_every=7, validate_every=9)
    assert next(toy_run(reference, STEPS, **options))["done"]


# Damaged states


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def renumber(path):
    path.write_text(path.read_text().replace('"step": 2', '"step": 1'))


DAMAGES = {
    "weights cut short": (".safetensors", cut),
    "weights empty": (".safetensors", lambda path: path.write_bytes(b"")),
    "weights with a flipped bit": (".safetensors", flip),
    "weights missing": (".safetensors", lambda path: path.unlink()),
    "json cut short": (".json", cut),
    "json empty": (".json", lambda path: path.write_bytes(b"")),
    "json null": (".json", lambda path: path.write_text("null")),
    "json a list": (".json", lambda path: path.write_text("[1]")),
    "json without a checksum": (".json", lambda path: path.write_text('{"step": 2}')),
    "json no text": (".json", lambda path: path.write_bytes(b"\xff\xfe")),
    "json of another step": (".json", renumber),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_states(tmp_path, damage):
    suffix, break_it = DAMAGES[damage]
    for step in (1, 2):
        save_state(tmp_path, step, {"a": mx.full((9,), step), "n": mx.array(step)}, {"x": step})
    break_it(tmp_path / f"state-00000002{suffix}")
    arrays, info = load_state(tmp_path)
    assert info["step"] == info["x"] == 1 and arrays["a"].tolist() == [1] * 9
    # It does not push out the whole one.
    save_state(tmp_path, 3, {"a": mx.ones(9)}, {})
    assert [n[6:14] for n in names(tmp_path) if n.endswith(".json")] == ["00000001", "00000003"]
    for name in names(tmp_path):
        cut(tmp_path / name)
    with pytest.raises(SnapGenError, match=f"no training state in {tmp_path} is whole; remove it"):
        load_state(tmp_path)


def test_a_state_after_a_fallback_outlives_damaged_ones(tmp_path):
    for step in (1, 2):
        save_state(tmp_path, step, {"a": mx.ones(9)}, {})
    cut(tmp_path / "state-00000002.safetensors")
    save_state(tmp_path, 1, {"a": mx.zeros(9)}, {})
    assert names(tmp_path) == ["state-00000001.json", "state-00000001.safetensors"]
    assert load_state(tmp_path)[0]["a"].sum().item() == 0


def test_no_state_at_all(tmp_path):
    assert load_state(tmp_path) is None and load_state(tmp_path / "none") is None
    # Killed before the JSON of the first state was written.
    (tmp_path / "state-00000001.safetensors").write_bytes(b"x")
    assert load_state(tmp_path) is None


def test_a_run_falls_back_and_ends_the_same(tmp_path, reference):
    for record in toy_run(tmp_path, STEPS, save_minutes=0):
        if record["step"] == 12:
            break
    cut(tmp_path / "state-00000012.safetensors")
    assert load_state(tmp_path)[1]["step"] == 11
    records = list(toy_run(tmp_path, STEPS))
    assert records[0]["step"] == 12 and log(tmp_path) == log(reference)
    assert same(load_state(tmp_path)[0], load_state(reference)[0])


# A full disk, a diverging run


def test_a_full_disk_while_saving(tmp_path, reference):
    """A limit on the size of files stands in for the disk."""
    records = toy_run(tmp_path, STEPS, save_minutes=0, log_every=1)
    for _ in range(5):
        next(records)
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.name != "log.jsonl"}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(SnapGenError, match=r"cannot write .*state-00000006\.safetensors: "):
            next(records)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.name != "log.jsonl"} == before
    assert load_state(tmp_path)[1]["step"] == 5
    assert list(toy_run(tmp_path, STEPS))[-1]["done"]
    assert same(load_state(tmp_path)[0], load_state(reference)[0])


def test_a_log_that_cannot_be_written(tmp_path):
    records = toy_run(tmp_path, STEPS, log_every=1)
    next(records)
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(SnapGenError, match=r"cannot write .*log\.jsonl: Is a directory"):
        next(records)
    with pytest.raises(SnapGenError, match=r"cannot read .*log\.jsonl: Is a directory"):
        next(toy_run(tmp_path, STEPS))


def test_a_diverging_run_keeps_its_last_good_state(tmp_path):
    records = toy_run(tmp_path, 40, learning_rate=1e30, save_minutes=0, log_every=1)
    with pytest.raises(SnapGenError, match=r"became NaN at step \d+; .* lower learning"):
        list(records)
    arrays, _ = load_state(tmp_path)
    assert all(mx.all(mx.isfinite(a)) for a in arrays.values())


# The command


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tiny model and a folder of pictures, one of which is damaged."""
    folder = tmp_path_factory.mktemp("material")
    write_tiny_model(folder / "model")
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        image.save(folder / "data" / f"{i}.png")
        (folder / "data" / f"{i}.txt").write_text("a red dog" if i % 2 else "a happy cat")
    (folder / "data" / "bad.png").write_text("not a picture")
    (folder / "data" / "bad.txt").write_text("a cat")
    return folder


def arguments(material, output, **options):
    options = {"steps": 30, "batch": 4, "learning-rate": 1e-3, "warmup": 2} | options
    args = ["finetune", material / "model", material / "data", "-o", output, "--skip-bad"]
    return [str(a) for a in [*args, *(f"--{k}={v}" for k, v in options.items())]]


def invoke(*args):
    return CliRunner().invoke(main, list(args))


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory):
    """(output folder, result) of the command that nothing interrupted."""
    output = tmp_path_factory.mktemp("finished") / "out"
    return output, invoke(*arguments(material, output))


def test_the_command(material, finished):
    output, result = finished
    assert result.exit_code == 0, result.output
    assert "left out 1 pictures: bad.png (not a picture)" in result.stderr
    lines = result.stdout.splitlines()
    assert lines[:2] == ["encoded 6 of 6 pictures", "encoded 2 of 2 captions"]
    lines = lines[1:]
    assert [line.split("  ")[0] for line in lines[1:4]] == [f"step {n}0/30" for n in (1, 2, 3)]
    _, lossline, speed, memory, left = lines[1].split("  ")
    words = lossline.split()
    assert words[0] == "loss" and words[1::2] == ["full", "small", "tiny"]
    assert speed.endswith(" images/s") and memory.endswith(" GB") and left.endswith(" s left")
    change = lines[4].removeprefix("weights changed: ").split(", ")
    assert [c.split()[0] for c in change] == ["tiny", "small", "full"]
    assert all(0.01 < float(c.split()[1]) < 20 for c in change)
    assert lines[5].startswith("pictures changed, in levels of 255: tiny ")
    assert lines[6:] == [f"wrote {output}"]
    assert names(output) == ["cache", "config.json", "run", "text_encoder", "transformer", "vae"]
    model = material / "model"
    for part in ("config.json", "vae/model.safetensors", "text_encoder/vocab.txt"):
        assert (output / part).read_bytes() == (model / part).read_bytes()
    assert load_config(output / "transformer") == load_config(model / "transformer")
    weights = load_tensors(output / "transformer")
    state = load_state(output / "run")[0]
    assert same(weights, {k[4:]: a for k, a in state.items() if k.startswith("ema/")})
    assert not same(weights, load_tensors(model / "transformer"))
    load_dit(output, "tiny")


def test_the_same_command_again(material, finished, tmp_path):
    """A finished run writes its model anew, without encoding or training."""
    output, _ = finished
    before = (output / "transformer" / "model.safetensors").read_bytes()
    (output / "transformer" / "model.safetensors").unlink()
    result = invoke(*arguments(material, output))
    assert result.exit_code == 0, result.output
    first = [line.split()[0] for line in result.stdout.splitlines()]
    assert first == ["step", "weights", "pictures", "wrote"]
    assert (output / "transformer" / "model.safetensors").read_bytes() == before


def test_ctrl_c_and_sigterm(start, material, finished, tmp_path):
    """Each saves the state and ends with a line; the last session ends as if there were none."""
    output, steps = tmp_path / "out", []
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = start(*COMMAND, *arguments(material, output))
        while not (line := process.stdout.readline()).startswith("step"):
            assert line.startswith("encoded") and not steps, line
        process.send_signal(number)
        out, err = process.communicate(timeout=500)
        assert process.returncode == code, err
        *_, notice, last = err.splitlines()
        assert notice == "stopping after this step; once more stops at once"
        steps.append(load_state(output / "run")[1]["step"])
        assert last == f"stopped after step {steps[-1]} of 30; the same command goes on from there"
        assert "Traceback" not in err and not (output / "config.json").exists()
        assert "wrote" not in out
    assert 10 <= steps[0] < 20 <= steps[1] < 29
    # Out of time it stops as well, but writes the model as it is.
    result = invoke(*arguments(material, output, minutes=1e-6))
    assert result.exit_code == 0 and result.stdout.endswith(f"wrote {output}\n"), result.output
    assert f"stopped after step {steps[1] + 1} of 30; the same" in result.stderr
    result = invoke(*arguments(material, output))
    assert result.exit_code == 0, result.output
    assert log(output / "run") == log(finished[0] / "run")
    assert same(*(load_tensors(o / "transformer") for o in (output, finished[0])))


def test_ctrl_c_before_the_first_step_stops_at_once(material, tmp_path, monkeypatch):
    import snapgen_mlx.training.encoding as module

    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)
        yield

    monkeypatch.setattr(module, "cached_latents", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    result = invoke(*arguments(material, tmp_path / "out"))
    assert result.exit_code == 130
    assert result.stderr.endswith("stopped; the same command goes on from what is saved\n")
    assert signal.getsignal(signal.SIGINT) == handler


def test_ctrl_c_after_the_last_step_stops_at_once(material, tmp_path, monkeypatch):
    """While the pictures before and after are drawn; the same command then ends the run."""
    args = arguments(material, tmp_path / "out", steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(Report, "picture_change", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        result = invoke(*args)
    assert result.exit_code == 130 and "config.json" not in names(tmp_path / "out")
    result = invoke(*args)
    assert result.exit_code == 0 and "config.json" in names(tmp_path / "out"), result.output


def test_ctrl_c_that_ends_the_compiler_too(material, tmp_path, monkeypatch):
    """A terminal sends it to the compiler that MLX waits for as well, and MLX says so."""
    step, message, calls = ElasticTrainer.step, "Could not load C++ shared library /tmp/x.so", []

    def interrupted(*args):
        calls.append(args)
        if len(calls) % 3 == 0:
            os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError(message)
        return step(*args)

    monkeypatch.setattr(ElasticTrainer, "step", interrupted)
    result = invoke(*arguments(material, tmp_path / "out"))
    assert result.exit_code == 130, result.output
    assert result.stderr.endswith("stopped; the same command goes on from what is saved\n")
    message = "something else"  # is still told
    result = invoke(*arguments(material, tmp_path / "out"))
    assert result.exit_code == 1 and "something else" in result.stderr


def test_a_mac_is_kept_awake(material, tmp_path, monkeypatch):
    """By the system's own command, for as long as the training runs and no longer."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "caffeinate"
    fake.write_text(f"#!/bin/sh\necho $$ $@ > {tmp_path}/called\nexec sleep 600\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    result = invoke(*arguments(material, tmp_path / "out", steps=2))
    assert result.exit_code == 0, result.output
    pid, *args = (tmp_path / "called").read_text().split()
    assert args == ["-i", "-w", str(os.getpid())]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def one_error(result, code=1):
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if "left out" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.output
    return lines[0]


def test_training_that_changes_nothing(material, tmp_path):
    """A learning rate below what float32 resolves."""
    result = invoke(*arguments(material, tmp_path, steps=2, **{"learning-rate": 1e-30}))
    line = one_error(result)
    assert "no weight had changed after step 2, so nothing was written; train into another" in line
    assert names(tmp_path) == ["cache", "run"]


def test_a_lora_that_is_there_is_kept(material, tmp_path):
    (tmp_path / "lora.safetensors").write_text("mine")
    line = one_error(invoke(*arguments(material, tmp_path, lora=2)), 2)
    assert line.endswith("holds another LoRA; choose another folder")
    assert (tmp_path / "lora.safetensors").read_text() == "mine"


def test_prompts_that_are_no_text(material, tmp_path):
    prior = tmp_path / "prior.txt"
    prior.write_bytes(b"\xff\xfe")
    line = one_error(invoke(*arguments(material, tmp_path / "out", prior=prior)), 2)
    assert str(prior) in line


def test_two_runs_in_a_folder_exclude_each_other(tmp_path):
    first = toy_run(tmp_path, STEPS)
    next(first)
    with pytest.raises(SnapGenError, match="another process is training in"):
        next(toy_run(tmp_path, STEPS))
    first.close()
    next(toy_run(tmp_path, STEPS))


def test_bad_requests(material, finished, tmp_path):
    model, data = material / "model", material / "data"
    command = arguments(material, tmp_path / "out")
    command.remove("--skip-bad")
    assert "1 of 7 pictures cannot be used: bad.png (not a picture)" in one_error(invoke(*command))
    for inside in (model, model / "out"):
        assert "lies in the model" in one_error(invoke(*arguments(material, inside)), 2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    result = invoke(*arguments(material, tmp_path / "other"))
    assert "holds another model; choose another folder" in one_error(result, 2)
    other_options = one_error(invoke(*arguments(material, finished[0], batch=2)))
    assert "was started with batch 4, not 2" in other_options
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.png").write_text("nothing")
    result = invoke("finetune", str(model), str(bad), "-o", str(tmp_path / "out"), "--skip-bad")
    assert "no picture can be used: a.png (no caption)" in one_error(result)
    result = invoke("finetune", str(data), str(data), "-o", str(tmp_path / "out"))
    one_error(result)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def other(material, tmp_path):
    """(model, command): a copy of the model to be changed, the command that trains it."""
    shutil.copytree(material / "model", tmp_path / "model")
    args = ["finetune", tmp_path / "model", material / "data", "-o", tmp_path / "out"]
    options = ["--skip-bad", "--steps=3", "--warmup=1"]
    return tmp_path / "model", [*map(str, args), *options]


def test_models_that_cannot_be_trained(other, tmp_path):
    model, command = other
    params = load_tensors(model / "transformer")
    rest = {k: a for k, a in params.items() if k != "down.0.ffn.fc1.bias"}
    save_tensors(model / "transformer", rest)
    assert "lacks key 'down.0.ffn.fc1.bias'" in one_error(invoke(*command))
    save_tensors(model / "transformer", params)
    shutil.rmtree(model / "text_encoder")
    assert "has no text encoder" in one_error(invoke(*command))
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_is_trained_in_floats(other, tmp_path):
    model, command = other
    params = load_tensors(model / "transformer")
    layer = "mid.0.ffn.fc1"
    weight, scales, biases = mx.quantize(params[f"{layer}.weight"], group_size=32, bits=8)
    packed = {"weight": weight, "scales": scales, "biases": biases}
    quantized = params | {f"{layer}.{k}": a for k, a in packed.items()}
    save_tensors(model / "transformer", quantized)
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    trained = load_tensors(tmp_path / "out" / "transformer")
    assert {k: a.shape for k, a in trained.items()} == {k: a.shape for k, a in params.items()}
    change = trained[f"{layer}.weight"] - params[f"{layer}.weight"]
    assert mx.abs(change).max().item() < 0.01
    load_dit(tmp_path / "out")


def test_durations():
    assert [duration(s) for s in (0.4, 59.4, 60, 3540, 3600, 9000)] == [
        "0 s",
        "59 s",
        "1 min",
        "59 min",
        "1 h 0 min",
        "2 h 30 min",
    ]


# Two processes


def test_two_processes_are_one(start_two, material, tmp_path):
    """Averaged gradients give the losses of one process; only the first writes and speaks."""
    processes = start_two(*COMMAND, *arguments(material, "out", steps=6))
    results = [p.communicate(timeout=500) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], results
    assert results[0][0].endswith("wrote out\n") and results[1][0] == ""
    assert names(tmp_path / "1") == []
    assert "config.json" in names(tmp_path / "0" / "out")

    single = invoke(*arguments(material, tmp_path / "single", steps=6))
    assert single.exit_code == 0
    logs = [log(folder / "run") for folder in (tmp_path / "0" / "out", tmp_path / "single")]
    for two, one in zip(*logs, strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-3), two["step"]
    two, one, base = (
        load_tensors(folder / "transformer")
        for folder in (tmp_path / "0" / "out", tmp_path / "single", material / "model")
    )
    moved = sum((one[k] - base[k]).square().sum().item() for k in one) ** 0.5
    apart = sum((one[k] - two[k]).square().sum().item() for k in one) ** 0.5
    assert apart < 0.02 * moved


def test_a_process_that_is_gone(material, tmp_path, monkeypatch):
    """What MLX raises then, where it does not wait for ever."""
    import snapgen_mlx.training.finetune as module

    def lost(*_, **__):
        raise RuntimeError("[ring] connection to a peer was lost")

    monkeypatch.setattr(module, "train", lost)
    line = one_error(invoke(*arguments(material, tmp_path / "out")))
    assert "another process of this training ended" in line


def test_processes_that_start_from_different_states(start_two, tmp_path):
    """As on two machines that do not share the run's folder."""
    list(toy_run(tmp_path / "0" / "run", STEPS, minutes=1e-9))
    for process in start_two("-m", "tests.toy", "run", STEPS, 1):
        _, err = process.communicate(timeout=500)
        assert process.returncode and "the processes have different data, options" in err
    assert names(tmp_path / "1") == []


def test_a_batch_that_does_not_divide(tmp_path, monkeypatch):
    class Three:
        def rank(self):
            return 0

        def size(self):
            return 3

    monkeypatch.setattr(mx.distributed, "init", Three)
    with pytest.raises(UsageError, match="batch of 4 does not divide into 1 parts on each of 3"):
        next(toy_run(tmp_path, 3))
