"""A server's settings: flags, and the keys of a TOML file, by one table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from proteus_fast import strict_json
from proteus_server import logs, native

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DATA_PLANES = ("native", "grpcio")
_MAX_FILE_BYTES = 1 << 16
# calls, rows or threads
_MAX_COUNT = 1 << 20
# of a line: no setting has a dotted key, of which tomllib keeps every beginning
_MAX_DOTS = 100


@dataclass(frozen=True)
class Options:
    """What can be set on a server; the defaults suit two cores. `SETTINGS` says what each is."""

    insecure: bool = False
    max_queue: int = 256
    max_batch_size: int = 256
    workers: int = 8
    drain_seconds: float = 10.0
    data_plane: str | None = None
    threads: int = 1
    max_connection_age: float = 0.0
    admin_address: str | None = None
    checkpoint_root: str | None = None
    metrics_address: str | None = None
    access_log_sample: float = 0.0

    def __post_init__(self) -> None:
        if self.data_plane not in (None, *DATA_PLANES):
            raise ValueError(f"data_plane: expected {' | '.join(DATA_PLANES)}, got {self.data_plane!r}")
        if self.data_plane == "native" and not native.is_built():
            raise ValueError("data_plane: expected grpcio (this build has no native one), got 'native'")
        counts = dict.fromkeys(("max_queue", "max_batch_size", "workers", "threads"), (1, _MAX_COUNT))
        others = {"drain_seconds": (0, 3600), "access_log_sample": (0, 1), "max_connection_age": (0, 2_000_000)}
        for name, (least, most) in (counts | others).items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name}: expected {least} to {most}, got {strict_json.describe(value)}")
        if self.threads > 1 and self.plane == "grpcio":
            raise ValueError(f"threads: expected 1 on the data plane grpcio, got {self.threads}")

    @property
    def plane(self) -> str:
        """The data plane that serves: the one asked for, else native where it was built."""
        return self.data_plane or ("native" if native.is_built() else "grpcio")


class Setting(NamedTuple):
    """A flag `--name`, and the key `name` of the file. kind: of its value; choices: a string's."""

    name: str
    kind: type
    metavar: str
    text: str
    choices: tuple[str, ...] = ()


SETTINGS = (
    Setting("checkpoint", str, "DIR", "checkpoint to serve (default: $PROTEUS_CHECKPOINT, else the embedded router)"),
    Setting("encoder", str, "DIR", "where the checkpoint's transformer is, if it has moved"),
    Setting("device", str, "cpu | cuda | cuda:N", "where the checkpoint's transformer encodes texts (default: cpu)"),
    Setting("address", str, "HOST:PORT | unix:PATH", "where to serve (required); port 0 takes any free port"),
    Setting("insecure", bool, "", "allow cleartext on an address other machines can reach"),
    Setting("max-queue", int, "N", "calls that may wait beside those at work"),
    Setting("max-batch-size", int, "N", "most rows that the batcher decides at once"),
    Setting("workers", int, "N", "calls worked on at once"),
    Setting("drain-seconds", float, "S", "how long calls in flight may take after SIGTERM"),
    Setting("data-plane", str, "", "what answers Route and RouteBatch (default: native where built)", DATA_PLANES),
    Setting("threads", int, "N", "of the native data plane; grpcio has none to set"),
    Setting("max-connection-age", float, "S", "seconds after which a client is told to connect again; 0: never"),
    Setting(
        "admin-address", str, "HOST:PORT | unix:PATH", "where to serve AdminService; loopback only (default: none)"
    ),
    Setting("checkpoint-root", str, "DIR", "Reload may load checkpoints inside (default: the served one again)"),
    Setting("metrics-address", str, "HOST:PORT", "where GET /metrics answers, for Prometheus (default: none)"),
    Setting("log-level", str, "", "default: $PROTEUS_LOG, else info", logs.LEVELS),
    Setting("log-format", str, "", "a line of text or of JSON for each event (text)", logs.FORMATS),
    Setting("access-log-sample", float, "X", "share of calls that are logged, without their prompts"),
)
_OPTIONS = {field.name: field.default for field in fields(Options)}
_KINDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of a server, for every command line that starts one. What is not given leaves no attribute."""
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of these by the same names; flags win")
    for setting in SETTINGS:
        flag = f"--{setting.name}"
        default = _OPTIONS.get(setting.name.replace("-", "_"))
        text = setting.text if default is None or setting.kind is bool else f"{setting.text} ({default})"
        if setting.kind is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
        elif setting.choices:
            parser.add_argument(flag, choices=setting.choices, default=argparse.SUPPRESS, help=text)
        else:
            parser.add_argument(flag, type=setting.kind, metavar=setting.metavar, default=argparse.SUPPRESS, help=text)


def settings_from(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the file and the flags say, by names with underscores; a flag replaces the file's value.

    Raises:
        ValueError: `FILE: key: expected X, got Y`; or no address. OSError: the file cannot be read.
    """
    file = arguments.config
    given = {} if file is None else read(file)
    given |= {name: value for name, value in vars(arguments).items() if name in _NAMES}
    if "address" not in given:
        raise ValueError("address: expected --address, or address in the file of --config, got none")
    return given


def options_of(settings: Mapping[str, Any]) -> Options:
    """The part of the settings that a `Server` takes.

    Raises:
        ValueError: one is out of its range.
    """
    return Options(**{name: value for name, value in settings.items() if name in _OPTIONS})


def read(file: str) -> dict[str, Any]:
    """A TOML file's settings, by names with underscores.

    Raises:
        ValueError: `FILE: key: expected X, got Y`. OSError: the file cannot be read.
    """
    with Path(file).open("rb") as source:
        data = source.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        raise ValueError(f"{file}: expected at most {_MAX_FILE_BYTES} bytes, got more")
    dots = max(line.count(b".") for line in data.split(b"\n"))
    if dots > _MAX_DOTS:
        raise ValueError(f"{file}: expected at most {_MAX_DOTS} dots in a line, got {dots}")
    try:
        table = tomllib.loads(data.decode())
    except UnicodeDecodeError:
        raise ValueError(f"{file}: expected UTF-8, got other bytes") from None
    # integers of too many digits are a ValueError, deep nesting is a RecursionError
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected TOML, got: {error}") from None
    known = {setting.name: setting for setting in SETTINGS}
    for key, value in table.items():
        if key not in known:
            raise ValueError(f"{file}: {key[:60]}: expected one of {', '.join(known)}, got an unknown key")
        _check(f"{file}: {key}", value, known[key])
    return {key.replace("-", "_"): value for key, value in table.items()}


_NAMES = {setting.name.replace("-", "_") for setting in SETTINGS}


def _check(place: str, value: object, setting: Setting) -> None:
    if setting.choices:
        if value not in setting.choices:
            raise ValueError(f"{place}: expected {' | '.join(setting.choices)}, got {strict_json.describe(value)}")
        return
    # True is an int to Python, and an integer is a number to everybody
    kinds = (int, float) if setting.kind is float else (setting.kind,)
    if type(value) not in kinds:
        plain = isinstance(value, str | int | float | list | dict)
        shown = strict_json.describe(value) if plain else f"a {type(value).__name__}"
        raise ValueError(f"{place}: expected {_KINDS[setting.kind]}, got {shown}")
