"""Where the policy starts: the plug-in dual table, read off out-of-fold rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Start(NamedTuple):
    """Where training starts: targets, preferences and cost weights of the dual table at the knots, (N,) each; gamma."""

    tau: Tensor
    mu: Tensor
    weight: Tensor
    gamma: float


def dual_start(
    p: NDArray[np.float64], y: NDArray[np.float64], price: NDArray[np.float64], kappa: float, knots: int
) -> Start:
    """The plug-in dual table on out-of-fold rows, as the point to start from.

    Between the accuracy of the cheapest policy and the best one, knots are spread evenly; at each, the cost weight is
    the largest at which argmax p - w c still has that accuracy. mu = 1 - (w / kappa)^(1 / gamma) is then smoothed by
    local linear regression over some two knots to either side, since out-of-fold accuracy is noisy, and made
    increasing. gamma, which without a policy only spaces mu, starts where mu is closest to linear in tau.

    Args:
        p: out-of-fold predictions, (n, K), in [0, 1]. y: scores, (n, K). price: mean costs in cost units, (K,).
        kappa: cost scale. knots: N.
    """
    tried = np.geomspace(min(1e-4, 1e-4 * kappa), kappa, 400)
    rows = np.arange(len(p))
    accuracy = np.array([y[rows, np.argmax(p - w * price, axis=1)].mean() for w in tried])
    best = int(np.flatnonzero(accuracy == accuracy.max())[-1])
    tried, accuracy = tried[best:], np.minimum.accumulate(accuracy[best:])
    low, high = float(accuracy[-1]), float(accuracy[0])
    tau = np.linspace(low, max(high, low + 1e-3), knots)
    # for each accuracy the largest weight that still has it
    levels, first = np.unique(accuracy[::-1], return_index=True)
    weight = np.exp(np.interp(tau, levels, np.log(tried[::-1][first])))
    found: list[tuple[float, float, NDArray[np.float64]]] = []
    inner = tau[1:-1] if knots > 4 else tau
    for gamma in np.linspace(2.25, 7.75, 23):
        mu = np.maximum.accumulate(_smooth(1.0 - (weight / kappa) ** (1.0 / gamma))).clip(0.005, 0.995)
        at = np.interp(inner, tau, mu)
        straight = float(np.corrcoef(inner, at)[0, 1]) if len(inner) > 1 and np.ptp(at) > 1e-9 else 0.0
        found.append((straight, float(gamma), mu))
    _, gamma, mu = max(found, key=lambda entry: entry[0])
    smoothed = kappa * (1.0 - mu) ** gamma
    tensors = [torch.tensor(values, dtype=torch.float32) for values in (tau, mu, smoothed)]
    return Start(tensors[0], tensors[1], tensors[2], gamma)


def _smooth(values: NDArray[np.float64], bandwidth: float = 2.5) -> NDArray[np.float64]:
    """Local linear regression on equally spaced points, Gaussian weights; bandwidth in points."""
    offset = np.arange(len(values))[None, :] - np.arange(len(values))[:, None]
    weight = np.exp(-0.5 * (offset / bandwidth) ** 2)
    s0, s1, s2 = weight.sum(1), (weight * offset).sum(1), (weight * offset**2).sum(1)
    t0, t1 = weight @ values, (weight * offset) @ values
    smoothed: NDArray[np.float64] = (s2 * t0 - s1 * t1) / np.maximum(s0 * s2 - s1**2, 1e-12)
    return smoothed
