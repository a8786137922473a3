"""Logs in JSON: one line for each event, and never a prompt."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import grpc
import pytest

from proteus_server import errors, logs
from proteus_server import proteus_pb2 as pb
from proteus_server import proteus_pb2_grpc as stubs
from proteus_server.client import Client

CANARY = "canary-77aa-the-prompt-of-a-user"


def events(process: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in process.output if not line.startswith("listening on ")]


def test_a_life_in_events(launch: Any, plane: str, socket_dir: Path) -> None:
    process = launch(
        "--address", f"unix:{socket_dir}/s", "--data-plane", plane, "--admin-address", f"unix:{socket_dir}/admin",
        "--log-format", "json", "--access-log-sample", "1",
    )  # fmt: skip
    address = process.address()
    with (
        Client(address, timeout_s=20.0) as client,
        grpc.insecure_channel(f"unix:{socket_dir}/admin") as channel,
    ):
        operator = stubs.AdminServiceStub(channel)
        name = client.route(CANARY, tau=0.5).candidate
        client.route_batch([CANARY, CANARY * 2], tau=0.5)
        client.info()
        with pytest.raises(ValueError, match="tau"):
            client.route(CANARY, tau=7.0)
        operator.SetPrices(pb.SetPricesRequest(price_usd_per_query={name: 1.0}), timeout=10.0)
        operator.SetAvailability(pb.SetAvailabilityRequest(available={name: False}), timeout=10.0)
        operator.Reload(pb.ReloadRequest(), timeout=10.0)
        with pytest.raises(grpc.RpcError):
            operator.Reload(pb.ReloadRequest(path="/no/such"), timeout=10.0)
    assert process.stop() == 0
    assert CANARY not in process.text
    lines = events(process)
    own = [line for line in lines if line["logger"] == "proteus_server"]
    assert [(line["event"], line.get("outcome")) for line in own] == [
        ("start", None),
        ("ready", None),
        ("prices", "done"),
        ("availability", "done"),
        ("reload", "done"),
        ("reload", "refused"),
        ("drain", None),
        ("stop", None),
    ]
    assert all(line["time"] > 1e9 and line["level"] in ("info", "warning") for line in own)
    assert (own[1]["address"], own[1]["generation"]) == (address, 1)
    assert [line["generation"] for line in own[2:5]] == [2, 3, 4]
    assert own[3]["available"] != []
    assert own[5]["reason"].startswith("path: expected none (the server has no --checkpoint-root)")
    calls = [line for line in lines if line["event"] == "call"]
    if plane == "native":
        # the core answers what it can by itself, and counts it
        assert [line["method"] for line in calls] == ["GetInfo"]
        return
    assert [(line["method"], line["status"]) for line in calls] == [
        ("Route", "OK"),
        ("RouteBatch", "OK"),
        ("GetInfo", "OK"),
        ("Route", "INVALID_ARGUMENT"),
    ]
    first, batch, _, refused = calls
    assert (first["rows"], first["prompt_bytes"], batch["rows"], batch["prompt_bytes"]) == (1, 32, 2, 96)
    # equal prompts are seen as equal
    assert first["prompt_hash"] == refused["prompt_hash"] != batch["prompt_hash"]
    assert first["decide_ns"] > 0
    assert (first["generation"], len(first["router"])) == (1, 16)
    assert "generation" not in refused


def test_a_hash_needs_the_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    request = pb.RouteRequest(text=CANARY, tau=0.5).SerializeToString()
    for access in (logs.AccessLog(1.0), logs.AccessLog(1.0)):
        for _ in range(2):
            access.call("Route", request, "OK", None, 0.0)
    hashes = [record.fields["prompt_hash"] for record in caplog.records]  # type: ignore[attr-defined]
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3]
    logs.AccessLog(0.0).call("Route", request, "OK", None, 0.0)
    logs.AccessLog(1.0).call("Route", b"\xff", "INVALID_ARGUMENT", None, 0.0)
    assert len(caplog.records) == 5
    assert CANARY not in caplog.text


def test_a_sample_is_a_share(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    access = logs.AccessLog(0.25)
    for _ in range(2000):
        access.call("GetInfo", b"", "OK", None, 0.0)
    # 500 expected, with a deviation of 19
    assert 350 < len(caplog.records) < 650


def test_internal_errors_have_their_reference(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise KeyError(CANARY)
    except KeyError as error:
        refusal = errors.refusal_of(error, "Route", draining=False)
    line = json.loads(logs.JsonFormatter().format(caplog.records[0]))
    assert (line["event"], line["level"], line["method"]) == ("internal error", "error", "Route")
    assert refusal.text == f"internal error, reference {line['reference']}"
    assert "type=KeyError" in line["error"]
    assert CANARY not in json.dumps(line)


def test_an_event_is_one_line_of_text() -> None:
    record = logging.LogRecord("proteus_server", logging.INFO, "f.py", 1, "%s: %s", ("reload", "path=a"), None)
    line = logs.TextFormatter().format(record)
    assert line.endswith(" INFO proteus_server: reload: path=a")
    record.args = "reload", "path=\\x\nb\r\x1b[2J\0\x85\u2028é"
    assert logs.TextFormatter().format(record).endswith(r": reload: path=\x\nb\r\x1b[2J\x00\x85\u2028é")
    try:
        raise ValueError(CANARY)
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    line = logs.TextFormatter().format(record)
    assert " exception: type=ValueError frames=[" in line
    assert "\n" not in line
    assert CANARY not in line


def test_what_libraries_say() -> None:
    record = logging.LogRecord("grpc", logging.ERROR, "f.py", 1, "it %s", ("broke\nhere",), None)
    try:
        raise ValueError(CANARY)
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    text = logs.JsonFormatter().format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert (line["event"], line["logger"], line["message"]) == ("log", "grpc", "it broke\nhere")
    assert "type=ValueError" in line["exception"]
    assert CANARY not in text
