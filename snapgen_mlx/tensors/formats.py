"""The reader of a checkpoint, whatever it is: a file, shards with their index, or a folder."""

from pathlib import Path

from ..errors import SnapGenError
from .dcp_folder import DCPFolder
from .readers import Reader, SafetensorsFile, Sharded
from .sharded import EXTENSIONS, IS_INDEX, SHARD, weight_names
from .torch_file import TorchFile


def open_file(path: Path) -> Reader:
    """A reader of one weight file, chosen by its name."""
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix[1:] in EXTENSIONS:
        return TorchFile(path)
    raise SnapGenError(f"{path}: unknown kind of file; expected .{', .'.join(EXTENSIONS)}")


def open_weights(path) -> Reader:
    """A reader of the weights in ``path``: a file, an index, or a folder that holds one model's.

    Raises SnapGenError when there is none, it is ambiguous, incomplete or damaged.
    """
    path = Path(path)
    if IS_INDEX.fullmatch(path.name):
        return Sharded(path, open_file)
    if path.is_file():
        return open_file(path)
    if not path.is_dir():
        raise SnapGenError(f"{path} does not exist")
    if (path / ".metadata").is_file():
        return DCPFolder(path)
    try:
        names = weight_names([p.name for p in path.iterdir()])
    except SnapGenError as e:
        raise SnapGenError(f"{path}: {e}") from e
    if not names:
        raise SnapGenError(f"{path} holds no weights (.{', .'.join(EXTENSIONS)})")
    if IS_INDEX.fullmatch(names[-1]):
        return Sharded(path / names[-1], open_file)
    if len(names) > 1 or SHARD.search(Path(names[0]).stem):
        raise SnapGenError(f"{path} holds shards without their index (.index.json)")
    return open_file(path / names[0])
