"""What the benchmarks measure on: a router of the budget's size with fixed random weights, and its plain forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from proteus_fast.certificate import Certificate, Path, PathCertificate
from proteus_fast.checkpoint import Checkpoint, Config
from proteus_fast.pool import Candidate, Pool
from proteus_fast.router import Router
from proteus_fast.training.policy import PolicyNetwork
from proteus_kernels import reference

DIM, CANDIDATES, HIDDEN, KNOTS = 256, 11, 256, 16
TAU = 0.85
Answer = tuple[Any, Any, Any]


def build_router() -> Router:
    """A router without an encoder: D = 256, K = 11, a policy of 134 k parameters, a dual path of 64 vertices."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    knots = torch.linspace(0.0, 1.0, KNOTS)
    network = PolicyNetwork(DIM, CANDIDATES, knots, knots.clone(), 2 * knots, hidden=HIDDEN, head="free")
    with torch.no_grad():
        network.prior.normal_(0.0, 0.05)
    tensors = {
        "predictor.weight": (random.standard_normal((DIM, CANDIDATES)) / np.sqrt(DIM)).astype(np.float32),
        "predictor.bias": np.linspace(-0.5, 1.5, CANDIDATES).astype(np.float32),
        **network.tensors(),
    }
    price = np.geomspace(1e-4, 5e-3, CANDIDATES)
    pool = Pool(Candidate(f"candidate-{i}", float(usd), 0.6 + 0.02 * i) for i, usd in enumerate(price))
    path = Path(np.linspace(1.0, 0.0, 64, dtype=np.float32), np.linspace(5e-3, 1e-4, 64))
    successes = np.linspace(950, 600, len(path.code)).astype(np.int64)
    certificate = Certificate.build(
        {"dual": PathCertificate(path, successes)},
        delta=0.1, n=1000, data_sha256="0" * 64, date="2026-01-01", rounding_seed=0, key=1,
    )  # fmt: skip
    config = Config(
        pool=pool, encoder="none", input_dim=DIM, projection="none", link="sigmoid", head="free", mode="dual",
        kappa=2.0, gamma=4.0, cost_unit_usd=5e-3, block_weight=(), label_definition="random", data_set="random",
        data_sha256="0" * 64, rows=1,
    )  # fmt: skip
    return Router(Checkpoint(config, tensors, certificate))


def embeddings(rows: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((rows, DIM)).astype(np.float32)


def torch_form(router: Router, mode: str, device: str = "cpu") -> Callable[[torch.Tensor], Answer]:
    """The same decision as an operator would write it in torch: weights ready, no checks, no certificate."""
    source = router.checkpoint
    weights = {name: torch.from_numpy(tensor).to(device) for name, tensor in source.tensors.items()}
    transposed = {name: tensor.T.contiguous() for name, tensor in weights.items() if tensor.ndim == 2}
    c = torch.from_numpy((router.pool.price_usd / source.config.cost_unit_usd).astype(np.float32)).to(device)
    kappa, gamma = source.config.kappa, source.config.gamma
    dual = torch.tensor([[2.0 * TAU]], device=device)
    step = router.route_batch(np.zeros((1, DIM), np.float32), TAU, ids=np.zeros(1, np.uint64))
    fixed_mu = torch.from_numpy(step.mu).to(device)

    def decide(z: torch.Tensor) -> Answer:
        p = torch.sigmoid(functional.linear(z, transposed["predictor.weight"], weights["predictor.bias"]))
        if mode == "policy":
            rows = z.shape[0]
            x = torch.cat([z, torch.full((rows, 1), TAU, device=z.device), dual.expand(rows, 1)], dim=1)
            x = functional.gelu(functional.linear(x, transposed["policy.w1"], weights["policy.b1"]), approximate="tanh")
            x = x * torch.sigmoid(dual * weights["policy.gate_weight"] + weights["policy.gate_bias"])
            x = functional.gelu(functional.linear(x, transposed["policy.w2"], weights["policy.b2"]), approximate="tanh")
            conc = 1.0 + functional.softplus(functional.linear(x, transposed["policy.w3"], weights["policy.b3"]))
            mu = conc[:, 0] / conc.sum(dim=1)
            scores = p + mu[:, None] * weights["policy.prior"] - (kappa * (1.0 - mu) ** gamma)[:, None] * c
        else:
            mu = fixed_mu.expand(z.shape[0])
            scores = p - (kappa * (1.0 - mu) ** gamma)[:, None] * c
        score, choice = scores.max(dim=1)
        return choice, mu, score

    return decide


def torch_eager(router: Router, mode: str, device: str = "cpu") -> Callable[[torch.Tensor], Answer]:
    """That, operation by operation."""
    eager: Callable[[torch.Tensor], Answer] = torch.inference_mode()(torch_form(router, mode, device))
    return eager


def torch_compiled(router: Router, mode: str, device: str = "cpu", **options: Any) -> Callable[[torch.Tensor], Answer]:
    """That, compiled for its shapes alone: what was compiled for others would be asked for first."""
    torch.compiler.reset()
    compiled: Callable[[torch.Tensor], Answer] = torch.no_grad()(
        torch.compile(torch_form(router, mode, device), dynamic=False, **options)
    )
    return compiled


def numpy_plain(router: Router, mode: str) -> Callable[[NDArray[np.float32]], Answer]:
    """The same in NumPy."""
    source = router.checkpoint
    t = source.tensors
    c = (router.pool.price_usd / source.config.cost_unit_usd).astype(np.float32)
    kappa, gamma = source.config.kappa, source.config.gamma
    fixed_mu = router.route_batch(np.zeros((1, DIM), np.float32), TAU, ids=np.zeros(1, np.uint64)).mu
    dual = np.float32(2.0 * TAU)
    gate = 1.0 / (1.0 + np.exp(-(dual * t["policy.gate_weight"] + t["policy.gate_bias"])))

    def gelu(x: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.float32(0.5) * x * (1.0 + np.tanh(np.float32(0.7978845608) * (x + np.float32(0.044715) * x * x * x)))

    def decide(z: NDArray[np.float32]) -> Answer:
        p = 1.0 / (1.0 + np.exp(-(z @ t["predictor.weight"] + t["predictor.bias"])))
        mu = np.broadcast_to(fixed_mu, (len(z),))
        prior = np.float32(0.0)
        if mode == "policy":
            x = np.empty((len(z), DIM + 2), np.float32)
            x[:, :DIM], x[:, DIM], x[:, DIM + 1] = z, TAU, dual
            x = gelu(x @ t["policy.w1"] + t["policy.b1"]) * gate
            x = gelu(x @ t["policy.w2"] + t["policy.b2"])
            conc = 1.0 + np.logaddexp(np.float32(0.0), x @ t["policy.w3"] + t["policy.b3"])
            mu = conc[:, 0] / conc.sum(axis=1)
            prior = t["policy.prior"]
        scores = p + mu[:, None] * prior - (kappa * (1.0 - mu) ** gamma)[:, None] * c
        choice = scores.argmax(axis=1)
        return choice, mu, scores[np.arange(len(z)), choice]

    return decide


def reference_form(router: Router, mode: str, device: str = "cpu") -> Callable[[torch.Tensor], Answer]:
    """The same by the functions that say what is right, in float32."""
    source = router.checkpoint
    tensors = {name: torch.from_numpy(tensor).to(device) for name, tensor in source.tensors.items()}
    config = source.config
    c = torch.from_numpy((router.pool.price_usd / config.cost_unit_usd).astype(np.float32)).to(device)
    step = router.route_batch(np.zeros((1, DIM), np.float32), TAU, ids=np.zeros(1, np.uint64))
    fixed_mu = torch.from_numpy(step.mu).to(device)
    prior = tensors["policy.prior"] if mode == "policy" else torch.zeros_like(c)

    @torch.inference_mode()
    def decide(z: torch.Tensor) -> Answer:
        p = reference.predict_ref(z, tensors, config.link)
        mu = fixed_mu.expand(len(z))
        if mode == "policy":
            mu = reference.policy_ref(z, torch.full_like(mu, TAU), tensors, config.head or "").mu
        choice, score = reference.best_candidate_ref(reference.scores_ref(p, mu, prior, c, config.kappa, config.gamma))
        return choice, mu, score

    return decide
