"""Studies of synthetic tables, prepared as real ones are."""

from __future__ import annotations

from pathlib import Path

from proteus_fast.evaluation.outcomes import read_division, read_table
from proteus_fast.experiments.study import Study, study_of
from proteus_fast.training.fit_predictor import fit_predictor
from proteus_fast.training.stages import Stages
from proteus_fast.training.train import TrainConfig
from tests.evaluation import synthetic


def prepare(folder: Path, rows: int, seed: int, table_rows: int) -> Study:
    """Write the splits of a synthetic table of so many rows below a folder and fit a small predictor to them."""
    data = synthetic.write_splits(folder / "synthetic", synthetic.outcome_table(rows, seed=seed))
    config = TrainConfig(
        data=data, out=data, table_rows=table_rows, extra_dim=4, alphas=(1.0, 8.0), mode="policy",
        block_weights=((1.0, 1.0, 1.0, 0.0),), variants=("each+0",), links=("clip",),
    )  # fmt: skip
    division = read_division(data)
    first = fit_predictor(config, division, Stages(data, "", read_only=True), lambda _: None)
    assert first.problem is not None
    return study_of(division, read_table(data / "test.parquet"), first.encoder, first.problem)
