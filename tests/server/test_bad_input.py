"""Every way of asking wrongly: the exact status, the field that it names, and a server that works on."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest

from proteus_fast import Router
from proteus_server import proteus_pb2 as pb
from tests.server import http2

BAD = grpc.StatusCode.INVALID_ARGUMENT
NAN, INF = float("nan"), float("inf")


class World(NamedTuple):
    """What a request needs to know of the router."""

    dim: int
    names: tuple[str, ...]
    tau_max: float | None

    def floats(self, rows: int = 1, value: float = 0.25) -> bytes:
        return np.full((rows, self.dim), value, "<f4").tobytes()

    def with_value(self, value: float, rows: int = 1) -> bytes:
        x = np.full((rows, self.dim), 0.25, "<f4")
        x[-1, -1] = value
        return x.tobytes()


Make = Callable[[World], "pb.RouteRequest | pb.RouteBatchRequest | bytes"]
Case = tuple[str, str, Make, grpc.StatusCode, list[str]]


def one(**fields: Any) -> pb.RouteRequest:
    return pb.RouteRequest(**fields)


def many(**fields: Any) -> pb.RouteBatchRequest:
    return pb.RouteBatchRequest(**fields)


def taus(*values: float) -> list[tuple[str, float]]:
    return [(f"{value}", value) for value in values]


OUTSIDE = taus(NAN, INF, -INF, -1e-300, -1.0, 1.0000001, 1.0 + 2.0**-52, 2.0, 1e308)

ROUTE: list[Case] = [
    ("nothing at all", "Route", lambda _: one(), BAD, ["input", "tau"]),
    ("no input", "Route", lambda _: one(tau=0.5), BAD, ["input"]),
    ("no tau", "Route", lambda _: one(text="q"), BAD, ["tau"]),
    ("no tau, embedding", "Route", lambda w: one(embedding=w.floats()), BAD, ["tau"]),
    *[(f"tau {name}", "Route", lambda _, tau=tau: one(text="q", tau=tau), BAD, ["tau"]) for name, tau in OUTSIDE],
    ("tau nan, embedding", "Route", lambda w: one(embedding=w.floats(), tau=NAN), BAD, ["tau"]),
    ("empty embedding", "Route", lambda _: one(embedding=b"", tau=0.5), BAD, ["embedding"]),
    ("one byte", "Route", lambda _: one(embedding=b"\0", tau=0.5), BAD, ["embedding"]),
    ("a byte short", "Route", lambda w: one(embedding=w.floats()[:-1], tau=0.5), BAD, ["embedding"]),
    ("a byte long", "Route", lambda w: one(embedding=w.floats() + b"\0", tau=0.5), BAD, ["embedding"]),
    ("a float short", "Route", lambda w: one(embedding=w.floats()[:-4], tau=0.5), BAD, ["embedding"]),
    ("a float long", "Route", lambda w: one(embedding=w.floats() + bytes(4), tau=0.5), BAD, ["embedding"]),
    ("float64 values", "Route", lambda w: one(embedding=bytes(8 * w.dim), tau=0.5), BAD, ["embedding"]),
    ("two rows", "Route", lambda w: one(embedding=w.floats(2), tau=0.5), BAD, ["embedding"]),
    ("NaN in the embedding", "Route", lambda w: one(embedding=w.with_value(NAN), tau=0.5), BAD, ["embedding"]),
    ("inf in the embedding", "Route", lambda w: one(embedding=w.with_value(INF), tau=0.5), BAD, ["embedding"]),
    ("-inf in the embedding", "Route", lambda w: one(embedding=w.with_value(-INF), tau=0.5), BAD, ["embedding"]),
    ("unknown candidate", "Route", lambda _: one(text="q", tau=0.5, available=["no-such"]), BAD, ["available[0]"]),
    ("nameless candidate", "Route", lambda _: one(text="q", tau=0.5, available=[""]), BAD, ["available[0]"]),
    (
        "unknown among known",
        "Route",
        lambda w: one(text="q", tau=0.5, available=[w.names[0], "no-such", w.names[1], "nor-this"]),
        BAD,
        ["available[1]", "available[3]"],
    ),
    (
        "a name with a space",
        "Route",
        lambda w: one(text="q", tau=0.5, available=[w.names[0] + " "]),
        BAD,
        ["available[0]"],
    ),
    (
        "4,096 unknown names",
        "Route",
        lambda _: one(text="q", tau=0.5, available=["x"] * 4096),
        BAD,
        ["available[0]"],
    ),
    ("100,000 names", "Route", lambda _: one(text="q", tau=0.5, available=["x"] * 100_000), BAD, ["available"]),
    ("unknown mode", "Route", lambda _: one(text="q", tau=0.5, mode=3), BAD, ["mode"]),
    ("negative mode", "Route", lambda _: one(text="q", tau=0.5, mode=-1), BAD, ["mode"]),
    ("unknown guarantee", "Route", lambda _: one(text="q", tau=0.5, guarantee=3), BAD, ["guarantee"]),
    (
        "everything wrong",
        "Route",
        lambda _: one(embedding=b"123", tau=7.0, available=["no-such"], mode=9, guarantee=9),
        BAD,
        ["embedding", "tau", "available[0]", "mode", "guarantee"],
    ),
    (
        "infeasible under strict",
        "Route",
        lambda _: one(text="q", tau=1.0, strict=True),
        grpc.StatusCode.FAILED_PRECONDITION,
        [],
    ),
]

BATCH: list[Case] = [
    ("nothing at all", "RouteBatch", lambda _: many(), BAD, ["texts", "tau"]),
    ("no input", "RouteBatch", lambda _: many(tau=[0.5]), BAD, ["texts"]),
    ("rows without input", "RouteBatch", lambda _: many(rows=4, tau=[0.5]), BAD, ["texts"]),
    (
        "both inputs",
        "RouteBatch",
        lambda w: many(texts=["q"], embeddings=w.floats(), rows=1, tau=[0.5]),
        BAD,
        ["texts"],
    ),
    ("no tau", "RouteBatch", lambda _: many(texts=["q", "r"]), BAD, ["tau"]),
    ("two taus for three", "RouteBatch", lambda _: many(texts=["q"] * 3, tau=[0.5] * 2), BAD, ["tau"]),
    ("four taus for three", "RouteBatch", lambda _: many(texts=["q"] * 3, tau=[0.5] * 4), BAD, ["tau"]),
    ("two taus for one", "RouteBatch", lambda _: many(texts=["q"], tau=[0.5] * 2), BAD, ["tau"]),
    ("rows below texts", "RouteBatch", lambda _: many(texts=["q"] * 3, rows=2, tau=[0.5]), BAD, ["rows"]),
    ("rows above texts", "RouteBatch", lambda _: many(texts=["q"] * 3, rows=4, tau=[0.5]), BAD, ["rows"]),
    ("embeddings without rows", "RouteBatch", lambda w: many(embeddings=w.floats(2), tau=[0.5]), BAD, ["rows"]),
    ("rows too few", "RouteBatch", lambda w: many(embeddings=w.floats(3), rows=2, tau=[0.5]), BAD, ["embeddings"]),
    ("rows too many", "RouteBatch", lambda w: many(embeddings=w.floats(3), rows=4, tau=[0.5]), BAD, ["embeddings"]),
    ("a byte short", "RouteBatch", lambda w: many(embeddings=w.floats(3)[:-1], rows=3, tau=[0.5]), BAD, ["embeddings"]),
    (
        "a byte long",
        "RouteBatch",
        lambda w: many(embeddings=w.floats(3) + b"\0", rows=3, tau=[0.5]),
        BAD,
        ["embeddings"],
    ),
    (
        "float64 values",
        "RouteBatch",
        lambda w: many(embeddings=bytes(24 * w.dim), rows=3, tau=[0.5]),
        BAD,
        ["embeddings"],
    ),
    (
        "2^32 - 1 rows",
        "RouteBatch",
        lambda w: many(embeddings=w.floats(), rows=2**32 - 1, tau=[0.5]),
        BAD,
        ["embeddings", "rows"],
    ),
    ("65,537 texts", "RouteBatch", lambda _: many(texts=["q"] * 65_537, tau=[0.5]), BAD, ["rows"]),
    ("10^6 empty texts", "RouteBatch", lambda _: many(texts=[""] * 1_000_000, tau=[0.5]), BAD, ["rows"]),
    ("10^6 taus", "RouteBatch", lambda _: many(texts=["q"] * 3, tau=[0.5] * 1_000_000), BAD, ["tau"]),
    (
        "unknown candidate",
        "RouteBatch",
        lambda _: many(texts=["q"], tau=[0.5], available=["no-such"]),
        BAD,
        ["available[0]"],
    ),
    ("unknown mode", "RouteBatch", lambda _: many(texts=["q"], tau=[0.5], mode=77), BAD, ["mode"]),
    ("unknown guarantee", "RouteBatch", lambda _: many(texts=["q"], tau=[0.5], guarantee=-5), BAD, ["guarantee"]),
    (
        "a bad tau under strict",
        "RouteBatch",
        lambda _: many(texts=["q"] * 3, tau=[0.1, 0.1, NAN], strict=True),
        BAD,
        ["tau[2]"],
    ),
    (
        "a NaN row under strict",
        "RouteBatch",
        lambda w: many(embeddings=w.with_value(NAN, 3), rows=3, tau=[0.1], strict=True),
        BAD,
        ["embeddings[2]"],
    ),
    (
        "infeasible under strict",
        "RouteBatch",
        lambda _: many(texts=["q"] * 3, tau=[0.1, 1.0, 0.1], strict=True),
        grpc.StatusCode.FAILED_PRECONDITION,
        [],
    ),
]


def field(number: int, wire_type: int) -> bytes:
    return bytes([number << 3 | wire_type])


BYTES: list[Case] = [
    (name, method, lambda _, data=data: data, BAD, ["request"])
    for method in ("Route", "RouteBatch", "GetInfo")
    for name, data in [
        ("a lone tag", field(1, 2)),
        ("a length past the end", field(1, 2) + b"\x7fabc"),
        ("a length of 2^63", field(1, 2) + b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f"),
        ("an endless number", field(5, 0) + b"\xff" * 11),
        ("a group that never ends", field(9, 3)),
        ("100 bytes of 0xff", b"\xff" * 100),
        ("deep nesting", field(9, 3) * 20_000),
    ]
] + [
    ("invalid UTF-8 in text", "Route", lambda _: field(1, 2) + b"\x02\xc3\x28", BAD, ["request"]),
    ("a lone surrogate in text", "Route", lambda _: field(1, 2) + b"\x03\xed\xa0\x80", BAD, ["request"]),
    ("invalid UTF-8 in texts", "RouteBatch", lambda _: field(1, 2) + b"\x01\xff", BAD, ["request"]),
    ("invalid UTF-8 in available", "Route", lambda _: field(4, 2) + b"\x01\xff", BAD, ["request"]),
    (
        "a truncated tau",
        "Route",
        lambda _: one(text="q").SerializeToString() + field(3, 1) + b"\0\0\0",
        BAD,
        ["request"],
    ),
    (
        "a truncated message",
        "Route",
        lambda w: one(embedding=w.floats(), tau=0.5).SerializeToString()[:-5],
        BAD,
        ["request"],
    ),
]

OTHER: list[Case] = [
    ("unimplemented", "Explain", lambda _: b"", grpc.StatusCode.UNIMPLEMENTED, []),
    ("unimplemented", "ReportOutcome", lambda _: b"", grpc.StatusCode.UNIMPLEMENTED, []),
    ("no such method", "Rout", lambda _: b"", grpc.StatusCode.UNIMPLEMENTED, []),
    ("another case", "route", lambda _: b"", grpc.StatusCode.UNIMPLEMENTED, []),
    ("9 MiB", "Route", lambda _: one(text="x" * (9 << 20), tau=0.5), grpc.StatusCode.RESOURCE_EXHAUSTED, []),
    (
        "9 MiB",
        "RouteBatch",
        lambda _: many(texts=["x" * 1024] * 9216, tau=[0.5]),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        [],
    ),
]

CASES = ROUTE + BATCH + BYTES + OTHER


@pytest.fixture(scope="module")
def world(router: Router) -> World:
    return World(router.input_dim, tuple(router.pool.names), router.tau_max)


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 60
    assert len({(case[0], case[1]) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[1]}: {case[0]}")
def test_refused(case: Case, wire: Any, world: World) -> None:
    name, method, make, code, fields = case
    answer = wire.call(method, make(world))
    assert answer.code is code, answer.text
    assert answer.fields[: len(fields)] == fields
    if name != "4,096 unknown names":
        assert len(answer.fields) == len(fields)
    if code is BAD:
        assert "expected" in answer.text
        assert "got" in answer.text
    assert wire.works()


def test_an_error_stays_small(wire: Any) -> None:
    # trailing metadata has a limit: past it the client sees another error altogether
    answer = wire.call("Route", one(text="q", tau=0.5, available=["x" * 20] * 100_000))
    assert answer.code is BAD
    assert len(answer.status.SerializeToString()) < 4096


def test_no_router_reaches_a_policy_that_it_has_not(wire: Any, router: Router) -> None:
    answer = wire.call("Route", one(text="q", tau=0.5, mode=pb.MODE_POLICY))
    if "policy" in router.certificate.paths:
        assert answer.code is grpc.StatusCode.OK
    else:
        assert (answer.code, answer.fields) == (BAD, ["mode"])


@pytest.mark.parametrize("tau", [-0.0, 0.0, 5e-324, 1.0])
def test_the_edges_of_tau_are_taken(wire: Any, tau: float) -> None:
    assert wire.call("Route", one(text="q", tau=tau)).code is grpc.StatusCode.OK


def test_bad_values_in_a_batch_stay_in_their_rows(wire: Any, world: World) -> None:
    x = np.full((6, world.dim), 0.25, "<f4")
    x[1, 0] = NAN
    x[2, -1] = INF
    answer = wire.call("RouteBatch", many(embeddings=x.tobytes(), rows=6, tau=[0.1, 0.1, 0.1, NAN, 1.5, 0.1]))
    reply = pb.RouteBatchReply.FromString(answer.reply)
    assert list(reply.choice)[1:5] == [-1] * 4
    assert list(reply.status)[1:5] == [pb.INVALID] * 4
    assert np.isnan(reply.mu[1:5]).all()
    assert np.isnan(reply.score[1:5]).all()
    assert np.isnan(reply.certified_floor[1:5]).all()
    alone = pb.RouteReply.FromString(wire.call("Route", one(embedding=world.floats(), tau=0.1)).reply)
    for row in (0, 5):
        assert (reply.choice[row], reply.status[row]) == (alone.choice, alone.status)
    assert wire.works()


def test_a_compressed_bomb_is_refused(wire: Any, plane: str) -> None:
    # 100 MiB of one letter are 100 KiB on the wire
    bomb = one(text="x" * (100 << 20), tau=0.5)
    answer = wire.call("Route", bomb, compression=grpc.Compression.Gzip)
    # the native plane takes no compressed message at all
    assert answer.code is grpc.StatusCode["UNIMPLEMENTED" if plane == "native" else "RESOURCE_EXHAUSTED"]
    assert wire.works()


def test_oversized_metadata_is_refused(wire: Any) -> None:
    answer = wire.call("Route", one(text="q", tau=0.5), metadata=[("padding", "x" * 100_000)])
    assert answer.code is not grpc.StatusCode.OK
    assert wire.works()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        http2.PREFACE[:10],
        http2.PREFACE,
        http2.PREFACE + b"\xff" * 4096,
        # a settings frame whose length is no multiple of 6, a frame that stops in its header, data on stream 0
        http2.PREFACE + b"\0\0\5\4\0\0\0\0\0" + b"\0" * 5,
        http2.PREFACE + b"\0\0\0\4\0\0\0\0\0" + b"\0\0",
        http2.PREFACE + b"\0\0\0\4\0\0\0\0\0" + b"\0\0\4\0\1\0\0\0\0abcd",
        # headers that never end, and a frame larger than any limit
        http2.PREFACE + b"\0\0\0\4\0\0\0\0\0" + b"\0\0\1\1\0\0\0\0\1\x82",
        http2.PREFACE + b"\0\0\0\4\0\0\0\0\0" + b"\xff\xff\xff\0\0\0\0\0\1",
    ],
    ids=lambda data: repr(data[len(http2.PREFACE) :][:12] if data.startswith(http2.PREFACE) else data[:12]),
)
@pytest.mark.parametrize("reset", [False, True])
def test_broken_frames_harm_nobody_else(address: str, wire: Any, data: bytes, reset: bool) -> None:
    if address.startswith("unix:"):
        peer = socket.socket(socket.AF_UNIX)
        peer.connect(address.removeprefix("unix:"))
    else:
        host, _, port = address.rpartition(":")
        peer = socket.create_connection((host, int(port)))
        if reset:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with peer:
        peer.sendall(data)
        assert wire.works()
    assert wire.works()
