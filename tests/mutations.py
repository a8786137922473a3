"""Mutations of files that keep most of their structure, so that what is behind a parser is reached."""

from __future__ import annotations

import copy
import json
import math
import random
import struct
from collections.abc import Callable
from typing import Any

from proteus_server.config import SETTINGS

# JSON as text, because no Python value is written like it
_RAW = (
    "NaN", "-Infinity", "1e400", "-1e400", "1e-400", "-0", "-0.0", "9" * 4301, "[" * 2000, "[" * 60 + "]" * 60,
    '"\\ud800"', '"\\udfff\\u0000"', "{" + '"a":{' * 200 + "}" * 201, '{"a": 1, "a": 2}', "1.0", "1E0",
)  # fmt: skip
_VALUES = (
    None, True, False, "", "\0", "x" * 300, "x" * 5000, "/", "/" + "x" * 300, "../..", "encoder", "hash", "transformer",
    "none", "mlp", "clip", "sigmoid", "residual", "free", "dual", "policy", "0" * 64, "f" * 16, [], {}, [[]], [None],
    [0] * 70, -1, 0, 1, 2, 3, 64, 65, 4096, 1 << 16, 1 << 20, 1 << 24, 1 << 31, 1 << 40, 1 << 53, 1 << 63, 1 << 64,
    1 << 200, 0.5, 0.999999, -1e-300, 1e-300, 5e-324, 1e-15, 1e-9, 1e6, 1e9, 1e300, 1.7976931348623157e308,
    "F64", "F32", "F16", "BF16", "F8_E4M3", "F4", "I64", "I32", "I8", "U8", "BOOL", "C64",
)  # fmt: skip
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "U32": 32, "I8": 8, "U8": 8, "BOOL": 8}
_FLOATS = (math.nan, math.inf, 0.0, -0.0, 1e-45, 1e-20, 1.0, -1.0, 2.0, 1e4, 1e5, -1e5, 1.1e5, 1e19, -3e38, 3.4e38)
_TOML_VALUES = (
    '"x"', "''", '"\\u0000"', '"' + "x" * 5000 + '"', '"""\na\n"""', "'''\n'''", "0", "1", "-1", "9" * 30, "9" * 4301,
    "0x" + "f" * 5000, "true", "false", "1.5", "1e400", "nan", "-inf", "[]", "{}", "[1, 'x', {}]", "[" * 300,
    "[" * 300 + "]" * 300, "[" * 5000, "{a=" * 300 + "1" + "}" * 300, "{" + "a." * 300 + "a=1}", "2025-01-01",
    "2025-13-45", "2025-01-01T00:00:00+99:99", "12:00:00", "07:32:00.999999999999", "'unix:/a'", "'[::1]:0'",
    "'localhost:" + "0" * 4301 + "'", "'native'", "'json'",
)  # fmt: skip
_TOML_KEYS = ("a", "''", '"a.b"', "a.b", "a." * 300 + "a", "a." * 8000 + "a", "_", "x" * 300)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, drop, double, insert or overwrite bytes of any data."""
    made = bytearray(data)
    at = rng.randrange(len(made) + 1)
    size = rng.choice((1, 1, 2, 4, 8, rng.randrange(1, 64)))
    match rng.randrange(6):
        case 0 if made:
            made[at % len(made)] ^= 1 << rng.randrange(8)
        case 1:
            del made[at : at + size]
        case 2:
            made[at:at] = rng.randbytes(size)
        case 3:
            made[at : at + size] = rng.randbytes(size)
        case 4:
            made[at:at] = made[at : at + size]
        case _:
            made[at : at + size] = rng.choice((b"\0", b"\xff")) * size
    return bytes(made)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Change one to three values, keys or sizes of a JSON document; bytes of what is none."""
    try:
        root = [json.loads(data)]
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        parent: Any = root
        key: Any = 0
        while isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.85:
            parent = parent[key]
            key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
        parent[key] = _other_value(parent[key], rng)
        if parent is not root and rng.random() < 0.3:
            _change_container(parent, key, rng)
    try:
        text = json.dumps(root[0])
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng)
    for i, raw in enumerate(_RAW):
        text = text.replace(f'"<raw {i}>"', raw)
    return text.encode("utf-8", "surrogatepass")


def _other_value(value: Any, rng: random.Random) -> Any:
    match rng.randrange(7):
        case 0:
            return f"<raw {rng.randrange(len(_RAW))}>"
        case 1 if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
            return rng.choice(
                (value + 1, value - 1, -value, value * 2, value / 2, float(value), str(value), value + 0.5)
            )
        case 2 if isinstance(value, str) and value:
            at = rng.randrange(len(value))
            return rng.choice((value[:at], value + value[at:], value.upper(), value[:at] + "0" + value[at + 1 :]))
        case 3:
            most = 2 if isinstance(value, list | dict) else 5000
            return rng.choice(([value], {"a": value}, [value] * rng.choice((2, most))))
        case 4 if isinstance(value, list):
            return rng.choice((value[::-1], value[:-1], value + value[-1:], value[:1]))
        case 5:
            return value
        case _:
            return copy.deepcopy(rng.choice(_VALUES))


def _change_container(parent: Any, key: Any, rng: random.Random) -> None:
    if isinstance(parent, list):
        rng.choice((parent.reverse, lambda: parent.pop(key), lambda: parent.insert(key, parent[key])))()
    else:
        other = rng.choice(list(parent))
        name = rng.choice((*parent, "x", "", "__metadata__", "x" * 300, "\ud800"))
        rng.choice(
            (
                lambda: parent.pop(key),
                lambda: parent.update({name: parent[key]}),
                lambda: parent.update({key: parent[other], other: parent[key]}),
                lambda: parent.update({name: parent.pop(key)}),
            )
        )()


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Change the header's JSON, its length, or the tensors behind a header that stays right."""
    size = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    header, body = data[8 : 8 + size], data[8 + size :]
    kind = rng.randrange(8)
    if kind == 0:
        return mutate_bytes(data, rng)
    if kind == 1:
        lie = rng.choice((0, 1, size - 1, size + 1, size + len(body), 1 << 20, 1 << 40, (1 << 63) - 1, (1 << 64) - 1))
        return struct.pack("<Q", lie % (1 << 64)) + data[8:]
    if kind <= 3:
        header = mutate_json(header, rng)
        return struct.pack("<Q", len(header)) + header + body
    try:
        tensors = {
            name: (entry["dtype"], list(entry["shape"]), body[entry["data_offsets"][0] : entry["data_offsets"][1]])
            for name, entry in json.loads(header).items()
            if name != "__metadata__"
        }
        _change_tensors(tensors, rng)
        return _write_safetensors(tensors)
    except (ValueError, TypeError, KeyError, LookupError, AttributeError, RecursionError):
        return mutate_bytes(data, rng)


def _change_tensors(tensors: dict[str, tuple[str, list[int], bytes]], rng: random.Random) -> None:
    name, other = rng.choice(list(tensors)), rng.choice(list(tensors))
    dtype, shape, body = tensors[name]
    match rng.randrange(8):
        case 0:
            tensors[name], tensors[other] = tensors[other], tensors[name]
        case 1:
            del tensors[name]
        case 2:
            tensors[rng.choice(("x", "policy.w1", "projection.w1", "encoder.table", ""))] = tensors[name]
        case 3:
            count = math.prod(shape)
            shapes = ([count], [1, *shape], [*shape, 1], shape[::-1], [count // 2, 2], [0], [0, 1 << 62], [0, 1 << 63])
            chosen = rng.choice((*shapes, [1] * 40, [], [1 << 32, 1 << 32, 0]))
            tensors[name] = (dtype, chosen, body if 0 not in chosen else b"")
        case 4:
            changed = rng.choice(list(_BITS))
            tensors[name] = (changed, [len(body) * 8 // _BITS[changed]], body)
        case 5 if shape:
            # a row more or less
            row = len(body) // max(1, shape[0])
            body, rows = rng.choice(
                ((body[row:], shape[0] - 1), (body + body[:row], shape[0] + 1), (body * 2, shape[0] * 2))
            )
            tensors[name] = (dtype, [rows, *shape[1:]], body)
        case _:
            made = bytearray(body)
            for _ in range(rng.choice((1, 1, 3, 100))):
                at = rng.randrange(max(1, len(made) // 4)) * 4
                made[at : at + 4] = struct.pack("<f", rng.choice(_FLOATS)) if rng.random() < 0.7 else rng.randbytes(4)
            tensors[name] = (dtype, shape, bytes(made[: len(body)]))


def _write_safetensors(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    header, at = {}, 0
    for name, (dtype, shape, body) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(body)]}
        at += len(body)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(body for _, _, body in tensors.values())


def mutate_toml(data: bytes, rng: random.Random) -> bytes:
    """Change lines, keys and values of a flat TOML file."""
    if rng.random() < 0.2:
        return mutate_bytes(data, rng)
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    key, _, value = lines[at].partition(b"=")
    names = [setting.name for setting in SETTINGS]
    changed = rng.choice(_TOML_VALUES).encode()
    name = rng.choice((*names, *_TOML_KEYS)).encode()
    steps: tuple[Callable[[], object], ...] = (
        lambda: lines.__setitem__(at, key + b"=" + changed),
        lambda: lines.__setitem__(at, rng.choice(names).encode() + b" = " + changed),
        lambda: lines.__setitem__(at, name + b" =" + value),
        lambda: lines.insert(at, name + b" = " + changed),
        lambda: lines.insert(at, b"[" + name + b"]"),
        lambda: lines.insert(at, b"[[" + name + b"]]"),
        lambda: lines.insert(at, lines[rng.randrange(len(lines))]),
        lambda: lines.pop(at),
    )
    rng.choice(steps)()
    return b"\n".join(lines)
