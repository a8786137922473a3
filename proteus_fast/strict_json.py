"""Reading JSON that may be wrong or hostile: every error names the file and the field."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

MAX_BYTES = 16 << 20
# of an integer; Python's own limit has another message
_MAX_DIGITS = 400
Choice = TypeVar("Choice", bound=str)


def describe(value: object) -> str:
    """A value as a message has it, however large or deep it is."""
    if isinstance(value, dict | list):
        return f"a {type(value).__name__} of {len(value)}"
    # Python refuses to write out longer ones
    if isinstance(value, int) and value.bit_length() > 8 * _MAX_DIGITS:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Node:
    """A value of a JSON document with its place, for messages like ``config.json: pool[2].name: expected ...``."""

    def __init__(self, value: object, place: str, separator: str = ": ") -> None:
        self._value = value
        self._place = place
        self._separator = separator

    def _child(self, value: object, name: str) -> Node:
        return Node(value, f"{self._place}{self._separator}{name[:60]}", ".")

    def fail(self, expected: str) -> NoReturn:
        raise ValueError(f"{self._place}: expected {expected}, got {describe(self._value)}")

    def fields(self, *names: str) -> Iterator[Node]:
        """The fields of an object that has exactly these, in the order asked for."""
        if not isinstance(self._value, dict):
            self.fail("an object")
        missing = [name for name in names if name not in self._value]
        extra = [name for name in self._value if name not in names]
        if missing or extra:
            wrong = f"no {missing[0]!r}" if missing else f"an unknown field {extra[0][:60]!r}"
            raise ValueError(f"{self._place}: expected the fields {', '.join(names)}, got {wrong}")
        for name in names:
            yield self._child(self._value[name], name)

    def items(self) -> Iterator[tuple[str, Node]]:
        """Keys and values of an object."""
        if not isinstance(self._value, dict):
            self.fail("an object")
        for key, value in self._value.items():
            yield key, self._child(value, key)

    def elements(self, least: int, most: int) -> list[Node]:
        if not isinstance(self._value, list) or not least <= len(self._value) <= most:
            self.fail(f"a list of {least} to {most} entries")
        return [Node(value, f"{self._place}[{i}]", ".") for i, value in enumerate(self._value)]

    @property
    def is_null(self) -> bool:
        return self._value is None

    def one_of(self, *allowed: Choice) -> Choice:
        found = next((choice for choice in allowed if choice == self._value), None)
        if found is None:
            self.fail(" or ".join(repr(choice) for choice in allowed))
        return found

    def text(self, *, most: int = 4096) -> str:
        if not isinstance(self._value, str) or len(self._value) > most:
            self.fail(f"a text of at most {most} characters")
        # what is no Unicode goes into no message or reply
        if any("\ud800" <= character <= "\udfff" for character in self._value):
            self.fail("a text without surrogates")
        return self._value

    def integer(self, least: int, most: int) -> int:
        if not isinstance(self._value, int) or isinstance(self._value, bool) or not least <= self._value <= most:
            self.fail(f"an integer in [{least}, {most}]")
        return self._value

    def number(self, least: float = -math.inf, most: float = math.inf) -> float:
        value = self._value
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            self.fail(f"a number in [{least:g}, {most:g}]")
        return float(value)

    def numbers(self, least_length: int, most_length: int, least: float, most: float) -> NDArray[np.float64]:
        nodes = self.elements(least_length, most_length)
        return np.array([node.number(least, most) for node in nodes], np.float64)

    def hexadecimal(self, digits: int) -> str:
        value = self.text(most=digits)
        if len(value) != digits or any(c not in "0123456789abcdef" for c in value):
            self.fail(f"{digits} lower-case hexadecimal digits")
        return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"expected finite numbers, got {name}")


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"expected integers of at most {_MAX_DIGITS} digits, got {len(digits)}")
    return int(digits)


def _no_duplicates(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("expected distinct field names, got one twice")
    return found


def parse(data: bytes, place: str) -> Node:
    """Parse one JSON document.

    Args:
        data: UTF-8. place: what messages call it, usually the file's path.

    Raises:
        ValueError: too large, not UTF-8, not JSON, nested too deeply, a field twice, NaN or Infinity.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"{place}: expected at most {MAX_BYTES} bytes, got {len(data)}")
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_int=_integer,
            parse_constant=_no_constant,
            object_pairs_hook=_no_duplicates,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: expected UTF-8, got byte {data[error.start]:#04x} at {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: expected JSON, got {error.msg} at line {error.lineno}") from None
    except RecursionError:
        raise ValueError(f"{place}: expected shallow JSON, got deep nesting") from None
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return Node(value, place)


def check_size(path: Path, most: int) -> None:
    """Raise unless a path is a regular file of at most so many bytes; see :func:`read_bytes`."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a file, got nothing there")
    if not path.is_file():
        raise ValueError(f"{path}: expected a regular file")
    size = path.stat().st_size
    if size > most:
        raise ValueError(f"{path}: expected at most {most} bytes, got {size}")


def read_bytes(path: Path, most: int) -> bytes:
    """The bytes of a regular file of bounded size.

    Raises:
        FileNotFoundError: no such file. ValueError: not a regular file, or larger than ``most``.
    """
    check_size(path, most)
    return path.read_bytes()
