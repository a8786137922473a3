"""Fine-tuning: what a run keeps, how it goes on after a stop, and the checkpoints that hold their transformer."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
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
from proteus_fast.cli import main
from proteus_fast.encoder import TransformerEncoder
from proteus_fast.evaluation.outcomes import OutcomeTable, fold_of, is_cal, read_division
from proteus_fast.router import Router
from proteus_fast.training import tuner
from proteus_fast.training.finetune import HELD_OUT, FinetuneConfig, cross_entropy, fit_temperature
from proteus_fast.training.train import TrainConfig, train
from tests import encoders
from tests.evaluation import synthetic
from tests.training.launch import run
from tests.training.test_frozen import WORDS
from tests.training.test_tuner import CONFIG, build

FILES = ("config.json", "model.safetensors", "tokenizer.json")
TUNING = FinetuneConfig(epochs=2, batch_size=16, learning_rate=3e-3)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoders.make("bert", tmp_path_factory.mktemp("bert"), WORDS)


@pytest.fixture(scope="module")
def table() -> OutcomeTable:
    return synthetic.outcome_table(700, seed=9, graded=True)


@pytest.fixture(scope="module")
def data(table: OutcomeTable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_splits(tmp_path_factory.mktemp("data") / "synthetic", table)


def settings(data: Path, out: Path, directory: Path, **changes: Any) -> TrainConfig:
    made = TrainConfig(
        data=data, out=out, encoder=str(directory), max_tokens=30, alphas=(0.05, 0.5, 4.0), variants=("each+0",),
        refine=False, progress=False, finetune=TUNING,
    )  # fmt: skip
    return replace(made, **changes)


def log_of(out: Path, stage: str) -> list[dict[str, Any]]:
    lines = (out.with_name(out.name + ".training") / "log.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["stage"] == stage]


def with_embeddings_of(trained: Path, out: Path) -> Path:
    """A place to train at, where the frozen embeddings are there already."""
    training = out.with_name(out.name + ".training")
    training.mkdir()
    for file in trained.with_name(trained.name + ".training").glob("embeddings-*.npz"):
        shutil.copyfile(file, training / file.name)
    return out


@pytest.fixture(scope="module")
def trained(data: Path, directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(settings(data, tmp_path_factory.mktemp("trained") / "router", directory))


def test_what_costs_less_on_the_held_out_fold_is_kept(trained: Path, data: Path) -> None:
    looks, chosen = log_of(trained, "finetune"), log_of(trained, "finetune selected")[-1]
    losses = [look["loss"] for look in looks]
    assert [look["epoch"] for look in looks] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert min(losses) < losses[0]
    assert chosen["step"] == looks[int(np.argmin(losses))]["step"] > 0
    assert chosen["cost_usd"] < chosen["frozen_cost_usd"]
    assert chosen["kept"]
    assert chosen["loss_calibrated"] <= min(losses) + 1e-6
    config = checkpoint.load(trained).config
    assert (config.link, config.projection, config.encoder) == ("sigmoid", "none", "transformer")
    # prices are of all fit rows, though the path is laid through a fold of them
    price = read_division(data).fit.cost_usd.mean(axis=0)
    np.testing.assert_allclose(config.pool.price_usd, price)
    assert chosen["rows"] == int((fold_of(read_division(data).fit.prompts) == HELD_OUT).sum())


def test_the_checkpoint_holds_what_was_trained_and_can_be_moved(trained: Path, data: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(trained, moved)
    assert sorted(file.name for file in (moved / "encoder").iterdir()) == sorted(FILES)
    assert json.loads((moved / "config.json").read_text())["encoder"]["directory"] == "encoder"
    router = Router.load(moved)
    source = router.checkpoint.config.source
    assert source is not None
    assert (source.held, source.directory) == (True, str(moved / "encoder"))
    # the embeddings that were certified, to the bit
    texts = sorted(set(read_division(data).calibration.prompts))
    stage = next(trained.with_name("router.training").glob("stage-*-finetune-*-calibration.npz"))
    with np.load(stage) as arrays:
        np.testing.assert_array_equal(router.encode(texts[:20]), arrays["h"][:20])
    # and what is written once more holds them too
    router.save(tmp_path / "saved")
    again = Router.load(tmp_path / "saved")
    assert again.checkpoint.sha256 == router.checkpoint.sha256
    for file in FILES:
        assert (tmp_path / "saved" / "encoder" / file).read_bytes() == (trained / "encoder" / file).read_bytes()


def test_a_new_certificate_keeps_the_encoder(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(trained, old)
    assert main(["certify", str(old), "--data", str(data / "test.parquet"), "--out", str(new), "--json"]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["n"] > 0
    shutil.rmtree(old)
    first, second = Router.load(trained), Router.load(new)
    np.testing.assert_array_equal(first.encode(["poems1 word2"]), second.encode(["poems1 word2"]))
    assert second.certificate.n != first.certificate.n


def test_a_stopped_run_goes_on_to_the_same_bits(
    trained: Path, data: Path, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, steps = tuner.Tuner.train, []

    def stops(self: tuner.Tuner, step: int) -> None:
        steps.append((self.step, step))
        if len(steps) == 4:
            raise KeyboardInterrupt
        real(self, step)

    monkeypatch.setattr(tuner.Tuner, "train", stops)
    config = settings(data, with_embeddings_of(trained, tmp_path / "router"), directory)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert not (tmp_path / "router").exists()
    resumed = checkpoint.load(train(config))
    # the second run began where the first had looked last
    assert steps[4][0] == steps[3][0] > 0
    assert resumed.sha256 == checkpoint.load(trained).sha256
    done = len(steps)
    assert checkpoint.load(train(config)).sha256 == resumed.sha256
    assert len(steps) == done
    training = tmp_path / "router.training"
    assert not [*training.glob("*-state.npz"), *training.glob("encoder")]


def test_labels_of_calibration_rows_change_the_certificate_only(
    trained: Path, table: OutcomeTable, directory: Path, tmp_path: Path
) -> None:
    split = np.array([synthetic.split_of(prompt) for prompt in table.prompts])
    held = (split == "val") | (is_cal(table.prompts) & (split == "train"))
    scrambled = replace(table, score=np.where(held[:, None], 1.0 - table.score, table.score))
    data = synthetic.write_splits(tmp_path / "synthetic", scrambled)
    other = checkpoint.load(train(settings(data, tmp_path / "router", directory)))
    mine = checkpoint.load(trained)
    assert other.config.source is not None
    assert mine.config.source is not None
    assert other.config.source.sha256 == mine.config.source.sha256
    for name, tensor in mine.tensors.items():
        np.testing.assert_array_equal(other.tensors[name], tensor)
    ours, theirs = mine.certificate.paths["dual"], other.certificate.paths["dual"]
    np.testing.assert_array_equal(ours.path.parameter, theirs.path.parameter)
    assert not np.array_equal(ours.successes, theirs.successes)


def test_what_learns_nothing_is_not_kept(
    trained: Path, data: Path, directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hopeless = replace(TUNING, learning_rate=30.0, patience=1)
    out = with_embeddings_of(trained, tmp_path / "router")
    with caplog.at_level(logging.WARNING):
        train(settings(data, out, directory, finetune=hopeless, hold_encoder=True))
    assert "the checkpoint has the frozen encoder" in caplog.text
    assert not log_of(out, "finetune selected")[-1]["kept"]
    source = checkpoint.load(out).config
    assert source.link == "clip"
    # asked to, a frozen transformer is held as it came
    for file in FILES:
        assert (out / "encoder" / file).read_bytes() == (directory / file).read_bytes()
    shutil.rmtree(out.with_name("router.training"))
    text = "poems1 word2"
    np.testing.assert_array_equal(
        Router.load(out).encode([text]), TransformerEncoder(source.source).encode([text])  # type: ignore[arg-type]
    )  # fmt: skip


def test_the_command_line_and_what_it_refuses(
    data: Path, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "router"
    command = ["train", "--data", str(data), "--out", str(out), "--json", "--no-refine", "--encoder"]
    words = ["--finetune", "--epochs", "1", "--batch-size", "16", "--accumulate", "2", "--learning-rate", "1e-3"]
    assert main([*command, str(directory), "--max-tokens", "30", *words, "--precision", "bfloat16"]) == 0
    assert json.loads(capsys.readouterr().out)["finetune_kept"] == log_of(out, "finetune selected")[-1]["kept"]
    for wrong, message in (
        ([str(directory), "--epochs", "2"], "finetune: expected --finetune with --epochs, got none"),
        ([str(directory), "--finetune", "--epochs", "0"], "epochs: expected at least 1, got 0"),
        ([str(directory), "--finetune", "--learning-rate", "nan"], "learning_rate: expected a finite number above 0"),
        (["hash", "--finetune"], "encoder: expected a transformer to fine-tune or to hold, got 'hash'"),
        (["hash", "--hold-encoder"], "encoder: expected a transformer to fine-tune or to hold, got 'hash'"),
    ):
        assert main([*command, *wrong]) == 2
        assert message in capsys.readouterr().err


# two processes run this: steps that they cannot share evenly, steps of which one has no row, and a whole training
SCRIPT = """
import pickle, sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from proteus_fast.training.distributed import process_group
from proteus_fast.training.train import train
from tests.training.test_tuner import CONFIG, build

torch.set_num_threads(1)
config, tunings, rows = pickle.loads(Path("input.pickle").read_bytes())
with process_group("cpu"):
    for number, tuning in enumerate(tunings):
        tuner = build(Path(config.encoder), tuning)
        tuner.train(7)
        np.savez(f"{number}-{torch.distributed.get_rank()}.npz", p=tuner.predict(rows), **tuner.weights())
    train(config)
"""


def test_two_processes_train_what_one_trains(trained: Path, data: Path, directory: Path, tmp_path: Path) -> None:
    tunings, rows = (CONFIG, replace(CONFIG, batch_size=1, accumulate=3)), [[1, 5, 2], [], [1, 6, 7, 2]]
    out = with_embeddings_of(trained, tmp_path / "router")
    given = pickle.dumps((settings(data, out, directory), tunings, rows))
    (tmp_path / "input.pickle").write_bytes(given)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "tests").symlink_to(Path(__file__).resolve().parents[1])
    run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"], tmp_path)
    for number, tuning in enumerate(tunings):
        alone = build(directory, tuning)
        alone.train(7)
        expected = {"p": alone.predict(rows), **alone.weights()}
        with np.load(tmp_path / f"{number}-0.npz") as first, np.load(tmp_path / f"{number}-1.npz") as second:
            for name, values in expected.items():
                np.testing.assert_array_equal(first[name], second[name], err_msg=name)
                np.testing.assert_allclose(first[name], values, atol=1e-4, err_msg=name)
    losses = [[look["loss"] for look in log_of(path, "finetune")] for path in (out, trained)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    ours, theirs = Router.load(out), Router.load(trained)
    np.testing.assert_allclose(ours.encode(["poems1 word2"]), theirs.encode(["poems1 word2"]), atol=1e-3)
    for name, tensor in theirs.checkpoint.tensors.items():
        np.testing.assert_allclose(ours.checkpoint.tensors[name], tensor, atol=1e-3, err_msg=name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accumulate", 0), ("batch_size", 0), ("token_budget", 0), ("patience", 0), ("gradient_clip", 0.0),
        ("weight_decay", -1.0), ("layer_decay", 0.0), ("layer_decay", 1.5), ("warm_up", 1.0), ("precision", "float16"),
    ],
)  # fmt: skip
def test_wrong_settings(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        FinetuneConfig(**{name: value})  # type: ignore[arg-type]


def test_a_temperature_is_found() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0.0, 1.5, (4000, 3))
    score = (rng.random(logits.shape) < 1.0 / (1.0 + np.exp(-logits))).astype(np.float64)
    assert fit_temperature(2.0 * logits, score) == pytest.approx(2.0, rel=0.1)
    p = 1.0 / (1.0 + np.exp(-logits))
    plain = -(score * np.log(p) + (1.0 - score) * np.log(1.0 - p)).mean()
    assert cross_entropy(logits, score) == pytest.approx(plain)
