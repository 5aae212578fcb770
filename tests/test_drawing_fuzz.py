"""Mutated settings, metadata and arguments: clean errors or right results, and nothing else."""

import io
import json
import random

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from snapgen_mlx import Pipeline, load_dit
from snapgen_mlx.errors import SnapGenError, UsageError
from snapgen_mlx.ingredients import differences
from snapgen_mlx.picture_file import picture_bytes, read_metadata
from snapgen_mlx.settings import Settings
from snapgen_mlx.training.picture_list import left_out
from snapgen_mlx.training.pictures import scan_folder

from .test_convert_fuzz import mutate
from .tiny import write_tiny_model

METADATA = {
    **Settings("a <cat> & dog", seed=7, steps=1, width=64, height=64).__dict__,
    "variant": "tiny",
    "few_step": True,
    "model": "tiny",
    "text_encoder": "gemma",
    "loras": ["a.safetensors:0.5"],
    "digests": {"model": "1", "LoRA": "2"},
    "version": "0.1.0",
}
JSON_JUNK = [None, True, -1, 0, 3, 2**70, -0.5, 1e308, float("nan"), "", "a cat", "5", "\ud800"]
JSON_JUNK += ["a" * 5000, [], [1], ["x"], {}, {"a": 1}, [[[[]]]], {"model": ["x"]}]
PICTURE = Image.new("RGB", (64, 64))
JUNK = [*JSON_JUNK, b"x", (), ("a", 1), object(), np.float32(2), np.array([1, 2]), mx.array(1.0)]
JUNK += [1j, PICTURE, Image.new("1", (3, 3)), len, ..., range(3), "\0", "line\nline"]


def is_clean(action, accept=lambda result: True) -> bool:
    """Whether an action is refused in one line; otherwise its result must be accepted."""
    try:
        result = action()
    except SnapGenError as e:
        assert str(e) and "\n" not in str(e), repr(e)
        return True
    assert accept(result)
    return False


def is_valid(found: dict) -> bool:
    """Whether settings read from a file can be used without another look."""
    names = Settings.__dataclass_fields__
    settings = Settings(**{k: found[k] for k in names})
    differences(found, METADATA)
    texts = ("model", "text_encoder", "version", "image", "mask", "outpaint")
    return (
        {k: getattr(settings, k) for k in names} == {k: found[k] for k in names}
        and isinstance(found["variant"], str)
        and all(isinstance(found.get(k, ""), str) for k in texts)
        and " ".join(found.get("loras", [])) is not None
    )


def test_settings_of_other_kinds_in_a_png():
    rng = random.Random(0)
    refused = 0
    for _ in range(600):
        found = dict(METADATA)
        for _ in range(rng.choice((1, 1, 2))):
            name = rng.choice([*METADATA, "more"])
            if rng.random() < 0.2:
                found.pop(name, None)
            else:
                found[name] = rng.choice(JSON_JUNK)
        text = json.dumps(rng.choice([found] * 20 + [[found], None, 5]))
        info, file = PngInfo(), io.BytesIO()
        info.add_text("snapgen-mlx", text)
        Image.new("1", (1, 1)).save(file, "PNG", pnginfo=info)
        refused += is_clean(lambda file=file: read_metadata(file), is_valid)
    assert 200 < refused < 550


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_mutated_picture_files(suffix):
    data = picture_bytes(Image.new("RGB", (8, 8)), suffix, METADATA)
    assert read_metadata(io.BytesIO(data)) == METADATA
    refused = 0
    for seed in range(200):
        file = io.BytesIO(mutate(data, np.random.default_rng(seed)))
        # PNG's settings have a checksum; elsewhere another letter of a prompt is another prompt.
        accept = is_valid if suffix != ".png" else lambda found: found == METADATA
        refused += is_clean(lambda file=file: read_metadata(file), accept)
    assert refused > 20


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_mutated_lists_of_pictures(tmp_path, name):
    rows = [("1.png", "a red cat"), ("2.png", "a café, and a dog"), ("3.png", 'a 24" screen')]
    for file, _ in rows:
        PICTURE.save(tmp_path / file)
    if name.endswith("csv"):
        text = 'file_name,text\n1.png,a red cat\n2.png,"a café, and a dog"\n3.png,"a 24"" screen"\n'
    else:
        text = "".join(json.dumps({"file_name": f, "text": t}) + "\n" for f, t in rows)
    (tmp_path / name).write_text(text, encoding="utf-8")
    examples, bad = scan_folder(tmp_path)
    assert [e.captions for e in examples] == [[t] for _, t in rows] and not bad
    refused = 0
    for seed in range(200):
        changed = mutate(text.encode(), np.random.default_rng(seed))
        (tmp_path / name).write_bytes(changed)

        def right(found):
            """Each picture once, in the folder, with a caption, or named among the bad."""
            examples, bad = found
            files = [e.file.name for e in examples]
            assert all("\n" not in line for line in bad)
            return set(files) <= {f for f, _ in rows} and all(e.captions for e in examples)

        refused += is_clean(lambda: (scan_folder(tmp_path), left_out(tmp_path))[0], right)
    assert refused < 200


def test_settings_from_python():
    rng = random.Random(1)
    names = [*Settings.__dataclass_fields__]
    for _ in range(700):
        given = {"prompt": "a cat"} | {k: rng.choice(JUNK) for k in rng.sample(names, 2)}

        def accepted(s):
            json.dumps(s.__dict__)
            return s.shift > 0 and 0 <= s.seed < 2**63 and Settings(**s.__dict__) == s

        is_clean(lambda given=given: Settings(**given), accepted)


@pytest.mark.parametrize("shift", [0, -1, float("nan"), float("inf"), "3", True])
def test_a_shift_that_makes_no_schedule(shift):
    with pytest.raises(UsageError, match="shift"):
        Settings("a cat", shift=shift)


def test_strength_without_a_picture_to_start_from(tmp_path):
    pipe = Pipeline.load(write_tiny_model(tmp_path), "tiny")
    with pytest.raises(UsageError, match="strength"):
        pipe.generate("a cat", strength=0.5, steps=4)


def test_numpy_numbers_are_numbers():
    s = Settings("a cat", seed=np.int64(3), guidance=np.float32(2))
    assert json.loads(json.dumps(s.__dict__)) == s.__dict__ and type(s.seed) is int


def test_arguments_from_python(tmp_path):
    model = write_tiny_model(tmp_path)
    pipe = Pipeline.load(model, "tiny")
    flags = ("base", "low_ram", "keep_encoders")

    def is_picture(result):
        return isinstance(result, Image.Image)

    few = {"prompt": "a cat", "steps": 1, "guidance": 1}
    options = ["source", "variant", "width", "height", "guidance", "text_encoder", "loras"]
    for junk in random.Random(2).sample(JUNK, 14):
        for name in ("prompt", "width", "strength", "background", "nonsense"):
            is_clean(lambda n=name, j=junk: pipe.generate(**{**few, n: j}), is_picture)
        for name in options:
            given = {"source": model, name: junk}
            is_clean(lambda g=given: Pipeline.load(**g), lambda p: isinstance(p, Pipeline))
        for name in ("folder", "variant", "dtype", "loras"):
            is_clean(lambda n=name, j=junk: load_dit(**{"folder": model, n: j}))
        for name in ("image", "mask", "margins"):
            given = {**few, "image": PICTURE, name: junk}
            is_clean(lambda g=given: pipe.edit(**g), is_picture)
        assert is_clean(lambda j=junk: pipe.decode(j))
        assert is_clean(lambda j=junk: pipe.stream(j))
    assert not is_clean(lambda: Pipeline.load(model, **dict.fromkeys(flags, 1)))
    assert is_clean(lambda: pipe.decode(mx.zeros((1, 4, 4, 16), mx.int32)))
    assert is_clean(lambda: pipe.decode(mx.zeros((2, 4, 4, 16))))
