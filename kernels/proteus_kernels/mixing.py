"""The keyed row hash that decides the side of a mixing step, for use inside kernels; exact, so equal to the core's.

Numbers stand where they are used, here and in the other kernels: Triton compares every global that a kernel uses with
what it was at each launch, which takes time, and a NaN among them never equals itself.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix64(x):
    """Finaliser of splitmix64 (Steele et al. 2014) on uint64, elementwise."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def column_terms(x, column):
    """What each column adds to the sum that a row is hashed by.

    x is the row as passed, float32; column its index, int32; both broadcast. Returns uint64.
    """
    bits = x.to(tl.uint32, bitcast=True)
    # -0.0 counts as 0.0
    bits = tl.where(bits == 0x80000000, 0, bits).to(tl.uint64)
    return mix64(bits + (column + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)


@triton.jit
def id_terms(ids):
    """The same sum for an id that replaces the row, uint64."""
    return mix64(ids + 0x9E3779B97F4A7C15)


@triton.jit
def cheaper_side(total, key, code):
    """1 where the hash sends the row to the cheaper neighbour of the step `code` (vertex * 16 + share), else 0."""
    u = mix64(total ^ key)
    return ((u >> 60).to(tl.int32) < (code & 15)).to(tl.int32)
