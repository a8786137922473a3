"""Logs: a line of text or of JSON for each event on standard error, never with a prompt.

An event has a name and fields. An access line has the prompt's length, and a hash of it with a key that this process
draws and tells nobody: equal prompts can be seen as equal until the server restarts, and guesses cannot be checked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import secrets
import sys
import time
from typing import Any

from google.protobuf.message import DecodeError, Message

from proteus_server import errors
from proteus_server import proteus_pb2 as pb

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")
_REQUESTS: dict[str, type[Message]] = {"Route": pb.RouteRequest, "RouteBatch": pb.RouteBatchRequest}
# line and paragraph separators among them: what some programs end a line at
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_access = logging.getLogger("proteus_server.access")


def event(log: logging.Logger, level: int, name: str, **fields: Any) -> None:
    """Log an event; as text it reads `name: key=value ...`."""
    text = " ".join(f"{key}={value}" for key, value in fields.items())
    log.log(level, "%s: %s", name, text, extra={"event": name, "fields": fields})


def versions(of: pb.Versions) -> dict[str, Any]:
    """Versions as fields of an event."""
    return {descriptor.name: value for descriptor, value in of.ListFields()}


class JsonFormatter(logging.Formatter):
    """One line of JSON for a record: time (seconds since 1970), level, logger, event, then the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        name = getattr(record, "event", None)
        line: dict[str, Any] = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": name or "log",
        }
        if name is None:
            line["message"] = record.getMessage()
        else:
            line |= getattr(record, "fields", {})
        exception = _exception(record)
        if exception is not None:
            line["exception"] = exception
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """One line of text for a record: time, level, logger, message. Control characters are escaped as in Python."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{self.formatTime(record)} {record.levelname} {record.name}: {record.getMessage()}"
        exception = _exception(record)
        if exception is not None:
            line += f" exception: {exception}"
        return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), line)


def _exception(record: logging.LogRecord) -> str | None:
    """The record's exception without its text, which could be a prompt."""
    error = record.exc_info[1] if record.exc_info else None
    return None if error is None else errors.describe(error)


def configure(level: str, style: str) -> None:
    """Log to standard error from `level` on, as `text` or `json`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])


class AccessLog:
    """One event for a sample of the calls that Python answers."""

    def __init__(self, sample: float) -> None:
        """Args:
        sample: share of the calls, in [0, 1].
        """
        self._sample = sample
        self._key = secrets.token_bytes(32)

    def call(self, method: str, request: bytes, code: str, reply: Message | None, started: float) -> None:
        """Log a call, perhaps.

        Args:
            request: as it came. code: the status's name. reply: None where the call was refused. started: by
                `time.monotonic`.
        """
        if self._sample <= 0.0 or random.random() >= self._sample:
            return
        fields: dict[str, Any] = {"method": method, "status": code, "total_ns": int((time.monotonic() - started) * 1e9)}
        if method in _REQUESTS:
            fields |= self._of_prompts(_REQUESTS[method], request)
        if isinstance(reply, pb.RouteReply | pb.RouteBatchReply):
            timings = reply.timings
            fields |= {"queue_ns": timings.queue_ns, "encode_ns": timings.encode_ns, "decide_ns": timings.decide_ns}
            fields |= versions(reply.versions)
        event(_access, logging.INFO, "call", **fields)

    def _of_prompts(self, kind: type[Message], data: bytes) -> dict[str, Any]:
        try:
            request: Any = kind.FromString(data)
        except DecodeError:
            return {}
        texts = [request.text] if kind is pb.RouteRequest else list(request.texts)
        digest = hashlib.blake2b(key=self._key, digest_size=8)
        size = 0
        for text in texts:
            part = text.encode()
            # lengths keep two batches with the same letters apart
            digest.update(len(part).to_bytes(8, "little") + part)
            size += len(part)
        rows = 1 if kind is pb.RouteRequest else len(texts) or request.rows
        return {"rows": rows, "prompt_bytes": size} | ({"prompt_hash": digest.hexdigest()} if size else {})
