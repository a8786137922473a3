"""Sizes of a router and where its numbers lie in device memory: all that a decide kernel is compiled for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

TAU_STEPS = 1000
# rows of a weight matrix are padded to whole steps of the longest inner loop
DEPTH = 64


def padded(n: int, multiple: int) -> int:
    """The least multiple that holds n."""
    return -(-n // multiple) * multiple


def power_of_two(n: int, least: int) -> int:
    """The least power of two that holds n and ``least``."""
    return max(least, 1 << (n - 1).bit_length())


def _padded_layer(n: int) -> int:
    """Columns of a hidden layer, so that tiles of any power of two from DEPTH to 256 divide them; 0 without one."""
    return 0 if n == 0 else min(power_of_two(n, DEPTH), padded(n, 256))


# compared by identity, which is what a launch can afford: ``pack`` makes one object of each shape
@dataclass(frozen=True, eq=False)
class Layout:
    """A plain class of ints, so that two routers of one shape share their compiled kernels.

    Attributes:
        sigmoid: 1 for that link, 0 for clip. residual: 1 for that head, 0 for free. dim: D. width: d, of the
            projection's output; 0 without one. hidden: H, of the policy network; 0 without one. candidates: K.
            knots: N. inner: columns of z, the padded ones too where a projection wrote it.
        span: floats of a row of scratch.
        w1 ... policy_w2: offsets into the matrices. b1 ... knots_mu: offsets into the vectors.
    """

    sigmoid: int
    residual: int
    dim: int
    width: int
    hidden: int
    candidates: int
    knots: int
    inner: int
    padded_dim: int
    padded_inner: int
    padded_width: int
    padded_hidden: int
    padded_candidates: int
    span: int
    w1: int
    w2: int
    predictor: int
    policy_w1: int
    policy_w2: int
    b1: int
    b2: int
    ln_weight: int
    ln_bias: int
    bias: int
    cost: int
    prior: int
    policy_b1: int
    w_tau: int
    w_dual: int
    gate_weight: int
    gate_bias: int
    policy_b2: int
    w3_first: int
    w3_second: int
    b3: int
    knots_tau: int
    knots_dual: int
    knots_mu: int


@cache
def _shared_layout(numbers: tuple[int, ...]) -> Layout:
    return Layout(*numbers)


def pack(
    tensors: Mapping[str, Tensor], cost: Tensor, link: str, head: str | None, dtype: torch.dtype
) -> tuple[Layout, Tensor, Tensor]:
    """Lay a router's tensors out: every matrix and vector padded by zeros to what the kernel's tiles read.

    Args:
        tensors: names and shapes as in a checkpoint, float32, on the CPU. cost: price / cost unit, (K,) float32.
        link: ``sigmoid`` or ``clip``. head: ``residual``, ``free`` or None. dtype: of the matrices.

    Returns:
        The layout, the matrices (n,) of ``dtype``, the vectors (m,) float32.
    """
    matrices: list[Tensor] = []
    vectors: list[Tensor] = []
    place: dict[str, int] = {}

    def add_matrix(name: str, values: Tensor, rows: int, columns: int) -> None:
        block = torch.zeros(rows, columns, dtype=dtype)
        block[: values.shape[0], : values.shape[1]] = values
        place[name] = sum(m.numel() for m in matrices)
        matrices.append(block.flatten())

    def add_vector(name: str, values: Tensor, size: int) -> None:
        block = torch.zeros(padded(size, 16), dtype=torch.float32)
        block[: values.numel()] = values.flatten()
        place[name] = sum(v.numel() for v in vectors)
        vectors.append(block)

    depth, candidates = tensors["predictor.weight"].shape
    dim, width = (tensors["projection.w1"].shape[0], depth) if "projection.w1" in tensors else (depth, 0)
    hidden = tensors["policy.b1"].numel() if "policy.w1" in tensors else 0
    knots = tensors["policy.knots_tau"].numel() if hidden else 0
    padded_width, padded_hidden = _padded_layer(width), _padded_layer(hidden)
    padded_candidates = power_of_two(candidates, 16)
    inner = padded_width or padded(dim, DEPTH)
    if width:
        add_matrix("w1", tensors["projection.w1"], padded(dim, DEPTH), padded_width)
        add_matrix("w2", tensors["projection.w2"], padded_width, padded_width)
        for name in ("b1", "b2", "ln_weight", "ln_bias"):
            add_vector(name, tensors[f"projection.{name}"], padded_width)
    add_matrix("predictor", tensors["predictor.weight"], inner, padded_candidates)
    add_vector("bias", tensors["predictor.bias"], padded_candidates)
    add_vector("cost", cost, padded_candidates)
    add_vector("prior", tensors["policy.prior"] if hidden else torch.zeros(candidates), padded_candidates)
    if hidden:
        w1, w3 = tensors["policy.w1"], tensors["policy.w3"]
        add_matrix("policy_w1", w1[:depth], inner, padded_hidden)
        add_matrix("policy_w2", tensors["policy.w2"], padded_hidden, padded_hidden)
        for name, values in {
            "policy_b1": tensors["policy.b1"], "w_tau": w1[depth], "w_dual": w1[depth + 1],
            "gate_weight": tensors["policy.gate_weight"], "gate_bias": tensors["policy.gate_bias"],
            "policy_b2": tensors["policy.b2"], "w3_first": w3[:, 0], "w3_second": w3[:, 1],
        }.items():  # fmt: skip
            add_vector(name, values, padded_hidden)
        add_vector("b3", tensors["policy.b3"], 2)
        for name in ("knots_tau", "knots_dual", "knots_mu"):
            add_vector(name, tensors[f"policy.{name}"], knots)
    sizes = {
        "dim": dim, "width": width, "hidden": hidden, "candidates": candidates, "knots": knots,
        "sigmoid": int(link == "sigmoid"), "residual": int(head == "residual"), "padded_dim": padded(dim, DEPTH),
        "inner": padded_width or dim, "padded_inner": inner,
        "padded_width": padded_width, "padded_hidden": padded_hidden, "padded_candidates": padded_candidates,
        "span": max(padded_width, padded_hidden),
    }  # fmt: skip
    numbers = tuple((sizes | place).get(name, 0) for name in Layout.__dataclass_fields__)
    return _shared_layout(numbers), torch.cat(matrices), torch.cat(vectors)
