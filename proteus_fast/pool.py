"""The candidates among which a router chooses: names, prices, order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

MAX_CANDIDATES = 64
MAX_NAME = 256
MAX_PRICE_USD = 1e6


@dataclass(frozen=True)
class Candidate:
    """One model that can answer.

    Attributes:
        name: as in the outcome table. price_usd: mean cost of a query in USD on the training rows.
        mean_score: mean score on the training rows, in [0, 1].
    """

    name: str
    price_usd: float
    mean_score: float


def is_name(text: str) -> bool:
    """Whether a candidate can be called this: it goes into logs, metrics and replies as it is."""
    return text.isprintable() and bool(text.strip()) and len(text) <= MAX_NAME


class Pool(Sequence[Candidate]):
    """Ordered, immutable candidates; ``choice`` indexes into them.

    Raises:
        ValueError: no candidate, more than 64, a name that is there twice, too long or not printable, or a price
            outside [0, 1e6].
    """

    def __init__(self, candidates: Iterable[Candidate]) -> None:
        self._candidates = tuple(candidates)
        self.names = tuple(candidate.name for candidate in self._candidates)
        if not 1 <= len(self.names) <= MAX_CANDIDATES:
            raise ValueError(f"pool: expected 1 to {MAX_CANDIDATES} candidates, got {len(self.names)}")
        self._index = {name: i for i, name in enumerate(self.names)}
        if len(self._index) < len(self.names):
            twice = next(name for i, name in enumerate(self.names) if self._index[name] != i)
            raise ValueError(f"pool: expected distinct names, got {twice!r} twice")
        for candidate in self._candidates:
            if not is_name(candidate.name):
                expected = f"names of at most {MAX_NAME} printable characters"
                raise ValueError(f"pool: expected {expected}, got {candidate.name[:80]!r}")
            if not 0.0 <= candidate.price_usd <= MAX_PRICE_USD:
                expected = f"prices in [0, {MAX_PRICE_USD:g}]"
                raise ValueError(f"pool: expected {expected}, got {candidate.price_usd} of {candidate.name!r}")
        self.price_usd: NDArray[np.float64] = np.array([c.price_usd for c in self._candidates], np.float64)
        self.mean_score: NDArray[np.float64] = np.array([c.mean_score for c in self._candidates], np.float64)
        self.price_usd.flags.writeable = False
        self.mean_score.flags.writeable = False

    @overload
    def __getitem__(self, index: int) -> Candidate: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Candidate]: ...
    def __getitem__(self, index: int | slice) -> Candidate | Sequence[Candidate]:
        return self._candidates[index]

    def __len__(self) -> int:
        return len(self._candidates)

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self._candidates)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pool) and self._candidates == other._candidates

    def __hash__(self) -> int:
        return hash(self._candidates)

    def __repr__(self) -> str:
        return f"Pool({', '.join(self.names)})"

    def index_of(self, name: str, argument: str = "candidate") -> int:
        """Index of a candidate by name; ``argument`` is what the message calls it.

        Raises:
            ValueError: the pool has no such candidate.
        """
        index = self._index.get(name)
        if index is None:
            raise ValueError(f"{argument}: expected one of {', '.join(self.names)}, got {name!r}")
        return index

    def available(self, names: Iterable[str]) -> NDArray[np.bool_]:
        """Mask of the named candidates, (K,) bool."""
        if isinstance(names, str):
            raise TypeError("available: expected a list of names, got one str")
        mask = np.zeros(len(self), np.bool_)
        for name in names:
            mask[self.index_of(name, "available")] = True
        return mask

    @property
    def cheapest(self) -> int:
        """Index of the candidate with the lowest price."""
        return int(np.argmin(self.price_usd))

    @property
    def best_fixed(self) -> int:
        """Index of the candidate with the best mean score on the training rows."""
        return int(np.argmax(self.mean_score))
