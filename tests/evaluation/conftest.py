"""One synthetic data set and one router trained on it, for every test here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from threadpoolctl import threadpool_limits

from proteus_fast import Router, TrainConfig, train
from proteus_fast.evaluation import baselines
from proteus_fast.evaluation.outcomes import Division, OutcomeTable, read_division, read_table
from tests.evaluation import synthetic

Train = Callable[..., Router]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """On matrices this small a second thread only waits, for long where the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of train, val and test files; its name is the data set's."""
    return synthetic.write_splits(tmp_path_factory.mktemp("data") / "synthetic", synthetic.outcome_table(3000))


@pytest.fixture(scope="session")
def division(folder: Path) -> Division:
    return read_division(folder)


@pytest.fixture(scope="session")
def test_table(folder: Path) -> OutcomeTable:
    return read_table(folder / "test.parquet")


@pytest.fixture(scope="session")
def many_rows() -> OutcomeTable:
    """So many fresh rows that hindsight finds no lucky policy among them."""
    return synthetic.outcome_table(8000, seed=9)


@pytest.fixture
def few_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """One setting a baseline, for tests of something else than its tuning."""
    monkeypatch.setattr(baselines, "MIN_DOCUMENTS", (2,))
    monkeypatch.setattr(baselines, "NEIGHBOURS", (40,))
    monkeypatch.setattr(baselines, "ALPHAS", (8.0,))


@pytest.fixture(scope="session")
def train_on(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Train on a folder, quickly and from nothing, and load what comes out."""

    def run(data: Path, *, seed: int = 0, refine: bool = False) -> Router:
        # a new place each time, so that no finished stage of an earlier run is taken up
        config = TrainConfig(
            data=data, out=tmp_path_factory.mktemp("checkpoint") / "router", seed=seed, table_rows=1 << 12, extra_dim=8,
            block_weights=((1.0, 1.0, 1.0, 0.0), (1.0, 1.0, 1.0, 0.5)), alphas=(1.0, 4.0, 16.0),
            variants=("each+0", "each+1", "all@1"), refine=refine,
            progress=False,
        )  # fmt: skip
        return Router.load(train(config))

    return run


@pytest.fixture(scope="session")
def router(folder: Path, train_on: Train) -> Router:
    return train_on(folder)
