"""Every operation of the router in plain torch: what is right.

The C++ engine and the Triton kernels are tested against these functions. They favour being read over being fast, follow
the dtype of their inputs (float32 or float64) and use one formula each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

LAYER_NORM_EPS = 1e-5
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


class Preference(NamedTuple):
    """Output of the policy network: the Beta's two concentrations and its mean-like preference, each (B,)."""

    conc1: Tensor
    conc0: Tensor
    mu: Tensor


def masked_mean_ref(hidden: Tensor, mask: Tensor) -> Tensor:
    """Average the hidden states of the tokens that count.

    Args:
        hidden: hidden states, (B, T, D).
        mask: not 0 where a token counts, (B, T), any dtype; what the others hold, NaN too, does not matter.

    Returns:
        (B, D) in the dtype of ``hidden``; a row without tokens is all zeros.
    """
    live = mask != 0
    total = hidden.masked_fill(~live.unsqueeze(-1), 0.0).sum(dim=1)
    return total / live.sum(dim=1, keepdim=True).clamp_min(1).to(hidden.dtype)


def gelu_ref(x: Tensor) -> Tensor:
    """GELU in its tanh form, x/2 (1 + tanh(sqrt(2/pi) (x + .044715 x^3))) (Hendrycks and Gimpel 2016), elementwise."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def project_ref(h: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """z = LN(GELU(W2 GELU(W1 h))), the two-layer projection of PROTEUS.

    Args:
        h: pooled encoder output, (B, D).
        tensors: ``projection.w1`` (D, d), ``projection.b1`` (d,), ``projection.w2`` (d, d), ``projection.b2`` (d,),
            ``projection.ln_weight`` (d,), ``projection.ln_bias`` (d,); without ``projection.w1`` the projection is the
            identity.

    Returns:
        Embedding z, (B, d).
    """
    if "projection.w1" not in tensors:
        return h
    x = gelu_ref(h @ tensors["projection.w1"] + tensors["projection.b1"])
    x = gelu_ref(x @ tensors["projection.w2"] + tensors["projection.b2"])
    return torch.nn.functional.layer_norm(
        x, x.shape[-1:], tensors["projection.ln_weight"], tensors["projection.ln_bias"], LAYER_NORM_EPS
    )


def predict_ref(z: Tensor, tensors: Mapping[str, Tensor], link: str) -> Tensor:
    """Predicted accuracy of each candidate, p = link(z W + b).

    Args:
        z: embedding, (B, d).
        tensors: ``predictor.weight`` (d, K), ``predictor.bias`` (K,).
        link: ``sigmoid`` or ``clip`` (to [0, 1]).

    Returns:
        p, (B, K), in [0, 1].
    """
    logits = z @ tensors["predictor.weight"] + tensors["predictor.bias"]
    return torch.sigmoid(logits) if link == "sigmoid" else logits.clamp(0.0, 1.0)


def interpolate_ref(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear function through (knots, values), constant outside.

    Args:
        x: (B,). knots: increasing, (N,). values: (N,).

    Returns:
        (B,).
    """
    right = torch.searchsorted(knots, x.contiguous()).clamp(1, knots.numel() - 1)
    left = right - 1
    share = ((x - knots[left]) / (knots[right] - knots[left])).clamp(0.0, 1.0)
    return values[left] + share * (values[right] - values[left])


def policy_ref(z: Tensor, tau: Tensor, tensors: Mapping[str, Tensor], head: str) -> Preference:
    """The Beta policy: a two-layer network on (z, tau, dual) whose first layer is gated by the dual variable.

    Args:
        z: embedding, (B, d).
        tau: path parameter, (B,), in [0, 1].
        tensors: ``policy.*`` of the checkpoint (shapes in ``proteus_fast.checkpoint``).
        head: ``residual`` (correction of the dual table's preference in logit space) or ``free`` (the paper's).

    Returns:
        conc1, conc0 (both > 1) and mu, (B,) each. mu is the Beta's mean for the free head and the corrected preference
        m itself for the residual head.
    """
    knots = tensors["policy.knots_tau"]
    dual = interpolate_ref(tau, knots, tensors["policy.knots_dual"])
    x = torch.cat([z, tau.unsqueeze(1), dual.unsqueeze(1)], dim=1)
    gate = torch.sigmoid(dual.unsqueeze(1) * tensors["policy.gate_weight"] + tensors["policy.gate_bias"])
    x = gelu_ref(x @ tensors["policy.w1"] + tensors["policy.b1"]) * gate
    x = gelu_ref(x @ tensors["policy.w2"] + tensors["policy.b2"])
    out = x @ tensors["policy.w3"] + tensors["policy.b3"]
    if head == "residual":
        start = interpolate_ref(tau, knots, tensors["policy.knots_mu"]).clamp(1e-4, 1.0 - 1e-4)
        mu = torch.sigmoid(torch.logit(start) + out[:, 0])
        total = torch.nn.functional.softplus(out[:, 1])
        return Preference(1.0 + mu * total, 1.0 + (1.0 - mu) * total, mu)
    conc = 1.0 + torch.nn.functional.softplus(out)
    return Preference(conc[:, 0], conc[:, 1], conc[:, 0] / conc.sum(dim=1))


def scores_ref(p: Tensor, mu: Tensor, b: Tensor, c: Tensor, kappa: float, gamma: float | Tensor) -> Tensor:
    """s_i = p_i + mu b_i - kappa (1 - mu)^gamma c_i (PROTEUS, Eq. 2, where kappa = 1).

    Args:
        p: predicted accuracy, (B, K). mu: quality preference, (B,), in [0, 1]. b: prior, (K,).
        c: cost in cost units, (K,) or (B, K). kappa: cost scale. gamma: cost sensitivity.

    Returns:
        Scores, (B, K).
    """
    cost_weight = kappa * (1.0 - mu).clamp_min(0.0) ** gamma
    return p + mu.unsqueeze(1) * b - cost_weight.unsqueeze(1) * c


def best_candidate_ref(scores: Tensor, available: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The candidate with the highest score among the available ones.

    Args:
        scores: (B, K). available: bool, (K,) or (B, K); None means all.

    Returns:
        choice (B,) int32, the lowest index where scores tie, -1 where nothing is available; score (B,), NaN there.
    """
    if available is not None:
        scores = scores.masked_fill(~available.expand_as(scores), -math.inf)
    best = scores.max(dim=1).values
    # argmax does not promise the first of equal scores, so the first is counted out
    choice = (scores == best.unsqueeze(1)).to(torch.int8).argmax(dim=1).to(torch.int32)
    nothing = torch.isinf(best) & (best < 0)
    return choice.masked_fill(nothing, -1), best.masked_fill(nothing, math.nan)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # int64 shifts are arithmetic in torch; the mask makes them logical
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _wrap(value: int) -> int:
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def mix64_ref(x: Tensor) -> Tensor:
    """Finaliser of splitmix64 (Steele et al. 2014) on int64 words seen as unsigned, elementwise."""
    x = (x ^ _shift_right(x, 30)) * _wrap(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _wrap(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def row_hash_ref(x: Tensor, key: int) -> Tensor:
    """Keyed 64-bit hash of a row, or of an id; it decides the side of a mixing step.

    The sum over the columns does not depend on their order, so that a GPU can reduce it in any.

    Args:
        x: rows as passed, (B, D) float32, or ids, (B,) int64 seen as unsigned.
        key: 64-bit key of the checkpoint.

    Returns:
        (B,) int64, to be seen as unsigned.
    """
    if x.dtype == torch.int64:
        total = mix64_ref(x + _wrap(_GOLDEN))
    else:
        # + 0.0 makes -0.0 and 0.0 one value
        bits = (x.to(torch.float32) + 0.0).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        column = torch.tensor([_wrap((d + 1) * _GOLDEN) for d in range(x.shape[1])], dtype=torch.int64)
        total = mix64_ref(bits + column.to(x.device)).sum(dim=1)
    return mix64_ref(total ^ _wrap(key))


def mixing_side_ref(u: Tensor, step_code: Tensor) -> Tensor:
    """Vertex of the path that each row is served by.

    Args:
        u: row hash, (B,) int64 seen as unsigned.
        step_code: vertex * 16 + g, (B,) int32: share g / 16 of the rows goes to the cheaper neighbour.

    Returns:
        Vertex, (B,) int64.
    """
    cheaper = _shift_right(u, 60) < (step_code % 16)
    return torch.div(step_code, 16, rounding_mode="floor").to(torch.int64) + cheaper.to(torch.int64)


def philox_ref(counter: Tensor, key: int) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011), the counter-based generator of every sampled decision.

    Args:
        counter: (..., 4) int64 words in [0, 2^32), low word first. key: 64-bit seed.

    Returns:
        Random words, the shape of ``counter``.
    """
    low, high = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    x0, x1, x2, x3 = counter.unbind(-1)
    for _ in range(10):
        high0, low0 = _multiply32(x0, 0xD2511F53)
        high1, low1 = _multiply32(x2, 0xCD9E8D57)
        x0, x1, x2, x3 = high1 ^ x1 ^ low, low1, high0 ^ x3 ^ high, low0
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return torch.stack([x0, x1, x2, x3], dim=-1)


def _multiply32(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    # the product of two 32-bit words wraps in int64; both halves of its bits are still right
    product = x * factor
    return _shift_right(product, 32), product & 0xFFFFFFFF


BETA_TRIES = 16


def sample_beta_ref(conc1: Tensor, conc0: Tensor, seed: int, rows: Tensor) -> Tensor:
    """Draw from Beta(conc1, conc0) by Cheng's algorithm BA (1978); a draw depends on (seed, row) alone.

    Try t of row r takes the words of Philox at counter (r, t, 0) under the key ``seed``, uniform numbers from the first
    two of them; after 16 rejected tries the draw is the mean.

    Args:
        conc1, conc0: concentrations, >= 1, (B,). seed: 64-bit. rows: index of each row, (B,) int64, >= 0.

    Returns:
        (B,) float64, in (0, 1).
    """
    a, b = conc1.double(), conc0.double()
    total = a + b
    excess1, excess0 = a - 1.0, b - 1.0
    excess = excess1 + excess0
    # sqrt((total - 2) / (2 a b - total)) without its 0 / 0 at (1, 1)
    beta = torch.rsqrt(1.0 + 2.0 * excess1 * excess0 / excess.clamp_min(1e-300))
    gamma = a + 1.0 / beta
    drawn = a / total
    waiting = torch.arange(len(rows), device=rows.device)
    for attempt in range(BETA_TRIES):
        row = rows[waiting]
        counter = torch.stack([row & 0xFFFFFFFF, row >> 32, torch.full_like(row, attempt), torch.zeros_like(row)], -1)
        words = philox_ref(counter, seed)
        u1, u2 = (((word >> 9).double() + 0.5) * 2.0**-23 for word in words.unbind(-1)[:2])
        a_, b_, total_, gamma_ = a[waiting], b[waiting], total[waiting], gamma[waiting]
        v = beta[waiting] * torch.log(u1 / (1.0 - u1))
        w = a_ * torch.exp(v)
        accept = gamma_ * v - math.log(4.0) + total_ * torch.log(total_ / (b_ + w)) >= torch.log(u1 * u1 * u2)
        drawn[waiting[accept]] = (w / (b_ + w))[accept]
        waiting = waiting[~accept]
        if not len(waiting):
            break
    return drawn


def log_bucket_ref(distance: Tensor, position_buckets: int, max_relative_positions: int) -> Tensor:
    """Bucket of a relative position: itself up to half the buckets, further out one for a growing range.

    Past m = position_buckets / 2 it is sign(r) (m + ceil(log(|r| / m) / log((max_relative_positions - 1) / m) (m - 1)))
    (He et al. 2021, DeBERTa-v2). In float32 whatever the model's dtype, so that a bound between two buckets stays.

    Args:
        distance: r = query's position - key's, any shape, int64. position_buckets: even, > 0.
        max_relative_positions: > position_buckets / 2 + 1.

    Returns:
        int64, the shape of ``distance``.
    """
    mid = position_buckets // 2
    near = distance.abs() <= mid
    share = torch.log(distance.abs().clamp_min(mid) / mid) / torch.log(torch.tensor((max_relative_positions - 1) / mid))
    far = (torch.ceil(share * (mid - 1)) + mid) * torch.sign(distance)
    return torch.where(near, distance, far.to(torch.int64))


def disentangled_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, position_key: Tensor, position_query: Tensor, cu_seqlens: Tensor,
    max_relative_positions: int,
) -> Tensor:  # fmt: skip
    """Self-attention of DeBERTa on packed sequences (He et al. 2021), content to position and position to content.

    The score of key j for query i is (q_i k_j + q_i Kr[s] + k_j Qr[s]) / sqrt(3 d) with s = bucket(i - j) + S, held to
    [0, 2 S - 1].

    Args:
        q, k, v: (N, heads, d), the tokens of all sequences one after another.
        position_key, position_query: Kr and Qr, the relative embeddings through the projections of the keys and of the
            queries, (2 S, heads, d); S is the number of position buckets.
        cu_seqlens: where each sequence starts and the last one ends, (B + 1,), integer.
        max_relative_positions: where the buckets end.

    Returns:
        (N, heads, d), of the dtype of ``q``.
    """
    out = torch.zeros_like(q)
    buckets = position_key.shape[0] // 2
    scale = 1.0 / math.sqrt(3 * q.shape[-1])
    bounds = cu_seqlens.tolist()
    for first, last in pairwise(bounds):
        here = slice(first, last)
        place = torch.arange(last - first, device=q.device)
        slot = log_bucket_ref(place[:, None] - place[None, :], buckets, max_relative_positions) + buckets
        slot = slot.clamp(0, 2 * buckets - 1).expand(q.shape[1], -1, -1)
        scores = torch.einsum("ihd,jhd->hij", q[here], k[here])
        scores = scores + torch.einsum("ihd,shd->his", q[here], position_key).gather(2, slot)
        to_content = torch.einsum("jhd,shd->hjs", k[here], position_query)
        scores = scores + to_content.gather(2, slot.transpose(1, 2)).transpose(1, 2)
        out[here] = torch.einsum("hij,jhd->ihd", torch.softmax(scores * scale, dim=-1), v[here])
    return out
