"""torchrun: join the process group that its environment describes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the other processes under torchrun, leave them at the end; without torchrun nothing happens.

    Args:
        device: ``cuda`` talks over NCCL, each process on the GPU of its local rank; ``cpu`` over gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
