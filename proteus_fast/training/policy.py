"""The policy network as a torch module; its forward pass is the reference's, its training comes with PPO."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from proteus_kernels.reference import Preference, policy_ref


class PolicyNetwork(nn.Module):
    """Beta policy over the preference mu, gated by the dual variable (PROTEUS, section on the policy).

    With the ``residual`` head the network starts as the dual table itself: the last layer is zero, so that mu is the
    interpolation of ``knots_mu`` at tau. With the ``free`` head, the paper's, the concentrations are the network's
    alone.

    Args:
        dim: width of the embedding z. candidates: K. knots_tau: increasing targets, (N,). knots_mu: preference of the
            dual table at the knots, (N,). knots_dual: dual variable at the knots, (N,). hidden: units of a layer.
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
        head: Literal["residual", "free"] = "residual",
    ) -> None:
        super().__init__()
        self.head = head
        first, second, last = nn.Linear(dim + 2, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 2)
        self.w1, self.b1 = nn.Parameter(first.weight.detach().T.contiguous()), nn.Parameter(first.bias.detach())
        self.w2, self.b2 = nn.Parameter(second.weight.detach().T.contiguous()), nn.Parameter(second.bias.detach())
        self.w3, self.b3 = nn.Parameter(last.weight.detach().T.contiguous()), nn.Parameter(last.bias.detach())
        self.gate_weight, self.gate_bias = nn.Parameter(torch.zeros(hidden)), nn.Parameter(torch.full((hidden,), 2.0))
        self.prior = nn.Parameter(torch.zeros(candidates))
        if head == "residual":
            nn.init.zeros_(self.w3)
            nn.init.zeros_(self.b3)
        self.knots_tau: Tensor
        self.knots_mu: Tensor
        self.knots_dual: Tensor
        for name, knots in (("knots_tau", knots_tau), ("knots_mu", knots_mu), ("knots_dual", knots_dual)):
            self.register_buffer(name, knots.detach().clone().float())

    def named(self) -> dict[str, Tensor]:
        """Parameters and knots under their checkpoint names."""
        return {f"policy.{name}": tensor for name, tensor in (*self.named_parameters(), *self.named_buffers())}

    def forward(self, z: Tensor, tau: Tensor) -> Preference:
        """Concentrations and preference for embeddings z (B, dim) and targets tau (B,)."""
        return policy_ref(z, tau, self.named(), self.head)

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """Checkpoint tensors, float32 copies."""
        return {name: tensor.detach().float().cpu().numpy().copy() for name, tensor in self.named().items()}
