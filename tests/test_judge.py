"""The judge: GenEval's protocol, the detector and its training, `eval`, a run's curve."""

import json
from collections import Counter
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from benchmarks.judge import curve, detecting, recognizing, train
from benchmarks.judge.network import JudgeNetworks as TorchNetworks
from benchmarks.judge.network import calibrate, export, folded, unfold
from benchmarks.judge.scenes import LABEL, MOST
from recipes.embedded.autoencoder import Autoencoder, Config, save_autoencoder
from recipes.embedded.things import held_out
from recipes.pretrain.train import main as pretrain
from snapgen_mlx.cli.main import main
from snapgen_mlx.errors import SnapGenError
from snapgen_mlx.geneval import (
    TASKS,
    Found,
    Prompt,
    Score,
    Wanted,
    correct,
    kept,
    read_prompts,
    relations,
)
from snapgen_mlx.judge import (
    FOLDER,
    Judge,
    Looked,
    Place,
    as_input,
    crop,
    diversity,
    frechet,
    named,
    places,
    protocol,
    real_pictures,
)
from snapgen_mlx.models.detector import CROP, GRID, LABELS, SIDE, JudgeNetworks
from snapgen_mlx.scoring import summary
from snapgen_mlx.tensors.weights import assign

from .test_pretrain import write_config, write_shard
from .tiny import write_tiny_model

CAT = Found("cat", 0.95, (0.1, 0.1, 0.3, 0.3), "red", "3d")


def at(x: float, y: float, **changes) -> Found:
    """A cat of size .2 whose middle is at (x, y)."""
    return replace(CAT, box=(x - 0.1, y - 0.1, x + 0.1, y + 0.1), **changes)


# The protocol


@pytest.mark.parametrize(
    ("wanted", "found", "right"),
    [
        (Wanted("cat"), [CAT], True),
        (Wanted("dog"), [CAT], False),
        (Wanted("cat"), [replace(CAT, score=0.31)], True),
        (Wanted("cat"), [replace(CAT, score=0.3)], False),
        (Wanted("cat", 2), [CAT], False),
        (Wanted("cat"), [CAT, at(0.7, 0.7)], True),  # more than asked for may be there
        (Wanted("cat", color="red"), [CAT], True),
        (Wanted("cat", color="blue"), [CAT], False),
        # Only the surest is looked at.
        (Wanted("cat", color="red"), [CAT, at(0.7, 0.7, score=0.99, color="blue")], False),
        (Wanted("cat", style="3d"), [CAT], True),
        (Wanted("cat", style="flat"), [CAT], False),
    ],
)
def test_one_thing(wanted, found, right):
    assert correct(Prompt("a cat", "colors", (wanted,)), found) is right


@pytest.mark.parametrize(
    ("found", "right"),
    [
        ([at(0.2, 0.2), at(0.7, 0.2)], True),
        ([at(0.2, 0.2)], False),
        ([at(0.2, 0.2), at(0.7, 0.2), at(0.2, 0.7)], False),
        ([at(0.2, 0.2), at(0.7, 0.2), at(0.2, 0.7, score=0.9)], True),  # not above .9
        ([at(0.2, 0.2), at(0.7, 0.2, score=0.9)], False),
        ([at(0.2, 0.2), at(0.7, 0.2), at(0.71, 0.2, score=0.91)], True),  # the same again
        ([at(0.2, 0.2), at(0.27, 0.2), at(0.7, 0.2)], False),  # overlap of .48: another one
        ([at(0.2, 0.2), at(0.7, 0.2), replace(CAT, name="dog")], True),
    ],
)
def test_counting_is_exact(found, right):
    prompt = Prompt("two cats", "counting", (Wanted("cat", 2),), (Wanted("cat", 3),))
    assert correct(prompt, found) is right


def test_at_most_sixteen_count():
    crowd = [at(x / 5, y / 5) for x in range(5) for y in range(5)]
    assert len(kept(crowd, "counting")["cat"]) == 16


@pytest.mark.parametrize(
    ("x", "y", "names"),
    [
        (0.9, 0.5, {"right of"}),
        (0.1, 0.5, {"left of"}),
        (0.5, 0.1, {"above"}),
        (0.5, 0.9, {"below"}),
        (0.9, 0.9, {"right of", "below"}),
        (0.539, 0.5, set()),  # within a tenth of both sizes: .04
        (0.57, 0.5, set()),  # (.07 - .04) / .07 is not above .5
        (0.59, 0.5, {"right of"}),  # (.09 - .04) / .09 is
        (0.5, 0.5, set()),
        (0.9, 0.7, {"right of"}),  # (.2 - .04) / .447 = .36 below, which is too little
    ],
)
def test_relations(x, y, names):
    assert relations(at(x, y).box, at(0.5, 0.5).box) == names


@pytest.mark.parametrize(("dog", "right"), [(0.8, False), (0.05, True)])
def test_position_needs_every_pair(dog, right):
    """As GenEval's: {"class": "cat", "position": ["right of", 0]} is a cat right of the dog."""
    include = (Wanted("dog"), Wanted("cat", position=("right of", 0)))
    things = [at(0.5, 0.5), at(dog, 0.5, name="dog")]
    assert correct(Prompt("a cat right of a dog", "position", include), things) is right


def test_scores():
    score, prompt = Score(), Prompt("a cat", "colors", (Wanted("cat"),))
    for right, task, held in ((1, "colors", True), (0, "colors", False), (1, "position", False)):
        score.add(replace(prompt, task=task, held_out=held), bool(right))
    assert (score.share("colors"), score.share("colors", True)) == (0.5, 1.0)
    assert score.share("counting") is None
    assert (score.overall(), score.overall(False), score.overall(True)) == (0.75, 0.0, 1.0)


ROW = {"tag": "colors", "prompt": "a red cat", "include": [{"class": "cat", "count": 1}]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: is no prompt: "),
        ("[1]", "line 2: is no prompt: "),
        (json.dumps(ROW | {"include": []}), "line 2: is no prompt: nothing is to be included"),
        (json.dumps(ROW | {"include": [{"class": "cat"}]}), "line 2: lacks 'count'"),
        (json.dumps(ROW | {"include": [{"class": "cat", "count": 0}]}), "a count of 0"),
        (
            json.dumps(ROW | {"include": [ROW["include"][0] | {"position": ["above", 0]}]}),
            "a position of ['above', 0]",
        ),
        (
            json.dumps(
                ROW
                | {
                    "include": ROW["include"] * 2
                    + [{"class": "x", "count": 1, "position": ["on", 0]}]
                }
            ),
            "a position of ['on', 0]",
        ),
        (json.dumps({k: v for k, v in ROW.items() if k != "prompt"}), "line 2: lacks 'prompt'"),
        (json.dumps(ROW | {"prompt": 3}), "prompt and tag must be texts"),
        (json.dumps(ROW | {"prompt": " "}), "prompt and tag must be texts"),
    ],
)
def test_bad_lines(tmp_path, line, message):
    (tmp_path / "p.jsonl").write_text(f"{json.dumps(ROW)}\n{line}\n")
    with pytest.raises(SnapGenError) as error:
        read_prompts(tmp_path / "p.jsonl")
    assert message in str(error.value) and "p.jsonl" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_files_without_prompts(tmp_path):
    with pytest.raises(SnapGenError, match="cannot read the prompts"):
        read_prompts(tmp_path / "none")
    (tmp_path / "empty").touch()
    with pytest.raises(SnapGenError, match="holds no prompt"):
        read_prompts(tmp_path / "empty")


def test_the_prompts():
    prompts = protocol()
    sizes = Counter(p.task for p in prompts)
    assert [sizes[t] for t in TASKS] == [80, 99, 80, 94, 100, 100] and sizes["style"] == 40
    assert {p.task for p in prompts[:553]} == set(TASKS), "style comes last"
    assert len({p.text for p in prompts}) == len(prompts)
    shares = Counter(p.task for p in prompts[:96])
    assert all(abs(shares[t] - 96 * sizes[t] / 553) <= 1 for t in TASKS)
    for p in prompts:
        first, *rest = p.include
        if p.task == "counting":
            assert p.held_out == held_out("count", first.name, first.count)
            assert p.exclude == (Wanted(first.name, first.count + 1),)
        if p.task == "colors":
            assert p.held_out == held_out("color", first.name, first.color)
        if p.task == "two_object":
            assert p.held_out == held_out("pair", first.name, rest[0].name)
    for task in TASKS[1:]:
        held = sum(p.held_out for p in prompts if p.task == task)
        assert held == sizes[task] // 2
    position = next(p for p in prompts if p.task == "position")
    other, placed = position.include
    assert position.text.split(placed.position[0])[0].strip().endswith(placed.name)
    assert position.text.endswith(other.name)


# The networks


def random_networks() -> TorchNetworks:
    torch.manual_seed(0)
    model = TorchNetworks()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


def test_mlx_is_torch(tmp_path):
    model, ours = random_networks(), JudgeNetworks()
    weights = folded(model)
    ours = assign(ours, {k: mx.array(a.numpy()) for k, a in weights.items()}, "torch")
    rng = np.random.default_rng(0)
    x, c = (rng.random((2, n, n, 3), np.float32) for n in (SIDE, CROP))
    with torch.no_grad():
        maps, features = model.detector(torch.from_numpy(x).permute(0, 3, 1, 2))
        logits = model.recognizer(torch.from_numpy(c).permute(0, 3, 1, 2))
    theirs = (maps.permute(0, 2, 3, 1), features, logits)
    for a, b in zip(
        (*ours.detector(mx.array(x)), ours.recognizer(mx.array(c))), theirs, strict=True
    ):
        assert np.abs(np.array(a) - b.numpy()).max() <= 1e-5 * b.abs().max()
    export(model, tmp_path / "model.safetensors")
    (tmp_path / "labels.json").write_text((FOLDER / "labels.json").read_text())
    (look,) = Judge.load(tmp_path).look([Image.fromarray((x[0] * 255).astype(np.uint8))])
    assert look.features == pytest.approx(features[0].numpy(), abs=0.05)  # float16


def test_folded_weights_train_further():
    model, again = random_networks(), TorchNetworks().eval()
    unfold(again, folded(model))
    x, c = torch.rand(2, 3, SIDE, SIDE), torch.rand(2, 3, CROP, CROP)
    with torch.no_grad():
        torch.testing.assert_close(again.detector(x), model.detector(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(again.recognizer(c), model.recognizer(c), rtol=1e-4, atol=1e-4)
    calibrate(again)
    assert not torch.allclose(again.detector.head.bias, model.detector.head.bias)
    calibrate(again, back=True)
    after = folded(again)
    for k, a in folded(model).items():
        torch.testing.assert_close(after[k], a)


def test_places_of_maps_made_by_hand():
    thing, box = np.full((2, GRID, GRID, 1), -9.0), np.zeros((2, GRID, GRID, 4))
    thing[0, 4, 8] = 3
    thing[0, 4, 9] = 2  # beside the peak
    thing[0, 12, 3] = -1  # too faint
    thing[1, 0, 15] = 9
    box[0, 4, 8] = (0.25, -0.5, np.log(4), np.log(2))
    box[1, 0, 15] = (0, 0, np.log(100), 0)
    (one,), (cut,) = places(np.concatenate([thing, box], -1))
    assert one.sure == pytest.approx(1 / (1 + np.exp(-3)))
    assert one.box == pytest.approx((54, 24, 86, 40))
    assert cut.box == pytest.approx((0, 0, 128, 8))


def test_crops_are_those_of_the_training():
    picture = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    for box in ((10.5, 20, 60, 50.25), (-3, 0, 128, 128), (100, 90, 127, 128)):
        theirs = recognizing.crops(x, np.array([box], float))[0].permute(1, 2, 0)
        assert np.abs(crop(picture, box) - theirs.numpy()).max() < 1e-4
    flat = crop(np.full((SIDE, SIDE, 3), 51, np.uint8), (120, 120, 128, 128))
    assert flat == pytest.approx(np.full((CROP, CROP, 3), 0.2))


def test_names():
    labels = {"name": ["cat", "dog"], "color": ["red", "blue"], "style": ["3d"]}
    parts = {k: np.zeros(n) for k, n in LABELS.items()}
    parts["name"][:2] = 99 + np.log(3), 99
    parts["color"][1] = 1
    logits, place = np.concatenate(list(parts.values())), Place(0.8, (0, 0, 1, 1))
    (only,) = named(place, logits, labels)
    assert (only.name, only.color, only.style, only.box) == ("cat", "blue", "3d", place.box)
    assert only.score == pytest.approx(0.6)
    parts["name"][-1] = 200  # something without a name
    assert named(place, np.concatenate(list(parts.values())), labels) == []


def test_transparent_pictures_are_seen_on_white():
    clear = Image.new("RGBA", (256, 256), (255, 0, 0, 0))
    assert (as_input(clear) == 255).all() and as_input(clear).shape == (SIDE, SIDE, 3)
    assert (as_input(Image.new("L", (128, 128), 7)) == 7).all()


def test_frechet_and_diversity():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((500, 6)) @ rng.standard_normal((6, 6))
    mean, covariance = a.mean(0), np.cov(a, rowvar=False)
    assert frechet(a, mean, covariance) == pytest.approx(0, abs=1e-8)
    assert frechet(a + 2, mean, covariance) == pytest.approx(24)
    assert frechet(3 * (a - mean) + mean, mean, covariance) == pytest.approx(4 * covariance.trace())
    assert diversity([np.zeros((3, 2)), np.array([[0, 0], [3, 4.0]])]) == 2.5


# Its training


def square(box) -> tuple[torch.Tensor, np.ndarray]:
    """A picture with a dark rectangle, and its labels."""
    x, labels = torch.ones(1, 3, SIDE, SIDE), np.zeros((1, MOST), LABEL)
    left, top, right, bottom = box
    x[..., top:bottom, left:right] = 0
    labels[0, 0] = (3, 1, 2, box, True)
    return x, labels


def test_labels_move_with_their_pictures():
    seen = 0
    for seed in range(40):
        x, labels = detecting.warp(*square((40, 60, 80, 90)), np.random.default_rng(seed))
        row = labels[0, 0]
        rows, columns = np.nonzero(x[0, 0].numpy() < 0.5)
        if row["name"] < 0 or not row["there"]:
            continue
        ends = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        assert row["box"] == pytest.approx(ends, abs=5)  # turned ones have loose boxes
        seen += 1
    assert seen > 30


def test_targets():
    _, labels = square((40, 60, 80, 90))  # its middle is in cell (7, 9)
    labels[0, 1] = (-1, 0, -1, (0, 0, 24, 24), True)  # cut off: neither asked for nor forbidden
    target = detecting.targets(labels)
    assert target["thing"].nonzero().tolist() == [[0, 9, 7]]
    assert target["free"][0, 1, 1] == 0 and target["free"][0, 9, 7] < 0.01
    assert target["free"][0, 15, 15] > 0.99
    names = target["name"].gather(1, target["owner"].flatten(1)).reshape(GRID, GRID)
    assert names[9, 7] == 3 and names[1, 1] == -1


@pytest.mark.parametrize("name", ["detector", "recognizer"])
def test_training_resumes(tmp_path, monkeypatch, name):
    lesson, pairs = train.LESSONS[name], [square(b) for b in ((8, 8, 60, 60), (60, 60, 110, 120))]
    monkeypatch.setattr(lesson, "BATCH", {"plain": 2})
    for constant in ("SAVE_EVERY", "LOG_EVERY"):
        monkeypatch.setattr(train, constant, 1)
    pixels = np.concatenate([(x * 255).byte().permute(0, 2, 3, 1).numpy() for x, _ in pairs])
    sets = {"plain": (pixels, np.concatenate([labels for _, labels in pairs]))}
    models = []
    for cut in (False, True):
        torch.manual_seed(0)
        models.append(getattr(TorchNetworks(), name))
        file = tmp_path / f"{cut}.pt"
        if cut:
            assert next(train.train(models[-1], lesson, sets, file, 2))["step"] == 1
        records = list(train.train(models[-1], lesson, sets, file, 2))
        assert [r["step"] for r in records] == ([2] if cut else [1, 2])
    a, b = (m.state_dict() for m in models)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert a["head.weight"].isfinite().all() and records[0]["name"] > 0


# The shipped judge


@pytest.fixture(scope="module")
def real():
    """Scenes of prompts that the judge never saw: pictures, and their prompts."""
    folder = FOLDER.parents[2] / "tests" / "data" / "judge"
    sheet = Image.open(folder / "scenes.png")
    prompts = read_prompts(folder / "prompts.jsonl")
    pictures = [sheet.crop((i * SIDE, 0, (i + 1) * SIDE, SIDE)) for i in range(len(prompts))]
    return pictures, prompts


def moved(picture: Image.Image, dx: int, dy: int) -> Image.Image:
    out = Image.new("RGB", picture.size, picture.getpixel((0, 0)))
    out.paste(picture, (dx, dy))
    return out


def test_the_judge_knows_real_scenes_and_moved_ones(real):
    pictures, prompts = real
    judge, n = Judge.load(), round(SIDE / 10)
    assert {p.task for p in prompts} == set(TASKS)
    for shift in ((0, 0), (n, 0), (-n, 0), (0, n), (0, -n)):
        looks = judge.look([moved(p, *shift) for p in pictures])
        right = [correct(p, look.things) for p, look in zip(prompts, looks, strict=True)]
        assert sum(right) >= len(right) - 2, (shift, right)  # two are white on white
    others = [correct(p, look.things) for p, look in zip(prompts[1:], looks, strict=False)]
    assert not any(others), "a picture of another prompt is wrong"


def test_a_damaged_judge(tmp_path):
    (tmp_path / "labels.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(SnapGenError, match=r"model\.safetensors"):
        Judge.load(tmp_path)


def test_summary():
    real = real_pictures()
    prompts = protocol()[: real.prompts]
    rng = np.random.default_rng(0)
    looks = [Looked([], rng.standard_normal(len(real.mean))) for _ in range(2 * len(prompts))]
    found = summary(prompts * 2, looks)
    assert found["all"]["overall"] == 0 and found["held_out"]["single_object"] is None
    floor = real.floors[min(2, len(real.floors)) - 1]
    assert found["frechet"]["drawn"] > found["frechet"]["real"] == floor
    assert "frechet" not in summary(prompts[:9], looks[:9])
    ceilings = real.shares
    assert ceilings["real scenes"]["overall"] >= 0.95
    assert all(ceilings["real scenes"][t] >= 0.89 for t in TASKS)  # white on white costs colours
    assert ceilings["moved by 10 %"]["overall"] >= ceilings["real scenes"]["overall"] - 0.03
    assert ceilings["other prompts"]["overall"] <= 0.05


# eval


def invoke(*args):
    return CliRunner().invoke(main, list(map(str, args)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def test_eval_of_a_model_without_data(model, tmp_path, monkeypatch):
    cats = [Prompt(t, "counting", (Wanted("cat", n),)) for n, t in enumerate(("a cat", "a dog"), 1)]
    monkeypatch.setattr("snapgen_mlx.scoring.protocol", lambda: cats)
    monkeypatch.setattr(
        Judge, "look", lambda _, pictures: [Looked([CAT], np.zeros(9))] * len(pictures)
    )
    args = ["--variants=tiny,full", "--steps=1", "--count=3", "--json", tmp_path / "e.json"]
    result = invoke("eval", model, *args)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["2", "prompts,", "3", "pictures", "at", "each", "width"]
    assert lines[1][:3] == ["single", "two", "counting"]
    figures = {line[0]: line[1:] for line in lines}
    # Two pictures of the first prompt are right, and one of the second is not.
    assert figures["tiny"] == ["-", "-", "0.667", "-", "-", "-", "0.667", "-"]
    assert figures["tiny"] == figures["full"]
    found = json.loads((tmp_path / "e.json").read_text())["variants"]
    assert list(found) == ["tiny", "full"] and found["full"]["all"]["counting"] == pytest.approx(
        2 / 3
    )
    assert (found["full"]["steps"], found["full"]["guidance"]) == (1, 2.0)


def test_bad_requests(model, tmp_path):
    for args, line in (
        ([model, "--count=0"], "--count 0 leaves nothing to judge"),
        ([model, "--skip-bad"], "--caption and --skip-bad belong to DATA"),
        ([model, "--variants=huge"], "no variant 'huge'"),
        ([model, "--steps=0"], "0 steps; it must be 1"),
    ):
        result = invoke("eval", *args)
        assert result.exit_code == 2 and line in result.stderr
    assert invoke("eval", tmp_path / "none").exit_code == 1


# A pretraining run


def test_a_curve_gets_a_point(tmp_path, monkeypatch, capsys):
    write_shard(tmp_path / "data", "shard-00000", 0)
    config = write_config(tmp_path / "c.json", steps=2, prompts=[])
    run = tmp_path / "run"
    assert (
        pretrain(["--data", str(tmp_path / "data"), "--out", str(run), "--config", str(config)])
        == 0
    )
    sizes = Config(4, 4, (8, 8), (1, 1), (1, 1))
    save_autoencoder(Autoencoder(sizes), tmp_path / "vae")
    args = [str(run), "--vae", str(tmp_path / "vae"), "--prompts=7", "--steps=1"]
    for _ in range(2):
        capsys.readouterr()
        assert curve.main(args) == 0
    assert "a line for this already" in capsys.readouterr().out
    for other in (["--first", "7"], ["--guidance", "2"]):
        assert curve.main([*args, *other]) == 0
    lines = list(map(json.loads, (run / "judge.jsonl").read_text().splitlines()))
    assert [(p["first"], p["guidance"]) for p in lines] == [(0, 4), (7, 4), (0, 2)]
    line = lines[0]
    assert (line["step"], line["prompts"], list(line["widths"])) == (2, 7, ["0.375", "0.5", "1"])
    assert {*TASKS, "overall", "seen", "held_out", "style"} == line["widths"]["1"].keys()
    assert curve.main([str(tmp_path), "--vae", str(tmp_path / "vae")]) == 2
    assert "holds no state" in capsys.readouterr().err
