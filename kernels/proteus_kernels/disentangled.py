"""Disentangled self-attention of DeBERTa on packed sequences: three products a tile, two of them read sheared.

The position terms depend on i - j alone. With a row of the position tables for every distance, those that a tile needs
lie together, and the terms are a band of one product with them: no score is fetched by its bucket from memory.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from proteus_kernels.deberta import HEAD_DIMS, WEIGHT_DTYPES
from proteus_kernels.launch import check_cuda, launch
from proteus_kernels.layout import power_of_two

_LOG2_E = 1.4426950408889634


@triton.jit
def _dot(x, y, total):
    """total + x y, float32; three TF32 products where both are float32."""
    if x.dtype == tl.float32:
        return tl.dot(x, y, total, input_precision="tf32x3")
    else:  # noqa: RET505
        return tl.dot(x, y, total)


@triton.jit
def _rows_times_rows(
    x_ptr, x_stride, x_row, x_live, y_ptr, y_stride, y_row, y_live, first_column,
    X: tl.constexpr, Y: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x y^T of one head's D columns, (X, Y) float32; a row that is not live counts as zeros."""
    total = tl.zeros([X, Y], tl.float32)
    # DEPTH columns at a time, which bounds the registers that the split of float32 takes
    for start in range(0, D, DEPTH):
        column = first_column + start + tl.arange(0, DEPTH)
        x = tl.load(x_ptr + x_row[:, None] * x_stride + column[None, :], mask=x_live[:, None], other=0.0)
        y = tl.load(y_ptr + y_row[:, None] * y_stride + column[None, :], mask=y_live[:, None], other=0.0)
        total = _dot(x, tl.trans(y), total)
    return total


@triton.jit(do_not_specialize=["blocks", "reach"])
def _disentangled_attention_kernel(
    q_ptr, k_ptr, v_ptr, token_stride, position_key_ptr, position_query_ptr, position_stride, cu_seqlens_ptr,
    out_ptr, blocks, reach, scale, HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    # one program per head and block of queries; scale is that of the scores times log2(e)
    sequence = tl.program_id(0) // blocks
    first_query = tl.program_id(0) % blocks * BLOCK
    first = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    tokens = (tl.load(cu_seqlens_ptr + sequence + 1) - first).to(tl.int32)
    if first_query >= tokens:
        return
    i = tl.arange(0, BLOCK)
    j = tl.arange(0, BLOCK)
    near = tl.arange(0, 2 * BLOCK).to(tl.int64)
    first_column = tl.program_id(1) * D
    column = first_column + tl.arange(0, D)
    query = first + first_query + i
    query_live = first_query + i < tokens
    # place of the distance between query i and key j among the 2 BLOCK distances that a tile needs
    key_shear = j[None, :] - i[:, None] + (BLOCK - 1)
    query_shear = i[:, None] - j[None, :] + (BLOCK - 1)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mixed = tl.zeros([BLOCK, D], tl.float32)
    for first_key in range(0, tokens, BLOCK):
        key = first + first_key + j
        key_live = first_key + j < tokens
        away = first_key - first_query
        row = reach + away - (BLOCK - 1) + near
        scores = tl.gather(
            _rows_times_rows(q_ptr, token_stride, query, query_live, position_key_ptr, position_stride, row,
                             (row >= 0) & (row <= 2 * reach), first_column, BLOCK, 2 * BLOCK, D, DEPTH),
            key_shear, axis=1,
        )  # fmt: skip
        row = reach - away - (BLOCK - 1) + near
        scores += tl.gather(
            _rows_times_rows(position_query_ptr, position_stride, row, (row >= 0) & (row <= 2 * reach), k_ptr,
                             token_stride, key, key_live, first_column, 2 * BLOCK, BLOCK, D, DEPTH),
            query_shear, axis=0,
        )  # fmt: skip
        scores += _rows_times_rows(q_ptr, token_stride, query, query_live, k_ptr, token_stride, key, key_live,
                                   first_column, BLOCK, BLOCK, D, DEPTH)  # fmt: skip
        scores = tl.where(key_live[None, :], scores * scale, -float("inf"))
        # softmax of what was seen so far; a block has a key, so that best is finite
        now = tl.maximum(best, tl.max(scores, axis=1))
        fade = tl.exp2(best - now)
        weight = tl.exp2(scores - now[:, None])
        total = total * fade + tl.sum(weight, axis=1)
        v = tl.load(v_ptr + key[:, None] * token_stride + column[None, :], mask=key_live[:, None], other=0.0)
        mixed = _dot(weight.to(v.dtype), v, mixed * fade[:, None])
        best = now
    tl.store(
        out_ptr + query[:, None] * (HEADS * D) + column[None, :],
        (mixed / total[:, None]).to(out_ptr.dtype.element_ty), mask=query_live[:, None],
    )  # fmt: skip


def _check_heads(name: str, tensor: Tensor, like: Tensor, rows: int | None = None) -> None:
    check_cuda(name, tensor, (like.dtype,), 3, like=like)
    expected = (tensor.shape[0] if rows is None else rows, *like.shape[1:])
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")
    if tensor.stride()[1:] != (like.shape[2], 1):
        raise ValueError(f"{name}: expected heads and columns next to each other, got strides {tensor.stride()}")


def disentangled_attention(
    q: Tensor, k: Tensor, v: Tensor, position_key: Tensor, position_query: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Self-attention of DeBERTa, ``disentangled_attention_ref`` with position tables that have a row for each distance.

    Args:
        q, k, v: (N, heads, d), float32, bfloat16 or float16, heads and columns next to each other, tokens equally far
            apart in all three, as in the output of one projection. d is 16, 32 or 64.
        position_key: Kr by key's position - query's, from -R to R, (2 R + 1, heads, d), of the dtype of ``q``.
        position_query: Qr by query's position - key's, from -R to R, likewise.
        cu_seqlens: where each sequence starts and the last one ends, (B + 1,) int32 or int64, on the device.
        max_seqlen: no sequence is longer (not looked at: it would be cut off), at most R + 1.
        out: where to write, (N, heads, d) of the dtype of ``q``, contiguous.

    Returns:
        (N, heads, d). Scores, softmax and sums are float32; products of float32 are three TF32 ones.
    """
    check_cuda("q", q, WEIGHT_DTYPES, 3)
    tokens, heads, dim = q.shape
    if dim not in HEAD_DIMS:
        raise ValueError(f"q: expected a last dimension of {HEAD_DIMS}, got {dim}")
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        _check_heads(name, tensor, q, tokens)
        if tensor.stride(0) != q.stride(0):
            raise ValueError(f"{name}: expected tokens {q.stride(0)} apart as in q, got {tensor.stride(0)}")
    _check_heads("position_key", position_key, q)
    _check_heads("position_query", position_query, q, position_key.shape[0])
    if position_query.stride(0) != position_key.stride(0):
        raise ValueError(
            f"position_query: expected rows {position_key.stride(0)} apart, got {position_query.stride(0)}"
        )
    check_cuda("cu_seqlens", cu_seqlens, (torch.int32, torch.int64), 1, like=q)
    sequences, reach = cu_seqlens.numel() - 1, position_key.shape[0] // 2
    if sequences < 0:
        raise ValueError("cu_seqlens: expected shape (B + 1,), got (0,)")
    if not 0 <= max_seqlen <= reach + 1:
        raise ValueError(f"max_seqlen: expected 0 to {reach + 1}, got {max_seqlen}")
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    block = power_of_two(min(max_seqlen, 32), 16)
    blocks = triton.cdiv(max_seqlen, block)
    # of the choices without stack on sm_80 and sm_90, those with the largest tile
    options = {"DEPTH": dim, "num_warps": 4, "num_stages": 2}
    if q.dtype == torch.float32:
        options = {"DEPTH": min(dim, 32), "num_warps": 8, "num_stages": 1}
    if sequences * blocks:
        launch(
            _disentangled_attention_kernel, (sequences * blocks, heads), q.device, q, k, v, q.stride(0), position_key,
            position_query, position_key.stride(0), cu_seqlens.contiguous(), out, blocks, reach,
            _LOG2_E / math.sqrt(3 * dim), HEADS=heads, D=dim, BLOCK=block, **options,
        )  # fmt: skip
    return out
