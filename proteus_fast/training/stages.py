"""Finished stages of a training and its log, in the folder beside the checkpoint."""

from __future__ import annotations

import json
import logging
import os
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_logger = logging.getLogger(__name__)


class Stages:
    """Finished stages of a run on disk, keyed by everything that they depend on; those of another key are removed."""

    def __init__(self, folder: Path, fingerprint: str, *, kind: str = "stage", read_only: bool = False) -> None:
        self.folder = folder
        self._prefix = f"{kind}-{fingerprint[:16]}-"
        self._read_only = read_only
        self._began = time.monotonic()
        if read_only:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f"{kind}-*.npz"):
            if not stale.name.startswith(self._prefix):
                stale.unlink()

    def beside(self, kind: str, fingerprint: str) -> Stages:
        """Stages of another kind in the same folder, which depend on less."""
        return Stages(self.folder, fingerprint, kind=kind, read_only=self._read_only)

    def load(self, name: str) -> dict[str, NDArray[Any]] | None:
        """Arrays of a finished stage; None where it has yet to run."""
        path = self.folder / f"{self._prefix}{name}.npz"
        if not path.is_file():
            return None
        try:
            # np.load would leave a file open that it cannot read
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            # a machine that stopped may leave one so
            _logger.warning("%s: expected a finished stage, got %s; it runs again", path, type(error).__name__)
            return None

    def save(self, name: str, **arrays: Any) -> dict[str, NDArray[Any]]:
        """Keep the arrays of a stage; a reader never sees a part of them."""
        if self._read_only:
            return {key: np.asarray(value) for key, value in arrays.items()}
        path = self.folder / f"{self._prefix}{name}.npz"
        partial = path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
        return {key: np.asarray(value) for key, value in arrays.items()}

    def drop(self, name: str) -> None:
        """Remove what was kept of a stage."""
        if not self._read_only:
            (self.folder / f"{self._prefix}{name}.npz").unlink(missing_ok=True)

    def log(self, **entry: Any) -> None:
        """Append a line to log.jsonl; ``seconds`` is since the run began."""
        if self._read_only:
            return
        entry["seconds"] = round(time.monotonic() - self._began, 3)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
