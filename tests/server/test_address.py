"""Addresses: what is one, what is allowed, and why one cannot be had."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from proteus_server import address as addresses
from proteus_server import app


@pytest.mark.parametrize(
    ("text", "expected", "target"),
    [
        ("127.0.0.1:8080", ("127.0.0.1", 8080, None), "127.0.0.1:8080"),
        ("localhost:0", ("localhost", 0, None), "localhost:0"),
        ("[::1]:65535", ("::1", 65535, None), "[::1]:65535"),
        ("unix:/run/p.sock", ("", 0, "/run/p.sock"), "unix:/run/p.sock"),
        ("unix:///run/p.sock", ("", 0, "/run/p.sock"), "unix:/run/p.sock"),
        ("unix:p.sock", ("", 0, "p.sock"), "unix:p.sock"),
    ],
)
def test_parsed(text: str, expected: tuple[str, int, str | None], target: str) -> None:
    address = addresses.parse(text)
    assert address == expected
    assert address.target == target


BAD_ADDRESSES = [
    "", ":", "localhost", "localhost:", ":8080", "localhost:x", "localhost:-1", "localhost:65536", "localhost:1 ",
    "localhost:٣", "::1:80", "fe80::1", "[::1]", "unix:", "unix:" + "x" * 108, "unix:a\0b", "http://localhost:80",
    "localhost:" + "9" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_ADDRESSES, ids=repr)
def test_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"^address: expected .*, got "):
        addresses.parse(text)


@pytest.mark.parametrize("text", ["127.0.0.1:1", "127.9.9.9:1", "localhost:1", "[::1]:1", "unix:/x"])
def test_loopback_is_allowed(text: str) -> None:
    assert addresses.checked(text, insecure=False) == addresses.parse(text)


@pytest.mark.parametrize("text", ["0.0.0.0:1", "[::]:1", "192.0.2.1:1", "8.8.8.8:1"])
def test_what_others_can_reach_needs_insecure(text: str) -> None:
    with pytest.raises(ValueError, match=r"address: expected loopback or a Unix socket, got .*--insecure"):
        addresses.checked(text, insecure=False)
    assert addresses.checked(text, insecure=True) == addresses.parse(text)


def test_a_host_that_does_not_resolve() -> None:
    with pytest.raises(OSError, match=r"address: expected a host that resolves, got 'no-such-host\.invalid'"):
        addresses.checked("no-such-host.invalid:80", insecure=False)


def test_a_unix_socket_is_its_owner_s_and_goes_away(router: Any, socket_dir: Path) -> None:
    path = socket_dir / "s"
    mask = os.umask(0o022)
    os.umask(mask)
    with app.Server(router, f"unix:{path}").running() as place:
        assert place == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        # the process's own mask is as it was
        assert os.umask(mask) == mask
    assert not path.exists()


def test_a_relative_path(router: Any, socket_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(socket_dir)
    with app.Server(router, "unix:here").running():
        assert (socket_dir / "here").is_socket()


def test_a_dead_server_s_socket_is_replaced(router: Any, socket_dir: Path) -> None:
    path = socket_dir / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    assert path.is_socket()
    with app.Server(router, f"unix:{path}").running():
        pass


def test_a_live_server_s_socket_is_refused(router: Any, socket_dir: Path) -> None:
    path = socket_dir / "s"
    with app.Server(router, f"unix:{path}").running():
        before = path.stat()
        with pytest.raises(FileExistsError, match=re.escape(f"address: expected a free socket at {path}, got one")):
            app.Server(router, f"unix:{path}").start()
        # the same file, which asking for the server behind it has touched: that is its access time alone
        after = path.stat()
        assert (after.st_ino, after.st_mode, after.st_mtime_ns) == (before.st_ino, before.st_mode, before.st_mtime_ns)
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(path))


def test_a_busy_server_s_socket_is_refused(router: Any, socket_dir: Path) -> None:
    path = socket_dir / "s"
    with contextlib.ExitStack() as stack:
        busy = stack.enter_context(socket.socket(socket.AF_UNIX))
        busy.bind(str(path))
        busy.listen(0)
        # the backlog is full: a connect would wait
        for _ in range(4):
            peer = stack.enter_context(socket.socket(socket.AF_UNIX))
            peer.setblocking(False)
            peer.connect_ex(str(path))
        with pytest.raises(FileExistsError):
            app.Server(router, f"unix:{path}").start()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_socket_is_left_alone(router: Any, socket_dir: Path, kind: str) -> None:
    path = socket_dir / "s"
    path.mkdir() if kind == "folder" else path.write_text("precious")
    with pytest.raises(FileExistsError, match="expected a socket or nothing at"):
        app.Server(router, f"unix:{path}").start()
    assert path.is_dir() if kind == "folder" else path.read_text() == "precious"


def test_a_folder_that_is_not_there(router: Any, socket_dir: Path) -> None:
    with pytest.raises(OSError, match=r"address: cannot bind unix:.*: No such file or directory"):
        app.Server(router, f"unix:{socket_dir}/no/s").start()


def test_a_port_in_use(router: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OSError, match=f"address: cannot bind {place}: Address already in use"):
            app.Server(router, place).start()


def test_two_servers_never_share_a_port(router: Any) -> None:
    with app.Server(router, "127.0.0.1:0").running() as place, pytest.raises(OSError, match="already in use"):
        app.Server(router, place).start()


def test_port_zero_takes_a_free_port(router: Any) -> None:
    with app.Server(router, "127.0.0.1:0").running() as place:
        host, _, port = place.rpartition(":")
        assert host == "127.0.0.1"
        assert int(port) > 0
        with socket.create_connection((host, int(port))):
            pass
