"""Several processes train the policy that one process trains, and one of them writes."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from proteus_fast import checkpoint
from proteus_fast.evaluation.outcomes import read_division
from proteus_fast.training.distributed import is_distributed, is_first, process_group
from proteus_fast.training.fit_policy import Problem, build_trainer
from proteus_fast.training.fit_predictor import fit_predictor
from proteus_fast.training.ppo import PolicyConfig
from proteus_fast.training.stages import Stages
from proteus_fast.training.train import TrainConfig, train
from tests.evaluation import synthetic
from tests.training.launch import run

EVEN = PolicyConfig(
    hidden=16, sessions=4, batch=16, epochs=2, minibatch=32, session_batches=4, knots=8, learning_rate=1e-3, steps=7
)  # fmt: skip
CONFIGS = [
    EVEN,
    # minibatches that two processes cannot share evenly, the last one of a single row
    replace(EVEN, minibatch=21),
    replace(EVEN, minibatch=64, head="free", dual="scalar", baseline="critic"),
]

# of the training that the command line starts, so that it takes no time
CHANGES: dict[str, Any] = {
    "table_rows": 1 << 11, "extra_dim": 4, "alphas": (1.0, 8.0), "variants": ("each+0",),
    "block_weights": ((1.0, 1.0, 1.0, 0.0),), "policy": replace(EVEN, steps=2), "progress": False,
}  # fmt: skip

# the command line, which trains a few policies more while it has the process group; every process has its own place to
# write to, so that what it wrote can be told
SCRIPT = """
import os, pickle, sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from proteus_fast.cli import main
from proteus_fast.training import train as stages
from proteus_fast.training.fit_policy import build_trainer
from proteus_fast.training.distributed import is_first

rank = int(os.environ["RANK"])
train = stages.train


def train_more(config):
    assert (torch.distributed.get_rank(), torch.distributed.get_world_size()) == (rank, 2)
    assert is_first() == (rank == 0)
    problem, settings, changes = pickle.loads(Path("input.pickle").read_bytes())
    for number, one in enumerate(settings):
        trainer = build_trainer(problem, one, seed=3)
        trainer.train(one.steps)
        np.savez(f"policy-{number}-{rank}.npz", **trainer.network.tensors(), dual=trainer.dual.value)
    config = replace(config, **changes)
    train(config)
    # again: the second process has nothing of its own to take up
    return train(config)


stages.train = train_more
status = main([*sys.argv[1:], "--out", f"router-{rank}"])
assert not torch.distributed.is_initialized()
sys.exit(status)
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


def test_without_torchrun_there_is_one_process() -> None:
    with process_group("cpu"):
        assert not is_distributed()
        assert is_first()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_splits(tmp_path_factory.mktemp("data") / "synthetic", synthetic.outcome_table(300, seed=8))


@pytest.fixture(scope="module")
def problem(data: Path) -> Problem:
    config = TrainConfig(data=data, out=data, mode="policy", **CHANGES)
    first = fit_predictor(config, read_division(data), Stages(data, "", read_only=True), lambda _: None)
    assert first.problem is not None
    return first.problem


@pytest.fixture(scope="module")
def launched(data: Path, problem: Problem, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The folder in which two processes ran the script, and what they said."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "input.pickle").write_bytes(pickle.dumps((problem, CONFIGS, CHANGES)))
    (folder / "script.py").write_text(SCRIPT)
    # --standalone takes a free port
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["train", "--data", str(data), "--mode", "policy", "--json"]
    return folder, *run([*launcher, "script.py", *words], folder)


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_two_processes_train_the_policy_of_one(launched: tuple[Path, str, str], problem: Problem, number: int) -> None:
    folder, _, _ = launched
    trainer = build_trainer(problem, CONFIGS[number], seed=3)
    trainer.train(CONFIGS[number].steps)
    alone = {**trainer.network.tensors(), "dual": trainer.dual.value.numpy()}
    with np.load(folder / f"policy-{number}-0.npz") as first, np.load(folder / f"policy-{number}-1.npz") as second:
        for name, tensor in alone.items():
            assert np.array_equal(first[name], second[name]), name
            np.testing.assert_allclose(first[name], tensor, rtol=1e-4, atol=1e-4, err_msg=name)


def test_the_first_process_writes_and_answers(launched: tuple[Path, str, str], data: Path, tmp_path: Path) -> None:
    folder, shown, errors = launched
    assert not list(folder.glob("router-1*"))
    assert (folder / "router-0.training" / "log.jsonl").is_file()
    # one answer, though two processes ran
    assert json.loads(shown)["mode"] == "policy"
    assert "Warning" not in errors
    alone = checkpoint.load(train(TrainConfig(data=data, out=tmp_path / "alone", mode="policy", **CHANGES)))
    ours = checkpoint.load(folder / "router-0")
    assert ours.tensors.keys() == alone.tensors.keys()
    for name, tensor in alone.tensors.items():
        # rows of the table that no text hits hold rounding noise, scaled to int8
        if not name.startswith("encoder."):
            np.testing.assert_allclose(ours.tensors[name], tensor, rtol=1e-4, atol=1e-4, err_msg=name)
