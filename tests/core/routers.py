"""Random routers, and the whole decision in float64 by the reference's functions."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from proteus_fast import _core
from proteus_kernels import reference

FEASIBLE, INFEASIBLE, UNCERTIFIED, INVALID = 1, 2, 3, 4


@dataclasses.dataclass(frozen=True)
class PathTable:
    """Arguments of a `_core.Path`."""

    parameter: NDArray[np.float32]
    certified: NDArray[np.int32]
    certified_max: int
    calibrated: NDArray[np.int32]
    calibrated_max: int

    @staticmethod
    def random(rng: np.random.Generator) -> PathTable:
        vertices = int(rng.integers(1, 40))
        parameter = np.sort(rng.random(vertices, dtype=np.float32))[::-1].copy()
        if vertices > 2:
            parameter[[0, -1]] = 1.0, 0.0

        def codes() -> tuple[NDArray[np.int32], int]:
            falling = np.sort(rng.integers(0, (vertices - 1) * 16 + 1, 1001).astype(np.int32))[::-1].copy()
            return falling, int(rng.choice([-1, 0, 500, 900, 1000]))

        return PathTable(parameter, *codes(), *codes())

    def build(self) -> _core.Path:
        return _core.Path(self.parameter, self.certified, self.certified_max, self.calibrated, self.calibrated_max)


@dataclasses.dataclass(frozen=True)
class RandomRouter:
    """Arguments of a `_core.Snapshot`, its tensors with real-looking magnitudes."""

    tensors: dict[str, NDArray[np.float32]]
    link: str
    head: str | None
    kappa: float
    gamma: float
    price_usd: NDArray[np.float32]
    cost_unit_usd: float
    key: int
    default_mode: str
    dual: PathTable
    policy: PathTable | None

    @property
    def input_dim(self) -> int:
        name = "projection.w1" if "projection.w1" in self.tensors else "predictor.weight"
        return self.tensors[name].shape[0]

    @property
    def candidates(self) -> int:
        return self.tensors["predictor.weight"].shape[1]

    @property
    def modes(self) -> list[str]:
        return ["dual", "policy"] if "policy.w1" in self.tensors else ["dual"]

    def build(self, **changes: Any) -> _core.Snapshot:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["dual"] = self.dual.build()
        fields["policy"] = self.policy.build() if self.policy else None
        return _core.Snapshot(**{**fields, "encoder": None, **changes})


def random_router(rng: np.random.Generator, **fixed: Any) -> RandomRouter:
    """A router of random shape; `fixed` may hold dim, width (0: no projection), candidates, hidden (0: no policy).

    Widths start at 24: the layer norm of a few nearly equal values magnifies any rounding.
    """
    dim = fixed.get("dim", int(rng.integers(1, 200)))
    width = fixed.get("width", int(rng.choice([0, rng.integers(24, 100)])))
    candidates = fixed.get("candidates", int(rng.integers(1, 65)))
    hidden = fixed.get("hidden", int(rng.choice([0, 1, 16, rng.integers(1, 130)])))
    d = width or dim

    def normal(*shape: int) -> NDArray[np.float32]:
        scale = 1.0 / np.sqrt(shape[0]) if len(shape) == 2 else 0.5
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    tensors = {"predictor.weight": normal(d, candidates), "predictor.bias": normal(candidates)}
    if width:
        tensors |= {
            "projection.w1": normal(dim, d),
            "projection.b1": normal(d),
            "projection.w2": normal(d, d),
            "projection.b2": normal(d),
            "projection.ln_weight": 1.0 + normal(d) / 4,
            "projection.ln_bias": normal(d),
        }
    if hidden:
        knots = int(rng.integers(2, 20))
        tensors |= {
            "policy.w1": normal(d + 2, hidden),
            "policy.b1": normal(hidden),
            "policy.gate_weight": normal(hidden),
            "policy.gate_bias": normal(hidden),
            "policy.w2": normal(hidden, hidden),
            "policy.b2": normal(hidden),
            "policy.w3": normal(hidden, 2),
            "policy.b3": normal(2),
            "policy.prior": normal(candidates) / 4,
            "policy.knots_tau": np.sort(rng.choice(np.arange(100), knots, replace=False)).astype(np.float32) / 99,
            "policy.knots_dual": rng.random(knots, dtype=np.float32) * 3,
            "policy.knots_mu": rng.random(knots, dtype=np.float32),
        }
    return RandomRouter(
        tensors=tensors,
        link=str(rng.choice(["sigmoid", "clip"])),
        head=str(rng.choice(["residual", "free"])) if hidden else None,
        kappa=float(rng.uniform(0.5, 2.0)),
        gamma=float(rng.uniform(2.0, 8.0)),
        price_usd=rng.random(candidates, dtype=np.float32) / 1000,
        cost_unit_usd=1e-3,
        key=int(rng.integers(0, 2**64, dtype=np.uint64)),
        default_mode=str(rng.choice(["dual", "policy"])) if hidden else "dual",
        dual=PathTable.random(rng),
        policy=PathTable.random(rng) if hidden and rng.random() < 0.8 else None,
    )


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the reference decides, in float64; scores are -inf where not eligible and NaN in INVALID rows."""

    choice: NDArray[np.int64]
    mu: NDArray[np.float64]
    score: NDArray[np.float64]
    status: NDArray[np.int64]
    floor: NDArray[np.float64]
    predicted: NDArray[np.float64]
    scores: NDArray[np.float64]


def decide_ref(
    router: RandomRouter,
    x: NDArray[np.float32],
    tau: float | NDArray[Any],
    mode: str | None = None,
    guarantee: str = "certified",
    available: NDArray[np.bool_] | None = None,
    price_usd: NDArray[Any] | None = None,
    ids: NDArray[np.uint64] | None = None,
) -> Expected:
    """The decision by the reference's functions in float64, and the status rules in NumPy."""
    mode = mode or router.default_mode
    rows, k = len(x), router.candidates
    tensors = {name: torch.from_numpy(value).double() for name, value in router.tensors.items()}
    taus = np.broadcast_to(np.asarray(tau, dtype=np.float64), (rows,))
    eligible = np.broadcast_to(np.ones(k, bool) if available is None else available, (rows, k))
    price = np.broadcast_to(np.asarray(router.price_usd if price_usd is None else price_usd, np.float64), (rows, k))
    invalid = ~np.isfinite(x).all(axis=1) | ~((taus >= 0) & (taus <= 1)) | ~eligible.any(axis=1)
    invalid |= (~np.isfinite(price) | (price < 0)).any(axis=1)

    table = router.dual if mode == "dual" else router.policy
    tau_clean = np.where(invalid, 0.0, taus)
    grid = np.ceil(tau_clean * 1000 - 1e-3).astype(int)
    x_clean = torch.from_numpy(np.where(invalid[:, None], np.float32(0), x))
    if table:
        codes, top = table.certified, table.certified_max
        if guarantee == "calibrated":
            codes, top = table.calibrated, table.calibrated_max
        code = np.where(grid <= top, codes[grid], 0)
        source = torch.from_numpy(ids.view(np.int64)) if ids is not None else x_clean
        u = reference.row_hash_ref(source, router.key)
        vertex = reference.mixing_side_ref(u, torch.from_numpy(code.astype(np.int32))).numpy()
        parameter = torch.from_numpy(table.parameter).double()[vertex]
    else:
        top = -1
        parameter = torch.from_numpy(tau_clean)

    z = reference.project_ref(x_clean.double(), tensors)
    p = reference.predict_ref(z, tensors, router.link)
    mu, prior = parameter, torch.zeros(k, dtype=torch.float64)
    if mode == "policy":
        mu = reference.policy_ref(z, parameter, tensors, router.head or "").mu
        prior = tensors["policy.prior"]
    cost = torch.from_numpy(np.where(invalid[:, None], 0.0, price) / router.cost_unit_usd)
    scores = reference.scores_ref(p, mu, prior, cost, router.kappa, router.gamma)
    choice, score = reference.best_candidate_ref(scores, torch.from_numpy(eligible.copy()))

    uncertified = np.full(rows, mode != router.default_mode or table is None)
    uncertified |= ~eligible.all(axis=1) | (price_usd is not None) | (ids is not None)
    status = np.where(uncertified, UNCERTIFIED, np.where(grid > top, INFEASIBLE, FEASIBLE))
    floor = np.where(status == FEASIBLE, grid / 1000, np.nan)
    floor = np.where((status == INFEASIBLE) & (top > 0), top / 1000, floor)
    if guarantee == "calibrated":
        status = np.where(status == FEASIBLE, UNCERTIFIED, status)
        floor = np.full(rows, np.nan)

    def blank(values: NDArray[Any]) -> NDArray[Any]:
        return np.where(invalid if values.ndim == 1 else invalid[:, None], np.nan, values)

    return Expected(
        choice=np.where(invalid, -1, choice.numpy()),
        mu=blank(mu.numpy()),
        score=blank(score.numpy()),
        status=np.where(invalid, INVALID, status),
        floor=blank(floor),
        predicted=blank(p.numpy()),
        scores=blank(np.where(eligible, scores.numpy(), -np.inf)),
    )
