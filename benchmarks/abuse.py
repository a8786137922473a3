"""Clients that mean no good, by raw HTTP/2 on a Unix socket: `python -m benchmarks.abuse unix:PATH --seconds S`.

500 connections that say hello and no more, 200 that send one byte of a request in a second, 10,000 streams that are
opened and reset, spread over the time. Prints how many of each there were.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys
import time
from collections.abc import Sequence

from proteus_server import address as addresses

IDLE, SLOW, RESETS = 500, 200, 10_000
# below what the server allows one connection at once
RESETS_OF_ONE = 500
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEADERS, _RST_STREAM, _SETTINGS = 1, 3, 4
_END_HEADERS = 4
_CANCEL = (8).to_bytes(4, "big")


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _literal(name: bytes, value: bytes) -> bytes:
    return bytes([0, len(name)]) + name + bytes([len(value)]) + value


ROUTE = (
    b"\x83\x86"
    + _literal(b":path", b"/proteus.v1.RouterService/Route")
    + _literal(b":authority", b"localhost")
    + _literal(b"content-type", b"application/grpc")
    + _literal(b"te", b"trailers")
)
HELLO += frame(_SETTINGS, 0, 0, b"")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", metavar="unix:PATH")
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args(argv)
    path = addresses.parse(arguments.address).path
    if path is None:
        parser.error("address: expected unix:PATH")
    with contextlib.ExitStack() as stack:

        def connect() -> socket.socket:
            peer = stack.enter_context(socket.socket(socket.AF_UNIX))
            peer.connect(path)
            return peer

        for _ in range(IDLE):
            connect().sendall(HELLO)
        slow = [connect() for _ in range(SLOW)]
        request = HELLO + frame(_HEADERS, _END_HEADERS, 1, ROUTE)
        print("ready", flush=True)
        streams = b"".join(
            frame(_HEADERS, _END_HEADERS, stream, ROUTE) + frame(_RST_STREAM, 0, stream, _CANCEL)
            for stream in range(1, 2 * RESETS_OF_ONE, 2)
        )
        begin = time.monotonic()
        resets, sent = 0, 0
        while (spent := time.monotonic() - begin) < arguments.seconds:
            if sent <= spent:
                for peer in slow:
                    with contextlib.suppress(OSError):
                        peer.send(request[sent : sent + 1])
                sent += 1
            if resets < RESETS * min(1.0, spent / arguments.seconds * 1.25):
                with contextlib.closing(connect()) as peer:
                    peer.sendall(HELLO + streams)
                resets += RESETS_OF_ONE
            time.sleep(0.01)
    print(f"idle {IDLE}, slow {SLOW} of {sent} bytes each, resets {resets}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
