"""Changes while the server runs: whole, explained by the versions of every reply, refused where they are wrong."""

from __future__ import annotations

import hashlib
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2

from proteus_fast import Router, Status, checkpoint
from proteus_fast.router import EMBEDDED
from proteus_server import admin, app, control
from proteus_server import proteus_pb2 as pb
from proteus_server.client import Client
from tests.checkpoints import tiny_checkpoint
from tests.server.conftest import PLANES

NAMES = [f"model-{i}" for i in range(4)]
TEXTS = ["Which gas do plants take in?", "word " * 30, "x"]
FIELDS = ("candidate", "choice", "mu", "score", "status", "certified_floor", "tau_max", "fallbacks")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints: `a` and `b` take texts and differ in everything, `c` takes embeddings of another width only."""
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoint.save(tiny_checkpoint(), folder / "a")
    checkpoint.save(tiny_checkpoint(seed=8, dim=24, right=800), folder / "b")
    checkpoint.save(tiny_checkpoint(encoder="none", dim=8), folder / "c")
    return folder


class Running(NamedTuple):
    server: app.Server
    place: str
    client: Client
    wire: Any
    admin: Any

    def change(self, method: str, request: Any) -> pb.ChangeReply:
        answer = self.admin.call(method, request, service=admin.SERVICE_NAME)
        assert answer.code is grpc.StatusCode.OK, answer
        return pb.ChangeReply.FromString(answer.reply)

    def refused(self, method: str, request: Any) -> Any:
        before = self.policy().versions
        answer = self.admin.call(method, request, service=admin.SERVICE_NAME)
        assert answer.code is not grpc.StatusCode.OK
        assert self.policy().versions == before
        assert self.wire.works()
        return answer

    def reload(self, path: str = "") -> pb.ChangeReply:
        return self.change("Reload", pb.ReloadRequest(path=path))

    def set_prices(self, **prices: float) -> pb.ChangeReply:
        named = {name.replace("_", "-"): price for name, price in prices.items()}
        return self.change("SetPrices", pb.SetPricesRequest(price_usd_per_query=named))

    def set_available(self, **available: bool) -> pb.ChangeReply:
        named = {name.replace("_", "-"): value for name, value in available.items()}
        return self.change("SetAvailability", pb.SetAvailabilityRequest(available=named))

    def policy(self) -> pb.GetPolicyReply:
        answer = self.admin.call("GetPolicy", service=admin.SERVICE_NAME)
        return pb.GetPolicyReply.FromString(answer.reply)


@pytest.fixture
def run(root: Path, plane: str, wire_to_address: Any, socket_dir: Path) -> Iterator[Running]:
    """A server of `a`."""
    options = app.Options(data_plane=plane, admin_address=f"unix:{socket_dir}/admin", checkpoint_root=str(root))
    server = app.Server(Router.load(root / "a"), f"unix:{socket_dir}/s", options, checkpoint=str(root / "a"))
    with (
        server.running() as place,
        Client(place, timeout_s=20.0) as client,
        wire_to_address(place) as wire,
        wire_to_address(server.admin_address) as calls,
    ):
        yield Running(server, place, client, wire, calls)


def assert_as_in_process(mine: Any, theirs: Any) -> None:
    for name in FIELDS:
        assert getattr(mine, name) == getattr(theirs, name), name


def test_200_changes_under_load(run: Running, root: Path) -> None:
    """No call fails, and each reply is wholly of the router and the prices that its versions name."""
    expected: dict[tuple[str, str], list[Any]] = {}
    for router in (Router.load(root / name) for name in "ab"):
        for factor in (1.0, 10.0):
            prices = router.pool.price_usd * [1.0, 1.0, 1.0, factor]
            own = None if factor == 1.0 else prices
            key = router.versions["router"], hashlib.sha256(prices.tobytes()).hexdigest()[:16]
            expected[key] = [router.route(text, 0.4, price_usd=own) for text in TEXTS]
    stop = threading.Event()
    seen: list[tuple[tuple[str, str], int]] = []
    failures: list[BaseException] = []

    def check(reply: Any, rows: list[int]) -> None:
        key = reply.versions.router, reply.versions.prices
        decisions = [expected[key][row] for row in rows]
        assert reply.versions.certificate == decisions[0].versions["certificate"]
        if len(rows) == 1:
            assert_as_in_process(reply, decisions[0])
        else:
            assert reply.tau_max == decisions[0].tau_max
            for name in ("choice", "score", "status"):
                assert getattr(reply, name).tolist() == [getattr(decision, name) for decision in decisions]
        seen.append((key, reply.versions.generation))

    def ask(turn: int) -> None:
        try:
            with Client(run.place, timeout_s=20.0) as client:
                while not stop.is_set():
                    turn += 1
                    check(client.route(TEXTS[turn % 3], tau=0.4), [turn % 3])
                    check(client.route_batch(TEXTS, tau=0.4), [0, 1, 2])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(2)]
    # clients and server share one interpreter: no thread holds it long
    interval = sys.getswitchinterval()
    sys.setswitchinterval(2e-4)
    try:
        for thread in threads:
            thread.start()
        own = 0.008
        for i in range(200):
            reply = run.reload("ba"[i // 10 % 2]) if i % 10 == 0 else run.set_prices(model_3=own * (1, 10)[i % 2])
            assert reply.versions.generation == i + 2
            # the reply to an operator means that new calls get the new generation
            assert run.client.route("x", tau=0.4).versions.generation == i + 2
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert failures == []
    assert {key for key, _ in seen} == expected.keys()
    assert len({generation for _, generation in seen}) > 50


def test_a_router_with_another_width_and_no_encoder(run: Running, root: Path) -> None:
    other = Router.load(root / "c")
    old = np.zeros(16, np.float32)
    assert run.client.route(embedding=old, tau=0.4).candidate
    run.reload("c")
    assert (run.client.info().input_dim, run.client.info().takes_text) == (8, False)
    x = np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)
    reply = run.client.route_batch(embeddings=x, tau=0.4)
    batch = other.route_batch(x, 0.4)
    assert reply.score.tolist() == batch.score.tolist()
    for request, field in [
        (pb.RouteRequest(embedding=old.tobytes(), tau=0.4), "embedding"),
        (pb.RouteRequest(text="q", tau=0.4), "text"),
    ]:
        answer = run.wire.call("Route", request)
        assert (answer.code, answer.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])
    # back to what the server was started with
    run.reload()
    assert run.client.info().takes_text


def test_a_transformer_comes_and_goes(run: Running, root: Path, tmp_path: Path) -> None:
    encoders = pytest.importorskip("tests.encoders", reason="needs transformers")
    words = [f"word{i}" for i in range(20)]
    folder = encoders.save_router(encoders.make("bert", tmp_path / "bert", words), root / "transformer")
    router = Router.load(folder)
    for path in ("transformer", "a", "transformer"):
        run.reload(path)
        expected = router if path == "transformer" else Router.load(root / "a")
        for text in words[:3]:
            assert_as_in_process(run.client.route(text, tau=0.4), expected.route(text, 0.4))
    assert run.client.route_batch(words, tau=0.4).versions.router == router.versions["router"]


def broken(folder: Path, name: str) -> Path:
    return shutil.copytree(folder / "a", folder / name)


@pytest.mark.parametrize("wrong", ["missing", "cut off", "no json", "another pool", "outside", "link", "absolute"])
def test_what_is_not_loaded(run: Running, root: Path, tmp_path: Path, plane: str, wrong: str) -> None:
    path = text = f"{plane}-{wrong}"
    code = grpc.StatusCode.FAILED_PRECONDITION
    if wrong == "cut off":
        file = broken(root, path) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-4])
    elif wrong == "no json":
        (broken(root, path) / "config.json").write_text("{")
    elif wrong == "another pool":
        shutil.copy(root / "b" / "certificate.json", broken(root, path) / "certificate.json")
    elif wrong in ("outside", "link", "absolute"):
        outside = shutil.copytree(root / "a", tmp_path / "a")
        code, text = grpc.StatusCode.INVALID_ARGUMENT, f"path: expected a folder inside {root}, got "
        if wrong == "link":
            (root / path).symlink_to(outside)
        else:
            path = str(outside) if wrong == "absolute" else "../a"
    answer = run.refused("Reload", pb.ReloadRequest(path=path))
    assert answer.code is code
    assert text in answer.text
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        assert answer.detail(error_details_pb2.ErrorInfo).reason == "CHECKPOINT"
        with pytest.raises((ValueError, OSError)) as error:
            Router.load(root / path)
        # the loader's own words
        assert answer.text == str(error.value)
    assert run.server.control.changes == {("reload", "refused"): 1}


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("a" * 4097, "path: expected at most 4096 bytes, got 4097"),
        ("é" * 2049, "path: expected at most 4096 bytes, got 4098"),
        ("a\nb", "path: expected no control characters, got some"),
        ("a\0", "path: expected no control characters, got some"),
        ("a\x1b[2J", "path: expected no control characters, got some"),
    ],
)
def test_what_is_no_path(run: Running, path: str, text: str) -> None:
    answer = run.refused("Reload", pb.ReloadRequest(path=path))
    assert (answer.code, answer.text, answer.fields) == (grpc.StatusCode.INVALID_ARGUMENT, text, ["path"])


def test_a_long_path_makes_no_long_line(run: Running, caplog: pytest.LogCaptureFixture) -> None:
    answer = run.refused("Reload", pb.ReloadRequest(path="a/" * 2048))
    assert answer.code is grpc.StatusCode.FAILED_PRECONDITION
    (line,) = [record.getMessage() for record in caplog.records if record.name == "proteus_server"]
    assert len(line) < 700
    assert len(answer.text) < 700


def test_a_change_that_a_follower_refuses_is_none(run: Running) -> None:
    def fail(_generation: Any) -> Any:
        raise ValueError("price: expected another")

    run.server.control._followers.append(fail)
    assert run.refused("SetPrices", pb.SetPricesRequest(price_usd_per_query={"model-0": 1.0})).fields != []
    # both who decides and who tells of it
    assert run.client.route("x", tau=0.4).versions.generation == run.client.info().versions.generation == 1
    run.server.control._followers.remove(fail)
    assert run.set_prices(model_0=1.0).versions.generation == 2
    assert run.client.route("x", tau=0.4).versions.generation == run.client.info().versions.generation == 2


def test_without_a_root_only_the_start_is_read_again(router: Router, wire_to_address: Any, socket_dir: Path) -> None:
    options = app.Options(admin_address="localhost:0")
    server = app.Server(router, f"unix:{socket_dir}/s", options)
    with server.running() as place, wire_to_address(place) as wire, wire_to_address(server.admin_address) as calls:
        run = Running(server, place, Client(place, timeout_s=20.0), wire, calls)
        answer = run.refused("Reload", pb.ReloadRequest(path="/etc"))
        assert (answer.code, answer.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["path"])
        assert run.reload().versions.router == router.versions["router"]
        run.client.close()


def test_prices_count_at_once_and_uncertified(run: Running, root: Path) -> None:
    router = Router.load(root / "a")
    prices = np.array(router.pool.price_usd)
    prices[[0, 3]] = 0.02, 0.0005
    before = run.client.route("x", tau=0.4)
    reply = run.set_prices(model_0=0.02, model_3=0.0005)
    assert (reply.certified, reply.versions.generation) == (False, 2)
    for text in TEXTS:
        mine = run.client.route(text, tau=0.4)
        assert_as_in_process(mine, router.route(text, 0.4, price_usd=prices))
        assert (mine.status, mine.certified_floor) == (Status.UNCERTIFIED, None)
        assert mine.versions.prices != before.versions.prices
        assert mine.versions._replace(prices="", generation=0) == before.versions._replace(prices="", generation=0)
    assert run.client.info().price_usd == tuple(prices.tolist())
    policy = run.policy()
    assert not policy.certified
    assert [row.price_usd_per_query for row in policy.candidates] == prices.tolist()
    assert {(row.status, row.HasField("certified_floor")) for row in policy.targets} == {(Status.UNCERTIFIED, False)}
    # one by one back to the checkpoint's own
    assert not run.set_prices(model_0=router.pool.price_usd[0]).certified
    assert run.set_prices(model_3=router.pool.price_usd[3]).certified
    after = run.client.route("x", tau=0.4)
    assert_as_in_process(after, before)
    assert after.versions == before.versions._replace(generation=4)
    # a checkpoint brings its own
    run.set_prices(model_1=1.0)
    assert run.reload().certified


@pytest.mark.parametrize(
    ("prices", "text"),
    [
        ({}, "names: expected at least one candidate, got none"),
        ({"no-such": 1.0}, "names: expected candidates of the pool, got 'no-such'"),
        ({"model-0": -1.0}, "model-0: expected a finite price >= 0, got -1.0"),
        ({"model-0": float("nan")}, "model-0: expected a finite price >= 0, got nan"),
        ({"model-0": float("inf")}, "model-0: expected a finite price >= 0, got inf"),
        ({"model-0": 1e39}, r"model-0: expected a finite price >= 0, got 1e+39"),
        ({"model-0": 3e38}, "cost_unit_usd: expected a unit near the prices, got 0.008"),
    ],
)
def test_prices_that_are_none(run: Running, prices: dict[str, float], text: str) -> None:
    answer = run.refused("SetPrices", pb.SetPricesRequest(price_usd_per_query=prices))
    assert (answer.code, answer.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["price_usd_per_query"])
    assert answer.text == f"price_usd_per_query: {text}"


def test_availability_narrows_every_request(run: Running, root: Path) -> None:
    router = Router.load(root / "a")
    first = run.client.route("x", tau=0.4)
    others = [name for name in NAMES if name != first.candidate]
    reply = run.set_available(**{first.candidate.replace("-", "_"): False})
    assert not reply.certified
    for text in TEXTS:
        mine = run.client.route(text, tau=0.4)
        assert_as_in_process(mine, router.route(text, 0.4, available=others))
        assert mine.status is Status.UNCERTIFIED
    both = run.client.route("x", tau=0.4, available=[first.candidate, others[0]])
    assert (both.candidate, both.fallbacks) == (others[0], ())
    batch = run.client.route_batch(TEXTS, tau=0.4)
    assert first.choice not in batch.choice
    answer = run.wire.call("Route", pb.RouteRequest(text="x", tau=0.4, available=[first.candidate]))
    assert (answer.code, answer.text) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "available: expected an eligible candidate, got none",
    )
    assert [row.name for row in run.policy().candidates if not row.available] == [first.candidate]
    # another checkpoint does not end an outage
    assert run.reload("b").versions.availability == reply.versions.availability
    run.reload()
    run.set_available(**{name.replace("-", "_"): False for name in others})
    assert run.client.route_batch(TEXTS, tau=0.4).status.tolist() == [Status.INVALID] * 3
    assert run.set_available(**{name.replace("-", "_"): True for name in NAMES}).certified
    last = run.client.route("x", tau=0.4)
    assert_as_in_process(last, first)
    assert last.versions.availability == first.versions.availability
    answer = run.refused("SetAvailability", pb.SetAvailabilityRequest(available={"no-such": True}))
    assert answer.fields == ["available"]


def test_the_policy(run: Running, root: Path, plane: str) -> None:
    router = Router.load(root / "a")
    policy = run.policy()
    assert policy.certified
    assert (policy.data_plane, policy.default_mode, policy.tau_max) == (plane, pb.MODE_DUAL, router.tau_max)
    assert policy.uptime_s > 0.0
    for row in policy.targets:
        found = router.feasibility(row.tau)
        floor = row.certified_floor if row.HasField("certified_floor") else None
        assert (row.status, floor, row.expected_cost_usd) == (
            found.status,
            found.certified_floor,
            found.expected_cost_usd,
        )
    assert router.tau_max in [row.tau for row in policy.targets]
    assert run.admin.call("GetPolicy", b"\xff", service=admin.SERVICE_NAME).code is grpc.StatusCode.INVALID_ARGUMENT
    assert run.admin.call("Route", b"", service="proteus.v1.RouterService").code is grpc.StatusCode.UNIMPLEMENTED
    assert run.wire.call("GetPolicy", b"", service=admin.SERVICE_NAME).code is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.skipif(len(PLANES) < 2, reason="needs both data planes")
def test_both_planes_say_the_same_of_every_generation(
    root: Path, wire_to_address: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    replies: dict[str, list[bytes]] = {}
    for name in PLANES:
        folder = tmp_path_factory.mktemp("s")
        server = app.Server(
            Router.load(root / "a"),
            f"unix:{folder}/s",
            app.Options(data_plane=name, checkpoint_root=str(root)),
            checkpoint=str(root / "a"),
        )
        with server.running() as place, wire_to_address(place) as wire:
            for method, argument in [
                ("set_prices", {"model-1": 0.5}),
                ("set_availability", {"model-2": False}),
                ("reload", "b"),
                ("set_availability", {"model-2": True}),
            ]:
                getattr(server.control, method)(argument)
                answers = [wire.call("Route", pb.RouteRequest(text=text, tau=0.4)) for text in TEXTS]
                answers.append(wire.call("RouteBatch", pb.RouteBatchRequest(texts=TEXTS, tau=[0.4])))
                kinds = [pb.RouteReply] * len(TEXTS) + [pb.RouteBatchReply]
                for kind, answer in zip(kinds, answers, strict=True):
                    reply = kind.FromString(answer.reply)
                    assert reply.SerializeToString() == answer.reply
                    reply.timings.Clear()
                    replies.setdefault(name, []).append(reply.SerializeToString())
    assert replies[PLANES[0]] == replies[PLANES[1]]


def test_only_this_machine_may_change_what_is_served(launch: Callable[..., Any]) -> None:
    process = launch("--address", "127.0.0.1:0", "--admin-address", "0.0.0.0:0", "--insecure")
    assert process.wait() == 2
    assert "admin_address: expected loopback or a Unix socket, got '0.0.0.0:0'\n" in process.text


def test_no_change_while_draining(root: Path, socket_dir: Path, wire_to_address: Any) -> None:
    options = app.Options(admin_address=f"unix:{socket_dir}/admin")
    server = app.Server(Router.load(root / "a"), f"unix:{socket_dir}/s", options)
    server.start()
    with wire_to_address(server.admin_address) as calls:
        server._admin.refuse_new()
        answer = calls.call("Reload", service=admin.SERVICE_NAME)
        assert (answer.code, answer.text) == (grpc.StatusCode.UNAVAILABLE, "server: draining, no new calls")
    server.drain()
    assert not list(socket_dir.iterdir())


def test_a_reload_keeps_the_device(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    load = Router.load

    def recorded(path: Any, device: str, encoder: Any = None) -> Router:
        seen.append((path, device, encoder))
        return load(path)

    monkeypatch.setattr(Router, "load", recorded)
    batching = {"max_batch_size": 8, "max_queue_rows": 8}
    served = control.Control(router, batching=batching, checkpoint=str(EMBEDDED), encoder="/e", device="cuda:3")
    assert served.reload("").number == 2
    assert seen == [(EMBEDDED, "cuda:3", "/e")]
    served.generation.batcher.close()
