"""PPO with a Lagrangian dual for the tau-conditioned Beta policy: the whole of stage 2 in one file.

One decision is one episode. A row x with a target tau gets mu ~ Beta(conc1, conc0) from the policy, the choice is
argmax_i p_i + mu b_i - kappa (1 - mu)^gamma c_i, and the reward weighs its recorded cost against its accuracy by the
dual variable lambda(tau), which rises where accuracy falls short of tau (PROTEUS, arXiv 2601.19402; [P] marks what is
the paper's). Rows come with out-of-fold p and out-of-fold regression columns in z, so that the policy never sees a
prediction that knows its own label.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from proteus_fast.training.distributed import add_gradients, own_share
from proteus_fast.training.policy import Critic, Head, PolicyNetwork, decide
from proteus_fast.training.start import Start
from proteus_kernels.reference import Preference, interpolate_ref, sample_beta_ref, scores_ref

_CONSTANT = 1e-5
_SMALLEST_MU = 1e-5
_SCALE_MEMORY = 0.95
_BANDS = 4


@dataclass(frozen=True)
class PolicyConfig:
    """How the policy is trained.

    Attributes:
        head: ``residual`` starts at the dual table and learns corrections; ``free`` is the paper's.
        dual: ``indexed`` keeps lambda(tau) on knots, each driven by its own violations, with the reward
            (-c + lambda (a - tau)) / (1 + lambda); ``scalar`` is the paper's single lambda with a - c + lambda (a -
            tau), where tau is a constant, so that nothing ties mu to it.
        hidden: units of both layers [P: 256]. steps: batches at most; the number kept is chosen out of fold.
        sessions: sessions of one tau that run side by side (left open by the paper). batch: rows of each [P: 64].
        session_batches: batches until a session draws its next tau (left open by the paper); 1: a tau per batch.
        taus: ``uniform`` spreads the sessions over the knots' range; ``extremes`` draws from its two ends only.
        epochs, minibatch: passes over a batch and rows of a gradient step (left open by the paper).
        clip, learning_rate, gradient_clip: [P: .2, AdamW 3e-4, 1.0]. weight_decay: AdamW's (left open by the paper).
        baseline: what is subtracted from a reward: ``greedy``, the reward of the policy's own mode on the same row
            (self-critical, Rennie et al. 2017; outcome tables know it), ``critic`` [P], or ``none``: the
            batch's mean only.
        label_share: accuracy in the reward is label_share y + (1 - label_share) p, p being the out-of-fold prediction:
            a label is one noisy draw, and with y alone the policy fits that noise within a hundred steps. [P] has p
            alone, in sample. Violations that drive the dual always count y.
        stay: weight of the squared correction in logit space, for the residual head.
        temperature: first and last T of softmax(s / T), through which b and gamma learn (left open by the paper; at .1
            the choice is blurred over candidates that differ by less).
        learn_gamma, learn_prior: whether gamma in [2, 8] [P] and b [P] are learned.
        knots: of lambda(tau). dual_every: batches between dual steps [P: 5].
        dual_step: of ``indexed``, in log lambda per unit of violation: lambda spans five orders of magnitude, which no
            additive step fits. scalar_step: of ``scalar``, additive [P: .4], from lambda = 1.
        smallest_gain: accuracy that is still worth the largest difference in cost; lambda never exceeds their ratio.
        slack, alarm: a knot at that cap whose CUSUM of (tau - accuracy - slack) exceeds ``alarm`` is unsatisfiable.
    """

    head: Head = "residual"
    dual: Literal["indexed", "scalar"] = "indexed"
    hidden: int = 256
    steps: int = 240
    sessions: int = 16
    batch: int = 64
    session_batches: int = 10
    taus: Literal["uniform", "extremes"] = "uniform"
    epochs: int = 1
    minibatch: int = 256
    clip: float = 0.2
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    baseline: Literal["greedy", "critic", "none"] = "greedy"
    label_share: float = 0.1
    stay: float = 0.1
    temperature: tuple[float, float] = (0.02, 0.002)
    learn_gamma: bool = True
    learn_prior: bool = True
    knots: int = 16
    dual_every: int = 5
    dual_step: float = 2.0
    scalar_step: float = 0.4
    smallest_gain: float = 0.001
    slack: float = 0.005
    alarm: float = 0.25

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[str, ...]] = {
            "head": ("residual", "free"),
            "dual": ("indexed", "scalar"),
            "taus": ("uniform", "extremes"),
            "baseline": ("greedy", "critic", "none"),
        }
        for name, words in allowed.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name}: expected one of {', '.join(words)}, got {getattr(self, name)!r}")
        for name in ("hidden", "sessions", "batch", "session_batches", "epochs", "minibatch", "dual_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.steps < 0 or self.knots < 2:
            raise ValueError(f"steps, knots: expected at least 0 and 2, got {self.steps} and {self.knots}")
        if not 0.0 <= self.label_share <= 1.0:
            raise ValueError(f"label_share: expected a number in [0, 1], got {self.label_share}")
        for name in ("clip", "learning_rate", "gradient_clip", "smallest_gain"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        for name in ("weight_decay", "stay", "dual_step", "scalar_step", "slack", "alarm"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number of at least 0, got {getattr(self, name)}")
        if self.batch < 2:
            raise ValueError(f"batch: expected at least 2, got {self.batch}")
        if not min(self.temperature) > 0.0:
            raise ValueError(f"temperature: expected numbers above 0, got {self.temperature}")


class Rows(NamedTuple):
    """What the policy is trained or followed on.

    z: embeddings, (n, d). p: predicted accuracy, (n, K), in [0, 1]. y: score, (n, K). c: recorded cost in cost units,
    (n, K). price: mean cost in cost units, (K,). All float32, on one device.
    """

    z: Tensor
    p: Tensor
    y: Tensor
    c: Tensor
    price: Tensor

    def take(self, index: Tensor) -> Rows:
        """Some of the rows."""
        return Rows(self.z[index], self.p[index], self.y[index], self.c[index], self.price)


class Dual:
    """lambda(tau) on knots, with its cap and its alarm.

    Attributes:
        value: lambda at the knots, (N,); all equal for ``scalar``. cusum: of the shortfall, (N,).
    """

    def __init__(self, config: PolicyConfig, start: Start, largest_difference: float) -> None:
        self.config = config
        self.knots = start.tau
        self.cap = largest_difference / config.smallest_gain
        scalar = config.dual == "scalar"
        # lambda = 1 / w makes the reward's optimum the plug-in rule p - w c
        first = torch.ones_like(start.weight) if scalar else 1.0 / start.weight.clamp_min(1e-12)
        self.value = first.clamp(max=self.cap)
        self.cusum = torch.zeros_like(self.value)

    def at(self, tau: Tensor) -> Tensor:
        """lambda for targets (B,): log(1 + lambda) is linear between knots."""
        return torch.expm1(interpolate_ref(tau, self.knots, torch.log1p(self.value)))

    def shares(self, tau: Tensor) -> Tensor:
        """How much each target belongs to each knot, (B, N), rows of sum 1."""
        width = self.knots[1] - self.knots[0]
        inside = tau.clamp(self.knots[0], self.knots[-1]).unsqueeze(1)
        return (1.0 - (inside - self.knots).abs() / width).clamp_min(0.0)

    def update(self, violation: Tensor, seen: Tensor) -> None:
        """One dual step.

        Args:
            violation: mean of tau - accuracy at each knot, (N,). seen: bool, which knots had rows, (N,).
        """
        if self.config.dual == "scalar":
            mean = violation[seen].mean()
            violation, seen = mean.expand_as(violation), torch.ones_like(seen)
            moved = (self.value + self.config.scalar_step * mean).clamp(0.0, self.cap)
        else:
            moved = (self.value * torch.exp(self.config.dual_step * violation)).clamp(1e-6, self.cap)
        self.value = torch.where(seen, moved, self.value)
        shortfall = (self.cusum + violation - self.config.slack).clamp_min(0.0)
        self.cusum = torch.where(seen, shortfall, self.cusum)

    @property
    def unsatisfiable(self) -> Tensor:
        """Knots that cannot be met: at the cap, and still short, bool, (N,)."""
        return (self.value >= self.cap * (1.0 - 1e-6)) & (self.cusum > self.config.alarm)


def build_network(rows: Rows, config: PolicyConfig, start: Start, seed: int) -> PolicyNetwork:
    """A policy at its start, standardised by the rows it will be trained on."""
    mean, scale = rows.z.mean(dim=0), rows.z.std(dim=0)
    # a column that says nothing is left as it is: its weights are divided by its scale when the network is saved
    scale = torch.where(scale < _CONSTANT, torch.ones_like(scale), scale)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = PolicyNetwork(
            rows.z.shape[1], rows.p.shape[1], start.tau, start.mu, torch.log1p(1.0 / start.weight),
            hidden=config.hidden, head=config.head, gamma=start.gamma, z_mean=mean, z_scale=scale,
        )  # fmt: skip
    return network.to(rows.z.device)


def follow(network: PolicyNetwork, rows: Rows, taus: Tensor, kappa: float) -> tuple[Tensor, Tensor]:
    """What the policy does with every row at every target, by mu: the Beta's mode (residual head) or mean (free).

    Args:
        taus: path parameters, (T,).

    Returns:
        choice (T, n) int64 and mu (T, n).
    """
    with torch.no_grad():
        mu = torch.stack([network(rows.z, tau.expand(len(rows.z))).mu for tau in taus])
        return torch.stack([decide(network, rows.p, one, rows.price, kappa) for one in mu]), mu


class Batch(NamedTuple):
    """Rows of a step with their targets and the sessions they belong to, (B,) each."""

    rows: Rows
    tau: Tensor
    session: Tensor


def _generator(seed: int, stream: int, number: int) -> torch.Generator:
    # a fresh generator for each use: a resumed run draws what an unbroken one does
    entropy = np.random.SeedSequence([seed, stream, number]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(entropy >> np.uint64(1)))


def draw_batch(rows: Rows, config: PolicyConfig, knots: Tensor, seed: int, step: int) -> Batch:
    """The batch of a step: ``sessions`` targets, ``batch`` rows each."""
    position = torch.rand(config.sessions, generator=_generator(seed, 0, step // config.session_batches))
    number = torch.arange(config.sessions)
    if config.taus == "extremes":
        position, number = 0.1 * position, torch.where(number % 2 == 0, 0.0, 0.9)
    else:
        position, number = position / config.sessions, number / config.sessions
    low, high, half = float(knots[0]), float(knots[-1]), 0.5 * float(knots[1] - knots[0])
    tau = low - half + (number + position) * (high - low + 2.0 * half)
    chosen = torch.randint(len(rows.z), (config.sessions * config.batch,), generator=_generator(seed, 1, step))
    session = torch.arange(config.sessions).repeat_interleave(config.batch)
    device = rows.z.device
    return Batch(rows.take(chosen.to(device)), tau[session].to(device), session.to(device))


def of_choice(values: Tensor, choice: Tensor) -> Tensor:
    """The entry of each row's choice, (B,), of values (B, K)."""
    return values.gather(1, choice.unsqueeze(1))[:, 0]


def rewards_of(rows: Rows, tau: Tensor, dual: Tensor, config: PolicyConfig) -> Tensor:
    """Reward of every candidate, (B, K); the formulas are in ``PolicyConfig.dual``."""
    accuracy = config.label_share * rows.y + (1.0 - config.label_share) * rows.p
    dual, tau = dual.unsqueeze(1), tau.unsqueeze(1)
    if config.dual == "scalar":
        return accuracy - rows.c + dual * (accuracy - tau)
    return (-rows.c + dual * (accuracy - tau)) / (1.0 + dual)


class Trainer:
    """The loop. One object trains one policy; everything it draws depends on (seed, step) alone.

    Under torch.distributed every process holds all rows and draws the whole batch; each takes its part of every
    minibatch, and gradients are added, so that the result is that of one process up to rounding.
    """

    def __init__(
        self,
        network: PolicyNetwork,
        rows: Rows,
        config: PolicyConfig,
        dual: Dual,
        *,
        kappa: float,
        seed: int,
    ) -> None:
        self.network, self.dual = network, dual
        self.rows, self.config, self.kappa, self.seed = rows, config, kappa, seed
        self.step = 0
        self.log: list[dict[str, Any]] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.critic = Critic(rows.z.shape[1]).to(rows.z.device)
        network.gamma_logit.requires_grad_(config.learn_gamma)
        network.prior.requires_grad_(config.learn_prior)
        self.parameters = [p for p in (*network.parameters(), *self.critic.parameters()) if p.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.scale = torch.zeros(config.sessions, device=rows.z.device)
        self.short = torch.zeros_like(dual.value)
        self.weight = torch.zeros_like(dual.value)
        self._show_dual()

    def _show_dual(self) -> None:
        self.network.knots_dual.copy_(torch.log1p(self.dual.value))

    def train(self, steps: int) -> None:
        """Train until so many batches are done."""
        while self.step < steps:
            self._one_step()
            self.step += 1

    def summary(self) -> str:
        """The last report in a few words: accuracy, cost, dual and violation of the tau bands."""
        if not self.log:
            return "policy at its start"
        bands = self.log[-1]["bands"]
        words = [f"{band['tau']:.3f}: {band['accuracy']:.3f} lambda {band['dual']:.3g}" for band in bands]
        return f"step {self.step}, {'; '.join(words)}"

    @property
    def served(self) -> PolicyNetwork:
        """The policy as it is served: with the scalar dual its input is fixed at lambda = 1 [P]."""
        if self.config.dual == "indexed":
            return self.network
        network = copy.deepcopy(self.network)
        network.knots_dual.fill_(math.log(2.0))
        return network

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything that a resumed run needs; its draws come from (seed, step)."""
        parts: dict[str, Tensor] = {f"network.{name}": t for name, t in self.network.state_dict().items()}
        parts |= {f"critic.{name}": t for name, t in self.critic.state_dict().items()}
        parts |= {
            "dual": self.dual.value, "cusum": self.dual.cusum, "scale": self.scale, "short": self.short,
            "weight": self.weight,
        }  # fmt: skip
        for number, moments in self.optimiser.state_dict()["state"].items():
            parts |= {f"adam.{number}.{name}": torch.as_tensor(value) for name, value in moments.items()}
        arrays = {name: tensor.detach().cpu().numpy().copy() for name, tensor in parts.items()}
        return arrays | {"step": np.array(self.step), "log": np.array(json.dumps(self.log))}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take a run up where :meth:`state` left it."""
        device = self.rows.z.device
        tensors = {name: torch.tensor(values, device=device) for name, values in arrays.items() if name != "log"}
        for prefix, module in (("network.", self.network), ("critic.", self.critic)):
            part = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            module.load_state_dict(part)
        self.dual.value, self.dual.cusum = tensors["dual"], tensors["cusum"]
        self.scale, self.short, self.weight = tensors["scale"], tensors["short"], tensors["weight"]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("adam."):
                _, number, field = name.split(".")
                moments.setdefault(int(number), {})[field] = tensor
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})
        self.step = int(arrays["step"])
        self.log = json.loads(str(arrays["log"]))

    def _one_step(self) -> None:
        config, network, step = self.config, self.network, self.step
        batch = draw_batch(self.rows, config, self.dual.knots, self.seed, step)
        size = len(batch.tau)
        with torch.no_grad():
            out = network(batch.rows.z, batch.tau)
            number = step * size + torch.arange(size, device=batch.tau.device)
            drawn = sample_beta_ref(out.conc1, out.conc0, self.seed, number)
            mu = drawn.clamp(_SMALLEST_MU, 1.0 - _SMALLEST_MU).to(batch.rows.z.dtype)
            log_density = _log_density(out, mu)
            rewards = rewards_of(batch.rows, batch.tau, self.dual.at(batch.tau), config)
            choice = decide(network, batch.rows.p, mu, batch.rows.price, self.kappa)
            reward = of_choice(rewards, choice)
            scale = self._spread(reward)[batch.session]
            rewards, reward = rewards / scale.unsqueeze(1), reward / scale
            x = network.critic_input(batch.rows.z, batch.tau)
            if config.baseline == "greedy":
                mode = decide(network, batch.rows.p, out.mu, batch.rows.price, self.kappa)
                advantage = reward - of_choice(rewards, mode)
            elif config.baseline == "critic":
                advantage = reward - self.critic(x)
            else:
                advantage = reward - reward.mean()
            advantage = advantage / advantage.std().clamp_min(1e-6)
            self._count(batch, choice)
        start = interpolate_ref(batch.tau, network.knots_tau, network.knots_mu).clamp(1e-4, 1.0 - 1e-4)
        progress = step / max(config.steps - 1, 1)
        temperature = config.temperature[0] * (config.temperature[1] / config.temperature[0]) ** min(progress, 1.0)
        for epoch in range(config.epochs):
            order = torch.randperm(size, generator=_generator(self.seed, 2 + epoch, step))
            for part in order.split(config.minibatch):  # type: ignore[no-untyped-call]
                index = own_share(part).to(batch.tau.device)
                rows, tau = batch.rows.take(index), batch.tau[index]
                out = network(rows.z, tau)
                ratio = torch.exp(_log_density(out, mu[index]) - log_density[index])
                clipped = ratio.clamp(1.0 - config.clip, 1.0 + config.clip)
                losses = -torch.minimum(ratio * advantage[index], clipped * advantage[index])
                scores = scores_ref(rows.p, out.mu.detach(), network.prior, rows.price, self.kappa, network.gamma)
                losses = losses - (torch.softmax(scores / temperature, dim=1) * rewards[index]).sum(dim=1)
                if config.baseline == "critic":
                    losses = losses + 0.5 * (self.critic(x[index]) - reward[index]) ** 2
                if config.head == "residual":
                    moved = torch.logit(out.mu.clamp(1e-6, 1.0 - 1e-6)) - torch.logit(start[index])
                    losses = losses + config.stay * moved**2
                # the mean over the minibatch, of which this process may have a smaller part or none
                loss = losses.sum() / len(part)
                self.optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                add_gradients(self.parameters)
                nn.utils.clip_grad_norm_(self.parameters, config.gradient_clip)
                self.optimiser.step()
        if step % config.dual_every == config.dual_every - 1:
            seen = self.weight > 0.0
            self.dual.update(self.short / self.weight.clamp_min(1e-9), seen)
            self.short.zero_()
            self.weight.zero_()
            self._show_dual()

    def _spread(self, reward: Tensor) -> Tensor:
        """Running standard deviation of each session's rewards: lambda must not set the size of a step."""
        spread = reward.view(self.config.sessions, -1).std(dim=1).clamp_min(1e-6)
        blended = _SCALE_MEMORY * self.scale + (1.0 - _SCALE_MEMORY) * spread
        self.scale = torch.where(self.scale == 0.0, spread, blended)
        return self.scale

    def _count(self, batch: Batch, choice: Tensor) -> None:
        """Add the batch's shortfalls to the knots that its targets belong to; report every dual step."""
        right = of_choice(batch.rows.y, choice)
        shares = self.dual.shares(batch.tau)
        self.short += shares.T @ (batch.tau - right)
        self.weight += shares.sum(dim=0)
        if self.step % self.config.dual_every == 0:
            cost = of_choice(batch.rows.c, choice)
            bands = []
            for number in range(_BANDS):
                here = batch.session * _BANDS // self.config.sessions == number
                tau = batch.tau[here]
                if not len(tau):
                    continue
                bands.append(
                    {
                        "tau": float(tau.mean()),
                        "accuracy": float(right[here].mean()),
                        "cost_units": float(cost[here].mean()),
                        "dual": float(self.dual.at(tau).mean()),
                        "violation": float((tau - right[here]).mean()),
                    }
                )
            entry = {"step": self.step, "gamma": float(self.network.gamma.detach()), "bands": bands}
            self.log.append(entry)


def _log_density(out: Preference, mu: Tensor) -> Tensor:
    beta = torch.distributions.Beta(out.conc1, out.conc0, validate_args=False)
    density: Tensor = beta.log_prob(mu)  # type: ignore[no-untyped-call]
    return density
