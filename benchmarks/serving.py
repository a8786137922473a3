"""A server in a process of its own, on a router of the budget's size with random weights."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from proteus_fast import Candidate, Certificate, Pool, Router
from proteus_fast.certificate import Path as PolicyPath
from proteus_fast.certificate import PathCertificate
from proteus_fast.checkpoint import Checkpoint, Config
from proteus_server import app, native
from proteus_server import proteus_pb2 as pb

DIM, CANDIDATES, HIDDEN, KNOTS, TABLE_ROWS = 256, 11, 256, 16, 1 << 16


def build_router(seed: int = 0) -> Router:
    """D = 256, K = 11, a policy of 134 k parameters, hashed n-grams in 2^16 rows; weights and prices by the seed."""
    random = np.random.default_rng(seed)
    d, k, h = DIM, CANDIDATES, HIDDEN

    def normal(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return random.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[0]))

    tensors: dict[str, Any] = {
        "predictor.weight": normal(d, k),
        "predictor.bias": np.linspace(-0.5, 1.5, k, dtype=np.float32),
        "policy.w1": normal(d + 2, h),
        "policy.w2": normal(h, h),
        "policy.w3": normal(h, 2),
        "policy.b3": normal(2),
        "policy.prior": normal(k) / 8,
        "encoder.table": random.integers(-127, 128, (TABLE_ROWS, d), np.int8),
    }
    tensors |= {f"policy.{name}": normal(h) for name in ("b1", "b2", "gate_weight", "gate_bias")}
    tensors |= {
        f"policy.knots_{name}": np.linspace(0.0, 1.0, KNOTS, dtype=np.float32) for name in ("tau", "dual", "mu")
    }
    tensors |= {f"encoder.{name}": np.full(TABLE_ROWS, 0.01, np.float32) for name in ("row_scale", "idf")}
    price = np.geomspace(1e-4, 5e-3, k) * random.uniform(0.9, 1.1, k)
    config = Config(
        pool=Pool([Candidate(f"candidate-{i}", float(usd), 0.6 + 0.02 * i) for i, usd in enumerate(price)]),
        encoder="hash", input_dim=d, projection="none", link="sigmoid", head="free", mode="policy", kappa=2.0,
        gamma=4.0, cost_unit_usd=5e-3, block_weight=(1.0, 0.5, 0.5, 0.2), label_definition="random",
        data_set="random", data_sha256="0" * 64, rows=1000,
    )  # fmt: skip
    path = PolicyPath(np.linspace(1.0, 0.0, 64, dtype=np.float32), np.linspace(5e-3, 1e-4, 64))
    successes = np.linspace(950, 600, len(path.code)).astype(np.int64)
    certificate = Certificate.build(
        {"dual": PathCertificate(path, successes), "policy": PathCertificate(path, successes - 50)},
        delta=0.1, n=1000, data_sha256="0" * 64, date="2026-01-01", rounding_seed=0, key=1,
    )  # fmt: skip
    return Router(Checkpoint(config, tensors, certificate))


@dataclass(frozen=True)
class Running:
    """A server at work. log: what it has written to stdout and stderr."""

    address: str
    pid: int
    log: Path

    def status(self) -> dict[str, int]:
        """Resident bytes, threads, descriptors."""
        fields = dict(
            line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text(encoding="ascii").splitlines()
        )
        return {
            "rss_bytes": int(fields["VmRSS"].split()[0]) * 1024,
            "threads": int(fields["Threads"]),
            "descriptors": sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir()),
        }


@contextlib.contextmanager
def serving(checkpoint: Path, *arguments: str, prefix: Sequence[str] = ()) -> Iterator[Running]:
    """Run `python -m proteus_server` on a Unix socket with these arguments."""
    with tempfile.TemporaryDirectory(prefix="proteus-") as folder:
        address, log = f"unix:{folder}/server", Path(folder, "log")
        command = [*prefix, sys.executable, "-m", "proteus_server", "--address", address]
        command += ["--checkpoint", str(checkpoint.resolve()), *arguments]
        with log.open("wb") as stderr:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, cwd=folder)
            try:
                assert process.stdout is not None
                if not process.stdout.readline():
                    raise RuntimeError(f"the server did not start:\n{log.read_text(encoding='utf-8')}")
                yield Running(address, process.pid, log)
            finally:
                process.terminate()
                process.wait()
                process.stdout.close()


def machine() -> str:
    """Processor, cores and load average, for a table's head."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "?")
    return f"{os.cpu_count()} cores of {model}, load average {os.getloadavg()[0]:.1f} before the run"


@contextlib.contextmanager
def _server_here(checkpoint: Path, *, realtime: bool) -> Iterator[tuple[str, app.Server]]:
    """A server in this process, its threads by SCHED_FIFO where asked for."""
    router = Router.load(checkpoint)
    with tempfile.TemporaryDirectory(prefix="proteus-") as folder:
        server = app.Server(router, f"unix:{folder}/server", app.Options(data_plane="native"))
        # threads take over what their maker has
        if realtime:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
        try:
            address = server.start()
        finally:
            if realtime:
                os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        try:
            yield address, server
        finally:
            server.drain()


@contextlib.contextmanager
def in_process(checkpoint: Path, *, realtime: bool) -> Iterator[tuple[str, Callable[[], dict[str, int]]]]:
    """A server whose counters can be read."""
    with _server_here(checkpoint, realtime=realtime) as (address, server):
        plane = server._plane
        assert isinstance(plane, native.NativePlane)

        def counters() -> dict[str, int]:
            assert plane._listener is not None
            return dict(plane._listener.stats())

        yield address, counters


@contextlib.contextmanager
def swappable(paths: Sequence[Path], prefix: Sequence[str]) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """A server on the first of these checkpoints, and a way to have it serve another one: AdminService.Reload."""
    with tempfile.TemporaryDirectory(prefix="proteus-") as folder:
        admin = f"unix:{folder}/admin"
        arguments = ["--admin-address", admin, "--checkpoint-root", str(paths[0].parent.resolve())]
        with serving(paths[0], *arguments, prefix=prefix) as server, grpc.insecure_channel(admin) as channel:
            reload_ = channel.unary_unary(
                "/proteus.v1.AdminService/Reload", request_serializer=pb.ReloadRequest.SerializeToString
            )

            def swap(path: Path) -> None:
                reload_(pb.ReloadRequest(path=str(path.resolve())), timeout=30.0)

            yield server.address, swap
