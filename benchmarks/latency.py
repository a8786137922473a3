"""Time from a text to a decision: in this process, and over gRPC from the Python client on a Unix socket, one at a
time.

python benchmarks/latency.py [--calls 20000] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from proteus_fast.demo_queries import queries
from proteus_fast.router import Router
from proteus_server.client import Client

WARM_UP = 500
TAU = 0.85


def measure(call: Callable[[str], object], texts: list[str]) -> dict[str, float]:
    """p50 and p99 in microseconds of one call after another, after a warm-up."""
    for text in islice(cycle(texts), WARM_UP):
        call(text)
    took = np.empty(len(texts))
    for i, text in enumerate(texts):
        start = time.perf_counter_ns()
        call(text)
        took[i] = (time.perf_counter_ns() - start) / 1000
    return {"p50_us": float(np.percentile(took, 50)), "p99_us": float(np.percentile(took, 99))}


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    router = Router.load()
    texts = list(islice(cycle(queries()), arguments.calls))
    rows = {
        "encode": measure(lambda text: router.encode([text]), texts),
        "encode + route_batch": measure(lambda text: router.route_batch(router.encode([text]), TAU), texts),
        "route (with fall-backs)": measure(lambda text: router.route(text, TAU), texts),
    }
    with tempfile.TemporaryDirectory() as folder:
        address = f"unix:{folder}/socket"
        command = [sys.executable, "-m", "proteus_server", "--address", address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            server.stdout.readline()
            with Client(address) as client:
                rows["gRPC Route, Unix socket"] = measure(lambda text: client.route(text=text, tau=TAU), texts)
            server.terminate()
    report = {
        "machine": f"{cpu_name()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "calls": arguments.calls,
        "mean_bytes": float(np.mean([len(text.encode()) for text in texts])),
        "rows": rows,
    }
    if arguments.json:
        print(json.dumps(report, indent=1))
        return 0
    print(f"{report['machine']}; {report['calls']} calls, {report['mean_bytes']:.0f} bytes a text on average\n")
    print("| text -> decision | p50, us | p99, us |\n| --- | ---: | ---: |")
    for name, row in rows.items():
        print(f"| {name} | {row['p50_us']:.1f} | {row['p99_us']:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
