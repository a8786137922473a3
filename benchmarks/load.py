"""Load on a server by an own native client (benchmarks/native/load.cpp, built on first use; needs libnghttp2-dev).

    python -m benchmarks.load --address unix:PATH --rate R|--in-flight N --seconds S --input embedding|text --json

Open loop (--rate): calls come at random and independently of each other (exponential gaps), whatever the server does.
A latency counts from the moment at which its call was to be sent, also where the client or its connections were not
ready for it; calls that never found room count as errors `unsent`. Closed loop (--in-flight): a reply brings the next
call. Every reply is checked: status 0, one whole message that parses, each choice a candidate.

rate: answered calls a second, refusals too. p50_us, p99_us, p999_us: of calls that succeeded; error_*: of the others.
send_lag_*: how late the client sent, which is in the latencies. server_cpu_us_per_call: user and system time of the
server's process by answered calls, in ticks of 10 ms: seconds long runs say something.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from proteus_fast.demo_queries import queries
from proteus_server import address as addresses
from proteus_server import proteus_pb2 as pb
from proteus_server import proteus_pb2_grpc

ROOT = Path(__file__).resolve().parents[1]
TAU = 0.85
MESSAGES = 256
REALTIME = ("chrt", "-f", "10")


class NotMeasured(Exception):
    """There is no client, or it has failed."""


@functools.cache
def build(folder: Path | None = None) -> Path:
    """Build the client, by default beside the virtual environment's files; quick where nothing has changed."""
    folder = folder or Path(sys.prefix) / "native-load"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    cmake = shutil.which("cmake", path=path) or "cmake"
    options = ["-G", "Ninja", "-DPROTEUS_PYTHON=OFF", "-DPROTEUS_BENCHMARKS=ON"]
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(folder), *options],
        [cmake, "--build", str(folder), "--target", "load"],
    ):
        try:
            done = subprocess.run(
                command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
            )
        except FileNotFoundError as error:
            raise NotMeasured("cmake: not found; `make .venv/.dev` installs it") from error
        if done.returncode:
            raise NotMeasured(
                f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
                "(the client needs libnghttp2-dev)"
            )
    return folder / "load"


def framed(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4, "big") + message


def texts(parts: int = 1) -> list[str]:
    """Distinct queries of 200 to 330 characters, about 64 tokens, times `parts`, made from the demonstration's."""
    long = [query for query in queries() if 200 <= len(query) <= 310]
    return [
        " ".join(f"{long[(i + part) % len(long)]} (question {i})" for part in range(parts)) for i in range(MESSAGES)
    ]


def embeddings(dim: int, rows: int = MESSAGES) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(1).standard_normal((rows, dim), np.float32).astype("<f4")


def requests(kind: str, dim: int, rows: int = 1, tau: float = TAU, parts: int = 1) -> list[bytes]:
    """Distinct requests, serialised: of Route, or of RouteBatch where rows > 1. parts: see `texts`."""
    if rows == 1 and kind == "text":
        return [pb.RouteRequest(text=text, tau=tau).SerializeToString() for text in texts(parts)]
    if rows == 1:
        return [pb.RouteRequest(embedding=x.tobytes(), tau=tau).SerializeToString() for x in embeddings(dim)]
    if kind == "text":
        some = texts()
        batches = [[some[(i * 37 + row) % MESSAGES] for row in range(rows)] for i in range(8)]
        return [pb.RouteBatchRequest(texts=batch, tau=[tau]).SerializeToString() for batch in batches]
    x = embeddings(dim, 8 * rows).reshape(8, rows, dim)
    return [pb.RouteBatchRequest(embeddings=one.tobytes(), rows=rows, tau=[tau]).SerializeToString() for one in x]


def info_of(address: str) -> pb.GetInfoReply:
    with grpc.insecure_channel(address) as channel:
        reply: pb.GetInfoReply = proteus_pb2_grpc.RouterServiceStub(channel).GetInfo(pb.GetInfoRequest(), timeout=10.0)
    return reply


def server_pid(address: str) -> int:
    """Process that listens there: a Unix socket says it, of a port it is looked up in /proc. 0 where unknown."""
    place = addresses.parse(address)
    if place.path is not None:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(place.path)
            return int(struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])
    inodes = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                # 0A: it listens
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == place.port:
                    inodes.add(f"socket:[{fields[9]}]")
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if str(link.readlink()) in inodes:
                return int(link.parts[2])
    return 0


def generate(
    address: str,
    messages: Sequence[bytes],
    *,
    rate: float | None = None,
    in_flight: int | None = None,
    seconds: float,
    candidates: int,
    prefix: Sequence[str] = (),
    **options: Any,
) -> dict[str, Any]:
    """Run the client and give what it measured.

    Args:
        address: of the server. messages: serialised requests, sent in turn. rate, in_flight: one of them.
        candidates: of the server's pool. prefix: of the command. options: of the program, `warm_up=0.5` for one.

    Raises:
        NotMeasured: the client could not be built, or has failed.
    """
    place = addresses.parse(address)
    target = ["--unix", place.path] if place.path is not None else ["--host", place.host, "--port", str(place.port)]
    options.setdefault("pid", server_pid(address))
    loop = ["--rate", str(rate)] if rate is not None else ["--in-flight", str(in_flight)]
    more = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    with tempfile.NamedTemporaryFile(prefix="proteus-load-") as file:
        file.write(b"".join(map(framed, messages)))
        file.flush()
        command = [*prefix, str(build()), *map(str, target), "--messages", file.name, "--candidates", str(candidates)]
        done = subprocess.run(
            [*command, "--seconds", str(seconds), *loop, *more], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise NotMeasured(f"exit status {done.returncode}: {done.stderr.strip()}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure(address: str, kind: str, *, rows: int = 1, parts: int = 1, **options: Any) -> dict[str, Any]:
    """`generate` with requests that suit the server."""
    info = info_of(address)
    if rows > 1:
        options |= {"method": "RouteBatch", "rows": rows}
    return generate(
        address, requests(kind, info.input_dim, rows, parts=parts), candidates=len(info.candidates), **options
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True, metavar="HOST:PORT | unix:PATH")
    loop = parser.add_mutually_exclusive_group(required=True)
    loop.add_argument("--rate", type=float, metavar="R", help="open loop: calls a second")
    loop.add_argument("--in-flight", type=int, metavar="N", help="closed loop: calls at once")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S")
    parser.add_argument("--warm-up", type=float, default=0.5, metavar="S", help="not counted, before (%(default)s)")
    parser.add_argument("--input", choices=("embedding", "text"), default="embedding")
    parser.add_argument("--rows", type=int, default=1, metavar="N", help="more than 1: RouteBatch of so many")
    parser.add_argument("--connections", type=int, default=2, metavar="N")
    parser.add_argument("--timeout-ms", type=float, nargs=2, metavar=("FROM", "TO"), help="deadline of each call")
    parser.add_argument("--pid", type=int, help="server whose CPU time is read (default: who listens there)")
    parser.add_argument("--realtime", action="store_true", help="run the client by SCHED_FIFO (root)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    options: dict[str, Any] = {"connections": arguments.connections, "warm_up": arguments.warm_up}
    if arguments.pid:
        options["pid"] = arguments.pid
    if arguments.timeout_ms:
        options |= dict(
            zip(("timeout_from_us", "timeout_to_us"), (int(ms * 1000) for ms in arguments.timeout_ms), strict=True)
        )
    try:
        result = measure(
            arguments.address,
            arguments.input,
            rows=arguments.rows,
            rate=arguments.rate,
            in_flight=arguments.in_flight,
            seconds=arguments.seconds,
            prefix=REALTIME if arguments.realtime else (),
            **options,
        )
    except (NotMeasured, ValueError, OSError) as error:
        print(f"load: {error}", file=sys.stderr)
        return 2
    except grpc.RpcError as error:
        print(f"load: {arguments.address}: {error.code().name}", file=sys.stderr)
        return 2
    print(json.dumps(result) if arguments.json else "\n".join(f"{name:24}{value}" for name, value in result.items()))
    return 1 if result["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
