"""What the server answers is what the router answers in process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from proteus_fast import Router, Status
from proteus_server import app
from proteus_server import proteus_pb2 as pb
from proteus_server.client import Client

TEXTS = [
    "Which gas do plants take in?",
    "Prove that there are infinitely many primes.",
    "def f(xs):\n    return sorted(xs)[::-1]\n\nWhat does f do?",
    "Übersetze: the quick brown fox 🦊",
    "",
    " \t\n",
    "\0",
    "x" * 20_000,
]
TAUS = [0.0, 0.35, 0.5, 0.654321, 0.8, 0.99, 1.0]


def reply_of(answer: Any, kind: Any = pb.RouteReply) -> Any:
    assert answer.code is grpc.StatusCode.OK, answer.text
    return kind.FromString(answer.reply)


def assert_same(reply: pb.RouteReply, decision: Any) -> None:
    assert (reply.candidate, reply.choice, reply.status) == (decision.candidate, decision.choice, decision.status)
    assert (reply.mu, reply.score) == (decision.mu, decision.score)
    assert (reply.certified_floor if reply.HasField("certified_floor") else None) == decision.certified_floor
    assert (reply.tau_max if reply.HasField("tau_max") else None) == decision.tau_max
    assert tuple(reply.fallbacks) == decision.fallbacks


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:12]))
def test_a_text_gets_the_router_s_decision(wire: Any, router: Router, text: str, tau: float) -> None:
    assert_same(reply_of(wire.call("Route", pb.RouteRequest(text=text, tau=tau))), router.route(text, tau))


@pytest.mark.parametrize("guarantee", ["certified", "calibrated"])
@pytest.mark.parametrize("available", [None, slice(1), slice(3), slice(None), slice(None, None, -2)])
def test_options_get_the_router_s_decision(wire: Any, router: Router, guarantee: Any, available: Any) -> None:
    names = None if available is None else router.pool.names[available]
    for tau in TAUS:
        request = pb.RouteRequest(
            text=TEXTS[0], tau=tau, available=names, mode=pb.MODE_DUAL, guarantee=f"GUARANTEE_{guarantee.upper()}"
        )
        decision = router.route(TEXTS[0], tau, available=names, mode="dual", guarantee=guarantee)
        assert_same(reply_of(wire.call("Route", request)), decision)


def test_a_named_twice_candidate_counts_once(wire: Any, router: Router) -> None:
    name = router.pool.names[-1]
    reply = reply_of(wire.call("Route", pb.RouteRequest(text="q", tau=0.5, available=[name, name])))
    assert (reply.candidate, reply.status, list(reply.fallbacks)) == (name, pb.UNCERTIFIED, [])


@pytest.mark.parametrize("method", ["Route", "RouteBatch"])
def test_names_are_bounded(router: Router, wire_to: Any, socket_dir: Path, method: str) -> None:
    name = router.pool.names[0]

    def request(*names: str) -> Any:
        if method == "Route":
            return pb.RouteRequest(text="q", tau=0.5, available=names)
        return pb.RouteBatchRequest(texts=["q"], tau=[0.5], available=names)

    with wire_to(app.Server(router, f"unix:{socket_dir}/s", app.Options(data_plane="grpcio"))) as wire:
        assert wire.call(method, request(*[name] * 4096)).code is grpc.StatusCode.OK
        answer = wire.call(method, request(*[name, "no-such"] * 2048, name))
        assert (answer.code, answer.text) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "available: expected at most 4096 names, got 4097",
        )
        assert answer.fields == ["available"]


def test_an_embedding_is_decided_as_its_text(wire: Any, router: Router) -> None:
    for text in TEXTS:
        embedding = router.encode([text])[0].astype("<f4").tobytes()
        reply = reply_of(wire.call("Route", pb.RouteRequest(embedding=embedding, tau=0.5)))
        assert_same(reply, router.route(text, 0.5))


@pytest.mark.parametrize("rows", [1, 2, 7, 256, 1000])
@pytest.mark.parametrize("many_taus", [False, True])
def test_a_batch_of_embeddings_gets_the_router_s_decisions(
    wire: Any, router: Router, rows: int, many_taus: bool
) -> None:
    random = np.random.default_rng(rows)
    x = random.standard_normal((rows, router.input_dim), np.float32)
    tau = random.uniform(0.0, 1.0, rows) if many_taus else np.array([0.5])
    request = pb.RouteBatchRequest(embeddings=x.astype("<f4").tobytes(), rows=rows, tau=tau.tolist())
    reply = reply_of(wire.call("RouteBatch", request), pb.RouteBatchReply)
    batch = router.route_batch(x, np.broadcast_to(tau, (rows,)).copy())
    assert list(reply.candidates) == list(router.pool.names)
    np.testing.assert_array_equal(reply.choice, batch.choice)
    np.testing.assert_array_equal(np.array(reply.mu, np.float32), batch.mu)
    np.testing.assert_array_equal(np.array(reply.score, np.float32), batch.score)
    np.testing.assert_array_equal(reply.status, batch.status)
    np.testing.assert_array_equal(np.array(reply.certified_floor, np.float32), batch.certified_floor)


def test_a_batch_of_texts_is_its_texts_one_by_one(wire: Any, router: Router) -> None:
    request = pb.RouteBatchRequest(texts=TEXTS, tau=[*TAUS, 0.5])
    reply = reply_of(wire.call("RouteBatch", request), pb.RouteBatchReply)
    for row, (text, tau) in enumerate(zip(TEXTS, request.tau, strict=True)):
        decision = router.route(text, tau)
        assert (reply.choice[row], reply.status[row]) == (decision.choice, decision.status)
        assert reply.mu[row] == pytest.approx(decision.mu, abs=1e-6)
        assert reply.score[row] == pytest.approx(decision.score, abs=2e-5)
    assert reply.timings.encode_ns > 0


def test_the_largest_batch_is_taken(wire: Any) -> None:
    reply = reply_of(wire.call("RouteBatch", pb.RouteBatchRequest(texts=["q"] * 65_536, tau=[0.5])), pb.RouteBatchReply)
    assert len(reply.choice) == 65_536
    assert set(reply.status) == {reply.status[0]}


def test_a_prompt_of_five_mebibytes_is_routed(wire: Any, router: Router) -> None:
    text = "a long story " * (5 * 2**20 // 13)
    assert_same(reply_of(wire.call("Route", pb.RouteRequest(text=text, tau=0.5))), router.route(text, 0.5))


def test_a_certified_target_is_kept_under_strict(wire: Any, router: Router) -> None:
    assert router.tau_max is not None
    reply = reply_of(wire.call("Route", pb.RouteRequest(text="q", tau=router.tau_max, strict=True)))
    assert (reply.status, reply.certified_floor) == (Status.FEASIBLE, router.tau_max)
    request = pb.RouteBatchRequest(texts=["q", "r"], tau=[router.tau_max, 0.1], strict=True)
    assert set(reply_of(wire.call("RouteBatch", request), pb.RouteBatchReply).status) == {Status.FEASIBLE}


def test_timings_and_versions(wire: Any, router: Router) -> None:
    reply = reply_of(wire.call("Route", pb.RouteRequest(text=TEXTS[0], tau=0.5)))
    assert 0 < reply.timings.encode_ns < 10**9
    assert 0 < reply.timings.decide_ns < 10**9
    assert reply.timings.queue_ns < 10**9
    info = reply_of(wire.call("GetInfo"), pb.GetInfoReply)
    batch = reply_of(wire.call("RouteBatch", pb.RouteBatchRequest(texts=["q"], tau=[0.5])), pb.RouteBatchReply)
    assert reply.versions == info.versions == batch.versions
    served = {field.name: value for field, value in reply.versions.ListFields()}
    assert served.items() >= router.versions.items()
    assert (served["generation"], len(served["availability"])) == (1, 16)


def test_info_is_the_router_s(wire: Any, router: Router, plane: str) -> None:
    info = reply_of(wire.call("GetInfo"), pb.GetInfoReply)
    assert [candidate.name for candidate in info.candidates] == list(router.pool.names)
    assert [candidate.price_usd_per_query for candidate in info.candidates] == [c.price_usd for c in router.pool]
    assert (info.input_dim, info.takes_text) == (router.input_dim, True)
    assert pb.Mode.Name(info.default_mode) == f"MODE_{router.mode.upper()}"
    assert (info.delta, info.calibration_rows) == (router.certificate.delta, router.certificate.n)
    assert (info.tau_max if info.HasField("tau_max") else None) == router.tau_max
    assert info.data_plane == plane
    assert info.limits == pb.Limits(message_bytes=8 << 20, batch_rows=65_536, queue_calls=256)


def test_fields_of_a_later_version_are_ignored(wire: Any, router: Router) -> None:
    # field 1000, four bytes: what a newer client may send
    later = pb.RouteRequest(text="q", tau=0.5).SerializeToString() + b"\xc2\x3e\x04abcd"
    assert_same(reply_of(wire.call("Route", later)), router.route("q", 0.5))


@pytest.mark.parametrize("service", ["", "proteus.v1.RouterService"])
def test_health_is_serving(wire: Any, service: str) -> None:
    assert wire.health(service) == health_pb2.HealthCheckResponse.SERVING


def test_health_of_another_service_is_not_found(wire: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        wire.health("proteus.v1.AdminService")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services_and_knows_the_proto(wire: Any) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(wire.channel)
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="proteus.v1.RouterService"),
    ]
    listed, file = stub.ServerReflectionInfo(iter(asked), timeout=5.0)
    names = {service.name for service in listed.list_services_response.service}
    assert names == {
        "proteus.v1.RouterService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert file.file_descriptor_response.file_descriptor_proto[0] == pb.DESCRIPTOR.serialized_pb


def test_the_admin_service_is_not_here(wire: Any) -> None:
    answer = wire.call("SetPrices", service="proteus.v1.AdminService")
    assert answer.code is grpc.StatusCode.UNIMPLEMENTED


@pytest.fixture
def serve(tiny: Callable[..., Router], plane: str, socket_dir: Path) -> Iterator[Callable[..., tuple[Router, Client]]]:
    """Serve a made-up router; gives it with a client."""
    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> tuple[Router, Client]:
            router = tiny(**options)
            place = stack.enter_context(
                app.Server(router, f"unix:{socket_dir}/tiny", app.Options(data_plane=plane)).running()
            )
            return router, stack.enter_context(Client(place, timeout_s=10.0))

        yield start


@pytest.mark.parametrize("default", ["dual", "policy"])
@pytest.mark.parametrize("mode", [None, "dual", "policy"])
def test_every_mode_is_served(serve: Any, default: str, mode: Any) -> None:
    router, client = serve(mode=default)
    assert client.info().default_mode == default
    for guarantee in ("certified", "calibrated"):
        for tau in TAUS:
            mine = client.route("a query", tau=tau, mode=mode, guarantee=guarantee)
            theirs = router.route("a query", tau, mode=mode, guarantee=guarantee)
            for name in ("candidate", "mu", "score", "status", "certified_floor", "tau_max", "fallbacks"):
                assert getattr(mine, name) == getattr(theirs, name), name


def test_a_router_without_a_text_encoder(serve: Any) -> None:
    router, client = serve(encoder="none")
    assert not client.info().takes_text
    assert client.healthy()
    x = np.random.default_rng(0).standard_normal((5, router.input_dim), np.float32)
    assert client.route(embedding=x[0], tau=0.5).choice == router.route_batch(x, 0.5).choice[0]
    with pytest.raises(ValueError, match=r"^text: expected an embedding"):
        client.route("q", tau=0.5)
    with pytest.raises(ValueError, match=r"^texts: expected an embedding"):
        client.route_batch(["q"], tau=0.5)


def test_a_router_that_certifies_nothing(serve: Any) -> None:
    router, client = serve(right=0)
    assert router.tau_max is None or router.tau_max == 0.0
    decision = client.route("q", tau=0.5)
    assert (decision.status, decision.tau_max) == (Status.INFEASIBLE, router.tau_max)
    with pytest.raises(ValueError, match=r"^tau: expected "):
        client.route("q", tau=0.5, strict=True)
