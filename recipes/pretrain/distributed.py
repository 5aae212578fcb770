"""Several processes of one run (`torchrun`): who is who, and weights that they share or split."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from snapgen_mlx.errors import UsageError

from .attention import leading


@contextmanager
def joined(device: str) -> Iterator[torch.device]:
    """Join the processes that `torchrun` started, if it did, and leave them at the end.

    Yields the device of this process. Raises UsageError where there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("PyTorch finds no CUDA device here; leave --device out for the CPU")
    if "RANK" not in os.environ:
        yield torch.device(device)
        return
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        yield torch.device("cuda", torch.cuda.current_device())
    else:
        yield torch.device(device)
    # Threads of a group that is left to the end of Python can abort the process. After an error
    # the other processes may wait in the group: it stays.
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    """Until every process is here."""
    if processes() > 1:
        dist.barrier()


def any_process(flags: list[bool], device: torch.device) -> list[bool]:
    """Which of the flags are true in any process; all get the same answer."""
    if processes() == 1:
        return flags
    tensor = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return [bool(flag) for flag in tensor.tolist()]


def mean(value: Tensor) -> Tensor:
    """A scalar's mean over the processes."""
    if processes() > 1:
        dist.all_reduce(value)
        value /= processes()
    return value


def replicate(network: nn.Module) -> nn.Module:
    """The network with gradients averaged over the processes (DDP)."""
    # A step does not use the isolated parameters of the other widths; buffers never change.
    return DistributedDataParallel(network, find_unused_parameters=True, broadcast_buffers=False)


def shard(network: nn.Module, device: torch.device) -> None:
    """Split every parameter over the processes, one group per block (FSDP2)."""
    mesh = init_device_mesh(device.type, (processes(),))
    for block in (*network.dit.down, *network.dit.mid, *network.dit.up):
        fully_shard(block, mesh=mesh)
    # Gathered anew at every pass: the averaged weights take the others' place between two.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def local(a: Tensor) -> Tensor:
    """This process's part of a split tensor, in place; any other tensor as it is."""
    return a.to_local() if isinstance(a, DTensor) else a


def whole(a: Tensor) -> Tensor:
    """All of a split tensor; every process must ask."""
    return a.full_tensor() if isinstance(a, DTensor) else a


def split_like(a: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, split as `model` is."""
    if not isinstance(model, DTensor) or a.shape != model.shape:
        return a
    a = a.to(model.device)
    return distribute_tensor(a, model.device_mesh, model.placements, src_data_rank=None)


def local_slice(a: Tensor, groups: tuple[int, ...], width: float) -> Tensor:
    """This process's part of `leading(a, groups, width)`."""
    if not isinstance(a, DTensor):
        return leading(a, groups, width)
    part, rows = a.to_local(), a.shape[0]
    if groups and groups[0] and width != 1:
        # FSDP2 splits rows like torch.chunk.
        first = -(-rows // processes()) * rank()
        size = rows // groups[0]
        row = torch.arange(first, first + len(part), device=part.device)
        part = part[row % size < round(size * width)]
    return leading(part, (0, *groups[1:]), width)


def global_norm(tensors: list[Tensor], split: bool) -> Tensor:
    """Euclidean norm over all entries; `split`: the tensors are one process's parts."""
    total = torch.stack(torch._foreach_norm(tensors)).square().sum()
    return _sum(total, split).sqrt()


def dot(a: list[Tensor], b: list[Tensor], split: bool) -> Tensor:
    total = torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()
    return _sum(total, split)


def _sum(total: Tensor, split: bool) -> Tensor:
    if split:
        dist.all_reduce(total)
    return total
