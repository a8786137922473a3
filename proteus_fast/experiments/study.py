"""What every experiment starts from and ends with: a data set prepared once, policies measured on its test rows, files.

Everything is trained on the fit rows; test rows are read by ``measure`` and by nothing else. Targets are
a_cheap + q (a_best - a_cheap) for 17 values q = .1 ... .9, with accuracies of the fit rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from proteus_fast.evaluation.metrics import (
    SELECTION_TARGETS,
    Curve,
    leak_limit,
    plug_in_curve,
    relative_targets,
)
from proteus_fast.evaluation.outcomes import Division, OutcomeTable, read_division, read_table, shared_prompts
from proteus_fast.evaluation.report import LeakError
from proteus_fast.training.fit_policy import Nowhere, Problem, Store, curve_of, positions_of, to_rows
from proteus_fast.training.fit_predictor import fit_predictor
from proteus_fast.training.ppo import Rows, Trainer, follow
from proteus_fast.training.predictor import HashPredictor
from proteus_fast.training.stages import Stages
from proteus_fast.training.train import TrainConfig, fingerprint

FloatArray = NDArray[np.float64]
Progress = Callable[[], Any]
T = TypeVar("T")
J = TypeVar("J")

SHARES = tuple(np.linspace(0.1, 0.9, 17).round(3).tolist())
"""q of the 17 targets inside the feasible range."""


@dataclass(frozen=True)
class Study:
    """A data set, prepared.

    Attributes:
        division: fit and calibration rows. test: the test rows. hashed: encoder and predictor. problem: fit rows for
            stage 2. rows: the test rows for the policy. p: predicted accuracies there, (n, K). taus: the 17 targets.
        plug_in: curve of the plug-in rule on the test rows. store: keeps trained policies.
    """

    division: Division
    test: OutcomeTable
    hashed: HashPredictor
    problem: Problem
    rows: Rows
    p: FloatArray
    taus: FloatArray
    plug_in: Curve
    store: Store

    @property
    def name(self) -> str:
        """The data set's."""
        return self.test.name


def load_study(folder: Path, cache: Path | None = None, progress: Callable[[str], None] = lambda _: None) -> Study:
    """Read a data set and fit encoder and predictor to it.

    Args:
        folder: with train, val and test tables. cache: keeps finished stages; None: nothing is kept.
        progress: called with the stage after each.

    Raises:
        FileNotFoundError, ValueError: see ``read_division``. LeakError: a test prompt is also in train or val.
    """
    division = read_division(folder)
    test = read_table(folder / "test.parquet").with_candidates(division.fit.candidates)
    if shared_prompts(test.prompts, division.fit.prompts + division.calibration.prompts):
        raise LeakError(f"{folder}: expected no test prompt in train or val, got some")
    # the link of the runs that docs/results reports
    config = TrainConfig(data=folder, out=folder, mode="policy", links=("clip",))
    where = Path() if cache is None else cache / test.name
    stages = Stages(where, fingerprint(config, division), read_only=cache is None)
    first = fit_predictor(config, division, stages, progress)
    assert first.problem is not None
    assert isinstance(first.encoder, HashPredictor)
    return study_of(division, test, first.encoder, first.problem, stages)


def study_of(
    division: Division, test: OutcomeTable, hashed: HashPredictor, problem: Problem, store: Store | None = None
) -> Study:
    """A study of prepared parts, of a predictor with the link ``clip``; an experiment that changes costs makes its own.

    Raises:
        ValueError: the predictor has another link.
    """
    if hashed.link != "clip":
        raise ValueError(f"hashed: expected the link clip, got {hashed.link}")
    h = hashed.encode(test.prompts)
    p = np.clip(h.astype(np.float64) @ hashed.weight + hashed.bias, 0.0, 1.0)
    fit = problem.table
    taus = relative_targets(fit.score.mean(axis=0), problem.price_usd, SHARES)
    return Study(
        division, test, hashed, problem, to_rows(problem, h, p, test), p, taus,
        plug_in_curve(p, problem.price_usd, test), store or Nowhere(),
    )  # fmt: skip


class Measured(NamedTuple):
    """One policy on the test rows.

    tau_mu, tau_mu_spearman, tau_accuracy: correlations of the 17 targets with mean mu and with accuracy. mu_range:
    largest less smallest mean mu, since a nearly flat line correlates as well as a steep one. cost_ratio:
    cost of the policy at each target over that of the plug-in path's hull at the same accuracy, geometric mean.
    hull_ratio: hull of the policy's path over hull of the plug-in path at the selection targets, both in hindsight.
    mu, accuracy, cost_usd: at the 17 targets, raw (tau' = tau), (17,).
    """

    tau_mu: float
    tau_mu_spearman: float
    tau_accuracy: float
    mu_range: float
    cost_ratio: float
    hull_ratio: float
    mu: FloatArray
    accuracy: FloatArray
    cost_usd: FloatArray


def ratio_to(curve: Curve, table: OutcomeTable, accuracy: FloatArray, cost_usd: FloatArray) -> float:
    """Geometric mean of costs over those of a curve's hull at the same accuracies."""
    return float(np.exp(np.log(np.maximum(cost_usd, 1e-12) / curve.costs(accuracy, table)).mean()))


def measure(study: Study, trainer: Trainer) -> Measured:
    """Follow a trained policy on the test rows.

    Raises:
        LeakError: it is more accurate than an honest router can be.
    """
    taus = torch.as_tensor(study.taus, dtype=torch.float32)
    choice, preference = follow(trainer.served, study.rows, taus, trainer.kappa)
    curve = curve_of(study.test, choice.numpy())
    accuracy, cost = (values.mean(axis=1, dtype=np.float64) for values in (curve.score, curve.cost_usd))
    if accuracy.max() > leak_limit(study.test):
        raise LeakError(f"{study.name}: expected at most {leak_limit(study.test):.4f}, got {accuracy.max():.4f}")
    mu = preference.double().mean(dim=1).numpy()
    path = curve_of(study.test, follow(trainer.served, study.rows, positions_of(trainer), trainer.kappa)[0].numpy())
    fit = study.problem.table
    selection = relative_targets(fit.score.mean(axis=0), study.problem.price_usd, SELECTION_TARGETS)
    hulls = np.log(path.costs(selection, study.test) / study.plug_in.costs(selection, study.test)).mean()
    return Measured(
        correlation(study.taus, mu), correlation(ranks(study.taus), ranks(mu)), correlation(study.taus, accuracy),
        float(np.ptp(mu)), ratio_to(study.plug_in, study.test, accuracy, cost), float(np.exp(hulls)), mu, accuracy,
        cost,
    )  # fmt: skip


def correlation(a: FloatArray, b: FloatArray) -> float:
    """Pearson's r; 0 where one of them does not vary."""
    if np.std(a) < 1e-12 or np.std(b) < 1e-12:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def ranks(values: FloatArray) -> FloatArray:
    """Average ranks; their Pearson correlation is Spearman's."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(values), np.float64)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % interval by Student's t; without width for one value."""
    from scipy.stats import t

    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return mean, mean, mean
    half = float(t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))
    return mean, mean - half, mean + half


def show(values: Sequence[float], digits: int = 3) -> str:
    """Mean and half the width of its interval as text."""
    mean, low, high = interval(values)
    return f"{mean:.{digits}f}" if len(values) < 2 else f"{mean:.{digits}f} ± {(high - low) / 2:.{digits}f}"


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread: batches of a thousand rows are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_all(run: Callable[[J], T], jobs: Iterable[J], progress: Callable[[], Any] = lambda: None) -> list[T]:
    """What a function returns for every job, reporting after each."""
    found = []
    for job in jobs:
        found.append(run(job))
        progress()
    return found


@dataclass(frozen=True)
class Result:
    """What an experiment found.

    Attributes:
        name: the experiment's. title: one line. columns, rows: the table, cells as text. figures: the same as plain
            values for JSON. notes: what a reader has to know. draw: draws the plot into a matplotlib figure.
        data: data set -> hash of its fit rows. seeds: number of seeds.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    figures: dict[str, Any]
    notes: tuple[str, ...]
    draw: Callable[[Any], None]
    data: dict[str, str]
    seeds: int
    size: tuple[float, float] = field(default=(8.0, 4.5))

    def to_markdown(self) -> str:
        """Title, table and notes."""
        lines = [
            f"# {self.title}",
            "",
            f"| {' | '.join(self.columns)} |",
            f"| ---{' | ---:' * (len(self.columns) - 1)} |",
        ]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        lines += ["", *(f"{note}\n" for note in self.notes)]
        hashes = ", ".join(f"{name} `{sha[:16]}`" for name, sha in self.data.items())
        seeds = "1 seed" if self.seeds == 1 else f"{self.seeds} seeds; ± is half of a 95 % interval over them"
        return "\n".join([*lines, f"Fit rows: {hashes}. {seeds}. `proteus experiment {self.name}`."]) + "\n"

    @property
    def stem(self) -> str:
        """Name of the files: the experiment's, with the data set's where there is one."""
        return self.name if len(self.data) > 1 else "-".join((self.name, *self.data))

    def write(self, folder: Path) -> None:
        """Write STEM.md, STEM.json and STEM.png."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.stem}.md").write_text(
            self.to_markdown() + f"\n![{self.title}]({self.stem}.png)\n", encoding="utf-8"
        )
        facts = {"name": self.name, "data": self.data, "seeds": self.seeds}
        (folder / f"{self.stem}.json").write_text(json.dumps(facts | self.figures, indent=1) + "\n")
        figure = Figure(figsize=self.size, layout="constrained")
        FigureCanvasAgg(figure)
        self.draw(figure)
        figure.savefig(folder / f"{self.stem}.png", dpi=80)
