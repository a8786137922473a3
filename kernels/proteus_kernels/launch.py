"""How every kernel is launched, and the checks of arguments that launchers share."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

# set before Triton is imported, it runs kernels on the CPU: that is how they are tested without a GPU
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# of rows, hidden states, targets and prices: whatever the caller computes with
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_lock = threading.Lock()


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> Any:
    """Start a kernel on the current stream of ``device``; nothing is waited for."""
    if INTERPRETED:
        options = {name: value for name, value in options.items() if name not in ("num_warps", "num_stages")}
        return kernel[grid](*arguments, **options)
    # contraction is Triton 3.6's default and 3.9's with a warning
    options.setdefault("enable_fp_fusion", True)
    place = nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)
    # a kernel's first launch, which loads it, is not safe from two threads
    with place, _lock:
        return kernel[grid](*arguments, **options)


def check_cuda(
    name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], dimensions: int, like: Tensor | None = None
) -> None:
    """Raise unless ``tensor`` is a CUDA tensor (of ``like``'s device) with one of ``dtypes`` and ``dimensions``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch tensor, got {type(tensor).__name__}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {tensor.device}")
    if not tensor.is_cuda and not INTERPRETED:
        raise ValueError(f"{name}: expected a CUDA tensor, got one on {tensor.device}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected {expected}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.dim() != dimensions:
        raise ValueError(f"{name}: expected {dimensions} dimensions, got shape {tuple(tensor.shape)}")
