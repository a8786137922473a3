"""Scores and argmax against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from proteus_kernels import reference
from proteus_kernels.scoring import best_candidate
from tests.kernels.snapshots import DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "candidates"), [(1, 1), (17, 3), (40, 16), (33, 64)])
def test_the_best_is_the_references(rows: int, candidates: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    p = torch.rand(rows, candidates, generator=generator).to(dtype)
    mu = torch.rand(rows, generator=generator)
    mu[0], mu[-1] = 0.0, 1.0
    b = torch.randn(candidates, generator=generator) / 10
    for c in (torch.rand(candidates, generator=generator), torch.rand(rows, candidates, generator=generator)):
        for kappa, gamma in ((0.5, 2.0), (30.0, 8.0)):
            available = torch.rand(rows, candidates, generator=generator) < 0.6
            for mask in (None, available, available[0]):
                scores = reference.scores_ref(p.double(), mu.double(), b.double(), c.double(), kappa, gamma)
                choice, score = reference.best_candidate_ref(scores, mask)
                scales = torch.tensor([kappa, gamma], dtype=torch.float64)
                given = (None if part is None else part.to(DEVICE) for part in (p, mu, b, c, scales, mask))
                got_choice, got_score = (part.cpu() for part in best_candidate(*given))  # type: ignore[arg-type]
                torch.testing.assert_close(got_score.double(), score, rtol=0, atol=1e-5, equal_nan=True)
                shown = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
                top = shown.sort(dim=1).values
                clear = (top[:, -1] - top[:, -2] > 2e-5) if candidates > 1 else torch.ones(rows, dtype=torch.bool)
                assert torch.equal(got_choice[clear], choice[clear])
                assert ((got_choice == -1) == (choice == -1)).all()


def test_ties_overflow_and_bad_shapes() -> None:
    p = torch.tensor([[0.5, 0.5, 0.5], [0.1, 0.9, 0.9], [0.5, np.nan, 0.1]], device=DEVICE)
    zeros, scales = torch.zeros(3, device=DEVICE), torch.tensor([1.0, 2.0], dtype=torch.float64, device=DEVICE)
    choice, score = best_candidate(p, zeros, zeros, zeros, scales)
    assert choice.tolist() == [0, 1, -1]
    assert score[2].isnan()
    without = torch.tensor([True, False, True], device=DEVICE)
    assert best_candidate(p, zeros, zeros, zeros, scales, without)[0].tolist() == [0, 2, 0]
    with pytest.raises(ValueError, match=r"^c: expected shape \(3,\) or \(3, 3\), got \(2,\)"):
        best_candidate(p, zeros, zeros, zeros[:2], scales)
    with pytest.raises(ValueError, match=r"^available: expected shape \(3,\) or \(3, 3\), got \(2,\)"):
        best_candidate(p, zeros, zeros, zeros, scales, without[:2])
    with pytest.raises(TypeError, match=r"^kappa_gamma: expected float64, got float32"):
        best_candidate(p, zeros, zeros, zeros, zeros)
