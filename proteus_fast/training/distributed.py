"""torchrun: join the process group that its environment describes, and what processes do together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


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


def is_distributed() -> bool:
    """Whether several processes train one model."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return not is_distributed() or torch.distributed.get_rank() == 0


def from_first(value: T) -> T:
    """The first process's value: what decides how long to train must be one for all."""
    if not is_distributed():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def own_share(part: Tensor) -> Tensor:
    """This process's share of the rows of a step."""
    if not is_distributed():
        return part
    return part[torch.distributed.get_rank() :: torch.distributed.get_world_size()]


def add_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add the gradients of all processes up; each gets the sum."""
    if not is_distributed():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.ravel() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
