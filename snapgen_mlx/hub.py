"""From what the user named to a local path: a file, a folder, or a download from the Hub."""

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from .errors import SnapGenError, UsageError, shown
from .layout import COMPONENTS, FEW_STEP, FORMAT, TOKENIZERS, load_config
from .tensors.sharded import EXTENSIONS, weight_names
from .vocabulary import FILE as WORDS

EMBEDDED = "embedded"  # name of the shipped model
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# The weights by their usual names, without fp16 doubles and single-file copies of the whole.
USUAL = ["*model.safetensors", "*model-?????-of-?????.safetensors", f"{FEW_STEP}/*.safetensors"]
EXTRAS = ["*.json", "*.model", "*.txt", "*.jinja"]  # configurations, tokenizers, licences


def embedded_model() -> Path:
    """Folder of the model that is shipped with the package."""
    folder = Path(str(resources.files("snapgen_mlx") / "assets" / "embedded"))
    if not (folder / "config.json").is_file():
        raise SnapGenError(f"the embedded model is missing at {folder}; reinstall snapgen-mlx")
    return folder


def resolve_model(source) -> Path:
    """Local folder of a model: None or "embedded" for the embedded one, a folder, or a Hub id."""
    if source is None:
        return embedded_model()
    folder = local_path(source)
    if str(source) == EMBEDDED and not folder.exists():
        return embedded_model()
    if not folder.exists():
        folder = resolve(source)
    if not folder.is_dir():
        raise SnapGenError(f"{folder} is not a model folder")
    if (folder / "model_index.json").is_file() and not (folder / "config.json").is_file():
        raise SnapGenError(
            f"{source} holds a PyTorch model; convert it first: snapgen-mlx convert {source} DIR"
        )
    config = load_config(folder)
    if config.get("format") != FORMAT["format"]:
        what = config.get("_class_name") or config.get("model_type") or "something else"
        raise SnapGenError(f"{folder / 'config.json'} is of {what}, not of a snapgen-mlx model")
    return folder


def resolve(
    source,
    revision: str | None = None,
    token: str | None = None,
    only: Sequence[str] | None = None,
) -> Path:
    """The local path of a source; downloads what is not there yet.

    Only files that conversion reads are downloaded (safetensors before ``.bin``), and whole files
    are never downloaded twice. HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN and a cached login work.

    Args:
        source: an existing path, or a Hub id ``org/name[@revision]``.
        revision: branch, tag or commit on the Hub.
        token: for the Hub; None for the cached login.
        only: parts of a whole checkpoint to download; None for all.

    Returns:
        The path itself, or the folder of the Hub's snapshot.

    Raises:
        SnapGenError: in one line, for everything that can go wrong on the way.
    """
    path = local_path(source)
    if path.exists():
        if revision:
            raise UsageError(f"--revision is for the Hub, and {source} is a local path")
        return path
    match = HUB_ID.fullmatch(str(source))
    if not match:
        raise SnapGenError(
            f"{source}: no such file or folder (a Hub model is written org/name or "
            "org/name@revision)"
        )
    if revision and match["revision"]:
        raise UsageError(f"{source} names a revision already; leave out --revision {revision}")
    return _download(match["repo"], revision or match["revision"], token, only)


def local_path(source) -> Path:
    """The path that a name is, whether there is one or not. Raises UsageError for what is none."""
    try:
        path = Path(source).expanduser()
        path.exists()
        if "\0" in str(path):
            raise ValueError("embedded null byte")
    except (TypeError, ValueError, RuntimeError, OSError) as e:
        raise UsageError(f"{shown(source)} is neither a folder nor a Hub id: {e}") from e
    return path


def commit_of(path) -> str | None:
    """The commit a path in the Hub's cache belongs to; None elsewhere."""
    for part, parent in zip(Path(path).parts[1:], Path(path).parts, strict=False):
        if parent == "snapshots":
            return part
    return None


def _wanted(only: Sequence[str] | None, files: list[str]) -> list[str]:
    """Patterns of what is downloaded of a repository with these ``files``."""
    parts = [name for name in only or () if any(f.startswith(f"{name}/") for f in files)]
    if not parts:  # all is wanted, or it is a single model
        return USUAL + EXTRAS
    folders = [*parts, *(TOKENIZERS[name] for name in parts if name in TOKENIZERS)]
    inside = [f"{folder}/{p}" for folder in folders for p in USUAL[:2] + EXTRAS]
    if "transformer" in parts:
        inside += [f"{FEW_STEP}/*.safetensors", WORDS]
    # What says how a transformer is sampled, and which latents are its own.
    return [*inside, "*index.json", "scheduler/*.json", "vae/config.json", "README.md"]


def _download(
    repo: str, revision: str | None, token: str | None, only: Sequence[str] | None
) -> Path:
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    at = f"{repo}@{revision}" if revision else repo
    page = f"https://huggingface.co/{repo}"
    http_error: type[Exception] = errors.HfHubHTTPError.__bases__[
        0
    ]  # of httpx or httpx2, as its version has it
    unreachable = None
    files: list[str] = []
    try:
        try:
            # snapshot_download would wait for the listing for ever.
            patience = constants.HF_HUB_ETAG_TIMEOUT
            api = hub.HfApi(token=token)
            info = api.model_info(repo, revision=revision, timeout=patience)
            files = [file.rfilename for file in info.siblings or []]
        except (http_error, errors.OfflineModeIsEnabled) as e:
            refused = isinstance(e, errors.HfHubHTTPError) and e.response.status_code < 500
            if refused:
                raise
            unreachable = e  # an earlier download may do

        def fetch(patterns):
            return hub.snapshot_download(
                repo,
                revision=revision,
                token=token,
                allow_patterns=patterns,
                local_files_only=unreachable is not None,
            )

        folder = Path(fetch(_wanted(only, files)))
        parts = [c for c in only or COMPONENTS if (folder / c).is_dir()] or [""]
        if bare := [c for c in parts if _lacks_weights(folder / c)]:  # under no usual name
            fetch([f"{c}/*.{ext}".lstrip("/") for c in bare for ext in EXTENSIONS])
    except errors.GatedRepoError as e:
        raise SnapGenError(
            f"{repo} is gated: accept its terms at {page}, log in with `hf auth login` and run "
            "again; for Gemma, --text-encoder takes any local or community Gemma 3 folder instead"
        ) from e
    except errors.RevisionNotFoundError as e:
        raise SnapGenError(f"{repo} has no revision {revision!r}; see {page}") from e
    except errors.RepositoryNotFoundError as e:
        raise SnapGenError(
            f"{repo} is not on the Hub, or is private: check the name at {page}, or log in with "
            "`hf auth login`"
        ) from e
    except (errors.LocalEntryNotFoundError, http_error) as e:
        raise SnapGenError(_why_not(at, page, unreachable or e.__cause__ or e)) from e
    except (errors.HFValidationError, OSError) as e:
        why = e.strerror if isinstance(e, OSError) and e.strerror else str(e).splitlines()[0]
        raise SnapGenError(
            f"cannot download {at}: {why}; run again, files that are whole are kept"
        ) from e
    return folder


def _lacks_weights(folder: Path) -> bool:
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return "config.json" in names and not weight_names(names)


def _why_not(at: str, page: str, error: BaseException) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"{at} is not wholly in the cache and the Hub is switched off: unset HF_HUB_OFFLINE, "
            "or download it once with a network"
        )
    if status := getattr(getattr(error, "response", None), "status_code", None):
        what = f"the Hub answered {status}"
        if status in (401, 403):
            return f"cannot download {at}: {what}; log in again with a token that may read {page}"
    else:
        late = "Timeout" in type(error).__name__
        what = "the Hub did not answer in time" if late else "the Hub cannot be reached"
    return f"cannot download {at}: {what}; run again later, files that are whole are kept"
