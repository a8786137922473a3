"""What the GPU's compiler makes of every kernel, read from the machine code without a GPU.

Each kernel is compiled ahead of time exactly as its launcher would launch it, for sm_80 and sm_90. Registers a thread,
bytes of stack and instructions that spill to it, shared memory of a block, 128-bit loads and warpgroup matrix products
(HGMMA) are compared with the limits of benchmarks/results/resources.json, one set for each release of Triton.

python benchmarks/resources.py [--json] [--record]

Exit status: 0 all within their limits, 1 past one, 2 wrong usage. ``--record`` writes what was measured as the limits
of this release.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

# compiled, not interpreted, whatever the caller's environment says
os.environ.pop("TRITON_INTERPRET", None)

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from proteus_kernels import beta, disentangled, launch, pooling, scoring, snapshot

LIMITS = Path(__file__).parent / "results" / "resources.json"
TARGETS = (80, 90)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# a block of a Hopper GPU has 227 KiB, of an A100 163 KiB
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
AT_MOST = ("registers", "stack_bytes", "spills", "shared_bytes")
AT_LEAST = ("loads_128", "hgmma")
CPU = torch.device("cpu")

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches that were asked for inside, and did not take place."""
    found: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:  # noqa: ARG001
        found.append((kernel, arguments, options))

    with patch.object(launch, "INTERPRETED", True):
        patches = [
            patch.object(module, "launch", record) for module in (beta, disentangled, pooling, scoring, snapshot)
        ]
        for one in patches:
            one.start()
        try:
            yield found
        finally:
            for one in patches:
                one.stop()


def build_snapshot(dim: int, width: int, hidden: int, candidates: int, precision: str) -> snapshot.Snapshot:
    """A router of that shape; its numbers do not matter to a compiler."""
    d = width or dim
    shapes: dict[str, tuple[int, ...]] = {"predictor.weight": (d, candidates), "predictor.bias": (candidates,)}
    if width:
        shapes |= {"projection.w1": (dim, d), "projection.w2": (d, d)}
        shapes |= {f"projection.{name}": (d,) for name in ("b1", "b2", "ln_weight", "ln_bias")}
    if hidden:
        shapes |= {"policy.w1": (d + 2, hidden), "policy.w2": (hidden, hidden), "policy.w3": (hidden, 2)}
        shapes |= {f"policy.{name}": (hidden,) for name in ("b1", "b2", "gate_weight", "gate_bias")}
        shapes |= {"policy.b3": (2,), "policy.prior": (candidates,)}
        shapes |= {f"policy.knots_{name}": (16,) for name in ("tau", "dual", "mu")}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    if hidden:
        tensors["policy.knots_tau"] = np.linspace(0, 1, 16, dtype=np.float32)
    codes = np.zeros(1001, np.int32)
    path = snapshot.PathTable(np.ones(64, np.float32), codes, 900, codes, 950)
    made = snapshot.Snapshot(
        tensors=tensors, link="sigmoid", head="residual" if hidden else None, kappa=1.0, gamma=4.0,
        price_usd=np.ones(candidates, np.float32), cost_unit_usd=1.0, key=1,
        default_mode="policy" if hidden else "dual", dual=path, policy=path if hidden else None, device=CPU,
        precision=precision,
    )  # fmt: skip
    made._multiprocessors = 132
    return made


def decide(
    dim: int, width: int, hidden: int, candidates: int, rows: int, *, dtype: torch.dtype = torch.float32,
    precision: str = "float32", everything: bool = False, tokens: int = 0,
) -> Callable[[], None]:  # fmt: skip
    """A decision; ``everything``: with every optional argument."""

    def call() -> None:
        router = build_snapshot(dim, width, hidden, candidates, precision)
        shape = (rows, tokens, dim) if tokens else (rows, dim)
        options: dict[str, Any] = {"mask": torch.ones(rows, tokens, dtype=torch.bool)} if tokens else {}
        tau: Any = 0.5
        if everything:
            tau = torch.zeros(rows, dtype=torch.float64)
            options["available"] = torch.ones(rows, candidates, dtype=torch.bool)
            options["price_usd"] = torch.ones(rows, candidates)
            options["ids"] = torch.zeros(rows, dtype=torch.int64)
            if hidden:
                options["state"] = torch.zeros(2, dtype=torch.int64)
        router.decide(torch.zeros(shape, dtype=dtype), tau, **options)

    return call


def _pool(dim: int, dtype: torch.dtype) -> Callable[[], object]:
    return lambda: pooling.masked_mean(torch.zeros(64, 64, dim, dtype=dtype), torch.ones(64, 64, dtype=torch.bool))


def _pack(dim: int, dtype: torch.dtype) -> Callable[[], object]:
    return lambda: pooling.varlen_mean(torch.zeros(64, dim, dtype=dtype), torch.zeros(5, dtype=torch.int32))


def _sample() -> object:
    ones = torch.ones(64)
    return beta.sample_beta(ones, ones, torch.zeros(2, dtype=torch.int64))


def _score() -> object:
    p = torch.zeros(64, 64)
    available, scales = torch.ones(64, 64, dtype=torch.bool), torch.ones(2, dtype=torch.float64)
    return scoring.best_candidate(p, p[0], p[0], p, scales, available)


def _attend(tokens: int, dtype: torch.dtype) -> Callable[[], object]:
    q, k, v = torch.zeros(tokens, 3, 12, 64, dtype=dtype).unbind(1)
    table, bounds = torch.zeros(1023, 12, 64, dtype=dtype), torch.zeros(5, dtype=torch.int32)
    return lambda: disentangled.disentangled_attention(q, k, v, table, table, bounds, tokens)


BF16 = torch.bfloat16
KERNELS: dict[str, Callable[[], object]] = {
    "masked_mean bf16 D=768": _pool(768, BF16),
    "masked_mean fp32 D=1024": _pool(1024, torch.float32),
    "varlen_mean bf16 D=768": _pack(768, BF16),
    "sample_beta": _sample,
    "best_candidate K=64": _score,
    "disentangled_attention bf16 d=64": _attend(128, BF16),
    "disentangled_attention bf16 d=64 short": _attend(16, BF16),
    "disentangled_attention fp32 d=64": _attend(128, torch.float32),
    "disentangled_attention fp32 d=64 short": _attend(16, torch.float32),
    "decide dual D=256": decide(256, 0, 0, 11, 64),
    "decide dual D=1024 d=256 K=64 all": decide(1024, 256, 0, 64, 64, everything=True),
    "decide policy D=256": decide(256, 0, 256, 11, 64),
    "decide policy D=256 wide": decide(256, 0, 256, 11, 4096),
    "decide policy D=768 d=256": decide(768, 256, 256, 11, 64),
    "decide policy D=768 d=256 from hidden bf16": decide(768, 256, 256, 11, 1, dtype=BF16, tokens=64),
    "decide policy D=1024 d=256 K=64 all": decide(1024, 256, 256, 64, 64, everything=True),
    "decide policy D=1024 d=256 K=64 all wide": decide(1024, 256, 256, 64, 4096, everything=True),
    "decide policy D=256 in bf16": decide(256, 0, 256, 11, 4096, dtype=BF16, precision="bfloat16"),
    "decide policy D=768 d=256 in bf16": decide(768, 256, 256, 11, 4096, dtype=BF16, precision="bfloat16"),
    "decide policy D=1024 d=256 K=64 all in bf16": decide(
        1024, 256, 256, 64, 4096, dtype=BF16, precision="bfloat16", everything=True
    ),
}


def to_source(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> ASTSource:
    """The specialisation that a launch with these arguments compiles: as Triton's launcher would see them."""
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    dtypes = {
        torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.int32: "*i32",
        torch.int64: "*i64", torch.uint8: "*u8", torch.bool: "*i1",
    }  # fmt: skip
    for index, parameter in enumerate(kernel.params):
        value, name = given[parameter.name], parameter.name
        free = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not free):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], aligned = dtypes[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and not free
        else:
            signature[name], aligned = "fp32", False
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def disassemble(cubin: bytes) -> tuple[str, str]:
    """The resource line and the instructions of a cubin, by the tools in Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: E731
        usage = run(str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name)
        return usage, run(str(TOOLS / "nvdisasm"), "-c", file.name)


def measure(name: str, target: int) -> dict[str, Any]:
    """Compile one kernel for one target and read what it takes."""
    with recorded() as launches:
        KERNELS[name]()
    kernel, arguments, options = launches[-1]
    compile_options = {key: options.pop(key) for key in ("num_warps", "num_stages") if key in options}
    source = to_source(kernel, arguments, options)
    made = triton.compile(
        source, target=GPUTarget("cuda", target, 32), options={**compile_options, "enable_fp_fusion": True}
    )
    usage, code = disassemble(made.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return {
        "kernel": name,
        "target": f"sm_{target}",
        "registers": int(found[1]),
        "stack_bytes": int(found[2]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "shared_bytes": made.metadata.shared,
        "loads_128": len(re.findall(r"\b(?:LDG|LDGSTS)\.E[.\w]*\.128\b", code)),
        "hgmma": len(re.findall(r"\bHGMMA\b", code)),
    }


def past_limits(row: dict[str, Any], limits: dict[str, dict[str, int]]) -> list[str]:
    """What of a row is past its limits, in words."""
    key = f"{row['kernel']} {row['target']}"
    if key not in limits:
        return [f"{key}: expected limits of this release, got none"]
    limit = limits[key]
    wrong = [
        f"{key}: {name}: expected at most {limit[name]}, got {row[name]}" for name in AT_MOST if row[name] > limit[name]
    ]
    wrong += [
        f"{key}: {name}: expected at least {limit[name]}, got {row[name]}"
        for name in AT_LEAST
        if row[name] < limit[name]
    ]
    shared = SHARED_BYTES[int(row["target"][3:])]
    if row["shared_bytes"] > shared:
        wrong.append(f"{key}: shared_bytes: expected at most the block's {shared}, got {row['shared_bytes']}")
    return wrong


def to_limits(row: dict[str, Any]) -> dict[str, int]:
    """A measured row as limits: a little room for registers, a tenth for what should be there, none for spills."""
    limit = {name: row[name] for name in AT_MOST}
    limit["registers"] = min(row["registers"] + 8, 255)
    return limit | {name: row[name] * 9 // 10 for name in AT_LEAST}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--limits", type=Path, default=LIMITS)
    parser.add_argument("-k", default="", help="only kernels whose name holds this")
    options = parser.parse_args(arguments)
    release = ".".join(triton.__version__.split(".")[:2])
    jobs = [(name, target) for name in KERNELS for target in TARGETS if options.k in name]
    if not jobs:
        parser.error(f"-k: expected a part of a kernel's name, got {options.k!r}")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(measure, *zip(*jobs, strict=True)))
    every = json.loads(options.limits.read_text()) if options.limits.exists() else {}
    if options.record:
        every[release] = every.get(release, {}) | {f"{row['kernel']} {row['target']}": to_limits(row) for row in rows}
        options.limits.write_text(json.dumps(every, indent=1) + "\n")
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        columns = ("kernel", "target", *AT_MOST, *AT_LEAST)
        print(
            f"Triton {triton.__version__}\n\n| {' | '.join(columns)} |\n|{' --- |' * 2}{' ---: |' * (len(columns) - 2)}"
        )
        for row in rows:
            print(f"| {' | '.join(str(row[column]) for column in columns)} |")
    wrong = [text for row in rows for text in past_limits(row, every.get(release, {}))]
    for text in wrong:
        print(text, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
