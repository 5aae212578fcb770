"""A model folder to the Hub, with a card filled from its configuration and its training."""

import json
import re
from pathlib import Path

from .description import describe
from .errors import SnapGenError, UsageError, format_bytes
from .hub import HUB_ID, resolve_model
from .layout import COMPONENTS, FEW_STEP, TINY_DECODER, TOKENIZERS
from .vocabulary import FILE as WORDS
from .vocabulary import known_words

PARTS = (*COMPONENTS, *TOKENIZERS.values(), FEW_STEP, TINY_DECODER)
FRONT_MATTER = re.compile(r"---\n.*?\n---\n", re.DOTALL)


def files_to_push(folder: Path) -> list[Path]:
    """The files of a model folder that make it up: no caches, training states or hidden files."""
    loose = [file for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".md")]
    loose += [file for file in folder.iterdir() if file.name.upper().startswith("LICEN")]
    inside = [file for part in PARTS for file in (folder / part).rglob("*")]
    return [f for f in sorted({*loose, *inside}) if f.is_file() and not f.name.startswith(".")]


def model_card(folder, repo: str) -> str:
    """README.md for the Hub: what the model is, how to draw with it, how it was trained; then the
    folder's own README, where it has one.

    Args:
        repo: "org/name", under which it will be found.
    """
    folder = Path(folder)
    d = describe(folder)
    source = d["source"]["name"] if d["source"] else None
    head = ["library_name: snapgen-mlx", "pipeline_tag: text-to-image", "tags:", "- mlx"]
    if source and HUB_ID.fullmatch(source) and d["source"].get("revision"):  # not a folder a/b
        head.append(f"base_model: {source.partition('@')[0]}")
    few = d["few_steps"]
    how = few if few["variants"] else d["sampling"]
    lines = ["---", *head, "---", f"# {repo.partition('/')[2]}", ""]
    lines += [
        f"A model for snapgen-mlx: pictures of "
        f"{d['sampling']['width']}x{d['sampling']['height']} pixels in {how['steps']} steps, "
        f"guidance {how['guidance']:g}.",
        "",
        "```shell",
        f'snapgen-mlx generate "{_example(folder)}" -m {repo}',
        "```",
        "",
        "| part | what | parameters | bits per weight | size |",
        "|---|---|---|---|---|",
    ]
    for name, part in d["parts"].items():
        lines.append(
            f"| `{name}` | {part['kind']} | {part['parameters'] / 1e6:.1f} M | "
            f"{part['bits_per_weight']:.3g} | {format_bytes(part['bytes'])} |"
        )
    lines += ["", "| width | parameters | memory to draw |", "|---|---|---|"]
    for name, needs in d["memory"].items():
        peak = max(needs[phase] for phase in ("encoding", "denoising", "decoding"))
        lines.append(f"| {name} | {needs['parameters'] / 1e6:.1f} M | {format_bytes(peak)} |")
    if source:
        lines += ["", f"Made from {source}."]
    lines += _training(folder / "run", list(d["memory"]))
    own = folder / "README.md"
    if own.is_file():
        lines += ["", FRONT_MATTER.sub("", own.read_text(encoding="utf-8"), count=1).strip()]
    return "\n".join(lines) + "\n"


def _example(folder: Path) -> str:
    words = known_words(folder)
    return words[0] if words else "a lighthouse at dusk"


def _training(run: Path, widths: list[str]) -> list[str]:
    """What the log and the newest state of a training say."""
    log, states = run / "log.jsonl", sorted(run.glob("state-*.json"))
    if not log.is_file():
        return []
    records = _records(log)
    if not records:
        return []
    last: dict[str, float] = {}
    for record in records:  # validation is not in every one
        last |= record
    lines = ["", "## Training", "", f"{records[-1]['step']} steps."]
    if states:
        options = json.loads(states[-1].read_text(encoding="utf-8")).get("options", {})
        told = [f"{k.replace('_', ' ')} {v}" for k, v in options.items() if _is_plain(v)]
        lines[-1] += f" Options: {', '.join(told)}." if told else ""
    widths = [name for name in widths if f"loss/{name}" in last]  # few-step losses have others
    if widths:
        lines += ["", "| width | loss at the end | on held-out pictures |", "|---|---|---|"]
    for width in widths:
        held_out = f"{last[f'val/{width}']:.4f}" if f"val/{width}" in last else "not measured"
        lines.append(f"| {width} | {last[f'loss/{width}']:.4f} | {held_out} |")
    return lines


def _records(log: Path) -> list[dict]:
    try:
        records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        return [record for record in records if "step" in record]
    except (OSError, ValueError, TypeError) as e:
        raise SnapGenError(f"the training log {log} is damaged: {e}") from e


def _is_plain(value) -> bool:
    return isinstance(value, int | float | str) and not isinstance(value, bool)


def push(model, repo: str, private: bool = False) -> str:
    """Upload a model to the Hub in one commit, with ``model_card`` as its README. Files of an
    earlier upload that this model does not have are removed in the same commit.

    Args:
        model: a folder or "embedded".
        repo: "org/name"; it is made where it does not exist yet.
        private: whether a new repository can be seen by its owners only.

    Returns:
        The address of the commit.

    Raises:
        UsageError: a name that is none, no token, or a repository of a PyTorch model.
        SnapGenError: the Hub refuses or cannot be reached.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        raise UsageError(f"{repo!r} is no name of a repository; write org/name")
    folder = resolve_model(model)
    if hub.get_token() is None:
        raise UsageError(
            "no token for the Hub: run `hf auth login` or set HF_TOKEN; it must allow writing"
        )
    card = model_card(folder, repo)
    adding = [hub.CommitOperationAdd("README.md", card.encode())]
    adding += [
        hub.CommitOperationAdd(file.relative_to(folder).as_posix(), str(file))
        for file in files_to_push(folder)
        if file != folder / "README.md"
    ]
    names = {operation.path_in_repo for operation in adding}
    api = hub.HfApi(endpoint=constants.ENDPOINT)
    # Of httpx or httpx2, as its version has it.
    http_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        there = [file.rfilename for file in api.model_info(repo).siblings or []]
        if "model_index.json" in there:
            raise UsageError(f"{repo} holds a PyTorch model; choose another repository")
        # Of an earlier upload: with its index, or its LoRAs, another model would be drawn with.
        gone = [hub.CommitOperationDelete(n) for n in there if _is_ours(n) and n not in names]
        message = "Upload by snapgen-mlx"
        return api.create_commit(repo, [*adding, *gone], commit_message=message).commit_url
    except (http_error, errors.OfflineModeIsEnabled, OSError, RuntimeError) as e:
        raise SnapGenError(f"cannot push to {repo}: {_why(e)}") from e


def _is_ours(name: str) -> bool:
    """Whether a repository's file would belong to the model that is drawn with."""
    folder, _, rest = name.partition("/")
    return folder in PARTS if rest else name == WORDS


def _why(error: Exception) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub is switched off; unset HF_HUB_OFFLINE"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the Hub answered {status}; the token may not write there"
    if status:
        return f"the Hub answered {status}; run again later"
    again = "run again, what was uploaded is not sent twice"
    return f"{str(error).splitlines()[0] if str(error) else type(error).__name__}; {again}"
