"""Accuracy targets that mean something: a path of policies, an exact bound, a table from target to policy.

The path is one list of deterministic policies, fixed before calibration, from the most accurate to the cheapest. For a
target tau the list is walked from its accurate end while the one-sided Clopper-Pearson bound of a step's accuracy on
the calibration rows stays at or above tau; the last step passed is served (Learn then Test with fixed-sequence testing,
Angelopoulos et al. 2021). So for each tau, with probability at least 1 - delta over the calibration rows, the accuracy
on exchangeable traffic is at least tau.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

TAU_STEPS = 1000
MIXING_STEPS = 16
MIN_DELTA, MAX_DELTA = 1e-9, 0.499999
MAX_SEED = (1 << 63) - 1

Guarantee = Literal["certified", "calibrated"]
Mode = Literal["dual", "policy"]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class Status(IntEnum):
    """What an answer promises; the numbers are those of the protocol and of the engine."""

    UNSPECIFIED = 0
    FEASIBLE = 1
    """The target was certified; ``certified_floor`` is the value that was tested."""
    INFEASIBLE = 2
    """The target is above the largest one served (tau_max); the most accurate policy answered, its floor is tau_max."""
    UNCERTIFIED = 3
    """Nothing is promised: a mask, own prices, own ids, sampling, another mode or the calibrated guarantee."""
    INVALID = 4
    """The row could not be decided; its choice is -1."""


def tau_index(tau: float) -> int:
    """Index on the grid 0, .001 ... 1 of the smallest entry that is not below tau (float32 rounding apart).

    Raises:
        ValueError: tau is not in [0, 1].
    """
    if not 0.0 <= tau <= 1.0:
        raise ValueError(f"tau: expected a number in [0, 1], got {tau}")
    return max(int(np.ceil(tau * TAU_STEPS - 1e-3)), 0)


def _pmf(n: int, rate: float, first: int, last: int) -> FloatArray:
    """P(X = k) for k = first ... last and X ~ Binomial(n, rate), rate in (0, 1): from the first by the ratio of
    neighbours, so that memory is that of the window and not of n."""
    if last < first:
        return np.zeros(0)
    k = np.arange(first, last, dtype=np.float64)
    ratio = (n - k) / (k + 1.0) * (rate / (1.0 - rate))
    log_ways = math.lgamma(n + 1) - math.lgamma(first + 1) - math.lgamma(n - first + 1)
    log_first = log_ways + first * math.log(rate) + (n - first) * math.log1p(-rate)
    return np.exp(log_first + np.concatenate([[0.0], np.cumsum(np.log(ratio))]))


def _upper_tails(n: int, rate: float, first: int) -> FloatArray:
    """P(X >= k) for k = first ... and X ~ Binomial(n, rate), up to where the tail is beyond any delta."""
    deviation = math.sqrt(n * rate * (1.0 - rate))
    return np.cumsum(_pmf(n, rate, first, min(n, int(n * rate + 12.0 * deviation) + 60))[::-1])[::-1]


def critical_count(n: int, delta: float, tau: float) -> int:
    """Smallest k with P(X >= k) <= delta for X ~ Binomial(n, tau): the least number of right answers that certifies
    tau.

    This is the test of which the Clopper-Pearson bound is the inversion: the bound of k right answers is at or above
    tau exactly when k is at or above this count.

    Args:
        n: calibration rows, >= 1. delta: error probability, in (0, .5). tau: accuracy, in [0, 1].

    Returns:
        The count; n + 1 where no result certifies tau.
    """
    if tau <= 0.0:
        return 0
    if tau >= 1.0:
        return n + 1
    first = int(n * tau)
    tails = _upper_tails(n, tau, first)
    passed = np.flatnonzero(tails <= delta)
    return first + int(passed[0]) if passed.size else first + tails.size


def lower_bound(successes: int, n: int, delta: float) -> float:
    """One-sided Clopper-Pearson lower bound at confidence 1 - delta (Clopper and Pearson 1934).

    Args:
        successes: right answers, 0 ... n. n: rows. delta: error probability, in (0, .5).

    Returns:
        The rate at which P(X >= successes) = delta, by bisection on the binomial tail.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes: expected an integer in [0, {n}], got {successes}")
    if successes == 0:
        return 0.0
    low, high = 0.0, successes / n
    for _ in range(60):
        rate = 0.5 * (low + high)
        if rate <= 0.0 or rate >= 1.0:
            break
        tail = _upper_tails(n, rate, successes)[:1].sum()
        low, high = (rate, high) if tail <= delta else (low, rate)
    return float(low)


def round_scores(score: NDArray[np.floating], seed: int) -> NDArray[np.uint8]:
    """Round graded scores once to 0 or 1, up with probability equal to the score, so that means are kept.

    Args:
        score: any shape, in [0, 1]. seed: recorded in the certificate.

    Returns:
        The same shape, uint8. Scores of 0 and 1 stay what they are.
    """
    return (np.random.default_rng(seed).random(score.shape) < score).astype(np.uint8)


@dataclass(frozen=True)
class Path:
    """Policies from the most accurate to the cheapest.

    Attributes:
        parameter: path parameter of each vertex (dual: mu; policy: internal tau'), (V,) float32.
        expected_cost_usd: mean cost of the chosen candidates on out-of-fold rows, (V,), strictly decreasing; at mean
            prices for dual, as recorded for policy, whose point is to see which queries are dear.
    """

    parameter: NDArray[np.float32]
    expected_cost_usd: FloatArray

    @property
    def code(self) -> IntArray:
        """Step codes vertex * 16 + g in walking order, ((V - 1) * 16 + 1,)."""
        return np.arange((len(self.parameter) - 1) * MIXING_STEPS + 1)

    def step_cost_usd(self) -> FloatArray:
        """Expected cost of every step: linear between neighbouring vertices, (S,)."""
        position = np.arange(len(self.code)) / MIXING_STEPS
        return np.interp(position, np.arange(len(self.parameter)), self.expected_cost_usd)


@dataclass(frozen=True)
class Table:
    """Look-up from the grid of targets to steps of the path.

    Attributes:
        code: step code for each grid target, (1001,) int32; 0, the most accurate, above ``max_index``.
        max_index: index of the largest target that can be served, -1 where none can.
    """

    code: NDArray[np.int32]
    max_index: int


@dataclass(frozen=True)
class PathCertificate:
    """A path and what was counted on the calibration rows.

    Attributes:
        path: the path that was walked.
        successes: right answers of each step on the calibration rows, (S,).
    """

    path: Path
    successes: IntArray

    def table(self, guarantee: Guarantee, n: int, delta: float) -> Table:
        """Walk the path for every grid target.

        ``certified`` asks for the exact bound, ``calibrated`` only for the plain mean of the same rows.
        """
        # the walk stops at the first failure: only the running minimum matters, and it is sorted
        reached = np.minimum.accumulate(self.successes)
        steps = len(reached)
        code = np.zeros(TAU_STEPS + 1, np.int32)
        max_index = -1
        # no target above the plain mean of the first step can pass, and below one that every step passes nothing
        # changes
        for index in range(int(reached[0] * TAU_STEPS / n + 1e-9), -1, -1):
            if guarantee == "certified":
                least = critical_count(n, delta, index / TAU_STEPS)
            else:
                least = int(np.ceil(index * n / TAU_STEPS - 1e-9))
            passed = int(np.searchsorted(-reached, -least, side="right"))
            if passed > 0:
                max_index = max(max_index, index)
                code[index] = self.path.code[passed - 1]
            if passed == steps:
                code[:index] = code[index]
                break
        return Table(code, max_index)


@dataclass(frozen=True)
class Certificate:
    """What a checkpoint promises, for whom, and on which evidence.

    Attributes:
        delta: error probability of each target's floor. n: calibration rows.
        data_sha256: hash of the calibration table. date: ISO date. rounding_seed: seed of ``round_scores``.
        key: 64-bit key of the mixing hash. paths: one entry for each mode that was calibrated.
        tables: certified and calibrated look-up of each of those modes.
    """

    delta: float
    n: int
    data_sha256: str
    date: str
    rounding_seed: int
    key: int
    paths: Mapping[Mode, PathCertificate]
    tables: Mapping[Mode, Mapping[Guarantee, Table]]

    @classmethod
    def build(
        cls,
        paths: Mapping[Mode, PathCertificate],
        *,
        delta: float,
        n: int,
        data_sha256: str,
        date: str,
        rounding_seed: int,
        key: int,
    ) -> Certificate:
        """Compute the tables of every path.

        Raises:
            ValueError: delta is not in (0, .5) or n < 1.
        """
        check_delta(delta)
        if n < 1:
            raise ValueError(f"n: expected at least 1 calibration row, got {n}")
        tables: dict[Mode, Mapping[Guarantee, Table]] = {
            mode: {g: path.table(g, n, delta) for g in ("certified", "calibrated")} for mode, path in paths.items()
        }
        return cls(delta, n, data_sha256, date, rounding_seed, key, dict(paths), tables)

    def tau_max(self, mode: Mode, guarantee: Guarantee = "certified") -> float | None:
        """Largest target of the grid that the mode serves under the guarantee; None where there is none."""
        tables = self.tables.get(mode)
        # a target of 0 asks for nothing: reaching it alone is reaching none
        if tables is None or tables[guarantee].max_index <= 0:
            return None
        return tables[guarantee].max_index / TAU_STEPS

    def expected_cost_usd(self, mode: Mode, guarantee: Guarantee = "certified") -> FloatArray:
        """Expected cost of the step served for each grid target, (1001,), non-decreasing."""
        return self.paths[mode].path.step_cost_usd()[self.tables[mode][guarantee].code]


def check_delta(delta: float) -> None:
    """Raise ValueError unless delta is a probability that a certificate can have, in (0, .5)."""
    if not MIN_DELTA <= delta <= MAX_DELTA:
        raise ValueError(f"delta: expected a number in (0, .5), {MIN_DELTA:g} at least, got {delta}")


def check_seed(seed: int) -> None:
    """Raise ValueError unless a certificate can name the seed of its rounding, 0 to 2^63 - 1."""
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed: expected an integer from 0 to {MAX_SEED}, got {seed}")


def cost_scale(p: FloatArray, c: FloatArray) -> float:
    """kappa: the smallest cost weight at which 99 % of the rows choose the cheapest candidate.

    Args:
        p: out-of-fold predicted accuracy, (n, K). c: cost in cost units, (K,).
    """
    cheapest = int(np.argmin(c))
    # a candidate within .1 % of the cheapest price is as cheap: the weight that tells the two apart has no bound
    dearer = c > c[cheapest] * 1.001
    if not dearer.any():
        return 1.0
    gain = (p[:, dearer] - p[:, [cheapest]]) / (c[dearer] - c[cheapest])
    return float(np.clip(np.quantile(gain.max(axis=1), 0.99, method="higher") * (1 + 1e-6), 1e-6, 1e8))


def build_dual_path(
    p: FloatArray, score: FloatArray, price_usd: FloatArray, *, cost_unit_usd: float, kappa: float, gamma: float,
    vertices: int = 64, grid: int = 2048,
) -> Path:  # fmt: skip
    """Lay the plug-in path through out-of-fold predictions.

    Each vertex is the rule argmax p_i - w c_i with w = kappa (1 - mu)^gamma. The path starts at the weight with the
    best out-of-fold accuracy (a weight of zero trusts noise in p) and ends at the cheapest policy.

    Args:
        p: out-of-fold predicted accuracy, (n, K). score: labels of the same rows, (n, K), in [0, 1].
        price_usd: mean price of a query, (K,). kappa, gamma: of the score. vertices: at most this many.
        grid: weights tried.
    """
    c = price_usd / cost_unit_usd
    # weights in geometric steps: how fine the path is does not depend on kappa
    least = min(1e-4, 1e-4 * kappa)
    tried = np.concatenate([[0.0], np.geomspace(least, kappa, grid - 1)])
    mu = (1.0 - (tried / kappa) ** (1.0 / gamma)).astype(np.float32)
    weight = kappa * (1.0 - mu.astype(np.float64)) ** gamma
    rows = np.arange(len(p))
    accuracy, cost = np.empty(grid), np.empty(grid)
    for i, w in enumerate(weight):
        choice = np.argmax(p - w * c, axis=1)
        accuracy[i] = score[rows, choice].mean()
        cost[i] = price_usd[choice].mean()
    return lay_path(mu, accuracy, cost, vertices)


def lay_path(
    parameter: FloatArray | NDArray[np.float32], accuracy: FloatArray, cost: FloatArray, vertices: int
) -> Path:
    """A path from policies that were tried out of fold, ordered from the most accurate end to the cheapest.

    It starts at the best accuracy; policies that do not lower the cost are left out, and vertices are spread evenly
    over what changes: accuracy, cost and the logarithm of cost.

    Args:
        parameter: path parameters, (P,). accuracy, cost: of each, on out-of-fold rows, cost in USD, (P,).
        vertices: at most this many.
    """
    start = int(np.flatnonzero(accuracy == accuracy.max())[-1])
    parameter, accuracy, cost = parameter[start:], accuracy[start:], cost[start:]
    changed = np.concatenate([[True], cost[1:] < np.minimum.accumulate(cost)[:-1]])
    parameter, accuracy, cost = parameter[changed], accuracy[changed], cost[changed]
    if len(parameter) > vertices:
        position = np.zeros(len(parameter))
        for values in (accuracy, cost, np.log(np.maximum(cost, 1e-12))):
            moved = np.cumsum(np.abs(np.diff(values)))
            position[1:] += moved / max(moved[-1], 1e-300)
        targets = np.linspace(0.0, position[-1], vertices)
        kept = np.unique(np.searchsorted(position, targets - 1e-12).clip(0, len(parameter) - 1))
        parameter, cost = parameter[kept], cost[kept]
    return Path(np.ascontiguousarray(parameter, np.float32), cost.astype(np.float64))


def count_successes(
    path: Path, choice: NDArray[np.int32], outcome: NDArray[np.uint8], u: NDArray[np.uint64]
) -> IntArray:
    """Right answers of every step of the path.

    Args:
        path: V vertices. choice: choice of every row at every vertex, (V, n). outcome: rounded labels, (n, K).
        u: mixing hash of the rows, (n,).

    Returns:
        (S,) counts in walking order.
    """
    vertices = len(path.parameter)
    right = outcome[np.arange(choice.shape[1]), choice].astype(np.int64)
    # a row changes sides at the step whose g exceeds the top four bits of its hash
    side = (u >> np.uint64(60)).astype(np.int64)
    counts = [right[0].sum()]
    for vertex in range(vertices - 1):
        gain = right[vertex + 1] - right[vertex]
        by_side = np.bincount(side, weights=gain, minlength=MIXING_STEPS)
        counts.extend(counts[-1] + np.cumsum(by_side).astype(np.int64))
    return np.array(counts, dtype=np.int64)


def plan(tau: float, headroom: float, delta: float = 0.1, power: float = 0.9) -> int:
    """Labels needed so that tau is certified with the given power.

    Args:
        tau: target, in (0, 1). headroom: true accuracy of the most accurate policy minus tau, tau + headroom <= 1, and
            at least a step of the grid (.001) above the target that is served for tau, the next one of the grid.
        delta: error probability of the certificate. power: probability that the certificate succeeds.

    Returns:
        The smallest n from which the power never falls below ``power`` again (it moves in a sawtooth).
    """
    check_delta(delta)
    if not 0.0 < tau < 1.0:
        raise ValueError(f"tau: expected a number in (0, 1), got {tau}")
    if not headroom > 0.0 or tau + headroom > 1.0 + 1e-12:
        raise ValueError(f"headroom: expected a number in (0, {1.0 - tau:g}], got {headroom}")
    accuracy, served = min(tau + headroom, 1.0), tau_index(tau) / TAU_STEPS
    if accuracy - served < 1e-3 - 1e-9:
        least = f"at least one step of the grid (.001) above {served:g}, which is served"
        raise ValueError(f"headroom: expected {least}, got {headroom} above {tau}")
    tau, headroom = served, accuracy - served
    if not 0.5 <= power < 1.0:
        raise ValueError(f"power: expected a number in [.5, 1), got {power}")
    normal = NormalDist()
    spread = -normal.inv_cdf(delta) * np.sqrt(tau * (1 - tau)) + normal.inv_cdf(power) * np.sqrt(
        accuracy * (1 - accuracy)
    )
    # the normal approximation with room for the exact bound and the sawtooth; from there down to the first failure
    n = int(1.03 * (spread / headroom) ** 2 + 15.0 / headroom) + 50
    while n > 1 and _power(n, tau, accuracy, delta) >= power:
        n -= 1
    return n + 1


def _power(n: int, tau: float, accuracy: float, delta: float) -> float:
    """P(X >= critical count) for X ~ Binomial(n, accuracy)."""
    least = critical_count(n, delta, tau)
    if least > n:
        return 0.0
    if accuracy >= 1.0:
        return 1.0
    first = max(0, int(n * accuracy - 12 * math.sqrt(n * accuracy * (1 - accuracy))) - 60)
    return 1.0 - float(_pmf(n, accuracy, first, least - 1).sum())
