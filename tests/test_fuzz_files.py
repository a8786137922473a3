"""A few mutations of everything that `fuzz_files.py` fuzzes, so that it works when it is needed."""

from __future__ import annotations

import random

import pytest

from tests.fuzz_files import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_no_mutation_does_worse_than_an_error(name: str) -> None:
    target, rng = TARGETS[name], random.Random(1)
    seeds = list(target.seeds())
    assert all(map(target.run, seeds))
    accepted = 0
    for _ in range(60):
        data = rng.choice(seeds)
        for _ in range(rng.choice((1, 1, 2, 3))):
            data = target.mutate(data, rng)
        accepted += target.run(data)
    # neither do all fail in the first check
    assert 0 < accepted < 60
