"""Outcome tables: what each candidate scored and cost on each prompt, and how rows are divided.

A table is a Parquet file with ``prompt`` (str), optionally ``task`` (str), and for each candidate ``score:<name>`` in
[0, 1] and ``cost:<name>`` in USD for the query.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proteus_fast.checkpoint import MAX_SKETCH
from proteus_fast.pool import MAX_CANDIDATES

FOLDS = 5
_CAL_SHARE = 4
_FEW_REPEATS = 0.95


@dataclass(frozen=True)
class OutcomeTable:
    """Scores and costs of K candidates on n prompts.

    Attributes:
        name: the data set's. prompts: n texts. tasks: n task names; empty where the table has none.
        candidates: K names. score: (n, K) in [0, 1]. cost_usd: (n, K), USD of the query.
    """

    name: str
    prompts: tuple[str, ...]
    tasks: tuple[str, ...]
    candidates: tuple[str, ...]
    score: NDArray[np.float64]
    cost_usd: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> OutcomeTable:
        """The table of some rows, given as a mask or as indices."""
        index = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        return OutcomeTable(
            self.name,
            tuple(self.prompts[i] for i in index),
            tuple(self.tasks[i] for i in index) if self.tasks else (),
            self.candidates,
            self.score[index],
            self.cost_usd[index],
        )

    def with_candidates(self, names: Sequence[str]) -> OutcomeTable:
        """The table of the named candidates, in that order.

        Raises:
            ValueError: a candidate is not in the table.
        """
        missing = [name for name in names if name not in self.candidates]
        if missing:
            raise ValueError(f"table {self.name}: expected the candidates of the router, got none named {missing[0]!r}")
        index = [self.candidates.index(name) for name in names]
        return OutcomeTable(
            self.name, self.prompts, self.tasks, tuple(names), self.score[:, index], self.cost_usd[:, index]
        )

    @property
    def sha256(self) -> str:
        """Hash of what the table says, whatever file it came from."""
        digest = hashlib.sha256()
        for text in (*self.candidates, *self.prompts):
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        for array in (self.score, self.cost_usd):
            digest.update(np.ascontiguousarray(array, "<f8").tobytes())
        return digest.hexdigest()


def concatenate(first: OutcomeTable, second: OutcomeTable) -> OutcomeTable:
    """The rows of two tables with the same candidates."""
    second = second.with_candidates(first.candidates)
    return OutcomeTable(
        first.name,
        first.prompts + second.prompts,
        first.tasks + second.tasks if first.tasks and second.tasks else (),
        first.candidates,
        np.concatenate([first.score, second.score]),
        np.concatenate([first.cost_usd, second.cost_usd]),
    )


def read_parquet(file: Path, argument: str, columns: Sequence[str] | None = None) -> Any:
    """A Parquet file as a pyarrow table whose texts are UTF-8; ``argument`` is what messages call it.

    Raises:
        FileNotFoundError: no such file. ValueError: not a Parquet file.
    """
    import pyarrow
    import pyarrow.parquet

    if not file.is_file():
        raise FileNotFoundError(f"{argument}: expected a Parquet file, got nothing at {file}")
    try:
        # pyarrow's read_table would take a folder named a=b for a column
        with pyarrow.parquet.ParquetFile(file) as parquet:
            table = parquet.read(columns)
        table.validate(full=True)
    # a column's name that is no UTF-8 is a UnicodeDecodeError
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{argument}: expected a Parquet file, got {str(error)[:300]}") from None
    return table


def read_table(path: str | os.PathLike[str]) -> OutcomeTable:
    """Read and check one Parquet file; the data set is named after its folder.

    Raises:
        FileNotFoundError: no such file. ValueError: not an outcome table; the message has the file and the column.
    """
    file = Path(path)
    table = read_parquet(file, str(file))
    columns = table.column_names
    names = tuple(column.removeprefix("score:") for column in columns if column.startswith("score:"))
    if not 1 <= len(names) <= MAX_CANDIDATES:
        raise ValueError(f"{file}: expected 1 to {MAX_CANDIDATES} columns score:<name>, got {len(names)}")
    for required in ("prompt", *(f"{kind}:{name}" for name in names for kind in ("score", "cost"))):
        if columns.count(required) != 1:
            raise ValueError(f"{file}: expected one column {required[:300]}, got {columns.count(required)}")
    prompts = table["prompt"].to_pylist()
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"{file}: prompt: expected at least one row, all of them texts, got others")
    tasks = tuple(str(task) for task in table["task"].to_pylist()) if "task" in columns else ()
    score, cost = (
        np.stack([_floats(table[f"{kind}:{name}"], f"{file}: {kind}:{name}", most) for name in names], axis=1)
        for kind, most in (("score", 1.0), ("cost", np.inf))
    )
    return OutcomeTable(file.resolve().parent.name, tuple(prompts), tasks, names, score, cost)


def _floats(column: Any, place: str, most: float) -> NDArray[np.float64]:
    values = np.array(column.to_numpy(), dtype=object)
    try:
        # NumPy reads numbers out of texts too
        floats = values.astype(np.float64) if not any(isinstance(value, str | bytes) for value in values) else None
    except (TypeError, ValueError):
        floats = None
    if floats is None:
        raise ValueError(f"{place}: expected numbers, got others")
    wrong = ~(np.isfinite(floats) & (floats >= 0.0) & (floats <= most))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"{place}: expected values in [0, {most:g}], got {floats[row]} in row {row}")
    return floats


def _prompt_bits(prompt: str, first: int) -> int:
    # the published splits use the first eight digits of the same hash
    return int(hashlib.sha256(prompt.strip().encode("utf-8", "surrogatepass")).hexdigest()[first : first + 8], 16)


def is_cal(prompts: Sequence[str]) -> NDArray[np.bool_]:
    """Which training rows are set aside for calibration: a quarter, by prompt hash, (n,)."""
    return np.array([_prompt_bits(prompt, 8) % _CAL_SHARE == 0 for prompt in prompts], np.bool_)


def fold_of(prompts: Sequence[str]) -> NDArray[np.int64]:
    """Fold of every row, 0 ... 4, by prompt hash, so that equal prompts share one, (n,)."""
    return np.array([_prompt_bits(prompt, 16) % FOLDS for prompt in prompts], np.int64)


def shared_prompts(first: Iterable[str], second: Iterable[str]) -> set[str]:
    """Prompts that are in both, white space around them apart."""
    return {prompt.strip() for prompt in first} & {prompt.strip() for prompt in second}


def prompt_sketch(prompts: Iterable[str]) -> tuple[int, ...]:
    """The smallest 1,024 of the 64-bit hashes of distinct prompts, ascending: enough to tell who else has them."""
    return tuple(sorted({_prompt_hash(prompt) for prompt in prompts})[:MAX_SKETCH])


def seen_share(prompts: Sequence[str], sketch: Sequence[int]) -> float:
    """Share of prompts that a sketch is of, estimated from those that would be in it; 0 where it is of none."""
    if not sketch:
        return 0.0
    # a full sketch knows of the hashes up to its largest one
    most = sketch[-1] if len(sketch) == MAX_SKETCH else (1 << 64) - 1
    known = set(sketch)
    looked = [value in known for prompt in prompts if (value := _prompt_hash(prompt)) <= most]
    return sum(looked) / len(looked) if looked else 0.0


def _prompt_hash(prompt: str) -> int:
    return int(hashlib.sha256(prompt.strip().encode("utf-8", "surrogatepass")).hexdigest()[24:40], 16)


def distinct_rows(prompts: Iterable[str]) -> float:
    """How many rows of distinct prompts say as much as these do, n^2 / sum of squared counts (Kish 1965)."""
    counts = Counter(prompts)
    return counts.total() ** 2 / sum(count * count for count in counts.values())


def calibration_notes(prompts: Sequence[str], sketch: Sequence[int] = ()) -> list[str]:
    """What makes a certificate on these rows promise too much: repeats, and prompts of the training rows.

    Args:
        sketch: of the prompts that the router was trained on, see :func:`prompt_sketch`.
    """
    notes = []
    worth = distinct_rows(prompts)
    if worth < _FEW_REPEATS * len(prompts):
        notes.append(
            f"{len(prompts)} queries, with their repeats, say as much as {worth:.0f} distinct ones; the bound takes"
            " rows for independent draws, and a query that they repeat more often than traffic does makes it too high"
        )
    share = seen_share(prompts, sketch)
    if share > 0.0:
        notes.append(
            f"about {share:.1%} of the queries were among the training rows; a router does better there than on others,"
            " and the bound is too high unless traffic repeats them as often"
        )
    return notes


@dataclass(frozen=True)
class Division:
    """The rows of a data set by what they may be used for.

    Attributes:
        fit: everything that is chosen is chosen here, out of fold. calibration: cal + val; read once, by the
            certificate.
    """

    fit: OutcomeTable
    calibration: OutcomeTable


def read_division(folder: str | os.PathLike[str]) -> Division:
    """Divide ``train.parquet`` and ``val.parquet`` of a folder into fit and calibration rows.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_table`; also where a prompt is in both files.
    """
    train = read_table(Path(folder) / "train.parquet")
    val = read_table(Path(folder) / "val.parquet")
    if set(val.candidates) != set(train.candidates):
        raise ValueError(f"{Path(folder) / 'val.parquet'}: expected the candidates of train.parquet, got others")
    val = val.with_candidates(train.candidates)
    crossing = shared_prompts(train.prompts, val.prompts)
    if crossing:
        raise ValueError(f"{folder}: expected no prompt in both train and val, got {len(crossing)}")
    cal = is_cal(train.prompts)
    if cal.all() or not cal.any():
        raise ValueError(f"{folder}: expected enough training rows to set a quarter aside, got {len(train)}")
    return Division(train.take(~cal), concatenate(train.take(cal), val))
