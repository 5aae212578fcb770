"""Fixtures of many tests: kernels that are not compiled; Python in one or two processes beside."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
# Compiling a step's kernels takes a minute on a CPU.
ENVIRONMENT = os.environ | {"MLX_DISABLE_COMPILE": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def uncompiled():
    """Compiling the kernels of a training step takes minutes on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def start():
    """Start Python with these arguments; what still runs after the test is killed."""
    processes = []

    def start(*args, cwd=None, **environment):
        process = subprocess.Popen(
            [sys.executable, "-u", *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env=ENVIRONMENT | environment,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def start_two(start, tmp_path):
    """Start Python as the two processes of one run, each in its folder, tmp_path/0 and /1."""
    sockets = [socket.socket() for _ in range(2)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    addresses = [[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]
    for s in sockets:
        s.close()
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps(addresses))

    def start_two(*args):
        processes = []
        for rank in ("0", "1"):
            folder = tmp_path / rank
            folder.mkdir(exist_ok=True)
            processes.append(start(*args, cwd=folder, MLX_RANK=rank, MLX_HOSTFILE=str(hosts)))
        return processes

    return start_two
