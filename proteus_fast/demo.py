"""``proteus demo``: the embedded router behind its server, asked through its client, at several targets."""

from __future__ import annotations

import json
import math
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from proteus_fast.certificate import TAU_STEPS, Guarantee
from proteus_fast.demo_queries import queries
from proteus_fast.router import Router

_SHOWN = 4
_WARM_UP = 50


def _targets(router: Router) -> list[float]:
    """Five targets from the cheapest candidate's accuracy to the largest certified one, and one above it."""
    tau_max = router.tau_max
    if tau_max is None:
        return [1.0]
    least = math.floor(100 * float(router.pool.mean_score[router.pool.cheapest])) / 100
    spread = np.linspace(least, tau_max, 5)
    return [math.floor(1000 * float(tau) + 1e-6) / 1000 for tau in spread] + [
        min(1.0, math.ceil(100 * tau_max + 2) / 100)
    ]


def _ask(client: Any, router: Router, texts: list[str], tau: float) -> dict[str, Any]:
    """One row of the table: every text through the client, one call each."""
    pool = router.pool
    always_best = float(pool.price_usd[pool.best_fixed])
    chosen: Counter[str] = Counter()
    took_us = []
    decision = None
    for text in texts:
        start = time.perf_counter_ns()
        decision = client.route(text=text, tau=tau)
        took_us.append((time.perf_counter_ns() - start) / 1000)
        chosen[decision.candidate] += 1
    if decision is None:
        raise ValueError("texts: expected at least one, got none")
    cost = sum(pool[pool.index_of(name)].price_usd * times for name, times in chosen.items()) / len(texts)
    return {
        "tau": tau,
        "status": decision.status.name,
        "certified_floor": decision.certified_floor,
        "tau_max": decision.tau_max,
        "mean_cost_usd": cost,
        "cost_of_always_best": cost / always_best,
        "share": {name: times / len(texts) for name, times in chosen.most_common()},
        "latency_p50_us": float(np.percentile(took_us, 50)),
        "latency_p99_us": float(np.percentile(took_us, 99)),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    header = ("target", "status", "floor", "cost, % of always-best", "p50 / p99", "share of the candidates")
    lines = [header]
    for row in rows:
        floor = "-" if row["certified_floor"] is None else f"{row['certified_floor']:.3f}"
        share = ", ".join(f"{name} {100 * part:.0f}%" for name, part in list(row["share"].items())[:_SHOWN])
        hidden = len(row["share"]) - _SHOWN
        lines.append(
            (
                f"{row['tau']:.3f}",
                row["status"],
                floor,
                f"{100 * row['cost_of_always_best']:.0f} %",
                f"{row['latency_p50_us']:.0f} / {row['latency_p99_us']:.0f} us",
                share + (f", {hidden} more" if hidden > 0 else ""),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]) for line in lines
    )


def draw_frontier(router: Router, path: Path) -> None:
    """Expected cost of every certified target beside the fixed candidates, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    certificate, pool = router.certificate, router.pool
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    styles: tuple[tuple[Guarantee, str], ...] = (("certified", "-"), ("calibrated", ":"))
    for guarantee, style in styles:
        tau_max = certificate.tau_max(router.mode, guarantee)
        if tau_max is None:
            continue
        tau = np.arange(round(tau_max * TAU_STEPS) + 1) / TAU_STEPS
        cost = certificate.expected_cost_usd(router.mode, guarantee)[: len(tau)]
        label = f"router, {guarantee}" + (f" at delta {certificate.delta:g}" if guarantee == "certified" else "")
        axes.plot(1000 * cost, tau, style, color="tab:blue", label=label)
    axes.scatter(1000 * pool.price_usd, pool.mean_score, color="tab:gray", zorder=3, label="one candidate for all")
    # neighbours in price would write over each other: names stand below and above in turn
    for i, candidate in enumerate(sorted(pool, key=lambda candidate: candidate.price_usd)):
        axes.annotate(candidate.name, (1000 * candidate.price_usd, candidate.mean_score), (4, 5 if i % 2 else -9),
                      textcoords="offset points", fontsize=6)  # fmt: skip
    axes.set(xscale="log", xlabel="USD per 1,000 queries", ylabel="accuracy",
             ylim=(float(pool.mean_score.min()) - 0.03, float(pool.mean_score.max()) + 0.03))  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    # by the name's ending, as matplotlib does, but never another name
    figure.savefig(path, dpi=130, format=path.suffix[1:] or "png")
    pyplot.close(figure)


def run(plot: Path, *, as_json: bool = False) -> int:
    """Run the demonstration; returns the exit status: 1 where a check of what it shows fails."""
    from proteus_server.app import Options, Server
    from proteus_server.client import Client

    router = Router.load()
    texts = queries()
    with tempfile.TemporaryDirectory(prefix="proteus-demo-") as folder:
        address = f"unix:{folder}/router.sock"
        with Server(router, address, Options()).running(), Client(address, timeout_s=5.0) as client:
            for text in texts[:_WARM_UP]:
                client.route(text=text, tau=0.5)
            rows = [_ask(client, router, texts, tau) for tau in _targets(router)]
    draw_frontier(router, plot)
    passed = _check(rows)
    if as_json:
        sys.stdout.write(json.dumps({"queries": len(texts), "rows": rows, "plot": str(plot), "passed": passed}) + "\n")
        return 0 if passed else 1
    certificate, config, best = router.certificate, router.checkpoint.config, router.pool[router.pool.best_fixed]
    infeasible = next((row for row in rows if row["status"] == "INFEASIBLE"), None)
    lines = [
        f"Router trained on {config.data_set} ({config.rows:,} prompts, {len(router.pool)} candidates); targets"
        f" certified on {certificate.n:,} other prompts, each with probability {1 - certificate.delta:g}.",
        f"{len(texts)} queries, each sent to the gRPC server over a Unix socket at every target"
        f" ({platform.machine()}, Python {platform.python_version()}):",
        "",
        _table(rows),
        "",
        f"always-best is {best.name} at {1000 * best.price_usd:.2f} USD per 1,000 queries. A floor holds on average"
        f" over traffic like {config.data_set}; these queries only show the routing.",
    ]
    if infeasible is not None:
        lines.append(
            f"{infeasible['tau']:.3f} is INFEASIBLE: the largest certified target (tau_max) is"
            f" {infeasible['tau_max']:.3f}; the most accurate policy answered."
        )
    lines.append(f"frontier: {plot}" if passed else "FAILED: the table is not what the certificate promises")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if passed else 1


def _check(rows: list[dict[str, Any]]) -> bool:
    """Feasible targets have floors at or above them, higher targets cost no less, the last target is infeasible."""
    feasible = [row for row in rows if row["status"] == "FEASIBLE"]
    floors_met = all(row["certified_floor"] >= row["tau"] - 1e-9 for row in feasible)
    costs = [row["mean_cost_usd"] for row in rows]
    return bool(feasible) and floors_met and costs == sorted(costs) and rows[-1]["status"] == "INFEASIBLE"
