"""Mean over the tokens that count: from an encoder's hidden states, padded or packed, to one row a query.

Both layouts and the CPU add in one order, so that a query has the same bits, and with them the same side of a mixing
step, wherever it is pooled: token t of a row goes to lane t mod 8, each lane adds in the order of its tokens in
float32, and the lanes are folded in halves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from proteus_kernels.launch import FLOATS, check_cuda, launch
from proteus_kernels.layout import power_of_two


@triton.jit
def _fold(x, HALF: tl.constexpr, BLOCK_D: tl.constexpr):
    """x[i] + x[i + HALF], (2 HALF, BLOCK_D) -> (HALF, BLOCK_D)."""
    low, high = tl.split(tl.permute(tl.reshape(x, [2, HALF, BLOCK_D]), [1, 2, 0]))
    return low + high


@triton.jit
def mean_of_tokens(
    hidden_ptr, token_stride, mask_ptr, mask_stride, tokens, column, inside, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Mean of one row's tokens in BLOCK_D columns, (BLOCK_D,) float32; 0 without tokens.

    The pointers are the row's; mask_ptr is None where every token counts. A token that does not count is not read.
    """
    LANES: tl.constexpr = 8
    lane = tl.arange(0, LANES)
    total = tl.zeros([LANES, BLOCK_D], tl.float32)
    count = tl.zeros([LANES], tl.int32)
    # several groups of tokens in flight: each waits for its mask, then for its states
    for start in tl.range(0, tokens, LANES, loop_unroll_factor=4):
        token = (start + lane).to(tl.int64)
        live = token < tokens
        if mask_ptr is not None:
            live = tl.load(mask_ptr + token * mask_stride, mask=live, other=0) != 0
        count += live.to(tl.int32)
        place = token[:, None] * token_stride + column[None, :]
        total += tl.load(hidden_ptr + place, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
    total = _fold(_fold(_fold(total, 4, BLOCK_D), 2, BLOCK_D), 1, BLOCK_D).reshape([BLOCK_D])
    # rounded correctly, as on the CPU
    return tl.div_rn(total, tl.zeros_like(total) + tl.maximum(tl.sum(count), 1).to(tl.float32))


@triton.jit(do_not_specialize=["mask_row_stride", "tokens"], do_not_specialize_on_alignment=["mask_ptr"])
def _masked_mean_kernel(
    hidden_ptr, row_stride, token_stride, mask_ptr, mask_row_stride, mask_token_stride, pooled_ptr, tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program per row and block of columns
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < D
    mean = mean_of_tokens(hidden_ptr + row * row_stride, token_stride, mask_ptr + row * mask_row_stride,
                          mask_token_stride, tokens, column, inside, BLOCK_D)  # fmt: skip
    tl.store(pooled_ptr + row * D + column, mean, mask=inside)


@triton.jit
def _varlen_mean_kernel(hidden_ptr, token_stride, cu_seqlens_ptr, pooled_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < D
    first = tl.load(cu_seqlens_ptr + row).to(tl.int64)
    tokens = (tl.load(cu_seqlens_ptr + row + 1) - first).to(tl.int32)
    mean = mean_of_tokens(hidden_ptr + first * token_stride, token_stride, None, 0, tokens, column, inside, BLOCK_D)
    tl.store(pooled_ptr + row * D + column, mean, mask=inside)


def check_mask(hidden: Tensor, mask: object) -> Tensor:
    """The mask of hidden states as numbers; raises unless it is a tensor (B, T) on their device."""
    if not isinstance(mask, Tensor):
        raise ValueError(f"mask: expected (B, T) with hidden states (B, T, D), got {type(mask).__name__}")
    if hidden.dim() != 3:
        raise ValueError(f"tensor: expected hidden states (B, T, D) with a mask, got shape {tuple(hidden.shape)}")
    if mask.device != hidden.device:
        raise ValueError(f"mask: expected a tensor on {hidden.device}, got one on {mask.device}")
    if mask.shape != hidden.shape[:2]:
        raise ValueError(f"mask: expected shape {tuple(hidden.shape[:2])}, got {tuple(mask.shape)}")
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def columns_together(x: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous, else a copy of which that is true."""
    return x if x.stride(-1) == 1 else x.contiguous()


def block_columns(dim: int) -> int:
    """Columns of a program: whole rows of 128-byte lines, few enough that a small batch still fills the GPU."""
    return min(power_of_two(dim, 64), 256)


def masked_mean(hidden: Tensor, mask: Tensor, out: Tensor | None = None) -> Tensor:
    """Average the hidden states of the tokens that count.

    Args:
        hidden: (B, T, D), float32, bfloat16, float16 or float64.
        mask: not 0 where a token counts, (B, T), bool, integer or floating; what the others hold does not matter.
        out: where to write, (B, D) float32.

    Returns:
        (B, D) float32, what ``route_batch`` takes; a row without tokens is all zeros.
    """
    mask = check_mask(hidden, mask)
    check_cuda("tensor", hidden, FLOATS, 3)
    rows, tokens, dim = hidden.shape
    hidden = columns_together(hidden)
    pooled = torch.empty(rows, dim, dtype=torch.float32, device=hidden.device) if out is None else out
    if rows:
        block = block_columns(dim)
        launch(
            _masked_mean_kernel, (rows, triton.cdiv(dim, block)), hidden.device, hidden, hidden.stride(0),
            hidden.stride(1), mask, mask.stride(0), mask.stride(1), pooled, tokens, D=dim, BLOCK_D=block, num_warps=4,
        )  # fmt: skip
    return pooled


def varlen_mean(hidden: Tensor, cu_seqlens: Tensor, out: Tensor | None = None) -> Tensor:
    """Average the hidden states of each sequence of a packed batch.

    Args:
        hidden: (N, D), the tokens of all sequences one after another, of the same dtypes.
        cu_seqlens: where each sequence starts and the last one ends, (B + 1,) int32 or int64, on the device.
        out: where to write, (B, D) float32.

    Returns:
        (B, D) float32; an empty sequence is all zeros.
    """
    check_cuda("hidden", hidden, FLOATS, 2)
    check_cuda("cu_seqlens", cu_seqlens, (torch.int32, torch.int64), 1, like=hidden)
    rows, dim = cu_seqlens.numel() - 1, hidden.shape[1]
    if rows < 0:
        raise ValueError("cu_seqlens: expected shape (B + 1,), got (0,)")
    hidden = columns_together(hidden)
    pooled = torch.empty(rows, dim, dtype=torch.float32, device=hidden.device) if out is None else out
    if rows:
        block = block_columns(dim)
        launch(
            _varlen_mean_kernel, (rows, triton.cdiv(dim, block)), hidden.device, hidden, hidden.stride(0),
            cu_seqlens.contiguous(), pooled, D=dim, BLOCK_D=block, num_warps=4,
        )  # fmt: skip
    return pooled
