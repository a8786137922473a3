"""A server under load, overload, deadlines, abuse and swaps, measured beside its goals.

    python -m benchmarks.scenarios [--only NAME ...] [--quick] [--realtime] [--soak-seconds S] [--write]

Prints a line for each check; exit status 1 where one is missed, 2 where a scenario could not be measured. --write
replaces the rows of the scenarios that ran in benchmarks/results/scenarios-cpu-amd-epyc.md. --realtime (root) runs
servers and load by SCHED_FIFO, because other work shares the cores; the kernel stops such a process for 50 ms of each
second that it fills, so overload shows tails of that length.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import load, probes, serving

RESULTS = load.ROOT / "benchmarks" / "results" / "scenarios-cpu-amd-epyc.md"


@dataclass(frozen=True)
class Check:
    """One figure beside its goal. passed: None where it is only reported."""

    what: str
    measured: str
    goal: str = ""
    passed: bool | None = None

    @property
    def verdict(self) -> str:
        return {True: "pass", False: "MISSED", None: "report"}[self.passed]


def at_most(what: str, value: float, limit: float, unit: str) -> Check:
    return Check(what, f"{value:,.4g} {unit}", f"<= {limit:,.4g} {unit}", value <= limit)


def at_least(what: str, value: float, limit: float, unit: str) -> Check:
    return Check(what, f"{value:,.6g} {unit}", f">= {limit:,.6g} {unit}", value >= limit)


def none(what: str, count: int) -> Check:
    return Check(what, f"{count:,}", "0", count == 0)


@dataclass
class Run:
    """What a scenario is given: checkpoints, how long to measure, how to start processes."""

    folder: Path
    quick: bool
    realtime: bool
    soak_seconds: float
    notes: list[str] = field(default_factory=list)

    @property
    def prefix(self) -> tuple[str, ...]:
        return load.REALTIME if self.realtime else ()

    def seconds(self, full: float, quick: float) -> float:
        return quick if self.quick else full

    def checkpoint(self, seed: int = 0) -> Path:
        """A router with random weights; another one for each seed."""
        path = self.folder / f"router-{seed}"
        if not path.exists():
            serving.build_router(seed).save(path)
        return path

    def serving(self, *arguments: str) -> Any:
        return serving.serving(self.checkpoint(), *arguments, prefix=self.prefix)

    def load(self, address: str, kind: str = "embedding", **options: Any) -> dict[str, Any]:
        options.setdefault("warm_up", 0.3)
        return load.measure(address, kind, prefix=self.prefix, **options)


def steady(run: Run) -> list[Check]:
    """Row 7: half the capacity, open loop; batches on one core."""
    seconds = run.seconds(20.0, 2.0)
    with run.serving() as server:
        peak = run.load(server.address, in_flight=64, seconds=run.seconds(5.0, 1.0))
        half = run.load(server.address, rate=peak["decisions_per_s"] / 2, seconds=seconds)
        fixed = run.load(server.address, rate=8000, seconds=seconds)
        batch = run.load(server.address, rows=256, in_flight=2, seconds=run.seconds(5.0, 1.0))
    return [
        Check("capacity, Route of embeddings, 64 in flight", f"{peak['decisions_per_s']:,.0f} /s"),
        at_most(f"p50 at half of it ({half['offered_per_s']:,.0f} /s open loop)", half["p50_us"], 1000, "us"),
        at_most("p99 at half of it", half["p99_us"], 1000, "us"),
        Check("p99.9 and largest at half of it", f"{half['p999_us']:,.0f} / {half['max_us']:,.0f} us"),
        none("errors at half of it", half["errors"]),
        at_most("p50 at 8,000 /s open loop", fixed["p50_us"], 150, "us"),
        at_most("p99 at 8,000 /s open loop", fixed["p99_us"], 1000, "us"),
        none("errors at 8,000 /s", fixed["errors"]),
        at_least("RouteBatch(256), one thread", batch["decisions_per_s"], 150_000, "vectors/s"),
        Check("its CPU", f"{batch['server_cpu']:.2f} cores"),
        none("its errors", batch["errors"]),
    ]


def _overload(run: Run, name: str, **request: int) -> list[Check]:
    connections = 8
    with run.serving() as server:

        def go(**options: Any) -> dict[str, Any]:
            return run.load(server.address, "text", connections=connections, **request, **options)

        peak = go(in_flight=64 // request.get("rows", 1), seconds=run.seconds(5.0, 2.0))["rate"]
        calm = go(rate=peak / 2, seconds=run.seconds(10.0, 2.0))
        go(rate=3 * peak, seconds=1.0)
        before = server.status()["rss_bytes"]
        seconds = run.seconds(60.0, 10.0)
        flood = go(rate=3 * peak, seconds=seconds)
        after = server.status()["rss_bytes"]
        later = go(rate=peak / 2, seconds=4.0, warm_up=0.0, series=1)
    # windows of 100 ms, from two seconds after the flood
    windows = later["series"][20:]
    p99s = sorted(p99 for _, _, p99 in windows)
    wrong = {name for name in flood["by_status"] if name not in ("OK", "RESOURCE_EXHAUSTED", "unanswered")}
    offered = f"{flood['offered_per_s']:,.0f} /s offered, capacity {peak:,.0f} /s"
    return [
        Check(f"{name}: load", offered),
        at_least(f"{name}: goodput by capacity", flood["by_status"]["OK"] / seconds / peak * 100, 80, "%"),
        at_most(f"{name}: p99 of accepted by p99 at half capacity", flood["p99_us"] / calm["p99_us"], 2, "times"),
        Check(f"{name}: p50, p99 of accepted; p99 at half capacity",
              f"{flood['p50_us']:,.0f}, {flood['p99_us']:,.0f}; {calm['p99_us']:,.0f} us"),
        at_most(f"{name}: p99 of refused", flood["error_p99_us"] / 1e3, 20, "ms"),
        Check(f"{name}: p50 of refused", f"{flood['error_p50_us'] / 1e3:,.2f} ms"),
        Check(f"{name}: other statuses than OK and RESOURCE_EXHAUSTED", ", ".join(sorted(wrong)) or "none", "none",
              not wrong),
        at_most(f"{name}: memory", (after - before) / 2**20, 10, "MB more after the flood"),
        none(f"{name}: refused from 2 s after the flood", sum(refused for _, refused, _ in windows)),
        at_most(f"{name}: p99 from then on by p99 at half capacity, median of windows of 100 ms",
                p99s[len(p99s) // 2] / calm["p99_us"], 2, "times"),
    ]  # fmt: skip


def overload(run: Run) -> list[Check]:
    """Row 8: three times the capacity, of texts; a client on one core cannot send so many embeddings."""
    return [
        *_overload(run, "texts of 1,200 characters", parts=4),
        *_overload(run, "RouteBatch of 16 texts of 300", rows=16),
        *_overload(run, "texts of 300 characters"),
        Check("embeddings", "not run: the client cannot offer three times 190,000 /s", "", None),
    ]


def deadlines(run: Run) -> list[Check]:
    """Row 9: RouteBatch calls of 64 texts, about twice as many as the server can answer."""
    calls, rows = (10_000, 64) if not run.quick else (2_000, 64)
    with serving.in_process(run.checkpoint(), realtime=run.realtime) as (address, counters):
        peak = run.load(address, "text", rows=rows, in_flight=4, seconds=1.0)["rate"]
        rate, options = 2 * peak, {"warm_up": 0.0, "rows": rows, "connections": 16}
        before = counters()
        timed = run.load(
            address, "text", rate=rate, seconds=calls / rate, timeout_from_us=1000, timeout_to_us=50_000, **options
        )
        between = counters()
        left = run.load(
            address, "text", rate=rate, seconds=calls / rate, cancel_from_us=1000, cancel_to_us=50_000, **options
        )
        after = counters()
    wasted = after["calls"] - between["calls"] - left["ok"]
    cancelled = left["cancelled_by_client"]
    seen = timed["by_status"]
    return [
        Check("deadlines of 1-50 ms: calls, of which", f"{timed['calls']:,}: {seen}"),
        Check("counters of the server",
              ", ".join(f"{name} {between[name] - before[name]:,}" for name in ("calls", "expired", "rejected"))),
        none("decided more than 5 ms after the deadline (the server's times)", timed["late_decided"]),
        Check("answered more than 5 ms after the deadline (the client's clock, stops of processes included)",
              f"{timed['late_answered']:,}"),
        none("other statuses", sum(n for name, n in seen.items()
                                   if name not in ("OK", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"))),
        Check("cancelled after 1-50 ms, unanswered until then", f"{cancelled:,} of {left['calls']:,}"),
        at_least("of them never computed", 100 * (1 - wasted / max(1, cancelled)), 95, "%"),
    ]  # fmt: skip


def abuse(run: Run) -> list[Check]:
    """Row 10: others beside idle, slow and resetting clients."""
    seconds = run.seconds(20.0, 4.0)
    with run.serving() as server:
        run.load(server.address, rate=10_000, seconds=1.0)
        calm = run.load(server.address, rate=10_000, seconds=seconds)
        before = server.status()["rss_bytes"]
        with probes.abusers(server.address, seconds + 3.0) as said:
            beside = run.load(server.address, rate=10_000, seconds=seconds)
            after = server.status()
    return [
        Check("abusers", said[0]),
        Check("p50, p99 of 10,000 /s open loop alone", f"{calm['p50_us']:,.0f}, {calm['p99_us']:,.0f} us"),
        Check("p50, p99 beside them", f"{beside['p50_us']:,.0f}, {beside['p99_us']:,.0f} us"),
        at_most("p99 beside them by p99 alone", beside["p99_us"] / calm["p99_us"], 2, "times"),
        at_most("memory", (after["rss_bytes"] - before) / 2**20, 100, "MB more"),
        none("errors of the others", beside["errors"]),
        Check("descriptors of the server while they last", f"{after['descriptors']:,}"),
    ]


def swaps(run: Run) -> list[Check]:
    """Row 11: another checkpoint every few milliseconds, under load."""
    count = 1_000 if not run.quick else 100
    paths = [run.checkpoint(seed) for seed in range(4)]
    with serving.swappable(paths, run.prefix) as (address, swap):
        done, result = probes.beside(
            lambda: run.load(address, rate=10_000, seconds=run.seconds(100.0, 10.0), answers=1),
            [lambda path=paths[i % 4]: swap(path) for i in range(1, count + 1)],
        )
    mixed, versions = probes.mixed_answers(result["answers"], paths)
    return [
        Check("swaps while under load", f"{done:,} by Reload", f"{count:,}", done == count),
        none("failed calls", result["errors"]),
        none(f"replies that their versions do not explain, of {result['ok']:,}", mixed),
        Check("versions seen", f"{versions}", f"{len(paths)}", versions == len(paths)),
        Check("p50, p99 meanwhile", f"{result['p50_us']:,.0f}, {result['p99_us']:,.0f} us"),
    ]


def soak(run: Run) -> list[Check]:
    """Row 14: steady load for long, with new connections every ten seconds."""
    seconds = run.soak_seconds if not run.quick else 30.0
    with run.serving() as server:
        samples, totals = probes.soak(server, run.load, seconds)
    # the first fifth warms up
    rest = samples[len(samples) // 5 :]
    slope = probes.slope_per_hour([(t, status["rss_bytes"] / 2**20) for t, status in rest])
    spread = {name: {status[name] for _, status in rest} for name in ("threads", "descriptors")}
    return [
        Check("time and calls", f"{seconds:,.0f} s, {totals['calls']:,}"),
        none("errors", totals["errors"]),
        at_most("slope of RSS", slope, 1, "MB/h"),
        Check("RSS first and last", ", ".join(f"{one[1]['rss_bytes'] / 2**20:.2f} MB" for one in (rest[0], rest[-1]))),
        *(Check(name, f"{min(seen)}-{max(seen)}", "flat", max(seen) - min(seen) <= allowed)
          for (name, seen), allowed in zip(spread.items(), (0, 4), strict=True)),
    ]  # fmt: skip


def canary(run: Run) -> list[Check]:
    """Row 15: a string that is in every request, good or bad, and has to be nowhere else."""
    metrics = f"127.0.0.1:{probes.free_port()}"
    arguments = ["--log-level", "debug", "--access-log-sample", "1", "--metrics-address", metrics]
    with run.serving(*arguments) as server:
        calls, refused, places = probes.canaries(server, f"http://{metrics}/metrics")
    return [
        Check("requests, of which refused", f"{calls}, {refused}", "", None),
        *(none(f"hits in {place}", hits) for place, hits in places.items()),
        Check("journal", "this server has none", "", None),
    ]


SCENARIOS: dict[str, tuple[str, Callable[[Run], list[Check]]]] = {
    "steady": ("7", steady),
    "overload": ("8", overload),
    "deadlines": ("9", deadlines),
    "abuse": ("10", abuse),
    "swaps": ("11", swaps),
    "soak": ("14", soak),
    "canary": ("15", canary),
}


def written(text: str, results: dict[str, list[Check]], how: str) -> str:
    """The table with the rows of these scenarios replaced."""
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| # ")]
    made = []
    for name, (number, _) in SCENARIOS.items():
        start = f"| {number} | {name} |"
        if name in results:
            made += [
                f"{start} {check.what} | {check.measured} | {check.goal} | {check.verdict} | {how} |"
                for check in results[name]
            ]
        else:
            made += [row for row in rows if row.startswith(start)] or [f"{start} | | | not run | |"]
    return "\n".join(
        [
            "# Scenarios of reliability, native data plane",
            "",
            "By `python -m benchmarks.scenarios --write`. Server and load share the cores with what else runs there.",
            "By SCHED_FIFO the kernel stops a process for 50 ms of a second that it fills (overload does).",
            "",
            "Goodput of single texts under three times the load: to refuse one costs r = 2 to 3 us on the thread that",
            "decides the others in s = 19 to 30 us, so of its capacity (1 - 3 r/s) / (1 - r/s) remains: 65 to 75 %.",
            "",
            "| # | scenario | what | measured | goal | verdict | how |",
            "|---|---|---|---|---|---|---|",
            *made,
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--realtime", action="store_true", help="servers and load by SCHED_FIFO (root)")
    parser.add_argument("--soak-seconds", type=float, default=600.0, metavar="S")
    parser.add_argument("--write", action="store_true", help=f"into {RESULTS.relative_to(load.ROOT)}")
    arguments = parser.parse_args(argv)
    results: dict[str, list[Check]] = {}
    failures = 0
    # not while something else is measured
    try:
        load.build()
    except load.NotMeasured as error:
        print(f"scenarios: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="proteus-") as folder:
        for name in arguments.only:
            number, scenario = SCENARIOS[name]
            run = Run(Path(folder), arguments.quick, arguments.realtime, arguments.soak_seconds)
            machine = serving.machine()
            print(f"{number} {name}: {(scenario.__doc__ or '').partition(':')[2].strip()} ({machine})", flush=True)
            try:
                results[name] = scenario(run)
            except load.NotMeasured as error:
                print(f"  not measured: {error}", file=sys.stderr)
                failures |= 2
                continue
            for check in results[name]:
                goal = f" (goal {check.goal})" if check.goal else ""
                print(f"  {check.verdict:7}{check.what}: {check.measured}{goal}", flush=True)
            if arguments.write:
                how = ("quick" if arguments.quick else "full") + (", SCHED_FIFO" if arguments.realtime else "")
                how += f", {machine}"
                text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else ""
                RESULTS.write_text(written(text, {name: results[name]}, how), encoding="utf-8")
    missed = any(check.passed is False for checks in results.values() for check in checks)
    return 2 if failures else int(missed)


if __name__ == "__main__":
    sys.exit(main())
