"""The networks in torch: the policy module is the reference, the refined projection is the engine's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from proteus_fast.checkpoint import Checkpoint
from proteus_fast.demo_queries import queries
from proteus_fast.evaluation.outcomes import fold_of
from proteus_fast.router import Router
from proteus_fast.training.policy import PolicyNetwork
from proteus_fast.training.refine import refine
from proteus_kernels import reference


@pytest.mark.parametrize("head", ["residual", "free"])
def test_policy_learns_and_exports_what_it_is(head: str) -> None:
    torch.manual_seed(0)
    knots = torch.linspace(0.5, 0.9, 16)
    network = PolicyNetwork(12, 4, knots, torch.linspace(0.2, 0.9, 16), torch.ones(16), hidden=32, head=head)  # type: ignore[arg-type]
    z, tau = torch.randn(64, 12), torch.rand(64)
    before = network(z, tau)
    assert (before.conc1 > 1).all()
    assert (before.conc0 > 1).all()
    assert ((before.mu > 0) & (before.mu < 1)).all()
    if head == "residual":
        assert torch.allclose(before.mu, reference.interpolate_ref(tau, knots, network.knots_mu), atol=1e-6)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    target = torch.sigmoid(z[:, 0])
    for _ in range(150):
        loss = ((network(z, tau).mu - target) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.5 * ((before.mu - target) ** 2).mean()
    exported = {name: torch.from_numpy(tensor) for name, tensor in network.tensors().items()}
    again = reference.policy_ref(z, tau, exported, head)
    assert torch.equal(again.mu, network(z, tau).mu)


def test_refinement_is_deterministic_and_served_by_the_engine() -> None:
    texts = queries()
    router = Router.load()
    h = router.encode(texts)
    random = np.random.default_rng(0)
    score = (random.random((len(texts), len(router.pool))) < 0.7).astype(np.float64)
    ticks: list[int] = []
    result = refine(h, score, fold_of(texts), seed=3, width=16, epochs=3, progress=lambda: ticks.append(1))
    again = refine(h, score, fold_of(texts), seed=3, width=16, epochs=3)
    assert len(ticks) == 6
    assert result.loss.shape == (3,)
    assert all(np.array_equal(result.tensors[name], again.tensors[name]) for name in result.tensors)
    source = router.checkpoint
    encoder = {name: tensor for name, tensor in source.tensors.items() if name.startswith("encoder.")}
    config = replace(source.config, projection="mlp", link="sigmoid")
    refined = Router(Checkpoint(config, encoder | result.tensors, source.certificate))
    _, _, _, _, _, predicted, _ = refined.snapshot.scores(h, 0.85)
    tensors = {name: torch.from_numpy(tensor).double() for name, tensor in result.tensors.items()}
    z = reference.project_ref(torch.from_numpy(h).double(), tensors)
    expected = reference.predict_ref(z, tensors, "sigmoid").numpy()
    assert np.abs(predicted - expected).max() < 1e-5
