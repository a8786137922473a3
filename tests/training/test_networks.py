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
from proteus_fast.training.policy import Critic, Head, PolicyNetwork, decide
from proteus_fast.training.refine import refine
from proteus_kernels import reference


@pytest.mark.parametrize("head", ["residual", "free"])
def test_policy_learns_and_exports_what_it_is(head: Head) -> None:
    torch.manual_seed(0)
    knots = torch.linspace(0.5, 0.9, 16)
    network = PolicyNetwork(12, 4, knots, torch.linspace(0.2, 0.9, 16), torch.ones(16), hidden=32, head=head)
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


@pytest.mark.parametrize("head", ["residual", "free"])
def test_standardisation_is_part_of_the_exported_policy(head: Head) -> None:
    """What is served takes embeddings as they are; what is trained sees them with mean 0 and deviation 1."""
    torch.manual_seed(1)
    z, tau = 3.0 + 20.0 * torch.randn(200, 5), 0.5 + 0.4 * torch.rand(200)
    knots, dual = torch.linspace(0.5, 0.9, 8), torch.linspace(0.0, 9.0, 8)
    network = PolicyNetwork(
        5, 3, knots, torch.linspace(0.2, 0.9, 8), dual, hidden=16, head=head, z_mean=z.mean(dim=0), z_scale=z.std(dim=0)
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = network.critic_input(z, tau)
    assert x.shape == (200, 7)
    torch.testing.assert_close(x[:, :5].mean(dim=0), torch.zeros(5), rtol=0, atol=1e-4)
    torch.testing.assert_close(x[:, :5].std(dim=0), torch.ones(5), rtol=0, atol=1e-4)
    assert x[:, 5:].abs().max() < 4.0
    # the first layer on standardised inputs, and the exported one on inputs as they are
    exported = {name: torch.from_numpy(tensor).double() for name, tensor in network.tensors().items()}
    inside = dict(network.named_parameters())
    first = x.detach().double() @ inside["w1"].detach().double() + inside["b1"].detach().double()
    raw = torch.cat([z, tau.unsqueeze(1), reference.interpolate_ref(tau, knots, dual).unsqueeze(1)], dim=1).double()
    torch.testing.assert_close(raw @ exported["policy.w1"] + exported["policy.b1"], first, rtol=0, atol=1e-4)
    served = reference.policy_ref(z.double(), tau.double(), exported, head)
    for ours, theirs in zip(network(z, tau), served, strict=True):
        torch.testing.assert_close(ours.detach().double(), theirs, rtol=1e-4, atol=1e-4)


def test_gamma_starts_where_it_is_told_and_stays_between_2_and_8() -> None:
    knots = torch.linspace(0.5, 0.9, 4)
    for gamma in (2.25, 4.0, 7.75):
        network = PolicyNetwork(2, 2, knots, knots, knots, hidden=4, gamma=gamma)
        assert network.gamma.item() == pytest.approx(gamma, abs=1e-5)
        for far in (-1e4, 1e4):
            with torch.no_grad():
                network.gamma_logit.fill_(far)
            assert network.gamma.item() == (2.0 if far < 0 else 8.0)


def test_a_decision_is_the_argmax_of_the_score() -> None:
    knots = torch.linspace(0.5, 0.9, 4)
    network = PolicyNetwork(2, 3, knots, knots, knots, hidden=4)
    p = torch.tensor([[0.5, 0.5, 0.5], [0.2, 0.6, 0.9], [0.2, 0.6, 0.9], [0.8, 0.8, 0.1]])
    cost = torch.tensor([0.1, 0.1, 1.0])
    with torch.no_grad():
        assert decide(network, p, torch.ones(4), cost, 5.0).tolist() == [0, 2, 2, 0]
        assert decide(network, p, torch.zeros(4), cost, 5.0).tolist() == [0, 1, 1, 0]
        # the prior counts by mu
        network.prior.copy_(torch.tensor([0.0, 0.0, 0.5]))
        assert decide(network, p, torch.ones(4), cost, 0.0).tolist() == [2, 2, 2, 0]
        assert decide(network, p, torch.zeros(4), cost, 0.0).tolist() == [0, 2, 2, 0]


def test_the_critic_starts_with_one_value_for_all() -> None:
    torch.manual_seed(2)
    critic = Critic(5)
    value = critic(torch.randn(30, 7))
    assert value.shape == (30,)
    assert value.std() < 1e-6


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
    # a policy would see embeddings that it was not trained on: the plug-in rule alone
    config = replace(source.config, projection="mlp", link="sigmoid", head=None, mode="dual")
    certificate = replace(source.certificate, paths={"dual": source.certificate.paths["dual"]})
    refined = Router(Checkpoint(config, encoder | result.tensors, certificate))
    _, _, _, _, _, predicted, _ = refined.snapshot.scores(h, 0.85)
    tensors = {name: torch.from_numpy(tensor).double() for name, tensor in result.tensors.items()}
    z = reference.project_ref(torch.from_numpy(h).double(), tensors)
    expected = reference.predict_ref(z, tensors, "sigmoid").numpy()
    assert np.abs(predicted - expected).max() < 1e-5
