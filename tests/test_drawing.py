"""What ``generate`` says of what it draws, and where it puts it."""

import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from click.testing import CliRunner
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from snapgen_mlx.cli import progress
from snapgen_mlx.cli.main import main
from snapgen_mlx.files import numbered, write_new
from snapgen_mlx.names import file_words
from snapgen_mlx.picture_file import read_metadata

from .tiny import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    """Run ``generate`` in an empty folder with the tiny model and one step."""
    monkeypatch.chdir(tmp_path)

    def run(*args, stdin=None, guidance=1):
        args = ["generate", *map(str, args), "-m", str(model), "--steps", "1"]
        return CliRunner().invoke(main, [*args, "--guidance", str(guidance)], input=stdin)

    return run


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def notes(result):
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    assert len(lines) == len(result.stderr.splitlines()), result.stderr
    return lines


# Names


@pytest.mark.parametrize(
    ("output", "name"),
    [
        ("new/", "new/a-cat-0.png"),
        (".", "a-cat-0.png"),
        ("there", "there/a-cat-0.png"),
        ("x.jpg", "x.jpg"),
        ("{seed}.JPEG", "0.JPEG"),
        ("x.webp", "x.webp"),
        ("v1.2", "v1.2.png"),
        ("{variant}", "full.png"),
    ],
)
def test_where_a_picture_goes(run, tmp_path, output, name):
    (tmp_path / "there").mkdir()
    result = run("a cat", "-o", output)
    assert result.exit_code == 0, result.output
    kind = {".png": "PNG", ".webp": "WEBP"}.get(os.path.splitext(name)[1], "JPEG")
    with Image.open(tmp_path / name) as image:
        assert image.format == kind
    assert read_metadata(tmp_path / name)["prompt"] == "a cat"


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_every_kind_of_file_repeats_itself(run, tmp_path, suffix):
    prompt = "a <cat> & \x01 dog \U0001f600"
    assert run(prompt, "--seed", 5, "-o", f"a.{suffix}").exit_code == 0
    assert run("--from-metadata", f"a.{suffix}", "-o", f"b.{suffix}").exit_code == 0
    data = (tmp_path / f"a.{suffix}").read_bytes()
    assert data == (tmp_path / f"b.{suffix}").read_bytes()
    assert read_metadata(tmp_path / f"a.{suffix}")["prompt"] == prompt
    assert run("a cat", "-o", f"c.{suffix}", "--no-metadata").exit_code == 0
    assert b"snapgen" not in (tmp_path / f"c.{suffix}").read_bytes()


def test_a_name_of_bytes_that_are_no_text(run, tmp_path):
    for output in ("\udcff.png", "\udcff/{prompt}"):
        result = run("a cat", "-o", output)
        assert result.exit_code == 0 and "nexpected" not in result.output
    result = run("a cat", "-o", "\udcff/\udcfe.gif")
    assert result.exit_code == 2 and ".webp" in result.stderr


def test_a_picture_on_standard_output(run, tmp_path):
    result = run("a cat", "-o", "-")
    assert result.exit_code == 0, result.stderr
    with Image.open(io.BytesIO(result.stdout_bytes)) as image:
        assert image.format == "PNG" and image.size == (64, 64)
    assert not names(tmp_path)


@pytest.mark.parametrize(
    ("args", "code", "word"),
    [
        (("-o", "x.gif"), 2, ".webp"),
        (("-o", "x" * 300 + ".png"), 2, "304 bytes"),
        (("-o", "猫" * 90 + ".png"), 2, "274 bytes"),
        (("-o", ""), 2, "file name"),
        (("-o", "file/x.png"), 1, "Not a directory"),
        (("-o", "x.jpg", "--background", "transparent"), 2, "JPEG"),
        (("a dog", "-o", "-"), 2, "-o -"),
        (("--grid", "file/x.png"), 1, "file/x.png"),
        (("--grid", "-"), 2, "one file"),
        (("--grid", "new/"), 2, "one file"),
        (("--preview", "file"), 1, "Not a directory"),
        (("--seed", "soon"), 2, "random"),
    ],
)
def test_a_place_that_cannot_be_written_is_told_before_drawing(
    run, tmp_path, monkeypatch, args, code, word
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("snapgen_mlx.pipeline.Pipeline.stream", None)
    result = run("a cat", *args)
    assert result.exit_code == code and word in result.stderr, result.output
    assert "nexpected" not in result.stderr and names(tmp_path) == ["file"]


def test_names_as_long_as_the_file_system_takes_are_numbered(run, tmp_path):
    name = "猫" * 83 + "ab.png"  # 255 bytes
    for _ in range(2):
        assert run("a cat", "-o", name).exit_code == 0
    assert len(names(tmp_path)) == 2 and name in names(tmp_path)
    assert all(len(os.fsencode(found)) <= 255 for found in names(tmp_path))
    assert numbered(tmp_path / name, 10).name.endswith("猫-10.png")


def test_words_of_any_script_make_names():
    assert [file_words(text) for text in ("猫", "Кот!", "a Café", "हिन्दी", "...")] == [
        *("猫", "кот", "a-café", "हिन्दी", "picture")
    ]
    assert file_words("\U0001f431 \u2764\ufe0f!") == "cat-face-heavy-black-heart"


def test_writers_of_one_name_do_not_overwrite_each_other(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda i: write_new(tmp_path / "x", b"%d" % i), range(40)))
    assert len(set(paths)) == 40
    assert [path.read_bytes() for path in paths] == [b"%d" % i for i in range(40)]
    assert len(names(tmp_path)) == 40


def test_writers_of_one_name_where_there_are_no_links(tmp_path, monkeypatch):
    def no_link(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    test_writers_of_one_name_do_not_overwrite_each_other(tmp_path)


# Seeds, widths, sheets


def test_a_random_seed_is_another_one_each_time_and_told(run, tmp_path):
    for _ in range(2):
        assert run("a cat", "--seed", "random").exit_code == 0
    seeds = {read_metadata(p)["seed"] for p in tmp_path.iterdir()}
    assert len(seeds) == 2 and {f"a-cat-{seed}.png" for seed in seeds} == set(names(tmp_path))


def test_a_sheet_of_prompts_by_widths(run, tmp_path, monkeypatch):
    seen = []

    def sheet(rows, prompts, columns):
        seen.append((rows, prompts, columns))
        return rows[0][0]

    monkeypatch.setattr("snapgen_mlx.cli.drawing.contact_sheet", sheet)
    widths = ["--variant", "tiny", "--variant", "full"]
    result = run("a cat", "a dog", "a cat", *widths, "--grid", "all.png", "-o", "out/")
    assert result.exit_code == 0, result.output
    ((rows, prompts, columns),) = seen
    assert columns == ["tiny", "full"] and prompts == ["a cat", "a dog", "a cat"]
    assert rows[0] == rows[2] and rows[0][0] != rows[0][1] and rows[0] != rows[1]
    for variant in ("tiny", "full"):
        path = tmp_path / "out" / f"a-cat-0-{variant}.png"
        assert read_metadata(path)["variant"] == variant
        assert run("a cat", "--variant", variant, "-o", "one.png").exit_code == 0
        assert (tmp_path / "one.png").read_bytes() == path.read_bytes()
        (tmp_path / "one.png").unlink()
    run("a cat", *widths, "--seed", 1, "--seed", 2, "--grid", "more.png", "-o", "out/")
    assert seen[1][2] == ["tiny, seed 1", "tiny, seed 2", "full, seed 1", "full, seed 2"]


def test_a_sheet_is_not_written_over_a_file(run, tmp_path):
    (tmp_path / "a.png").write_text("mine")
    assert run("a cat", "-o", "b.png", "--grid", "a.png").exit_code == 0
    assert names(tmp_path) == ["a-2.png", "a.png", "b.png"]
    assert (tmp_path / "a.png").read_text() == "mine"


# Notes


def test_what_may_surprise_is_one_line_each(run):
    assert notes(run("a red cat")) == []
    (line,) = notes(run("a zxcv cat"))
    assert "zxcv" in line and "info --words" in line
    (line,) = notes(run("a " * 10 + "cat " * 10))
    assert "16 of 20 tokens" in line and line.endswith("cat cat cat cat cat cat'")
    (line,) = notes(run("a cat", "--negative", "zxcv dog"))
    assert "negative text has no effect" in line
    assert "zxcv" in notes(run("a cat", "--negative", "a zxcv dog", guidance=2))[0]
    (line,) = notes(run("a cat", "--width", 128))
    assert "trained for 64x64" in line
    result = run("a cat", "-q", "--width", 128)
    assert result.stdout == "" and len(notes(result)) == 1


def test_progress_is_a_line_every_few_seconds_in_a_log(run, monkeypatch):
    assert run("a cat").stderr == ""
    monkeypatch.setattr(progress, "EVERY", 0.0)
    assert "a cat: step 1 of 1, 0 s left\n" in run("a\n\x1b cat").stderr
    assert run("a cat", "--quiet").output == ""


def test_progress_of_any_unit(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    bar = progress.Bar("layer")
    bar.update(1, 2)
    progress.Bar("B").update(3_000_000, 3_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("layer 1 of 2, ") and lines[1] == "3 MB of 3 MB, 0 s left"
    monkeypatch.setattr(progress, "EVERY", 5.0)
    for i in range(1000):
        progress.Bar("layer").update(i, 1000)
    assert capsys.readouterr().err == ""


def test_guidance_on_a_model_of_few_steps(tmp_path):
    args = ["generate", "a cat", "--guidance", "4", "--steps", "1", "--variant", "tiny"]
    result = CliRunner().invoke(main, [*args, "-o", str(tmp_path / "a.png")])
    (line,) = notes(result)
    assert "few steps without guidance" in line and "--base" in line


def test_emoji_are_their_names(tmp_path):
    for prompt, name in (("\U0001f431", "a"), ("cat face", "b")):
        args = ["generate", prompt, "--steps", "1", "--variant", "tiny", "--no-metadata"]
        result = CliRunner().invoke(main, [*args, "-o", str(tmp_path / f"{name}.png")])
        assert notes(result) == []
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


# Prompts that are no plain text, streams that are closed


@pytest.mark.parametrize(
    "data", ["a cat\r\n\r\na dog".encode(code) for code in ("utf-8", "utf-8-sig", "utf-16")]
)
def test_prompts_with_and_without_a_byte_order_mark(run, tmp_path, data):
    assert run(stdin=data).exit_code == 0
    assert names(tmp_path) == ["a-cat-0.png", "a-dog-0.png"]
    assert read_metadata("a-cat-0.png")["prompt"] == "a cat"


@pytest.mark.parametrize(
    ("prompt", "stdin", "word"),
    [
        ("-", "a dog\na café".encode("cp1252"), "line 2 of standard input is not UTF-8"),
        ("-", b"\xff\xfea", "standard input"),
        ("a cat\udcff", None, "UTF-8"),
        ("-", b"\xef\xbb\xbf \n", "no prompt"),
    ],
)
def test_prompts_that_are_no_utf_8(run, tmp_path, prompt, stdin, word):
    result = run(prompt, stdin=stdin)
    assert result.exit_code == 2 and word in result.stderr and not names(tmp_path)
    assert "nexpected" not in result.stderr


def shell(command, cwd):
    code = "from snapgen_mlx.cli.main import main; main()"
    command = command.replace("snapgen-mlx", f"{sys.executable} -c '{code}'")
    return subprocess.run(command, shell=True, cwd=cwd, capture_output=True, text=True)


def test_closed_and_full_streams(model, tmp_path):
    drawn = shell(f"snapgen-mlx generate 'a cat' -m {model} --preview p <&- >&- 2>&-", tmp_path)
    assert drawn.returncode == 0
    for path in [tmp_path / "a-cat-0.png", *(tmp_path / "p").iterdir()]:
        with Image.open(path) as image:
            image.load()
    done = shell("snapgen-mlx generate <&-", tmp_path)
    assert done.returncode == 2 and "no prompt" in done.stderr
    done = shell("snapgen-mlx info > /dev/full", tmp_path)
    assert done.returncode == 1 and done.stderr == "error: No space left on device\n"


def test_ctrl_c_is_130_and_leaves_nothing(run, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("snapgen_mlx.pipeline.Pipeline.decode", interrupted)
    result = run("a cat")
    assert result.exit_code == 130 and result.stderr == "interrupted\n"
    assert not names(tmp_path)


# Pictures made before


def metadata_with(path, **changes):
    """A PNG with other settings than those of ``path``; None leaves one out."""
    with Image.open(path) as image:
        found = json.loads(image.text["snapgen-mlx"]) | changes
        found = {k: v for k, v in found.items() if v is not None or k not in changes}
        info = PngInfo()
        info.add_text("snapgen-mlx", json.dumps(found))
        image.save("changed.png", pnginfo=info)


def test_the_ingredient_that_differs_is_named(run, tmp_path):
    assert run("a cat", "-o", "a.png").exit_code == 0
    digests = read_metadata("a.png")["digests"]
    for changes, word in [
        ({"digests": digests | {"model": "0"}}, "another model"),
        ({"digests": digests | {"LoRA": "0"}}, "a LoRA"),
        ({"digests": digests | {"text encoder": "0"}}, "a text encoder"),
        ({"digests": None, "model": "elsewhere"}, "another model"),
        ({"digests": {}}, "no model"),
    ]:
        metadata_with("a.png", **changes)
        result = run("--from-metadata", "changed.png")
        assert result.exit_code == 2 and word in result.stderr, (changes, result.output)
    metadata_with("a.png", version="0.0.9")
    (line,) = notes(run("--from-metadata", "changed.png"))
    assert "by version 0.0.9" in line
    metadata_with("a.png", digests=None)
    (line,) = notes(run("--from-metadata", "changed.png"))
    assert "does not say which weights" in line
    assert notes(run("--from-metadata", "a.png", "--variant", "tiny")) == []


def test_another_picture_to_start_from_is_named(run, tmp_path):
    for name, color in (("in", "red"), ("other", "blue")):
        Image.new("RGB", (64, 64), color).save(f"{name}.png")
    assert run("a cat", "--image", "in.png", "-o", "a.png").exit_code == 0
    assert run("--from-metadata", "a.png", "--image", "in.png", "-o", "b.png").exit_code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    result = run("--from-metadata", "a.png", "--image", "other.png")
    assert result.exit_code == 2 and "another image" in result.stderr
