"""The README can be run line by line, without a network."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from snapgen_mlx.cli.main import main
from snapgen_mlx.hub import embedded_model
from snapgen_mlx.notes import unknown_words
from snapgen_mlx.text_loading import load_text_encoders
from snapgen_mlx.vocabulary import known_words

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line) for line in re.findall(r"`snapgen-mlx (\w+ .*?)`", README)]
# These would take minutes, wait or need the Hub: their options are read, and no more.
READ = dict.fromkeys(("bench", "quantize", "serve", "push"), "--help")
READ |= {"finetune": "--explain", "distill": "--explain"}


def test_the_commands_run_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("snapgen_mlx.doctor.matmul_speed", lambda: 100.0)
    monkeypatch.setattr("snapgen_mlx.memory.ModelMemory.choose", lambda *_: "tiny")  # the fastest
    monkeypatch.setattr("snapgen_mlx.packs.STICKER", 64)
    assert len(COMMANDS) > 20
    for name, *args in COMMANDS:
        args = ["2" if i and args[i - 1] == "--count" else arg for i, arg in enumerate(args)]
        few = ["--steps", "1"] if name == "generate" else []
        few += [READ[name]] if name in READ else []
        # A download of 57 GB.
        few += ["--help"] if any(arg.lower().startswith("qwen") for arg in args) else []
        result = CliRunner().invoke(main, [name, *args, *few])
        assert result.exit_code == 0, (name, args, result.output)
        assert "does not know" not in result.output and "no effect" not in result.output
        if name == "finetune":  # what the lines after it work with
            output = Path(args[args.index("-o") + 1])
            if "--lora" in args:
                output.mkdir()
                shutil.copy(embedded_model() / "few_step" / "tiny.safetensors", output)
                (output / "tiny.safetensors").rename(output / "lora.safetensors")
            else:
                shutil.copytree("model", output)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    found: dict = {}
    exec(code, found)
    assert found["v"].shape == found["x"].shape and found["image"].size == (256, 256)


@pytest.mark.parametrize(
    "page", ["README.md", "docs/drawing.md", "docs/editing.md", "docs/first-steps.md"]
)
def test_examples_are_things_that_the_embedded_model_draws(page):
    folder = embedded_model()
    encoders = load_text_encoders(folder)
    things = {word for name in known_words(folder) for word in name.split()}
    text = (Path(__file__).parents[1] / page).read_text(encoding="utf-8")
    prompts = [
        prompt
        for line in re.findall(r"snapgen-mlx (?:generate|pack) ([^`\n#]*)", text)
        for prompt in re.findall(r'"(an? [^"]*)"', line)
    ]
    assert prompts
    for prompt in prompts:
        words = re.sub(r"[{},]", " ", prompt).split()
        assert not unknown_words(encoders, " ".join(words)), prompt
        assert things & set(words), f"{page}: {prompt!r}"
