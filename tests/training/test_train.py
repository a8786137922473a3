"""Training: deterministic, resumable, and blind to what it may not see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from proteus_fast import checkpoint
from proteus_fast.training import predictor
from proteus_fast.training.train import TrainConfig, train
from tests.evaluation import synthetic


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_splits(tmp_path_factory.mktemp("data") / "synthetic", synthetic.outcome_table(1200, seed=9))


def settings(data: Path, out: Path) -> TrainConfig:
    return TrainConfig(
        data=data, out=out, table_rows=1 << 11, extra_dim=4, alphas=(1.0, 8.0), refine=False, progress=False,
        block_weights=((1.0, 1.0, 1.0, 0.0), (1.0, 1.0, 1.0, 0.5)), variants=("each+0", "all@1"),
    )  # fmt: skip


def test_a_stopped_run_is_taken_up(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = checkpoint.load(train(settings(data, tmp_path / "whole")))
    real = predictor.fit_shrinkages
    calls = 0

    def stops(*arguments: object, **options: object) -> dict[str, predictor.Shrinkage]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(predictor, "fit_shrinkages", stops)
    with pytest.raises(KeyboardInterrupt):
        train(settings(data, tmp_path / "stopped"))
    assert not (tmp_path / "stopped").exists()
    resumed = checkpoint.load(train(settings(data, tmp_path / "stopped")))
    assert calls == 3
    assert resumed.sha256 == whole.sha256
    assert all(np.array_equal(resumed.tensors[name], whole.tensors[name]) for name in whole.tensors)
    # another seed is another run: nothing of the first is taken up
    other = settings(data, tmp_path / "stopped")
    train(TrainConfig(**{**vars(other), "seed": 5}))
    assert calls == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delta": 0.0}, "delta: expected"),
        ({"delta": float("nan")}, "delta: expected"),
        ({"encoder": "bert"}, "encoder: expected 'hash'"),
        ({"table_rows": 1000}, "table_rows: expected a power of two"),
    ],
)
def test_wrong_settings(data: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(TrainConfig(**{**vars(settings(data, tmp_path / "x")), **changes}))  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()
