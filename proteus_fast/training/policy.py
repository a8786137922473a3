"""The policy network as a torch module; its forward pass is the reference's."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from proteus_kernels.reference import Preference, interpolate_ref, policy_ref, scores_ref

Head = Literal["residual", "free"]

CONCENTRATION = 60.0
"""conc1 + conc0 - 2 with which a residual head starts: the Beta is then about .05 wide."""


class PolicyNetwork(nn.Module):
    """Beta policy over the preference mu, gated by the dual variable (PROTEUS, section on the policy).

    With the ``residual`` head the network starts as the dual table itself: its last layer is zero, so that mu is the
    interpolation of ``knots_mu`` at tau. With the ``free`` head, the paper's, the concentrations are the network's
    alone. Inputs are standardised inside; ``tensors`` folds that into the first layer.

    Args:
        dim: width of the embedding z. candidates: K. knots_tau: increasing targets, (N,). knots_mu: preference of the
            dual table at the knots, (N,). knots_dual: log(1 + lambda) at the knots, (N,). hidden: units of a layer.
        gamma: cost sensitivity to start from, in (2, 8). z_mean, z_scale: of the embeddings, (dim,); None: 0 and 1.
    """

    def __init__(
        self,
        dim: int,
        candidates: int,
        knots_tau: Tensor,
        knots_mu: Tensor,
        knots_dual: Tensor,
        *,
        hidden: int = 256,
        head: Head = "residual",
        gamma: float = 4.0,
        z_mean: Tensor | None = None,
        z_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.head: Head = head
        first, second, last = nn.Linear(dim + 2, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 2)
        self.w1, self.b1 = nn.Parameter(first.weight.detach().T.contiguous()), nn.Parameter(first.bias.detach())
        self.w2, self.b2 = nn.Parameter(second.weight.detach().T.contiguous()), nn.Parameter(second.bias.detach())
        self.w3, self.b3 = nn.Parameter(last.weight.detach().T.contiguous()), nn.Parameter(last.bias.detach())
        self.gate_weight, self.gate_bias = nn.Parameter(torch.zeros(hidden)), nn.Parameter(torch.full((hidden,), 2.0))
        self.prior = nn.Parameter(torch.zeros(candidates))
        self.gamma_logit = nn.Parameter(torch.logit(torch.tensor((gamma - 2.0) / 6.0)))
        if head == "residual":
            nn.init.zeros_(self.w3)
            with torch.no_grad():
                self.b3.copy_(torch.tensor([0.0, CONCENTRATION]))
        self.knots_tau: Tensor
        self.knots_mu: Tensor
        self.knots_dual: Tensor
        for name, knots in (("knots_tau", knots_tau), ("knots_mu", knots_mu), ("knots_dual", knots_dual)):
            self.register_buffer(name, knots.detach().clone().float())
        scalars = torch.stack([self.knots_tau, self.knots_dual])
        mean = torch.zeros(dim) if z_mean is None else z_mean
        scale = torch.ones(dim) if z_scale is None else z_scale
        self.input_mean: Tensor
        self.input_scale: Tensor
        self.register_buffer("input_mean", torch.cat([mean.float(), scalars.mean(dim=1)]))
        self.register_buffer("input_scale", torch.cat([scale.float(), scalars.std(dim=1).clamp_min(1e-2)]))

    @property
    def gamma(self) -> Tensor:
        """Cost sensitivity, 2 + 6 sigmoid(g), so that it stays in [2, 8] (PROTEUS)."""
        return 2.0 + 6.0 * torch.sigmoid(self.gamma_logit)

    def named(self) -> dict[str, Tensor]:
        """Parameters and knots under their checkpoint names, for inputs as they are."""
        w1 = self.w1 / self.input_scale.unsqueeze(1)
        named = {f"policy.{name}": tensor for name, tensor in (*self.named_parameters(), *self.named_buffers())}
        for name in ("policy.gamma_logit", "policy.input_mean", "policy.input_scale"):
            del named[name]
        return named | {"policy.w1": w1, "policy.b1": self.b1 - self.input_mean @ w1}

    def forward(self, z: Tensor, tau: Tensor) -> Preference:
        """Concentrations and preference for embeddings z (B, dim) and targets tau (B,)."""
        return policy_ref(z, tau, self.named(), self.head)

    def critic_input(self, z: Tensor, tau: Tensor) -> Tensor:
        """What the critic sees: z, tau and the dual variable, standardised, (B, dim + 2)."""
        dual = interpolate_ref(tau, self.knots_tau, self.knots_dual)
        x = torch.cat([z, tau.unsqueeze(1), dual.unsqueeze(1)], dim=1)
        return (x - self.input_mean) / self.input_scale

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """Checkpoint tensors, float32 copies."""
        return {name: tensor.detach().float().cpu().numpy().copy() for name, tensor in self.named().items()}


class Critic(nn.Module):
    """State value of (z, tau, dual), a two-layer network; a baseline for PPO only, never served."""

    def __init__(self, dim: int, hidden: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim + 2, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, 1))
        last = self.layers[2]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Expected reward, (B,), for ``PolicyNetwork.critic_input`` (B, dim + 2)."""
        value: Tensor = self.layers(x)[:, 0]
        return value


def decide(network: PolicyNetwork, p: Tensor, mu: Tensor, cost: Tensor, kappa: float) -> Tensor:
    """Choice of every row at a preference: argmax of the score with the network's prior and gamma.

    Args:
        p: predicted accuracy, (B, K). mu: (B,). cost: mean costs in cost units, (K,). kappa: cost scale.

    Returns:
        (B,) int64, the lowest index where scores tie.
    """
    return scores_ref(p, mu, network.prior, cost, kappa, network.gamma).argmax(dim=1)
