"""The whole decision in one launch: a program holds a tile of rows from the input to the choice."""

from __future__ import annotations

import triton
import triton.language as tl

from proteus_kernels.beta import draw_beta
from proteus_kernels.mixing import cheaper_side, column_terms, id_terms
from proteus_kernels.pooling import mean_of_tokens
from proteus_kernels.scoring import best_candidate_of, cost_weight


@triton.jit
def _gelu(x):
    # x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3); the bound keeps exp finite where the result is 0
    inner = x * (x * x * -0.0713548162726 - 1.5957691216057)
    return x / (1.0 + tl.exp(tl.minimum(inner, 80.0)))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(tl.minimum(-x, 80.0)))


@triton.jit
def _softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def _dense(
    x_ptr, x_stride, row, live, w_ptr, first,
    DIM: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x W for the rows of a tile and BLOCK_N columns from ``first``, (BLOCK_B, BLOCK_N) float32.

    x is (B, DIM); W is (DEPTH, COLUMNS), its rows from DIM on zeros.
    """
    column = first + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    for start in range(0, DEPTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row[:, None] * x_stride + k[None, :], mask=live[:, None] & (k < DIM)[None, :], other=0.0)
        w = tl.load(w_ptr + k[:, None] * COLUMNS + column[None, :])
        if w.dtype == tl.float32:
            # three TF32 products a pair keep float32's accuracy on the tensor cores
            total = tl.dot(x.to(tl.float32), w, total, input_precision="tf32x3")
        else:
            total = tl.dot(x.to(w.dtype), w, total)
    return total


@triton.jit
def _project(
    x_ptr, x_stride, row, live, matrices_ptr, vectors_ptr, first_ptr, second_ptr,
    LAYOUT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write z = LN(GELU(W2 GELU(W1 x))) of a tile to ``second_ptr``; rows of both buffers are LAYOUT.span apart."""
    N: tl.constexpr = BLOCK_N if LAYOUT.padded_width > BLOCK_N else LAYOUT.padded_width
    place = row[:, None] * LAYOUT.span
    every = tl.full([BLOCK_B], True, tl.int1)
    for first in range(0, LAYOUT.padded_width, N):
        column = first + tl.arange(0, N)
        y = _dense(x_ptr, x_stride, row, live, matrices_ptr + LAYOUT.w1, first, LAYOUT.dim, LAYOUT.padded_dim,
                   LAYOUT.padded_width, BLOCK_B, BLOCK_K, N)  # fmt: skip
        y = _gelu(y + tl.load(vectors_ptr + LAYOUT.b1 + column)[None, :])
        tl.store(first_ptr + place + column[None, :], y)
    # other threads read what these wrote
    tl.debug_barrier()
    total = tl.zeros([BLOCK_B], tl.float32)
    for first in range(0, LAYOUT.padded_width, N):
        column = first + tl.arange(0, N)
        y = _dense(first_ptr, LAYOUT.span, row, every, matrices_ptr + LAYOUT.w2, first, LAYOUT.padded_width,
                   LAYOUT.padded_width, LAYOUT.padded_width, BLOCK_B, BLOCK_K, N)  # fmt: skip
        y = _gelu(y + tl.load(vectors_ptr + LAYOUT.b2 + column)[None, :])
        total += tl.sum(y, axis=1)
        tl.store(second_ptr + place + column[None, :], y)
    tl.debug_barrier()
    mean = total / LAYOUT.width
    squares = tl.zeros([BLOCK_B], tl.float32)
    for first in range(0, LAYOUT.padded_width, N):
        column = first + tl.arange(0, N)
        y = tl.load(second_ptr + place + column[None, :])
        centred = tl.where((column < LAYOUT.width)[None, :], y - mean[:, None], 0.0)
        squares += tl.sum(centred * centred, axis=1)
    scale = 1.0 / tl.sqrt(squares / LAYOUT.width + 1e-5)
    for first in range(0, LAYOUT.padded_width, N):
        column = first + tl.arange(0, N)
        y = tl.load(second_ptr + place + column[None, :])
        weight = tl.load(vectors_ptr + LAYOUT.ln_weight + column)[None, :]
        y = (y - mean[:, None]) * scale[:, None] * weight + tl.load(vectors_ptr + LAYOUT.ln_bias + column)[None, :]
        tl.store(second_ptr + place + column[None, :], y)
    tl.debug_barrier()


@triton.jit
def _interpolate(x, knots_ptr, values_ptr, KNOTS: tl.constexpr):
    """Piecewise linear through (knots, values), constant outside; float64."""
    result = tl.load(values_ptr).to(tl.float64) + 0.0 * x
    for n in range(KNOTS - 1):
        low = tl.load(knots_ptr + n).to(tl.float64)
        high = tl.load(knots_ptr + n + 1).to(tl.float64)
        left = tl.load(values_ptr + n).to(tl.float64)
        right = tl.load(values_ptr + n + 1).to(tl.float64)
        share = tl.minimum((x - low) / (high - low), 1.0)
        result = tl.where(x > low, left + share * (right - left), result)
    return result


@triton.jit
def _prefer(
    z_ptr, z_stride, row, live, tau, dual, matrices_ptr, vectors_ptr, hidden_ptr,
    LAYOUT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The two outputs of the policy network for a tile, (BLOCK_B,) float32 each; tau and dual are float32."""
    N: tl.constexpr = BLOCK_N if LAYOUT.padded_hidden > BLOCK_N else LAYOUT.padded_hidden
    place = row[:, None] * LAYOUT.span
    every = tl.full([BLOCK_B], True, tl.int1)
    for first in range(0, LAYOUT.padded_hidden, N):
        column = first + tl.arange(0, N)
        y = _dense(z_ptr, z_stride, row, live, matrices_ptr + LAYOUT.policy_w1, first, LAYOUT.inner,
                   LAYOUT.padded_inner, LAYOUT.padded_hidden, BLOCK_B, BLOCK_K, N)  # fmt: skip
        base = tl.load(vectors_ptr + LAYOUT.policy_b1 + column)[None, :]
        base += tau[:, None] * tl.load(vectors_ptr + LAYOUT.w_tau + column)[None, :]
        base += dual[:, None] * tl.load(vectors_ptr + LAYOUT.w_dual + column)[None, :]
        gate = dual[:, None] * tl.load(vectors_ptr + LAYOUT.gate_weight + column)[None, :]
        gate += tl.load(vectors_ptr + LAYOUT.gate_bias + column)[None, :]
        tl.store(hidden_ptr + place + column[None, :], _gelu(y + base) * _sigmoid(gate))
    tl.debug_barrier()
    out1 = tl.zeros([BLOCK_B], tl.float32) + tl.load(vectors_ptr + LAYOUT.b3)
    out2 = tl.zeros([BLOCK_B], tl.float32) + tl.load(vectors_ptr + LAYOUT.b3 + 1)
    for first in range(0, LAYOUT.padded_hidden, N):
        column = first + tl.arange(0, N)
        y = _dense(hidden_ptr, LAYOUT.span, row, every, matrices_ptr + LAYOUT.policy_w2, first,
                   LAYOUT.padded_hidden, LAYOUT.padded_hidden, LAYOUT.padded_hidden,
                   BLOCK_B, BLOCK_K, N)  # fmt: skip
        y = _gelu(y + tl.load(vectors_ptr + LAYOUT.policy_b2 + column)[None, :])
        out1 += tl.sum(y * tl.load(vectors_ptr + LAYOUT.w3_first + column)[None, :], axis=1)
        out2 += tl.sum(y * tl.load(vectors_ptr + LAYOUT.w3_second + column)[None, :], axis=1)
    return out1, out2


# numbers that change from call to call and align nothing, so that they are no reason to compile again
@triton.jit(
    do_not_specialize=[
        "rows", "tokens", "vertices", "tau_stride", "tau", "grid_index", "available_stride", "price_stride",
        "uncertified",
    ],
    do_not_specialize_on_alignment=["tau_ptr", "available_ptr", "price_ptr", "ids_ptr", "mask_ptr", "state_ptr"],
)  # fmt: skip
def decide_kernel(
    x_ptr, x_stride, rows, hidden_ptr, token_stride, mask_ptr, mask_stride, tokens,
    matrices_ptr, vectors_ptr, words_ptr, table_ptr, vertices,
    tau_ptr, tau_stride, tau, grid_index, available_ptr, available_stride, price_ptr, price_stride,
    ids_ptr, state_ptr, uncertified, scratch_ptr, choice_ptr, mu_ptr, score_ptr, status_ptr, floor_ptr,
    LAYOUT: tl.constexpr, POLICY: tl.constexpr, SAMPLE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Decide BLOCK_B rows. Pointers that are None stand for arguments that were not given.

    With ``hidden_ptr`` there is one row, and it is pooled into ``x_ptr`` first.
    """
    FEASIBLE: tl.constexpr = 1
    UNCERTIFIED: tl.constexpr = 3
    INVALID: tl.constexpr = 4
    # places in a path's table: step codes of the grid's targets, then status and floor of each, then of each vertex
    # parameter, dual and logit
    STATUS: tl.constexpr = 1001
    FLOOR: tl.constexpr = 2002
    VERTICES: tl.constexpr = 3003
    if hidden_ptr is not None:
        for first in range(0, LAYOUT.dim, 512):
            column = first + tl.arange(0, 512)
            inside = column < LAYOUT.dim
            mean = mean_of_tokens(hidden_ptr, token_stride, mask_ptr, mask_stride, tokens, column, inside, 512)
            tl.store(x_ptr + column, mean, mask=inside)
        tl.debug_barrier()
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = row < rows
    every = tl.full([BLOCK_B], True, tl.int1)
    candidate = tl.arange(0, LAYOUT.padded_candidates)
    real = candidate < LAYOUT.candidates

    # which candidates may be chosen
    if available_ptr is not None:
        eligible = tl.load(
            available_ptr + row[:, None] * available_stride + candidate[None, :],
            mask=live[:, None] & real[None, :], other=0,
        ) != 0  # fmt: skip
    else:
        eligible = live[:, None] & real[None, :]
    count = tl.sum(eligible.to(tl.int32), axis=1)
    valid = count > 0

    # the target, as an index of the grid
    if tau_ptr is not None:
        target = tl.load(tau_ptr + row * tau_stride, mask=live, other=0.0).to(tl.float64)
        valid = valid & (target >= 0.0) & (target <= 1.0)
        # the bound stands between product and difference, so that no compiler makes one operation of them
        steps = tl.maximum(target * 1000.0, 0.0)
        grid = tl.where(valid, tl.ceil(tl.minimum(steps, 1000.0) - 1e-3), 0.0).to(tl.int32)
        target = tl.where(valid, target, 0.0)
    else:
        target = tl.zeros([BLOCK_B], tl.float64) + tau
        grid = tl.zeros([BLOCK_B], tl.int32) + grid_index

    # the row as passed: finite or not, and its hash
    # few, wide steps: a step waits for memory
    SCAN: tl.constexpr = 4096 // BLOCK_B
    broken = tl.zeros([BLOCK_B, SCAN], tl.int32)
    terms = tl.zeros([BLOCK_B, SCAN], tl.uint64)
    for start in range(0, LAYOUT.dim, SCAN):
        k = start + tl.arange(0, SCAN)
        inside = live[:, None] & (k < LAYOUT.dim)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
        broken |= ((tl.abs(x) < float("inf")) == 0).to(tl.int32)
        if (table_ptr is not None) and (ids_ptr is None):
            terms += tl.where((k < LAYOUT.dim)[None, :], column_terms(x, k[None, :]), 0)
    valid = valid & (tl.max(broken, axis=1) == 0)
    # a row that cannot be decided counts as zeros in the products
    sound = live & valid

    # the step that serves the target, the side of it that serves the row
    restricted = (count < LAYOUT.candidates) | (uncertified != 0)
    status = tl.where(restricted, UNCERTIFIED, FEASIBLE)
    floor = tl.full([BLOCK_B], float("nan"), tl.float32)
    dual = tl.zeros([BLOCK_B], tl.float64)
    start_logit = tl.zeros([BLOCK_B], tl.float64)
    if table_ptr is not None:
        code = tl.load(table_ptr + grid)
        if ids_ptr is not None:
            total = id_terms(tl.load(ids_ptr + row, mask=live, other=0).to(tl.uint64, bitcast=True))
        else:
            total = tl.sum(terms, axis=1)
        key = tl.load(words_ptr + 3).to(tl.uint64, bitcast=True)
        vertex = (code >> 4) + cheaper_side(total, key, code)
        vertex_ptr = table_ptr + VERTICES + vertex
        parameter = tl.load(vertex_ptr).to(tl.float32, bitcast=True).to(tl.float64)
        status = tl.where(restricted, UNCERTIFIED, tl.load(table_ptr + STATUS + grid))
        floor = tl.where(restricted, floor, tl.load(table_ptr + FLOOR + grid).to(tl.float32, bitcast=True))
        if POLICY:
            dual = tl.load(vertex_ptr + vertices).to(tl.float32, bitcast=True).to(tl.float64)
            start_logit = tl.load(vertex_ptr + 2 * vertices).to(tl.float32, bitcast=True).to(tl.float64)
    else:
        parameter = target
        if POLICY:
            knots_ptr = vectors_ptr + LAYOUT.knots_tau
            dual = _interpolate(target, knots_ptr, vectors_ptr + LAYOUT.knots_dual, LAYOUT.knots)
            if LAYOUT.residual:
                knot = _interpolate(target, knots_ptr, vectors_ptr + LAYOUT.knots_mu, LAYOUT.knots)
                # not by minimum and maximum, whose bounds Triton 3.6 rounds to float32
                knot = tl.where(knot > 0.9999, 0.9999, tl.where(knot < 1e-4, 1e-4, knot))
                start_logit = tl.log(knot / (1.0 - knot))

    # the embedding, the predicted accuracies
    if LAYOUT.width > 0:
        z_ptr = scratch_ptr + tl.num_programs(0).to(tl.int64) * BLOCK_B * LAYOUT.span
        z_stride: tl.constexpr = LAYOUT.span
        z_live = every
        _project(x_ptr, x_stride, row, sound, matrices_ptr, vectors_ptr, scratch_ptr, z_ptr, LAYOUT, BLOCK_B, BLOCK_K,
                 BLOCK_N)  # fmt: skip
    else:
        z_ptr = x_ptr
        z_stride = x_stride
        z_live = sound
    p = _dense(z_ptr, z_stride, row, z_live, matrices_ptr + LAYOUT.predictor, 0, LAYOUT.inner, LAYOUT.padded_inner,
               LAYOUT.padded_candidates, BLOCK_B, 64, LAYOUT.padded_candidates)  # fmt: skip
    p += tl.load(vectors_ptr + LAYOUT.bias + candidate)[None, :]
    if LAYOUT.sigmoid:  # noqa: SIM108
        # infinities become NaN, which no score survives
        p = _sigmoid(p) + (p - p)
    else:
        p = tl.where(p == p, tl.minimum(tl.maximum(p, 0.0), 1.0), float("nan"))

    # the preference
    if POLICY:
        parameter32 = parameter.to(tl.float32)
        dual32 = dual.to(tl.float32)
        out1, out2 = _prefer(z_ptr, z_stride, row, z_live, parameter32, dual32, matrices_ptr, vectors_ptr, scratch_ptr,
                             LAYOUT, BLOCK_B, BLOCK_K, BLOCK_N)  # fmt: skip
        # a minimum would make a number of NaN further down
        valid = valid & (out1 == out1)
        if SAMPLE or not LAYOUT.residual:
            valid = valid & (out2 == out2)
        first = out1.to(tl.float64)
        second = out2.to(tl.float64)
        if LAYOUT.residual:
            preference = 1.0 / (1.0 + tl.exp(tl.minimum(-(start_logit + first), 700.0)))
            spread = _softplus(second)
            conc1 = 1.0 + preference * spread
            conc0 = 1.0 + (1.0 - preference) * spread
        else:
            conc1 = 1.0 + _softplus(first)
            conc0 = 1.0 + _softplus(second)
            preference = conc1 / (conc1 + conc0)
        if SAMPLE:
            seed = tl.load(state_ptr)
            offset = tl.load(state_ptr + 1)
            preference = draw_beta(conc1, conc0, seed, offset + row, valid)
        mu = preference.to(tl.float32)
    else:
        mu = parameter.to(tl.float32)
    valid = valid & (mu >= 0.0) & (mu <= 1.0)

    # the scores and the best of them
    unit = tl.load(words_ptr + 2).to(tl.float64, bitcast=True)
    if price_ptr is not None:
        price = tl.load(
            price_ptr + row[:, None] * price_stride + candidate[None, :], mask=live[:, None] & real[None, :], other=0.0
        ).to(tl.float32)  # fmt: skip
        fits = (price >= 0.0) & (price < float("inf"))
        valid = valid & (tl.min(fits.to(tl.int32), axis=1) > 0)
        cost = (price.to(tl.float64) / unit).to(tl.float32)
    else:
        cost = tl.load(vectors_ptr + LAYOUT.cost + candidate)[None, :]
    kappa = tl.load(words_ptr).to(tl.float64, bitcast=True)
    gamma = tl.load(words_ptr + 1).to(tl.float64, bitcast=True)
    score = p
    if POLICY:
        score += mu[:, None] * tl.load(vectors_ptr + LAYOUT.prior + candidate)[None, :]
    score -= cost_weight(mu, kappa, gamma)[:, None] * cost
    choice, best, found = best_candidate_of(score, eligible, candidate, LAYOUT.padded_candidates)
    valid = valid & found

    tl.store(choice_ptr + row, tl.where(valid, choice, -1), mask=live)
    tl.store(mu_ptr + row, tl.where(valid, mu, float("nan")), mask=live)
    tl.store(score_ptr + row, tl.where(valid, best, float("nan")), mask=live)
    tl.store(status_ptr + row, tl.where(valid, status, INVALID).to(tl.uint8), mask=live)
    tl.store(floor_ptr + row, tl.where(valid, floor, float("nan")), mask=live)
