"""Outcome tables on which routing helps, made from a seed: prompts show their topic, candidates are good at some."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from proteus_fast.evaluation.outcomes import OutcomeTable

CANDIDATES = ("small", "coder", "medium", "large")
PRICE_USD = np.array([1e-4, 3e-4, 9e-4, 3e-3])
TOPICS = ("poems", "proofs", "code", "history", "trivia")
# accuracy of every candidate by topic: the small one suffices for some, the dear one is worth it for others
SKILL = np.array(
    [
        [0.90, 0.85, 0.92, 0.93],
        [0.30, 0.45, 0.60, 0.88],
        [0.40, 0.90, 0.70, 0.88],
        [0.75, 0.60, 0.85, 0.90],
        [0.50, 0.40, 0.65, 0.85],
    ]
)
WORDS_OF_A_TOPIC = 12
COMMON_WORDS = 40


def outcome_table(n: int, seed: int = 0, graded: bool = False) -> OutcomeTable:
    """Rows of one candidate order, prompts all distinct; graded scores are multiples of .25."""
    random = np.random.default_rng(seed)
    topic = random.integers(0, len(TOPICS), n)
    prompts = []
    for i, number in enumerate(topic):
        own = random.integers(0, WORDS_OF_A_TOPIC, 5)
        common = random.integers(0, COMMON_WORDS, 8)
        words = [f"{TOPICS[number]}{w}" for w in own] + [f"word{w}" for w in common]
        prompts.append(f"Question {seed}-{i}: {' '.join(random.permutation(words))}?")
    # how hard a row is for all candidates together, so that their scores are correlated
    hard = random.normal(0.0, 0.15, (n, 1))
    p = np.clip(SKILL[topic] + hard, 0.02, 0.98)
    score = (random.random(p.shape) < p).astype(np.float64)
    if graded:
        score = random.binomial(4, p) / 4
    cost = PRICE_USD * random.lognormal(0.0, 0.3, (n, 1))
    tasks = tuple(TOPICS[number] for number in topic)
    return OutcomeTable("synthetic", tuple(prompts), tasks, CANDIDATES, score, cost)


def split_of(prompt: str) -> str:
    """Six tenths train, two tenths val, two tenths test, by prompt hash."""
    bits = int(hashlib.sha256(prompt.strip().encode()).hexdigest()[:8], 16) % 10
    return "train" if bits < 6 else "val" if bits < 8 else "test"


def write_table(path: Path, table: OutcomeTable) -> None:
    """Write one Parquet file in the form of the published tables."""
    columns: dict[str, object] = {"prompt": list(table.prompts), "task": list(table.tasks)}
    for i, name in enumerate(table.candidates):
        columns[f"score:{name}"] = table.score[:, i]
        columns[f"cost:{name}"] = table.cost_usd[:, i]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def write_splits(folder: Path, table: OutcomeTable) -> Path:
    """Write train, val and test files of a table; returns the folder."""
    split = np.array([split_of(prompt) for prompt in table.prompts])
    for name in ("train", "val", "test"):
        write_table(folder / f"{name}.parquet", table.take(split == name))
    return folder
