"""A folder that takes its place whole, or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A new folder to write in, which takes the place of ``folder`` at the end of the block.

    It is beside its place, under a name that begins with a dot, and is flushed before it is renamed. What was there
    before is moved aside first and removed afterwards: a reader that looks between the two renames finds nothing. A
    block that raises, or is interrupted, changes nothing; a process that is killed may leave the new folder, or that of
    before, beside the place. Of two processes that replace one folder the later one's stays.

    Args:
        folder: absolute, without symbolic links (``os.path.realpath``).
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # of the name so much only that what is added to it fits what a file system takes
    staging = folder.with_name(f".{folder.name[:48]}.{secrets.token_hex(8)}")
    staging.mkdir()
    try:
        yield staging
        for place in (*staging.rglob("*"), staging):
            with _opened(place) as descriptor:
                os.fsync(descriptor)
        with _opened(folder.parent) as parent:
            # not every file system has locks of folders; without them the renames decide who is the later
            with contextlib.suppress(OSError):
                fcntl.flock(parent, fcntl.LOCK_EX)
            _exchange(staging, folder)
            with contextlib.suppress(OSError):
                os.fsync(parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _exchange(staging: Path, folder: Path) -> None:
    previous = staging.with_name(staging.name + ".old")
    try:
        if folder.exists():
            folder.rename(previous)
        staging.rename(folder)
    finally:
        if previous.exists() and not folder.exists():
            previous.rename(folder)
        shutil.rmtree(previous, ignore_errors=True)


@contextlib.contextmanager
def _opened(place: Path) -> Iterator[int]:
    descriptor = os.open(place, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
