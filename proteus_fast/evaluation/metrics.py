"""Accuracy and cost of policies: curves, hulls, the oracle, targets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from proteus_fast.certificate import MIXING_STEPS
from proteus_fast.evaluation.outcomes import OutcomeTable

FloatArray = NDArray[np.float64]

RELATIVE_TARGETS = tuple(q / 10 for q in range(1, 11))
SELECTION_TARGETS = tuple(q / 10 for q in range(3, 10))
LEAK_SHARE = 0.5
"""Share of the gap between best fixed candidate and oracle beyond which an accuracy is taken for a leak."""

_SLACK = 1e-12


def realised(table: OutcomeTable, choice: NDArray[np.int32] | NDArray[np.int64]) -> tuple[float, float]:
    """Mean score and mean cost in USD of a choice for every row, (n,)."""
    rows = np.arange(len(table))
    return float(table.score[rows, choice].mean()), float(table.cost_usd[rows, choice].mean())


def relative_targets(mean_score: FloatArray, price_usd: FloatArray, q: tuple[float, ...]) -> FloatArray:
    """tau = a_cheap + q (a_best - a_cheap): accuracy targets relative to what fixed candidates reach.

    Args:
        mean_score, price_usd: of the candidates on the rows that targets are set by, (K,). q: shares of the range.
    """
    cheap = float(mean_score[np.argmin(price_usd)])
    return cheap + np.array(q, np.float64) * (float(mean_score.max()) - cheap)


def cost_at_accuracy(accuracy: FloatArray, cost: FloatArray, tau: float) -> float:
    """Least cost of reaching an accuracy on average with the given policies and mixtures of two of them.

    Args:
        accuracy, cost: of P policies, (P,). tau: accuracy to reach.

    Returns:
        The cost; NaN where no policy reaches tau.
    """
    enough = accuracy >= tau
    if not enough.any():
        return float("nan")
    best = float(cost[enough].min())
    below, above = ~enough, enough & (cost > cost[~enough].min(initial=np.inf))
    if below.any() and above.any():
        rise = (accuracy[above][:, None] - accuracy[below]).clip(1e-300)
        share = (tau - accuracy[below]) / rise
        mixed = cost[below] + share * (cost[above][:, None] - cost[below])
        best = min(best, float(mixed.min()))
    return best


def hull_cost(table: OutcomeTable, tau: float) -> float:
    """Least mean cost of reaching tau with fixed candidates and their mixtures (RouterBench's zero router)."""
    return cost_at_accuracy(table.score.mean(axis=0), table.cost_usd.mean(axis=0), tau)


def oracle_cost(table: OutcomeTable, tau: float) -> float:
    """Least mean cost of reaching tau for one who knows every outcome: the linear programme over all rows.

    Solved by its dual, max over lambda >= 0 of lambda tau + mean min_i (cost_i - lambda score_i), which is concave.

    Returns:
        The cost; NaN where even the best candidate of every row does not reach tau.
    """
    score, cost = table.score, table.cost_usd
    if score.max(axis=1).mean() < tau - _SLACK:
        return float("nan")
    rows = np.arange(len(table))

    def at(price: float) -> tuple[float, float]:
        value = cost - price * score
        choice = np.argmin(value, axis=1)
        return price * tau + float(value[rows, choice].mean()), tau - float(score[rows, choice].mean())

    low, high = 0.0, float(cost.max()) or 1.0
    # without the slack a mean that rounds below tau would drive lambda to where costs have no digits left
    while at(high)[1] > _SLACK:
        high *= 4.0
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if at(middle)[1] > _SLACK else (low, middle)
    return max(at(low)[0], at(high)[0])


@dataclass(frozen=True)
class Curve:
    """What the rules argmax p_i - w c_i would have got on each row, over a range of cost weights w from 0 up.

    Attributes:
        score, cost_usd: realised on each row, (W, n).
    """

    score: NDArray[np.float32]
    cost_usd: NDArray[np.float32]

    def costs(self, taus: FloatArray, table: OutcomeTable, counts: FloatArray | None = None) -> FloatArray:
        """Cost at equal accuracy: the hull of the curve, read off the evaluated rows themselves.

        Args:
            taus: accuracies to reach. table: the rows that the curve is of. counts: how often each row counts, (n,);
                None: once.

        Returns:
            USD of a query for every tau; the best fixed candidate's cost where the curve does not reach it.
        """
        share = np.full(len(table), 1.0 / len(table)) if counts is None else counts / counts.sum()
        accuracy, cost = self.score @ share, self.cost_usd @ share
        instead = float(share @ table.cost_usd[:, np.argmax(share @ table.score)])
        costs = np.array([cost_at_accuracy(accuracy, cost, float(tau)) for tau in taus])
        return np.maximum(np.where(np.isnan(costs), instead, costs), 1e-12)


def plug_in_curve(p: FloatArray, price_usd: FloatArray, table: OutcomeTable) -> Curve:
    """The curve of predicted accuracies p (n, K) under prices (K,) on the rows of a table."""
    c = price_usd / max(float(price_usd.max()), 1e-300)
    weights = np.concatenate([[0.0], np.geomspace(1e-4, 3e3, 200)])
    rows = np.arange(len(table))
    score = np.empty((len(weights), len(table)), np.float32)
    cost = np.empty_like(score)
    for i, weight in enumerate(weights):
        choice = np.argmax(p - weight * c, axis=1)
        score[i], cost[i] = table.score[rows, choice], table.cost_usd[rows, choice]
    return Curve(score, cost)


def selection_cost(p: FloatArray, price_usd: FloatArray, table: OutcomeTable) -> float:
    """What choices inside fit are made by: geometric mean of the costs at equal accuracy over q = .3 ... .9, in USD."""
    taus = relative_targets(table.score.mean(axis=0), price_usd, SELECTION_TARGETS)
    return float(np.exp(np.log(plug_in_curve(p, price_usd, table).costs(taus, table)).mean()))


def bootstrap_costs(curve: Curve, table: OutcomeTable, taus: FloatArray, draws: int, seed: int) -> FloatArray:
    """Cost at equal accuracy under resampling of the rows; one seed draws the same rows for every curve of a table.

    Args:
        taus: accuracies, (T,), held fixed. draws: bootstrap samples.

    Returns:
        USD of a query, (draws, T).
    """
    random = np.random.default_rng(seed)
    n = len(table)
    costs = np.empty((draws, len(taus)))
    for draw in range(draws):
        counts = np.bincount(random.integers(0, n, n), minlength=n).astype(np.float64)
        costs[draw] = curve.costs(taus, table, counts)
    return costs


def bootstrap_log_ratio(
    ours: Curve, other: Curve, table: OutcomeTable, taus: FloatArray, draws: int, seed: int
) -> FloatArray:
    """Logarithm of our cost over another's at equal accuracy, averaged over targets, under resampling of the rows.

    Args:
        ours, other: curves on the same rows. taus: accuracies, held fixed. draws: paired bootstrap samples.

    Returns:
        (draws,); its quantiles are the interval.
    """
    costs = [bootstrap_costs(curve, table, taus, draws, seed) for curve in (ours, other)]
    ratios: FloatArray = np.log(costs[0] / costs[1]).mean(axis=1)
    return ratios


def fixed_curve(table: OutcomeTable) -> Curve:
    """The fixed candidates as a curve: its costs are those of their hull."""
    return Curve(table.score.T.astype(np.float32), table.cost_usd.T.astype(np.float32))


def step_choices(choice: NDArray[np.int32], u: NDArray[np.uint64]) -> NDArray[np.int32]:
    """What every step of a path chooses.

    Args:
        choice: choice of every row at every vertex, (V, n), from the engine. u: mixing hash of the rows, (n,).

    Returns:
        ((V - 1) * 16 + 1, n) in walking order.
    """
    side = u >> np.uint64(60)
    cheaper = side < np.arange(MIXING_STEPS, dtype=np.uint64)[:, None]
    mixed = np.where(cheaper, choice[1:, None], choice[:-1, None])
    return np.concatenate([mixed.reshape(-1, choice.shape[1]), choice[-1:]])


def leak_limit(table: OutcomeTable) -> float:
    """Best fixed + 50 % of the gap to the oracle; honest routers close far less of it on our tables (results/leak.md).

    It is no bound: candidates that are good at different kinds of queries are told apart honestly.
    """
    best, oracle = float(table.score.mean(axis=0).max()), float(table.score.max(axis=1).mean())
    return best + LEAK_SHARE * (oracle - best)


def median_correlation(score: FloatArray) -> float:
    """Median over pairs of candidates of the correlation of their scores; NaN where fewer than two of them vary.

    Candidates find the same questions hard. A value near 0 says that the columns were shuffled against each other, and
    an oracle over such a table is worthless.

    Args:
        score: (n, K).
    """
    varying = score[:, score.std(axis=0) > 0]
    if varying.shape[1] < 2:
        return float("nan")
    upper = np.triu_indices(varying.shape[1], 1)
    return float(np.median(np.asarray(np.corrcoef(varying.T))[upper]))
