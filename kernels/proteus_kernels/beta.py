"""Beta samples on the GPU: the C++ core's draws, number for number."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from proteus_kernels.launch import check_cuda, launch


@triton.jit
def draw_beta(conc1, conc0, seed, row, live):
    """Draw from Beta(conc1, conc0) by Cheng's algorithm BA (1978); see ``reference.sample_beta_ref``.

    conc1 and conc0 are float64, >= 1; seed is an int64 scalar and row int64, both seen as unsigned. Rows that are not
    live get the mean. The arithmetic is float64, as the core's, so that both accept the same tries.
    """
    total = conc1 + conc0
    excess1 = conc1 - 1.0
    excess0 = conc0 - 1.0
    # sqrt((total - 2) / (2 conc1 conc0 - total)) without its 0 / 0 at (1, 1)
    beta = 1.0 / tl.sqrt(1.0 + 2.0 * excess1 * excess0 / tl.maximum(excess1 + excess0, 1e-300))
    gamma = conc1 + 1.0 / beta
    drawn = conc1 / total
    low = row.to(tl.uint32)
    high = (row.to(tl.uint64) >> 32).to(tl.uint32)
    waiting = live
    attempt = 0
    # sixteen tries; the loop stays rolled and ends with its last waiting row
    while (attempt < 16) & (tl.max(waiting.to(tl.int32), axis=0) > 0):
        word1, word2, _, _ = tl.philox(seed, low, high, attempt, 0)
        u1 = ((word1 >> 9).to(tl.float64) + 0.5) * 1.1920928955078125e-07
        u2 = ((word2 >> 9).to(tl.float64) + 0.5) * 1.1920928955078125e-07
        v = beta * tl.log(u1 / (1.0 - u1))
        w = conc1 * tl.exp(v)
        accept = gamma * v - 1.3862943611198906 + total * tl.log(total / (conc0 + w)) >= tl.log(u1 * u1 * u2)
        drawn = tl.where(waiting & accept, w / (conc0 + w), drawn)
        waiting = waiting & (accept == 0)
        attempt += 1
    return drawn


@triton.jit(do_not_specialize=["rows"])
def _sample_beta_kernel(conc1_ptr, conc0_ptr, state_ptr, drawn_ptr, rows, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    conc1 = tl.load(conc1_ptr + row, mask=live, other=1.0).to(tl.float64)
    conc0 = tl.load(conc0_ptr + row, mask=live, other=1.0).to(tl.float64)
    seed = tl.load(state_ptr)
    offset = tl.load(state_ptr + 1)
    drawn = draw_beta(conc1, conc0, seed, offset + row, live)
    tl.store(drawn_ptr + row, drawn.to(drawn_ptr.dtype.element_ty), mask=live)


def sample_beta(conc1: Tensor, conc0: Tensor, state: Tensor) -> Tensor:
    """Draw one number a row from Beta(conc1, conc0); a draw depends on (seed, offset + row) alone.

    Args:
        conc1, conc0: concentrations, >= 1, (B,), float32 or float64.
        state: seed and offset, (2,) int64 seen as unsigned, on the device, so that a graph's replays draw fresh
            numbers once the offset has moved.

    Returns:
        (B,), dtype of ``conc1``, in (0, 1).
    """
    check_cuda("conc1", conc1, (torch.float32, torch.float64), 1)
    check_cuda("conc0", conc0, (conc1.dtype,), 1, like=conc1)
    check_cuda("state", state, (torch.int64,), 1, like=conc1)
    if conc0.shape != conc1.shape or state.numel() != 2:
        raise ValueError(
            f"conc0, state: expected shapes {tuple(conc1.shape)} and (2,), got {tuple(conc0.shape)} and "
            f"{tuple(state.shape)}"
        )
    conc1, conc0, state = conc1.contiguous(), conc0.contiguous(), state.contiguous()
    drawn = torch.empty_like(conc1)
    rows = conc1.numel()
    if rows:
        launch(
            _sample_beta_kernel, (triton.cdiv(rows, 128),), conc1.device, conc1, conc0, state, drawn, rows, BLOCK=128
        )
    return drawn
