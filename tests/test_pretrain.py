"""The pretrainer: its steps, its data, its life on disk."""

import dataclasses
import json
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from recipes import precision
from recipes.pretrain import state as states
from recipes.pretrain import trials
from recipes.pretrain.data import Batch, Shards
from recipes.pretrain.elastic import Elastic, Training, add_noise, is_isolated
from recipes.pretrain.text import NAME, load_words
from recipes.pretrain.train import WORD_TABLE, build, main

TRANSFORMER = {
    "in_channels": 4,
    "patch_size": 2,
    "hidden_size": 32,
    "head_dim": 4,
    "num_heads": 8,
    "num_kv_heads": 8,
    "cross_kv_heads": 2,
    "caption_dim": 16,
    "layers": [1, 2, 1],
    "bna_blocks": 4,
    "widths": [0.375, 0.5, 1.0],
}
TEXT = {"dim": 16, "layers": 1, "heads": 2}
TRAINING = {
    "batch": 4,
    "warmup": 2,
    "steps": 6,
    "bf16": False,
    "log_every": 1,
    "validate_every": 3,
    "validation_samples": 6,
    "sheet_every": 3,
    "prompts": ["a red apple", "two blue cats"],
}
CAPTIONS = ["a red apple", "two cats", "a dog to the left of a tree", "qwzrt", ""]


def write_shard(folder, name: str, seed: int, captions=CAPTIONS, channels=4):
    folder.mkdir(exist_ok=True)
    latents = torch.randn(len(captions), 8, 8, channels, generator=torch.manual_seed(seed))
    save_file({"latents": latents.half()}, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(list(captions)))


@pytest.fixture
def data(tmp_path):
    for i in range(2):
        write_shard(tmp_path / "data", f"shard-{i:05d}", i)
    write_shard(tmp_path / "data", "heldout", 9, CAPTIONS * 2)
    return tmp_path / "data"


def write_config(path, **training):
    config = {"transformer": TRANSFORMER, "text": TEXT, "training": TRAINING | training}
    path.write_text(json.dumps(config))
    return path


def run(data, out, config, *more) -> int:
    return main(["--data", str(data), "--out", str(out), "--config", str(config), *more])


def records(out) -> list[dict]:
    """The log without its timings."""
    timings = ("seconds", "samples_per_second")
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in r.items() if k not in timings} for r in lines]


def trainer(**training) -> Elastic:
    options = Training(**TRAINING | training)
    return Elastic(build(TRANSFORMER, TEXT, options, WORD_TABLE), options)


def shards(data, **changes) -> Shards:
    words = load_words(WORD_TABLE, build(TRANSFORMER, TEXT, Training(), WORD_TABLE).text.config)
    fixed = {"folder": data, "words": words, "encoders": [], "channels": 4, "seed": 0}
    return Shards(**fixed | changes)


def batch(data, step=0, size=4, **changes) -> Batch:
    source = shards(data, first=2, every=0)
    assert source.missing(step) is None
    made = source.batch(step, size, slice(0, size), 2, 0.1, 1.0)
    return dataclasses.replace(made, **changes)


def gradients(loss, params: dict) -> dict:
    grads = torch.autograd.grad(loss, params.values(), retain_graph=True, allow_unused=True)
    return dict(zip(params, grads, strict=True))


@pytest.mark.parametrize("subnet", [0, 1])
@pytest.mark.parametrize("adaptive", [True, False])
def test_step_is_the_definition(data, subnet, adaptive):
    """Gradients written out: L_diff on both widths, L_dist on the narrow one, scaled and added."""
    ours, plain = trainer(adaptive=adaptive), trainer()
    given = batch(data, subnet=subnet)
    x_t, target = add_noise(given)
    velocity = lambda i: plain.network(x_t, given.t, given.text, given.masks, i)  # noqa: E731
    v_full, v = velocity(2), velocity(subnet)
    loss = (v_full - target).square().mean()
    narrow = (v - target).square().mean() + (v - v_full.detach()).square().mean()
    params = plain.params
    full, sub = gradients(loss, params), gradients(narrow, params)

    # Where a narrow width has any gradient is its slice: the data is generic.
    shared = [k for k in params if not is_isolated(k) and sub[k] is not None]
    n_full = sum((full[k] * (sub[k] != 0)).square().sum() for k in shared).sqrt()
    n_sub = sum(sub[k].square().sum() for k in shared).sqrt()
    w = (n_full / n_sub).clamp(0.2, 5) if adaptive else 1.0

    seen = {}
    ours.optimizers[0].step = lambda: seen.update({k: p.grad for k, p in ours.params.items()})
    metrics = ours.step(given)
    assert metrics["loss/full"] == pytest.approx(loss.item(), rel=1e-5)
    assert float(metrics[f"ratio/{TRANSFORMER['widths'][subnet]:g}"]) == pytest.approx(
        (n_full / n_sub).item(), rel=1e-3
    )
    expected = {
        k: None
        if full[k] is None and sub[k] is None
        else (0 if full[k] is None else full[k]) + (0 if sub[k] is None else w * sub[k])
        for k in params
    }
    size = sum(g.square().sum() for g in expected.values() if g is not None).sqrt()
    assert float(metrics["grad"]) == pytest.approx(size.item(), rel=1e-3)
    for k, g in expected.items():
        assert (g is None) == (seen[k] is None), k
        if g is not None:
            g = g / max(size, 1.0)
            assert torch.allclose(seen[k], g, rtol=1e-3, atol=1e-5 * g.abs().max().item()), k


def bank_entry(name: str) -> str:
    """Index of the width whose isolated parameter this is."""
    _, time_embed, rest = name.partition("time_embed.")
    return rest.split(".")[0] if time_embed else name.rpartition(".")[2]


def test_isolated_parameters_of_other_widths_rest(data):
    """No change, no moments, no count of steps for the width that a step does not train."""
    ours = trainer(weight_decay=0.1)
    ours.step(batch(data, subnet=0))
    state = ours.optimizers[0].state
    before = {k: p.detach().clone() for k, p in ours.params.items()}
    moments = {k: {n: a.clone() for n, a in state[p].items()} for k, p in ours.params.items()}
    ours.step(batch(data, step=1, subnet=1))
    isolated = {k: p for k, p in ours.params.items() if is_isolated(k)}
    for k, p in isolated.items():
        entry = bank_entry(k)
        assert torch.equal(p, before[k]) == (entry == "0"), k
        assert bool(moments[k]) == (entry != "1"), k
        if entry == "0":
            assert all(torch.equal(state[p][n], a) for n, a in moments[k].items()), k
    # Time network, four blocks, final layer.
    assert sum(bank_entry(k) == "0" for k in isolated) == 6 + 4 + 1


def finished(data, tmp_path, name: str, *configs: dict):
    """The folder of a run that was started with one configuration after the other."""
    for changes in configs:
        assert run(data, tmp_path / name, write_config(tmp_path / "c.json", **changes)) == 0
    return tmp_path / name


# At a constant rate: the cosine depends on the number of steps.
GROWING = {"final_rate": 1, "steps_per_shard": 3}


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_resume_is_bit_equal(data, tmp_path, optimizer):
    changes = GROWING | {"optimizer": optimizer}
    whole = finished(data, tmp_path, "whole", changes)
    parts = finished(data, tmp_path, "parts", changes | {"steps": 4}, changes)
    assert records(parts) == records(whole)
    assert sum("heldout/1" in r for r in records(whole)) == 2
    a, b = states.load(parts), states.load(whole)
    assert a["step"] == b["step"] == 6
    for part in ("params", "ema"):
        assert all(torch.equal(a[part][k], v) for k, v in b[part].items())
    for ours, theirs in zip(a["optimizers"], b["optimizers"], strict=True):
        for k, moments in theirs["state"].items():
            assert all(torch.equal(ours["state"][k][n], v) for n, v in moments.items())
    assert torch.equal(a["ratios"], b["ratios"])
    sheets = [(out / "sheets" / "0000006.safetensors").read_bytes() for out in (parts, whole)]
    assert sheets[0] == sheets[1]


def test_batches_depend_on_seed_and_step_alone(data):
    early, late = shards(data, first=1, every=4), shards(data, first=1, every=4)
    assert late.missing(4) is None  # its second shard is open already
    assert early.missing(3) is None
    draw = lambda source, step: source.batch(step, 4, slice(0, 4), 2, 0.5, 3.0)  # noqa: E731
    a, b = draw(early, 3), draw(late, 3)
    assert torch.equal(a.noise, b.noise) and torch.equal(a.latents, b.latents)
    assert torch.equal(a.masks[NAME], b.masks[NAME]) and torch.equal(a.t, b.t)
    assert not torch.equal(a.noise, draw(late, 2).noise)
    half = late.batch(3, 4, slice(2, 4), 2, 0.5, 3.0)
    assert torch.equal(half.noise, b.noise[2:]) and torch.equal(half.latents, b.latents[2:])
    assert late.missing(8) == "shard-00002"
    # The second shard is drawn from at step 4, not before.
    second = late.shards[1].latents.float()
    drawn = [
        any((x == second).all(dim=(1, 2, 3)).any() for s in steps for x in draw(late, s).latents)
        for steps in (range(4), range(4, 8))
    ]
    assert drawn == [False, True]


def test_timesteps_and_dropped_texts(data):
    made = batch(data, size=20_000)
    u = made.t.logit()
    assert abs(u.mean()) < 0.03 and abs(u.std() - 1) < 0.03  # shift 1: logit-normal
    empty = (~made.masks[NAME].any(dim=1)).float().mean()
    # One caption of five has no word, 10 % of the others are dropped.
    assert empty.item() == pytest.approx(0.2 + 0.8 * 0.1, abs=0.02)


def test_waits_for_a_shard_and_stops(data, start, tmp_path):
    """One line about it; goes on when the shard is there; SIGTERM saves the state."""
    config = write_config(tmp_path / "c.json", steps=10_000, steps_per_shard=2)
    args = ["--data", data, "--out", tmp_path / "run", "--config", config]
    process = start("-m", "recipes.pretrain.train", *args)
    lines = iter(process.stdout.readline, "")
    assert any("waiting_for shard-00002" in line for line in lines)
    time.sleep(3)
    write_shard(data, "shard-00002", 2)
    line = next(lines)
    assert "loss/full" in line and line.startswith("step 5 ")
    assert any("waiting_for shard-00003" in line for line in lines)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert states.load(tmp_path / "run")["step"] == 6


def error_line(capsys) -> str:
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
def test_damaged_state(data, tmp_path, capsys, damage):
    out = finished(data, tmp_path, "run", {"steps": 1}, {"steps": 2})
    path = out / states.NAME
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
    else:
        content = b"something else"
    path.write_bytes(content)
    capsys.readouterr()
    assert run(data, out, tmp_path / "c.json") == 1
    assert "is damaged; put state-previous.pt" in error_line(capsys)
    (out / states.PREVIOUS).replace(path)
    assert states.load(out)["step"] == 1


def test_other_geometry(data, tmp_path, capsys):
    out = finished(data, tmp_path, "run", {"steps": 1})
    config = json.loads((tmp_path / "c.json").read_text())
    config["transformer"]["hidden_size"] = 64
    (tmp_path / "c.json").write_text(json.dumps(config))
    assert run(data, out, tmp_path / "c.json") == 2
    assert "hidden_size 32, the configuration 64" in error_line(capsys)
    assert states.load(out)["step"] == 1


@pytest.mark.parametrize(
    "config, message",
    [
        ("{", "is not a run configuration"),
        ("[]", "is not a run configuration"),
        ({"training": {}}, "lacks the part 'transformer'"),
        ({"transformer": TRANSFORMER, "training": {"lr": 1}}, "unknown key 'lr'"),
        ({"transformer": TRANSFORMER, "text": {"width": 1}}, "text part"),
        ({"transformer": TRANSFORMER | {"mid_skips": False}}, "mid_skips"),
        ({"transformer": TRANSFORMER | {"in_channels": 8}, "text": TEXT}, "in_channels is 8"),
        ({"transformer": TRANSFORMER}, "does not contain tensor text.clip"),
    ],
    ids=str,
)
def test_bad_configuration(data, tmp_path, capsys, config, message):
    path = tmp_path / "c.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    assert run(data, tmp_path / "run", path) in (1, 2)
    assert message in error_line(capsys)


def test_bad_shards(data, tmp_path, capsys):
    config = write_config(tmp_path / "c.json")
    shard = data / "shard-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    assert run(data, tmp_path / "run", config) == 1
    assert str(shard) in error_line(capsys)
    shard.write_bytes(whole)
    shard.with_suffix(".json").write_text('["one caption"]')
    assert run(data, tmp_path / "run", config) == 1
    assert "1 captions" in error_line(capsys)
    assert run(tmp_path / "nowhere", tmp_path / "run", config) == 1
    assert "there is no data folder" in error_line(capsys)


def two_processes(start, *args):
    """The trainer under `torchrun`; its exit code and error text."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start(*command, "-m", "recipes.pretrain.train", *args, OMP_NUM_THREADS="1")
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


@pytest.mark.parametrize("split", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes_are_one_with_the_doubled_batch(data, start, tmp_path, split):
    """Each takes half of the batch; then one process goes on from the state of the two."""
    changes = {"final_rate": 1, "steps": 4}
    one = finished(data, tmp_path, "one", changes)
    config = write_config(tmp_path / "c.json", **changes, split=split)
    args = ["--data", data, "--out", tmp_path / "two", "--config", config]
    code, errors = two_processes(start, *args)
    assert code == 0, errors
    for a, b in zip(records(tmp_path / "two"), records(one), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    a, b = states.load(tmp_path / "two"), states.load(one)
    assert a["params"].keys() == b["params"].keys()
    # A softmax does not see what is added to all keys: Adam makes steps of its rounding errors.
    for part in ("params", "ema"):
        for k, v in b[part].items():
            if k.endswith("cross.norm_k.bias"):
                continue
            theirs, ours = v, a[part][k]
            if k.endswith("to_qkv.bias"):  # of queries, keys and values
                (q, _, v), (own_q, _, own_v) = theirs.chunk(3), ours.chunk(3)
                theirs, ours = torch.cat([q, v]), torch.cat([own_q, own_v])
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5), k
    assert a["optimizers"][0]["state"].keys() == b["optimizers"][0]["state"].keys()
    whole = finished(data, tmp_path, "one", changes | {"steps": 6})
    parts = finished(data, tmp_path, "two", changes | {"steps": 6})
    assert records(parts)[-1] == pytest.approx(records(whole)[-1], rel=1e-3)


def test_two_processes_resume_split(data, start, tmp_path):
    """The state of a run that is split over two processes is restored in two."""
    whole = finished(data, tmp_path, "whole", GROWING)
    finished(data, tmp_path, "parts", GROWING | {"steps": 3})
    config = write_config(tmp_path / "c.json", **GROWING, split=True)
    args = ["--data", data, "--out", tmp_path / "parts", "--config", config]
    code, errors = two_processes(start, *args)
    assert code == 0, errors
    for a, b in zip(records(tmp_path / "parts"), records(whole), strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_no_cuda(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = write_config(tmp_path / "c.json")
    assert run(data, tmp_path / "run", config, "--device", "cuda") == 2
    assert "no CUDA device" in error_line(capsys)


@pytest.mark.parametrize(
    "has, seconds, dtype",
    [(True, 1, torch.bfloat16), (True, 4, torch.float32), (False, 1, torch.float32)],
)
def test_bfloat16_only_where_the_processor_is_faster_with_it(monkeypatch, has, seconds, dtype):
    """Against two seconds in float32."""
    times = {torch.bfloat16: seconds, torch.float32: 2}
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has)
    monkeypatch.setattr(precision, "seconds", times.get)
    precision.has_fast_bf16.cache_clear()
    try:
        with precision.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    finally:
        precision.has_fast_bf16.cache_clear()


def test_a_product_takes_time():
    assert 0 < precision.seconds(torch.float32) < 60


def test_muon_moves_the_inner_matrices(data):
    """Each of its steps has singular values near rate·0.2·sqrt(longer side), the rest is Adam's."""
    ours = trainer(optimizer="muon", warmup=0, clip=1e9)
    before = {k: p.detach().clone() for k, p in ours.params.items()}
    ours.step(batch(data, subnet=1))
    adam, muon = (set(map(id, o.param_groups[0]["params"])) for o in ours.optimizers)
    assert not adam & muon and len(adam | muon) == len(ours.params)
    names = {k for k, p in ours.params.items() if id(p) in muon}
    assert "dit.mid.0.ffn.fc1.weight" in names and "text.layers.0.to_qkv.weight" in names
    assert not any("time_embed" in k or "final" in k or "patch" in k for k in names)
    name = "dit.mid.0.ffn.fc1.weight"
    change = (ours.params[name] - before[name]).detach()
    sizes = torch.linalg.svdvals(change) / (1e-3 * 0.2 * max(change.shape) ** 0.5)
    assert 0.3 < sizes.median() < 1.5


def test_another_optimizer_on_resume(data, tmp_path, capsys):
    out = finished(data, tmp_path, "run", {"steps": 1})
    config = write_config(tmp_path / "c.json", steps=2, optimizer="muon")
    capsys.readouterr()
    assert run(data, out, config) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "another optimizer than 'muon'" in line


def test_unknown_optimizer(data, tmp_path, capsys):
    config = write_config(tmp_path / "c.json", optimizer="sgd")
    assert run(data, tmp_path / "run", config) == 2
    assert "'adam' or 'muon'" in capsys.readouterr().err


def test_all_shards_that_are_there_at_the_start(data, tmp_path):
    """And no more after a break, when others came: the samples of a step stay the same."""
    changes = {"first_shards": None, "final_rate": 1}
    whole = finished(data, tmp_path, "whole", changes)
    assert states.load(whole)["first_shards"] == 2
    finished(data, tmp_path, "parts", changes | {"steps": 4})
    write_shard(data, "shard-00002", 2)
    parts = finished(data, tmp_path, "parts", changes)
    assert records(parts) == records(whole)


def test_no_shards_are_an_error(data, tmp_path, capsys):
    for file in data.glob("shard-*"):
        file.unlink()
    config = write_config(tmp_path / "c.json", first_shards=None)
    assert run(data, tmp_path / "run", config) == 1
    assert "holds no shards" in capsys.readouterr().err


def test_both_validation_files_are_measured(data, tmp_path):
    write_shard(data, "validation", 8)
    folder = finished(data, tmp_path, "run", {"final_rate": 1})
    (first, *_) = [r for r in records(folder) if "heldout/1" in r]
    assert {"validation/0.375", "validation/1"} < set(first)
    assert first["validation/1"] != first["heldout/1"]


def test_the_recipe_makes_as_many_shards_as_its_training_reads():
    root = Path(__file__).parents[1]
    o = json.loads((root / "recipes" / "pretrain" / "stickers.json").read_text())["training"]
    needed = o["first_shards"] + (o["steps"] - 1) // o["steps_per_shard"]
    assert f"\nSHARDS = {needed}\n" in (root / "Makefile").read_text()


def test_times_are_spread_over_a_batch(data):
    """Each of equal parts of the distribution has one, whatever the seed."""
    source = shards(data, first=2, every=0)
    source.missing(0)
    t = source.batch(0, 64, slice(64), 2, 0.1, 3.0).t
    u = t / (3 - 2 * t)
    parts = torch.special.ndtr(torch.logit(u.double())).sort().values * 64
    assert (parts.floor() == torch.arange(64)).all()


def test_trials(data, tmp_path, capsys):
    config, out = write_config(tmp_path / "c.json", steps=None), tmp_path / "out"
    file = tmp_path / "trials.json"
    common = {"training": {"first_shards": 2, "learning_rate": 1e-4}}
    listed = {"base": {}, "fast": {"training": {"learning_rate": 1e-2}}}
    file.write_text(json.dumps({"common": common, "trials": listed}))
    args = [str(config), str(file), "--data", str(data), "--out", str(out), "--minutes", "0.005"]
    assert trials.main(args) == 0
    printed = capsys.readouterr().out
    rows = [line.split(" steps ") for line in printed.splitlines()]
    assert [name for name, _ in rows] == list(listed) and "heldout/0.375" in printed
    rates = [json.loads((out / f"{n}.config.json").read_text())["training"] for n in listed]
    assert [r["learning_rate"] for r in rates] == [1e-4, 1e-2]
    assert trials.main(args) == 0 and capsys.readouterr().out == printed  # none is run again
    file.write_text("{}")
    assert trials.main(args) == 2 and 'has no part "trials"' in error_line(capsys)
