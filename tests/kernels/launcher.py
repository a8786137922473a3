"""Launches kernels through all of Triton's launcher but its last step, the driver's. Run by test_launcher.py.

Prints by kernel how often it was compiled and how many arguments each of two launches handed to the driver."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

from benchmarks import resources
from proteus_kernels import launch

NAMES = (
    "sample_beta", "masked_mean bf16 D=768", "varlen_mean bf16 D=768", "best_candidate K=64", "decide dual D=256",
    "decide policy D=768 d=256 from hidden bf16", "disentangled_attention bf16 d=64 short",
)  # fmt: skip


class Driver:
    """A GPU of compute capability 9.0 that runs nothing."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:  # noqa: ARG002
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def main() -> None:
    launched: list[tuple[Any, ...]] = []
    compiled: set[int] = set()

    def run_of(kernel: CompiledKernel) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            compiled.add(id(kernel))
            # behind grid, stream, function, metadata and hooks come the kernel's own
            launched.append(arguments[9:])

        return run

    # tensors are the CPU's: their device is the current one, and checks take them
    launch.INTERPRETED = False
    torch.cuda.current_device = lambda: None  # type: ignore[assignment,return-value]
    torch.Tensor.is_cuda = property(lambda _: True)  # type: ignore[assignment,method-assign]
    CompiledKernel.run = property(run_of)  # type: ignore[assignment,method-assign]
    CompiledKernel.function = None
    CompiledKernel._init_handles = lambda _: None  # type: ignore[method-assign]
    CompiledKernel.launch_metadata = lambda *_: None  # type: ignore[method-assign]
    driver.set_active(Driver())
    report = {}
    for name in NAMES:
        launched.clear()
        compiled.clear()
        for _ in range(2):
            resources.KERNELS[name]()
        report[name] = {"compiled": len(compiled), "arguments": [len(arguments) for arguments in launched]}
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
