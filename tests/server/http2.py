"""Frames of HTTP/2 as bytes, for what no gRPC client does."""

from __future__ import annotations

from typing import BinaryIO, NamedTuple

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, GOAWAY = 0, 1, 4, 7
END_STREAM, END_HEADERS = 1, 4


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def read_frame(file: BinaryIO) -> Frame:
    """The next one; EOFError at the end."""
    head = file.read(9)
    if len(head) < 9:
        raise EOFError
    return Frame(head[3], head[4], int.from_bytes(head[5:9], "big"), file.read(int.from_bytes(head[:3], "big")))


def call_headers(path: bytes) -> bytes:
    """A block of the fields of a gRPC call."""

    def literal(name: bytes, value: bytes) -> bytes:
        return bytes([0, len(name)]) + name + bytes([len(value)]) + value

    # :method POST and :scheme http, by their numbers
    return (
        b"\x83\x86" + literal(b":path", path) + literal(b":authority", b"localhost")
        + literal(b"content-type", b"application/grpc") + literal(b"te", b"trailers")
    )  # fmt: skip


def opening(path: bytes) -> bytes:
    """A connection's first bytes, and stream 1 calls a method."""
    return PREFACE + frame(SETTINGS) + frame(HEADERS, END_HEADERS, 1, call_headers(path))
