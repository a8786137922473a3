"""Addresses a server can listen on: HOST:PORT and unix:PATH, checked before grpcio sees them.

grpcio unlinks whatever socket lies at a Unix address, a live server's included, and does not say why a bind failed.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# sun_path holds 108 bytes with the closing zero
_MAX_UNIX_PATH_BYTES = 107


class Address(NamedTuple):
    """Where to listen: a Unix socket's path, or a host and a port (0: any free one)."""

    host: str
    port: int
    path: str | None

    @property
    def target(self) -> str:
        """The address as grpcio takes it."""
        return f"{_bracketed(self.host)}:{self.port}" if self.path is None else f"unix:{self.path}"


def parse(text: str, argument: str = "address") -> Address:
    """Read HOST:PORT, [IPV6]:PORT or unix:PATH; `argument` is what the message calls it.

    Raises:
        ValueError: the text is none of these.
    """
    if text.startswith("unix:"):
        path = text[len("unix:") :]
        if path.startswith("//"):
            path = path[2:]
        size = len(os.fsencode(path))
        if not 0 < size <= _MAX_UNIX_PATH_BYTES or "\0" in path:
            raise ValueError(f"{argument}: expected a path of 1 to {_MAX_UNIX_PATH_BYTES} bytes, got {size} bytes")
        return Address("", 0, path)
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{argument}: expected an IPv6 host in brackets, got {text[:300]!r}")
    if not colon or not host or not port.isascii() or not port.isdecimal() or len(port) > 5 or int(port) > 65_535:
        raise ValueError(f"{argument}: expected HOST:PORT or unix:PATH, got {text[:300]!r}")
    return Address(host, int(port), None)


def checked(text: str, *, insecure: bool, argument: str = "address") -> Address:
    """Read an address, and refuse one that other machines can reach unless `insecure`: the server speaks cleartext.

    Raises:
        ValueError: the text is no address, or is not allowed.
        OSError: the host does not resolve.
    """
    address = parse(text, argument)
    if not insecure and not is_loopback(address, argument):
        # nothing allows it for who may change what is served
        hint = "" if argument == "admin_address" else " (cleartext: --insecure allows it)"
        raise ValueError(f"{argument}: expected loopback or a Unix socket, got {text!r}{hint}")
    return address


def is_loopback(address: Address, argument: str = "address") -> bool:
    """Whether only this machine can reach the address. A name counts if all it resolves to is loopback.

    Raises:
        OSError: the host does not resolve.
    """
    if address.path is not None:
        return True
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise OSError(f"{argument}: expected a host that resolves, got {address.host!r} ({error.strerror})") from None
    return all(ipaddress.ip_address(str(info[4][0]).partition("%")[0]).is_loopback for info in found)


@contextlib.contextmanager
def bound(address: Address, add_port: Callable[[str], int]) -> Iterator[str]:
    """Bind by grpcio's `add_port`, yield the address with the real port, and remove a Unix socket's file at the end.

    A Unix socket's file is open to its owner only (0600). One that a killed server left is replaced.

    Raises:
        OSError: the address cannot be bound; the message says why.
    """
    if address.path is None:
        port = _bind_tcp(address, add_port)
        yield f"{_bracketed(address.host)}:{port}"
        return
    path = Path(address.path)
    _remove_stale_socket(path)
    # only so has the file its mode from its first moment; nothing else creates files while a server starts
    mask = os.umask(0o177)
    try:
        add_port(address.target)
        made = path.stat()
    except (RuntimeError, FileNotFoundError):
        raise OSError(f"address: cannot bind {address.target}: {_unix_reason(path)}") from None
    finally:
        os.umask(mask)
    try:
        yield address.target
    finally:
        with contextlib.suppress(FileNotFoundError):
            now = path.stat()
            if (now.st_dev, now.st_ino, now.st_mtime_ns) == (made.st_dev, made.st_ino, made.st_mtime_ns):
                path.unlink()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _bind_tcp(address: Address, add_port: Callable[[str], int]) -> int:
    try:
        port = add_port(address.target)
    except RuntimeError:
        port = 0
    if port:
        return port
    raise OSError(f"address: cannot bind {address.target}: {_tcp_reason(address)}")


def _tcp_reason(address: Address) -> str:
    """Why grpcio could not bind: a bind of our own says it."""
    try:
        for family, kind, protocol, _, place in socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
    except OSError as error:
        return error.strerror or type(error).__name__
    return "the bind failed"


def _unix_reason(path: Path) -> str:
    if not path.parent.is_dir():
        return os.strerror(errno.ENOENT)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return os.strerror(errno.EACCES)
    return "the bind failed"


def _remove_stale_socket(path: Path) -> None:
    """Unlink a socket that no process listens on.

    Raises:
        OSError: a live server answers there, or the path is no socket.
    """
    try:
        if not path.is_socket():
            path.lstat()
            raise FileExistsError(f"address: expected a socket or nothing at {path}, got another kind of file")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        if probe.connect_ex(str(path)) != errno.ECONNREFUSED:
            raise FileExistsError(f"address: expected a free socket at {path}, got one that a running server holds")
    path.unlink(missing_ok=True)
