"""Training of heads on a frozen transformer, with a small one made on the spot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proteus_fast import checkpoint
from proteus_fast.cli import main
from proteus_fast.encoder import TransformerEncoder
from proteus_fast.evaluation.outcomes import OutcomeTable, is_cal, read_division, read_table
from proteus_fast.router import Router
from proteus_fast.training import fit_predictor, frozen
from proteus_fast.training.frozen import fit_frozen
from proteus_fast.training.train import TrainConfig, train
from tests import encoders
from tests.evaluation import synthetic

WORDS = [f"{topic}{i}" for topic in synthetic.TOPICS for i in range(synthetic.WORDS_OF_A_TOPIC)]
WORDS += [f"word{i}" for i in range(synthetic.COMMON_WORDS)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoders.make("bert", tmp_path_factory.mktemp("bert"), WORDS)


@pytest.fixture(scope="module")
def table() -> OutcomeTable:
    return synthetic.outcome_table(700, seed=9)


@pytest.fixture(scope="module")
def data(table: OutcomeTable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_splits(tmp_path_factory.mktemp("data") / "synthetic", table)


def settings(data: Path, out: Path, directory: Path, **changes: Any) -> TrainConfig:
    made = TrainConfig(
        data=data, out=out, encoder=str(directory), max_tokens=30, alphas=(0.05, 0.5, 4.0),
        variants=("each+0", "all@1"), refine=False, progress=False,
    )  # fmt: skip
    return replace(made, **changes)


@pytest.fixture(scope="module")
def trained(data: Path, directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(settings(data, tmp_path_factory.mktemp("trained") / "router", directory))


def test_the_checkpoint_routes_texts_by_what_it_learnt(trained: Path, data: Path, directory: Path) -> None:
    router = Router.load(trained)
    source = router.checkpoint.config.source
    assert source is not None
    assert (source.directory, source.max_tokens, router.input_dim) == (str(directory), 30, 32)
    assert set(router.checkpoint.tensors) == {"predictor.weight", "predictor.bias"}
    test = read_table(data / "test.parquet").with_candidates(router.pool.names)
    x = router.encode(test.prompts)
    p = router.snapshot.scores(x, 0.5)[5]
    constant = read_division(data).fit.with_candidates(router.pool.names).score.mean(axis=0)
    # the topic is in the words, and random weights leave something of it
    assert ((p - test.score) ** 2).mean() < 0.97 * ((constant - test.score) ** 2).mean()
    assert router.tau_max is not None
    assert router.route(test.prompts[0], 0.6).candidate in router.pool.names


def test_embeddings_are_made_once(
    trained: Path, data: Path, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "router"
    first = checkpoint.load(train(settings(data, out, directory))).sha256

    def never(*_: object, **__: object) -> None:
        raise AssertionError("embedded again")

    monkeypatch.setattr(fit_predictor, "embed", never)
    again = checkpoint.load(train(settings(data, out, directory)))
    assert again.sha256 == first
    assert again.sha256 == checkpoint.load(trained).sha256
    # they are the same for another seed, and by another name of the encoder
    train(settings(data, out, directory, seed=1))
    train(replace(settings(data, out, directory), encoder=str(directory.parent / "." / directory.name) + "/"))
    # calibration texts may be replaced without a word: then the embeddings are others too
    other = synthetic.write_splits(tmp_path / data.name, synthetic.outcome_table(700, seed=9))
    val = read_table(other / "val.parquet")
    synthetic.write_table(other / "val.parquet", replace(val, prompts=tuple(f"{text} more" for text in val.prompts)))
    with pytest.raises(AssertionError, match="embedded again"):
        train(settings(other, out, directory))
    # and so are those of fewer tokens
    with pytest.raises(AssertionError, match="embedded again"):
        train(settings(data, out, directory, max_tokens=20))


def test_an_interrupted_embedding_goes_on(
    trained: Path, data: Path, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupt(Exception):
        pass

    encode, most, encoded = TransformerEncoder.encode, [20], [0]

    def counting(self: TransformerEncoder, texts: list[str]) -> Any:
        if most[0] == 0:
            raise Interrupt
        most[0] -= 1
        encoded[0] += len(texts)
        return encode(self, texts)

    monkeypatch.setattr(frozen, "_KEEP_EVERY_S", -1.0)
    monkeypatch.setattr(TransformerEncoder, "encode", counting)
    out = tmp_path / "router"
    with pytest.raises(Interrupt):
        train(settings(data, out, directory))
    most[0] = 1000
    assert checkpoint.load(train(settings(data, out, directory))).sha256 == checkpoint.load(trained).sha256
    division = read_division(data)
    # each text once, whatever was interrupted
    assert encoded[0] == len({*division.fit.prompts, *division.calibration.prompts})
    assert not list(tmp_path.glob("router.training/*begun*"))


def test_labels_of_calibration_rows_change_the_certificate_only(
    trained: Path, table: OutcomeTable, directory: Path, tmp_path: Path
) -> None:
    split = np.array([synthetic.split_of(prompt) for prompt in table.prompts])
    held = (split == "val") | (is_cal(table.prompts) & (split == "train"))
    scrambled = replace(table, score=np.where(held[:, None], 1.0 - table.score, table.score))
    data = synthetic.write_splits(tmp_path / "synthetic", scrambled)
    other = checkpoint.load(train(settings(data, tmp_path / "router", directory)))
    mine = checkpoint.load(trained)
    for name, tensor in mine.tensors.items():
        np.testing.assert_array_equal(other.tensors[name], tensor)
    ours, theirs = mine.certificate.paths["dual"], other.certificate.paths["dual"]
    np.testing.assert_array_equal(ours.path.parameter, theirs.path.parameter)
    assert not np.array_equal(ours.successes, theirs.successes)


def test_a_refinement_that_is_cheaper_is_kept(data: Path, directory: Path, tmp_path: Path) -> None:
    out = train(settings(data, tmp_path / "router", directory, refine=True))
    lines = (tmp_path / "router.training" / "log.jsonl").read_text().splitlines()
    share = next(e["share_of_resamples_cheaper"] for e in map(json.loads, lines) if e["stage"] == "refine")
    assert (checkpoint.load(out).config.projection == "mlp") == (share >= 0.5)


def test_the_command_line_and_what_it_refuses(
    data: Path, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--data", str(data), "--out", str(tmp_path / "router"), "--encoder", str(directory), "--json"]
    assert main([*command, "--max-tokens", "30", "--no-refine"]) == 0
    assert json.loads(capsys.readouterr().out)["candidates"]
    assert main(["evaluate", str(tmp_path / "router"), "--data", str(data), "--json"]) == 0
    assert main([*command, "--mode", "policy"]) == 2
    assert "mode: expected dual with a transformer, got 'policy'" in capsys.readouterr().err
    assert main([*command, "--max-tokens", "41"]) == 2
    assert "max_tokens: expected 2 to 40" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"^encoder: expected a directory, got nothing at bert"):
        train(settings(data, tmp_path / "x", Path("bert")))


def test_ridge_on_embeddings_is_ridge() -> None:
    """One penalty for all components: the closed form on standardised rows."""
    rng = np.random.default_rng(0)
    h = rng.standard_normal((120, 7)).astype(np.float32) * [1, 5, 1, 1, 9, 1, 1] + 3
    score = rng.random((120, 3))
    found = fit_frozen(
        h.astype(np.float32), score, np.arange(120) % 5, lambda p: float(p.mean()), (2.0,), ("all@0",), ("clip",)
    )
    x = (h - h.mean(axis=0)) / (h.std(axis=0) * np.sqrt(7))
    solution = np.linalg.solve(x.T @ x + 2.0 * np.eye(7), x.T @ (score - score.mean(axis=0)))
    np.testing.assert_allclose(h @ found.weight + found.bias, x @ solution + score.mean(axis=0), atol=1e-4)
    assert [trial.variant for trial in found.trials] == ["all@0"]
    assert found.p.shape == (120, 3)
