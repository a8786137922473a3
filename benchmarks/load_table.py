"""The table of serving figures on a CPU, goals beside measured, both data planes in one run.

    python -m benchmarks.load_table [--checkpoint DIR] [--planes native grpcio] [--seconds S] [--realtime] [--write]

--realtime (root) runs server and load by SCHED_FIFO, so that what else runs on the machine is not measured.
--write puts the table into benchmarks/results/serving-cpu-amd-epyc.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import load, serving
from proteus_server.app import DATA_PLANES
from proteus_server.client import Client

RESULTS = load.ROOT / "benchmarks" / "results" / "serving-cpu-amd-epyc.md"
HEAD = (
    "| path | plane | p50 / p99 | decisions/s | server CPU a call | goal p50 / p99 | verdict |",
    "|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Row:
    """A load, and its goals on the native plane: p50 and p99 in microseconds, decisions a second."""

    path: str
    options: dict[str, Any]
    goal_us: tuple[float, float] | None = None
    least_per_s: float = 0.0
    # what the slower plane gets instead
    slower: dict[str, Any] | None = None


ROWS = (
    Row("embedding, 1 in flight", {"in_flight": 1, "connections": 1}, (60, 200)),
    Row("embedding, 64 in flight, one connection", {"in_flight": 64, "connections": 1}, (700, 1000), 50_000),
    Row("embedding, 64 in flight, four connections", {"in_flight": 64, "connections": 4}),
    Row("embedding, open loop 8,000/s", {"rate": 8000.0}, (150, 1000), slower={"rate": 1000.0}),
    Row("text, 1 in flight", {"kind": "text", "in_flight": 1, "connections": 1}, (100, 300)),
    Row("text, 64 in flight, one connection", {"kind": "text", "in_flight": 64, "connections": 1}),
    Row("RouteBatch of 256 embeddings, 2 in flight", {"rows": 256, "in_flight": 2}, None, 150_000),
)


def _cells(row: Row, plane: str, result: dict[str, Any], path: str) -> str:
    measured = f"{result['p50_us']:,.0f} / {result['p99_us']:,.0f} us"
    goal = verdict = ""
    if plane == "native" and (row.goal_us or row.least_per_s):
        parts = [f"{row.goal_us[0]:,.0f} / {row.goal_us[1]:,.0f} us"] if row.goal_us else []
        parts += [f">= {row.least_per_s:,.0f} /s"] if row.least_per_s else []
        goal = ", ".join(parts)
        met = result["decisions_per_s"] >= row.least_per_s
        if row.goal_us:
            met = met and result["p50_us"] <= row.goal_us[0] and result["p99_us"] <= row.goal_us[1]
        verdict = "pass" if met and not result["errors"] else "MISSED"
    if result["errors"]:
        path += f" ({result['errors']:,} errors: {result['by_status']})"
    cpu = f"{result['server_cpu_us_per_call']:,.1f} us" if "server_cpu_us_per_call" in result else ""
    return f"| {path} | {plane} | {measured} | {result['decisions_per_s']:,.0f} | {cpu} | {goal} | {verdict} |"


def _by_client(address: str, call: Callable[[Client], object], rows: int, seconds: float) -> dict[str, Any]:
    """One call after the other by the Python client."""
    spent_us: list[float] = []
    with Client(address) as client:
        for _ in range(100):
            call(client)
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            call(client)
            spent_us.append((time.perf_counter() - start) * 1e6)
    p50, p99 = np.percentile(spent_us, [50, 99])
    return {"p50_us": p50, "p99_us": p99, "errors": 0, "decisions_per_s": len(spent_us) * rows / seconds}


def _route_one(x: Any, client: Client) -> object:
    return client.route(embedding=x, tau=load.TAU)


def _route_all(x: Any, client: Client) -> object:
    return client.route_batch(embeddings=x, tau=load.TAU)


def measure(checkpoint: Path, planes: Sequence[str], seconds: float, prefix: Sequence[str]) -> list[str]:
    lines = []
    for plane in planes:
        with serving.serving(checkpoint, "--data-plane", plane, prefix=prefix) as server:
            for row in ROWS:
                slower = plane != "native" and row.slower
                options: dict[str, Any] = {"kind": "embedding", **row.options, **(slower or {})}
                path = row.path.replace("8,000", "1,000") if slower else row.path
                result = load.measure(server.address, seconds=seconds, warm_up=0.5, prefix=prefix, **options)
                lines.append(_cells(row, plane, result, path))
                print(lines[-1], flush=True)
            x = load.embeddings(load.info_of(server.address).input_dim, 64)
            for name, goal, rows, call in (
                ("embedding, Python client", (250, 500), 1, partial(_route_one, x[0])),
                ("RouteBatch of 64 embeddings, Python client", None, 64,
                 partial(_route_all, x)),
            ):  # fmt: skip
                result = _by_client(server.address, call, rows, seconds)
                lines.append(_cells(Row(name, {}, goal), plane, result, name))
                print(lines[-1], flush=True)
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="default: D = 256, K = 11, random weights, mode policy")
    parser.add_argument("--planes", nargs="+", default=list(DATA_PLANES), choices=DATA_PLANES)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--realtime", action="store_true")
    parser.add_argument("--write", action="store_true", help=f"into {RESULTS.relative_to(load.ROOT)}")
    arguments = parser.parse_args(argv)
    machine = serving.machine()
    if arguments.realtime:
        # the Python client runs in this process
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    print("\n".join(HEAD), flush=True)
    with tempfile.TemporaryDirectory(prefix="proteus-") as folder:
        checkpoint = arguments.checkpoint or Path(folder, "router")
        if not arguments.checkpoint:
            serving.build_router().save(checkpoint)
        try:
            lines = measure(
                checkpoint, arguments.planes, arguments.seconds, load.REALTIME if arguments.realtime else ()
            )
        except load.NotMeasured as error:
            print(f"load_table: {error}", file=sys.stderr)
            return 2
    if arguments.write:
        router = arguments.checkpoint or "random weights, D = 256, K = 11, mode policy, 134 k parameters"
        flag, how = (" --realtime", "both ran by SCHED_FIFO") if arguments.realtime else ("", "plain scheduling")
        text = [
            "# Serving on a CPU: goals beside measured",
            "",
            f"By `python -m benchmarks.load_table{flag} --write`; {machine}.",
            f"Router: {router}. Unix socket, {arguments.seconds:g} s a row, texts of about 300 characters.",
            f"Server and load share the cores; {how}.",
            "",
            *HEAD,
            *lines,
            "",
        ]
        RESULTS.write_text("\n".join(text), encoding="utf-8")
    return int(any(line.endswith("| MISSED |") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
