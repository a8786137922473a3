"""The demonstration and its queries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from proteus_fast import demo
from proteus_fast.demo_queries import queries
from proteus_fast.router import Router


def test_queries_are_many_and_varied() -> None:
    texts = queries()
    assert len(texts) >= 250
    assert len(set(texts)) == len(texts)
    assert "" in texts
    assert any(not text.isascii() for text in texts)


def test_demo_shows_what_it_should(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "frontier.png"
    assert demo.run(plot, as_json=True) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["passed"]
    rows = shown["rows"]
    assert rows[-1]["status"] == "INFEASIBLE"
    assert rows[-1]["tau_max"] == Router.load().tau_max
    assert [row["status"] for row in rows[:-1]] == ["FEASIBLE"] * (len(rows) - 1)
    assert all(row["certified_floor"] >= row["tau"] for row in rows[:-1])
    costs = [row["mean_cost_usd"] for row in rows]
    assert costs == sorted(costs)
    assert costs[0] < 0.1 * costs[-1]
    assert all(sum(row["share"].values()) == pytest.approx(1.0) for row in rows)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert demo.run(plot) == 0
    text = capsys.readouterr().out
    assert "INFEASIBLE" in text
    assert "tau_max" in text
