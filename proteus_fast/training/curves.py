"""What a training run looked like, as curves.json and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from proteus_fast.training.fit_policy import PolicyFit, Problem, positions_of
from proteus_fast.training.ppo import follow


def write_search_curves(folder: Path, name: str, tried: list[dict[str, Any]], losses: list[float]) -> None:
    """Write what was tried: curves.json, and curves.png with the out-of-fold figures and the refinement's losses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    (folder / "curves.json").write_text(json.dumps({"search": tried, "refine_loss": losses}, indent=1) + "\n")
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    labels = [" ".join(f"{weight:g}" for weight in trial["block_weight"]) for trial in tried]
    left.bar(labels, [1000 * trial["cost_usd"] for trial in tried], color="tab:blue")
    left.set(title=f"{name}: closed form, out of fold", xlabel="block weights", ylabel="USD per 1,000 queries")
    left.tick_params(axis="x", labelsize=7)
    right.plot(range(1, len(losses) + 1), losses, marker="o", color="tab:orange")
    right.set(title="refinement, held-out folds", xlabel="epoch", ylabel="cross-entropy")
    figure.savefig(folder / "curves.png", dpi=120)


def write_policy_curves(folder: Path, problem: Problem, fitted: PolicyFit) -> None:
    """Write policy.png: out-of-fold cost by step, shortfall and dual by step and tau band, and tau against mu."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    (cost, short), (dual, map_) = figure.subplots(2, 2)
    cost.plot(fitted.tried, 1000 * fitted.cost_usd, marker="o", ms=3, label="policy")
    cost.axhline(1000 * fitted.dual_cost_usd, color="tab:gray", ls="--", label="plug-in rule")
    cost.axvline(fitted.steps, color="tab:red", lw=0.8, label="kept")
    cost.set(title=f"{problem.table.name}, out of fold", xlabel="step", ylabel="USD per 1,000 queries, q = .3 to .9")
    cost.legend(fontsize=7)
    log = fitted.trainer.log
    steps = [entry["step"] for entry in log]
    for number in range(len(log[0]["bands"]) if log else 0):
        band = [entry["bands"][number] for entry in log]
        label = f"tau {np.mean([one['tau'] for one in band]):.3f}"
        # one batch of a band is a few hundred rows: a running mean shows where it goes
        width = min(5, len(band))
        violation = np.convolve([one["violation"] for one in band], np.ones(width) / width, "valid")
        short.plot(steps[width - 1 :], violation, label=label)
        dual.plot(steps, [one["dual"] for one in band], label=label)
    short.axhline(0.0, color="black", lw=0.6)
    short.set(title="training rows", xlabel="step", ylabel="tau - accuracy, mean of 5 reports")
    dual.set(xlabel="step", ylabel="dual variable lambda", yscale="log")
    if log:
        dual.legend(fontsize=7)
    positions = positions_of(fitted.trainer)
    _, preference = follow(fitted.trainer.served, problem.rows(device=str(positions.device)), positions, problem.kappa)
    tau, mu = positions.cpu().numpy(), preference.cpu().numpy()
    low, middle, high = np.quantile(mu, (0.05, 0.5, 0.95), axis=1)
    map_.fill_between(tau, low, high, alpha=0.25, label="5 to 95 % of the rows")
    map_.plot(tau, middle, label="median")
    map_.set(title="preference", xlabel="tau", ylabel="mu")
    map_.legend(fontsize=7)
    figure.savefig(folder / "policy.png", dpi=120)
