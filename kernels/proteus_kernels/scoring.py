"""Scores of the K candidates of a query and the best of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from proteus_kernels.launch import check_cuda, launch
from proteus_kernels.layout import power_of_two

ROWS = 16


@triton.jit
def cost_weight(mu, kappa, gamma):
    """kappa (1 - mu)^gamma, float32 from float32 mu; in float64 as in the core, since kappa may be large."""
    away = 1.0 - mu.to(tl.float64)
    # log2(0) at mu = 1 would be -inf, and 0 times that no number
    power = tl.exp2(gamma * tl.log2(tl.where(away > 0.0, away, 1.0)))
    return tl.where(away > 0.0, kappa * power, 0.0).to(tl.float32)


@triton.jit
def best_candidate_of(score, eligible, candidate, COUNT: tl.constexpr):
    """The first of the best eligible scores of each row, the score, and whether there is one.

    score is (BLOCK_B, COUNT) float32, eligible a mask of that shape, candidate arange(COUNT). A row has none where no
    candidate is eligible or an eligible score is not finite.
    """
    finite = tl.abs(score) < float("inf")
    overflown = eligible & (finite == 0)
    score = tl.where(eligible & finite, score, -float("inf"))
    best = tl.max(score, axis=1)
    choice = tl.min(tl.where(score == best[:, None], candidate[None, :], COUNT), axis=1)
    return choice, best, (tl.max(overflown.to(tl.int32), axis=1) == 0) & (best > -float("inf"))


@triton.jit(
    do_not_specialize=["c_stride", "available_stride", "rows"],
    do_not_specialize_on_alignment=["available_ptr", "mu_ptr"],
)
def _best_candidate_kernel(
    p_ptr, mu_ptr, b_ptr, c_ptr, c_stride, available_ptr, available_stride, choice_ptr, score_ptr, rows,
    kappa_ptr, K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # a tile of rows per program: its scores never leave the registers
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    k = tl.arange(0, BLOCK_K)
    live = (row < rows)[:, None] & (k < K)[None, :]
    p = tl.load(p_ptr + row[:, None] * K + k[None, :], mask=live, other=0.0).to(tl.float32)
    mu = tl.load(mu_ptr + row, mask=row < rows, other=0.0)
    b = tl.load(b_ptr + k, mask=k < K, other=0.0)
    c = tl.load(c_ptr + row[:, None] * c_stride + k[None, :], mask=live, other=0.0)
    if available_ptr is not None:
        live &= tl.load(available_ptr + row[:, None] * available_stride + k[None, :], mask=live, other=0) != 0
    weight = cost_weight(mu, tl.load(kappa_ptr), tl.load(kappa_ptr + 1))
    score = p + mu[:, None] * b[None, :] - weight[:, None] * c
    choice, best, found = best_candidate_of(score, live, k, BLOCK_K)
    tl.store(choice_ptr + row, tl.where(found, choice, -1), mask=row < rows)
    tl.store(score_ptr + row, tl.where(found, best, float("nan")), mask=row < rows)


def best_candidate(
    p: Tensor, mu: Tensor, b: Tensor, c: Tensor, kappa_gamma: Tensor, available: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Score the K candidates of each query, s_i = p_i + mu b_i - kappa (1 - mu)^gamma c_i, and keep the best.

    Args:
        p: predicted accuracy, (B, K), float32, bfloat16 or float16. mu: quality preference, (B,) float32, in [0, 1].
        b: prior, (K,) float32. c: cost in cost units, (K,) or (B, K) float32.
        kappa_gamma: cost scale and cost sensitivity, (2,) float64, on the device. available: bool, (K,) or (B, K).

    Returns:
        choice (B,) int32, the lowest index where scores tie; score (B,) float32. -1 and NaN where nothing is available
        or an available candidate's score is not finite.
    """
    check_cuda("p", p, (torch.float32, torch.bfloat16, torch.float16), 2)
    rows, candidates = p.shape
    floats = {"mu": (mu, ((rows,),)), "b": (b, ((candidates,),)), "c": (c, ((candidates,), (rows, candidates)))}
    for name, (tensor, shapes) in floats.items():
        check_cuda(name, tensor, (torch.float32,), tensor.dim(), like=p)
        if tuple(tensor.shape) not in shapes:
            raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got {tuple(tensor.shape)}")
    check_cuda("kappa_gamma", kappa_gamma, (torch.float64,), 1, like=p)
    if available is not None:
        check_cuda("available", available, (torch.bool,), available.dim(), like=p)
        if tuple(available.shape) not in ((candidates,), (rows, candidates)):
            raise ValueError(
                f"available: expected shape {(candidates,)} or {(rows, candidates)}, got {tuple(available.shape)}"
            )
        available = available.contiguous().view(torch.uint8)
    choice = torch.empty(rows, dtype=torch.int32, device=p.device)
    score = torch.empty(rows, dtype=torch.float32, device=p.device)
    if rows:
        launch(
            _best_candidate_kernel, (triton.cdiv(rows, ROWS),), p.device,
            p.contiguous(), mu.contiguous(), b.contiguous(), c.contiguous(), candidates if c.dim() == 2 else 0,
            available, candidates if available is not None and available.dim() == 2 else 0, choice, score, rows,
            kappa_gamma.contiguous(), K=candidates, BLOCK_B=ROWS, BLOCK_K=power_of_two(candidates, 16), num_warps=4,
        )  # fmt: skip
    return choice, score
