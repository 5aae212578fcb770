"""Writes `data/two_ranks`: tensors split over two processes, saved as FSDP saves them."""

import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Shard, distribute_tensor

FOLDER = Path(__file__).parent / "data" / "two_ranks"


def save(rank: int):
    dist.init_process_group("gloo", f"file://{FOLDER}.store", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    x = torch.arange(35.0).reshape(5, 7)
    content = {
        "dim0": distribute_tensor(x, mesh, [Shard(0)]),
        "dim1": distribute_tensor(x, mesh, [Shard(1)]),
        "bf16": distribute_tensor(x.bfloat16(), mesh, [Shard(1)]),
    }
    os.chdir(FOLDER.parent)  # the metadata keeps the path as it is given
    dcp.save(content, checkpoint_id=FOLDER.name)
    dist.destroy_process_group()


if __name__ == "__main__":
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.parent.mkdir(exist_ok=True)
    torch.multiprocessing.spawn(save, nprocs=2)
    Path(f"{FOLDER}.store").unlink(missing_ok=True)
