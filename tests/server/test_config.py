"""The TOML file: the same names as the flags, strict, and below them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proteus_server import config
from proteus_server.client import Client

DOCS = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
WHOLE = """
checkpoint = "/c"
encoder = "/e"
device = "cuda:1"
address = "localhost:0"
insecure = true
max-queue = 1
max-batch-size = 2
workers = 3
drain-seconds = 4
data-plane = "grpcio"
threads = 1
max-connection-age = 6.5
admin-address = "unix:/a"
checkpoint-root = "/r"
metrics-address = "localhost:1"
log-level = "error"
log-format = "json"
access-log-sample = 0.5
"""


def parse(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    config.add_arguments(parser)
    return config.settings_from(parser.parse_args(arguments))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | bytes], str]:
    def make(text: str | bytes) -> str:
        file = tmp_path / "proteus.toml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(file)

    return make


def test_every_setting_is_a_key_and_a_flag(write: Any) -> None:
    settings = parse("--config", write(WHOLE))
    assert len(settings) == len(config.SETTINGS)
    assert config.options_of(settings) == config.Options(
        insecure=True,
        max_queue=1,
        max_batch_size=2,
        workers=3,
        drain_seconds=4,
        data_plane="grpcio",
        threads=1,
        max_connection_age=6.5,
        admin_address="unix:/a",
        checkpoint_root="/r",
        metrics_address="localhost:1",
        access_log_sample=0.5,
    )
    flags = []
    for setting in config.SETTINGS:
        value = settings[setting.name.replace("-", "_")]
        flags += [f"--{setting.name}"] if setting.kind is bool else [f"--{setting.name}", str(value)]
    assert parse(*flags) == settings


def test_flags_win_and_defaults_lose(write: Any) -> None:
    file = write('address = "localhost:0"\nworkers = 3\nmax-batch-size = 2\n')
    settings = parse("--config", file, "--workers", "4", "--max-queue", "7")
    assert settings == {"address": "localhost:0", "workers": 4, "max_batch_size": 2, "max_queue": 7}
    assert config.options_of(settings) == config.Options(workers=4, max_batch_size=2, max_queue=7)
    # a flag with its default's value is given, too
    assert config.options_of(parse("--config", file, "--workers", "8")).workers == 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("workerz = 1", "workerz: expected one of checkpoint, encoder, device, address, "),
        ("max_queue = 1", "max_queue: expected one of checkpoint, encoder, device, address, "),
        ("config = 'x'", "config: expected one of checkpoint, encoder, device, address, "),
        ("[server]\nworkers = 1", "server: expected one of checkpoint, encoder, device, address, "),
        ("workers = '3'", "workers: expected an integer, got '3'"),
        ("workers = 3.0", "workers: expected an integer, got 3.0"),
        ("workers = true", "workers: expected an integer, got True"),
        ("[workers]\na = 1", "workers: expected an integer, got a dict"),
        ("insecure = 1", "insecure: expected true or false, got 1"),
        ("insecure = 'true'", "insecure: expected true or false, got 'true'"),
        ("drain-seconds = '1'", "drain-seconds: expected a number, got '1'"),
        ("drain-seconds = false", "drain-seconds: expected a number, got False"),
        ("address = 1", "address: expected a string, got 1"),
        ("address = ['a']", "address: expected a string, got a list"),
        ("address = 2025-01-01", "address: expected a string, got a date"),
        ("data-plane = 'other'", "data-plane: expected native | grpcio, got 'other'"),
        ("log-level = 3", "log-level: expected debug | info | warning | error, got 3"),
        ("workers = ", "expected TOML, got: Invalid value (at "),
        ("workers = 1\nworkers = 2", "expected TOML, got: Cannot overwrite a value (at "),
        (b"address = '\xff'", "expected UTF-8, got other bytes"),
        ("#" * (1 << 16) + "\n", "expected at most 65536 bytes, got more"),
        # the library's own limit, or the interpreter's
        ("workers = " + "[" * 1000, "expected TOML, got: "),
        ("workers = " + "9" * 5000, "expected TOML, got: Exceeds the limit"),
        ("log-level = 0x" + "f" * 5000, "log-level: expected debug | info | warning | error, got an integer of 20000"),
        ("workers = " + "[" * 200 + "]" * 200, "workers: expected an integer, got a list of 1"),
        ("a." * 8000 + "a = 1", "expected at most 100 dots in a line, got 8000"),
        ("address = [" + "1, " * 5000 + "]", "address: expected a string, got a list of 5000"),
        ("workers = '" + "x" * 5000 + "'", "workers: expected an integer, got 'xxxxx"),
    ],
)
def test_what_is_wrong_in_a_file(write: Any, text: str | bytes, expected: str) -> None:
    file = write(text)
    with pytest.raises(ValueError, match=re.escape(f"{file}: {expected}")) as caught:
        config.read(file)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("address = 'localhost:0'\nworkers = 0", "workers: expected 1 to 1048576, got 0"),
        ("address = 'localhost:0'\naccess-log-sample = 1.5", "access_log_sample: expected 0 to 1, got 1.5"),
        ("address = 'localhost:0'\nmax-connection-age = -1", "max_connection_age: expected 0 to 2000000, got -1"),
        ("address = 'localhost:0'\nmax-queue = 0x" + "f" * 5000, "expected 1 to 1048576, got an integer of 20000 bits"),
        (
            "address = 'localhost:0'\ndata-plane = 'grpcio'\nthreads = 2",
            "threads: expected 1 on the data plane grpcio, got 2",
        ),
        ("", "address: expected --address, or address in the file of --config, got none"),
    ],
)
def test_what_is_wrong_together(write: Any, text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        config.options_of(parse("--config", write(text)))


def test_a_server_by_its_file(launch: Any, write: Any, socket_dir: Path) -> None:
    file = write(f'address = "unix:{socket_dir}/file"\nlog-level = "warning"\ndata-plane = "grpcio"\n')
    process = launch("--config", file, "--address", f"unix:{socket_dir}/flag")
    address = process.address()
    assert address == f"unix:{socket_dir}/flag"
    with Client(address, timeout_s=10.0) as client:
        assert client.info().data_plane == "grpcio"
    assert process.stop() == 0
    assert "ready" not in process.text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config", "/no/such.toml"], "No such file or directory: '/no/such.toml'"),
        (["--address", "localhost:0", "--metrics-address", "0.0.0.0:0"], "metrics_address: expected loopback"),
        (["--address", "localhost:0", "--metrics-address", "unix:/m"], "metrics_address: expected HOST:PORT"),
    ],
)
def test_what_cannot_be_started(launch: Any, arguments: list[str], expected: str) -> None:
    process = launch(*arguments)
    assert process.wait() == 2
    assert expected in process.text
    assert "Traceback" not in process.text


def test_every_setting_is_documented() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| (string|integer|number|boolean)", DOCS.read_text(), re.MULTILINE)
    kinds = {str: "string", int: "integer", float: "number", bool: "boolean"}
    assert rows == [(setting.name, kinds[setting.kind]) for setting in config.SETTINGS]
