"""Small routers with random weights, for the server's tests and as what is fuzzed."""

from __future__ import annotations

from typing import Any

import numpy as np

from proteus_fast import Candidate, Certificate, Pool
from proteus_fast.certificate import MIXING_STEPS, Path, PathCertificate
from proteus_fast.checkpoint import Checkpoint, Config


def tiny_checkpoint(
    *, encoder: Any = "hash", mode: Any = "dual", right: int = 900, seed: int = 7, dim: int = 16
) -> Checkpoint:
    """Four candidates with random weights and a policy network, `right` of 1000 calibration rows right."""
    random = np.random.default_rng(seed)
    hidden, knots, rows, k, vertices = 8, 3, 64, 4, 5

    def normal(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return random.standard_normal(shape, np.float32)

    tensors: dict[str, Any] = {"predictor.weight": normal(dim, k) / 8, "predictor.bias": np.full(k, 0.5, np.float32)}
    tensors |= {
        "policy.w1": normal(dim + 2, hidden),
        "policy.w2": normal(hidden, hidden),
        "policy.w3": normal(hidden, 2),
    }
    tensors |= {f"policy.{name}": normal(hidden) for name in ("b1", "b2", "gate_weight", "gate_bias")}
    tensors |= {"policy.b3": normal(2), "policy.prior": normal(k) / 8}
    tensors |= {
        f"policy.knots_{name}": np.linspace(0.0, 1.0, knots, dtype=np.float32) for name in ("tau", "dual", "mu")
    }
    if encoder == "hash":
        tensors |= {"encoder.table": random.integers(-127, 128, (rows, dim), np.int8)}
        tensors |= {f"encoder.{name}": np.full(rows, 0.01, np.float32) for name in ("row_scale", "idf")}
    config = Config(
        pool=Pool([Candidate(f"model-{i}", 0.001 * 2.0**i, 0.5 + 0.1 * i) for i in range(k)]),
        encoder=encoder,
        input_dim=dim,
        projection="none",
        link="clip",
        head="residual",
        mode=mode,
        kappa=0.5,
        gamma=2.0,
        cost_unit_usd=0.008,
        block_weight=(1.0, 0.5, 0.5, 0.2) if encoder == "hash" else (),
        label_definition="a made-up score",
        data_set="made up",
        data_sha256="0" * 64,
        rows=1000,
    )
    path = Path(np.linspace(1.0, 0.0, vertices, dtype=np.float32), np.linspace(0.008, 0.001, vertices))
    successes = np.linspace(right, right // 2, (vertices - 1) * MIXING_STEPS + 1).astype(np.int64)
    certificate = Certificate.build(
        {"dual": PathCertificate(path, successes), "policy": PathCertificate(path, successes - right // 9)},
        delta=0.1,
        n=1000,
        data_sha256="0" * 64,
        date="2025-01-01",
        rounding_seed=0,
        key=1234567,
    )
    return Checkpoint(config, tensors, certificate)
