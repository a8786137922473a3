"""What a router answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from proteus_fast.certificate import Status


class RouteBatch:
    """Answers for a batch, in the caller's kind of array and on its device.

    Iterating gives ``choice, mu, score``.

    Attributes:
        choice: index into the pool, (B,) int32, the lowest where scores tie; -1 where the status is INVALID.
        mu: quality preference, (B,) float32. score: of the chosen candidate, (B,) float32.
        status: :class:`Status`, (B,) uint8.
        certified_floor: accuracy that is certified for the policy that served the row, (B,) float32: the tested target
            where the row is FEASIBLE, tau_max where it is INFEASIBLE, NaN where nothing is promised.
    """

    __slots__ = ("certified_floor", "choice", "mu", "score", "status")

    def __init__(self, choice: Any, mu: Any, score: Any, status: Any, certified_floor: Any) -> None:
        self.choice = choice
        self.mu = mu
        self.score = score
        self.status = status
        self.certified_floor = certified_floor

    def __iter__(self) -> Iterator[Any]:
        return iter((self.choice, self.mu, self.score))

    def __len__(self) -> int:
        return len(self.choice)

    def __repr__(self) -> str:
        return f"RouteBatch({', '.join(f'{name}={getattr(self, name)!r}' for name in sorted(self.__slots__))})"


class Decision(NamedTuple):
    """The answer for one query.

    ``certified_floor`` is None where nothing is promised, ``tau_max`` where no target is certified at all. ``score``,
    predicted accuracy weighed against price by ``mu``, ranks; ``fallbacks`` are the other eligible candidates by it.
    """

    candidate: str
    choice: int
    mu: float
    score: float
    status: Status
    certified_floor: float | None
    tau_max: float | None
    fallbacks: tuple[str, ...]
    versions: dict[str, str]


class Feasibility(NamedTuple):
    """What a target would get: its status, its floor, the largest certified target, the expected cost of a query."""

    tau: float
    status: Status
    certified_floor: float | None
    tau_max: float | None
    expected_cost_usd: float


class Explanation(NamedTuple):
    """A decision and, by candidate, the predicted accuracy, the price and the score behind it."""

    decision: Decision
    predicted: dict[str, float]
    price_usd: dict[str, float]
    scores: dict[str, float]
