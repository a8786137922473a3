"""Reading, checking and dividing outcome tables; the published splits; that calibration labels shape nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from proteus_fast import Router
from proteus_fast.checkpoint import MAX_SKETCH
from proteus_fast.evaluation.outcomes import (
    Division,
    OutcomeTable,
    calibration_notes,
    concatenate,
    distinct_rows,
    fold_of,
    is_cal,
    prompt_sketch,
    read_division,
    read_table,
    seen_share,
    shared_prompts,
)
from tests.conftest import TABLES
from tests.evaluation import synthetic

Columns = dict[str, Any]


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    table = synthetic.outcome_table(50, graded=True)
    synthetic.write_table(tmp_path / "set" / "test.parquet", table)
    read = read_table(tmp_path / "set" / "test.parquet")
    assert (read.name, read.prompts, read.tasks, read.candidates) == (
        "set", table.prompts, table.tasks, table.candidates,
    )  # fmt: skip
    assert np.array_equal(read.score, table.score)
    assert np.array_equal(read.cost_usd, table.cost_usd)
    assert read.sha256 == table.sha256


def test_integers_and_booleans_are_scores(tmp_path: Path) -> None:
    columns = {"prompt": ["a", "b"], "score:m": [True, False], "cost:m": [1, 0]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    table = read_table(tmp_path / "t.parquet")
    assert table.tasks == ()
    assert table.score.tolist() == [[1.0], [0.0]]
    assert table.cost_usd.tolist() == [[1.0], [0.0]]


def _set(name: str, value: object) -> Callable[[Columns], None]:
    return lambda columns: columns.__setitem__(name, value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c.pop("cost:b"), "expected one column cost:b, got 0"),
        (lambda c: c.pop("prompt"), "expected one column prompt, got 0"),
        (lambda c: (c.pop("score:a"), c.pop("score:b")), "expected 1 to 64 columns score:<name>, got 0"),
        (_set("prompt", ["x", None]), "prompt: expected at least one row, all of them texts"),
        (_set("prompt", [1, 2]), "prompt: expected at least one row, all of them texts"),
        (_set("score:a", [0.5, 1.5]), r"score:a: expected values in \[0, 1\], got 1.5 in row 1"),
        (_set("score:a", [-0.1, 0.5]), r"score:a: expected values in \[0, 1\], got -0.1 in row 0"),
        (_set("score:a", [0.5, float("nan")]), "score:a: expected values in .* got nan in row 1"),
        (_set("score:a", [0.5, None]), "score:a: expected"),
        (_set("score:a", ["x", "y"]), "score:a: expected numbers"),
        (_set("score:a", ["0.5", "1"]), "score:a: expected numbers"),
        (_set("cost:a", [-1.0, 0.0]), "cost:a: expected values in .* got -1.0 in row 0"),
        (_set("cost:a", [float("inf"), 0.0]), "cost:a: expected values in .* got inf in row 0"),
    ],
)
def test_a_spoilt_table_is_refused_with_its_place(
    tmp_path: Path, spoil: Callable[[Columns], object], message: str
) -> None:
    columns: Columns = {"prompt": ["x", "y"]}
    for name in ("a", "b"):
        columns |= {f"score:{name}": [0.0, 1.0], f"cost:{name}": [0.1, 0.2]}
    spoil(columns)
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=message) as caught:
        read_table(tmp_path / "t.parquet")
    assert "t.parquet" in str(caught.value)


def test_a_table_without_rows_is_refused(tmp_path: Path) -> None:
    columns = {
        "prompt": pa.array([], pa.string()),
        "score:a": pa.array([], pa.float64()),
        "cost:a": pa.array([], pa.float64()),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="at least one row"):
        read_table(tmp_path / "t.parquet")


@pytest.mark.parametrize("twice", ["score:a", "cost:a"])
def test_a_column_twice_is_refused(tmp_path: Path, twice: str) -> None:
    names = ["prompt", "score:a", "cost:a", twice]
    table = pa.Table.from_arrays([pa.array(["x"]), *(pa.array([0.5]) for _ in names[1:])], names=names)
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=f"expected one column {twice}, got 2"):
        read_table(tmp_path / "t.parquet")


def test_what_is_no_parquet_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.parquet"):
        read_table(tmp_path / "none.parquet")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and then nothing of the kind")
    with pytest.raises(ValueError, match=r"t\.parquet: expected a Parquet file"):
        read_table(tmp_path / "t.parquet")


def test_texts_that_are_no_utf8_are_refused(tmp_path: Path) -> None:
    columns = {"prompt": ["a text"], "score:a": [0.5], "cost:a": [0.5]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", compression="none", use_dictionary=False)
    good = (tmp_path / "t.parquet").read_bytes()
    # a value's first byte, then that of its column's name
    for word in (b"a text", b"prompt"):
        (tmp_path / "t.parquet").write_bytes(good.replace(word, b"\xff" + word[1:]))
        with pytest.raises(ValueError, match=r"t\.parquet: expected a Parquet file, got") as caught:
            read_table(tmp_path / "t.parquet")
        assert type(caught.value) is ValueError


def test_candidates_are_chosen_by_name() -> None:
    table = synthetic.outcome_table(20)
    turned = table.with_candidates(("large", "small"))
    assert turned.candidates == ("large", "small")
    assert np.array_equal(turned.score, table.score[:, [3, 0]])
    assert np.array_equal(turned.cost_usd, table.cost_usd[:, [3, 0]])
    with pytest.raises(ValueError, match="got none named 'unheard-of'"):
        table.with_candidates(("small", "unheard-of"))


def test_rows_are_taken_and_joined() -> None:
    table = synthetic.outcome_table(30)
    early = np.arange(30) < 12
    joined = concatenate(table.take(early), table.take(~early).with_candidates(table.candidates[::-1]))
    assert joined.sha256 == table.sha256
    assert table.take(np.array([5, 3])).prompts == (table.prompts[5], table.prompts[3])


def test_the_hash_covers_what_a_table_says() -> None:
    table = synthetic.outcome_table(10)
    score, cost = table.score.copy(), table.cost_usd.copy()
    score[3, 1] = 0.125
    cost[3, 1] += 1e-9
    changed = [
        OutcomeTable("t", table.prompts, (), table.candidates, score, table.cost_usd),
        OutcomeTable("t", table.prompts, (), table.candidates, table.score, cost),
        OutcomeTable("t", ("other", *table.prompts[1:]), (), table.candidates, table.score, table.cost_usd),
        OutcomeTable("t", table.prompts, (), ("other", *table.candidates[1:]), table.score, table.cost_usd),
    ]
    assert len({table.sha256, *(one.sha256 for one in changed)}) == 5


def test_equal_prompts_stay_together() -> None:
    prompts = [f"prompt {i}" for i in range(4000)]
    padded = [f"  {prompt}\n" for prompt in prompts]
    assert np.array_equal(is_cal(prompts), is_cal(padded))
    assert np.array_equal(fold_of(prompts), fold_of(padded))
    # shares within four standard deviations, cal and fold independent of each other
    assert abs(is_cal(prompts).mean() - 0.25) < 0.03
    counts = np.bincount(fold_of(prompts)[~is_cal(prompts)], minlength=5)
    assert np.all(np.abs(counts - 600) < 100)


def test_a_division_uses_every_row_once(folder: Path, division: Division) -> None:
    train, val = (read_table(folder / f"{name}.parquet") for name in ("train", "val"))
    assert len(division.fit) + len(division.calibration) == len(train) + len(val)
    assert set(division.fit.prompts) | set(division.calibration.prompts) == {*train.prompts, *val.prompts}
    assert not shared_prompts(division.fit.prompts, division.calibration.prompts)
    assert set(val.prompts) <= set(division.calibration.prompts)


def test_a_prompt_in_train_and_val_is_refused(tmp_path: Path) -> None:
    table = synthetic.outcome_table(40)
    synthetic.write_table(tmp_path / "train.parquet", table)
    synthetic.write_table(tmp_path / "val.parquet", table.take(np.array([7])))
    with pytest.raises(ValueError, match="expected no prompt in both train and val, got 1"):
        read_division(tmp_path)


@pytest.mark.parametrize("name", TABLES)
def test_no_prompt_crosses_the_published_splits(data_dir: Path, name: str) -> None:
    splits = {split: read_table(data_dir / name / f"{split}.parquet") for split in ("train", "val", "test")}
    for first, second in combinations(splits, 2):
        assert splits[first].candidates == splits[second].candidates
        assert not shared_prompts(splits[first].prompts, splits[second].prompts), (first, second)


def _scramble(folder: Path, out: Path) -> Path:
    """A copy of a data set in which every calibration row has the opposite labels and the costs of another row."""
    random = np.random.default_rng(1)
    for split in ("train", "val", "test"):
        table = read_table(folder / f"{split}.parquet")
        cal = is_cal(table.prompts) if split == "train" else np.full(len(table), split == "val")
        score, cost = table.score.copy(), table.cost_usd.copy()
        score[cal] = 1.0 - score[cal]
        cost[cal] = random.permutation(cost[cal])
        synthetic.write_table(
            out / f"{split}.parquet",
            OutcomeTable(table.name, table.prompts, table.tasks, table.candidates, score, cost),
        )
    return out


def test_calibration_labels_shape_neither_model_nor_path(tmp_path: Path, train_on: Callable[..., Router]) -> None:
    """Every choice is made on fit: with other labels on val and cal the router is the same to the bit."""
    small = synthetic.write_splits(tmp_path / "honest" / "synthetic", synthetic.outcome_table(1200, seed=3))
    honest = train_on(small, refine=True).checkpoint
    other = train_on(_scramble(small, tmp_path / "scrambled" / "synthetic"), refine=True).checkpoint
    assert tuple(honest.config.pool) == tuple(other.config.pool)
    assert replace(honest.config, pool=other.config.pool) == other.config
    assert honest.tensors.keys() == other.tensors.keys()
    for name, tensor in honest.tensors.items():
        assert tensor.tobytes() == other.tensors[name].tobytes(), name
    ours, theirs = honest.certificate.paths["dual"], other.certificate.paths["dual"]
    assert ours.path.parameter.tobytes() == theirs.path.parameter.tobytes()
    assert ours.path.expected_cost_usd.tobytes() == theirs.path.expected_cost_usd.tobytes()
    assert honest.certificate.key == other.certificate.key
    # the labels did change: what was counted on them is something else
    assert not np.array_equal(ours.successes, theirs.successes)


def test_one_seed_gives_one_model(folder: Path, router: Router, train_on: Callable[..., Router]) -> None:
    again, other = train_on(folder).checkpoint, train_on(folder, seed=1).checkpoint
    first = router.checkpoint
    assert tuple(again.config.pool) == tuple(first.config.pool)
    for name, tensor in first.tensors.items():
        assert tensor.tobytes() == again.tensors[name].tobytes(), name
    assert np.array_equal(again.certificate.paths["dual"].successes, first.certificate.paths["dual"].successes)
    assert other.certificate.key != first.certificate.key


def test_a_sketch_tells_who_was_seen() -> None:
    mine, others = [f"mine {i}" for i in range(5000)], [f"other {i}" for i in range(5000)]
    sketch = prompt_sketch(mine)
    assert len(sketch) == MAX_SKETCH
    assert sketch == prompt_sketch([f"  {prompt}\n" for prompt in reversed(mine)] * 2)
    assert seen_share(mine, sketch) == seen_share(mine[:300], sketch) == 1.0
    assert seen_share(others, sketch) == 0.0
    assert seen_share(mine[:1000] + others[:3000], sketch) == pytest.approx(0.25, abs=0.05)
    # a few rows are all known
    assert seen_share(["mine 1", "other 1"], prompt_sketch(mine[:10])) == 0.5
    assert seen_share(mine, ()) == 0.0


def test_repeats_are_weighed() -> None:
    assert distinct_rows(["a", "b", "c"]) == 3.0
    assert distinct_rows(["a", "b", "c"] * 7) == 3.0
    # one query 75 times among 1,500: 95 % are distinct, which says little
    rows = [f"text {i}" for i in range(1425)] + ["again"] * 75
    assert distinct_rows(rows) == pytest.approx(1500**2 / (1425 + 75**2))
    assert calibration_notes(rows)[0].startswith("1500 queries, with their repeats, say as much as 319 distinct ones")
    assert calibration_notes(rows[:1425]) == []
