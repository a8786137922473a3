"""Pooling against the reference, and padded = packed = CPU to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from proteus_fast._core import masked_mean as masked_mean_on_cpu
from proteus_kernels import pooling, reference
from tests.core.routers import random_router
from tests.kernels.snapshots import DEVICE, build, decide

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 1, 1), (3, 17, 79), (2, 64, 768), (5, 9, 1024), (4, 33, 256), (2, 100, 300)]


def hidden_states(shape: tuple[int, int, int], dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of mixed magnitude, and a ragged mask with a hole and an empty row."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-3, 3, shape, generator=generator)
    mask = torch.rand(shape[:2], generator=generator) < 0.7
    mask[:, 0] = True
    if shape[0] > 2:
        mask[-1] = False
    hidden[~mask] = torch.nan
    return hidden.to(dtype), mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masked_mean(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    hidden, mask = hidden_states(shape, dtype, seed=1)
    expected = reference.masked_mean_ref(hidden.double(), mask)
    on_cpu = masked_mean_on_cpu(hidden.float().numpy(), mask.numpy())
    for form in (mask, mask.to(torch.int64), mask.float()):
        pooled = pooling.masked_mean(hidden.to(DEVICE), form.to(DEVICE)).cpu()
        assert pooled.dtype == torch.float32
        torch.testing.assert_close(pooled.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        np.testing.assert_array_equal(pooled.numpy(), on_cpu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed_is_padded_to_the_bit(dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([0, 1, 7, 8, 9, 40, 0, 31])
    hidden = torch.randn(len(lengths), 40, 200, generator=generator).to(dtype)
    mask = torch.arange(40)[None] < lengths[:, None]
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(index_dtype)
    packed = pooling.varlen_mean(hidden[mask].to(DEVICE), ends.to(DEVICE))
    assert torch.equal(packed, pooling.masked_mean(hidden.to(DEVICE), mask.to(DEVICE)))
    assert torch.equal(packed[0], torch.zeros(200, device=DEVICE))


def test_views_are_taken_as_they_lie() -> None:
    hidden, mask = hidden_states((6, 20, 48), torch.float32, seed=3)
    hidden, mask = hidden.to(DEVICE), mask.to(DEVICE)
    expected = pooling.masked_mean(hidden[::2, 3:17], mask[::2, 3:17].contiguous())
    assert torch.equal(pooling.masked_mean(hidden[::2, 3:17], mask[::2, 3:17]), expected)
    assert torch.equal(pooling.masked_mean(hidden[::2, 3:17].contiguous(), mask[::2, 3:17]), expected)
    across = hidden.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(pooling.masked_mean(across, mask), pooling.masked_mean(hidden, mask))
    out = torch.full((6, 48), 77.0, device=DEVICE)
    assert pooling.masked_mean(hidden, mask, out) is out
    assert torch.equal(out, pooling.masked_mean(hidden, mask))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_deciding_from_hidden_states_is_pooling_first(rows: int, dtype: torch.dtype) -> None:
    """One row is pooled by the launch that decides it, more of them by one before."""
    rng = np.random.default_rng(4)
    router = random_router(rng, dim=600, width=64, candidates=7, hidden=32)
    hidden, mask = hidden_states((rows, 21, 600), dtype, seed=5)
    hidden, mask = hidden.nan_to_num(0.0).clamp(-3, 3).to(DEVICE), mask.to(DEVICE)
    pooled = pooling.masked_mean(hidden, mask)
    snapshot = build(router)
    expected = decide(snapshot, pooled, {"tau": 0.6})
    got = snapshot.decide(hidden, 0.6, mask=mask)
    for mine, theirs in zip(got, expected, strict=True):
        # two compiled variants of one kernel, whose products may be rounded in another order
        torch.testing.assert_close(mine.cpu(), theirs, rtol=0, atol=1e-6, equal_nan=True)
    core = router.build().route(masked_mean_on_cpu(hidden.float().cpu().numpy(), mask.cpu().numpy()), 0.6)
    np.testing.assert_array_equal(got.status.cpu().numpy(), core[3])


def test_empty_batches() -> None:
    hidden, mask = torch.zeros(0, 4, 8, device=DEVICE), torch.zeros(0, 4, device=DEVICE)
    assert pooling.masked_mean(hidden, mask).shape == (0, 8)
    none = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    assert pooling.varlen_mean(torch.zeros(0, 8, device=DEVICE), none).shape == (0, 8)
    # no tokens at all
    assert pooling.masked_mean(torch.zeros(2, 0, 8, device=DEVICE), torch.zeros(2, 0, device=DEVICE)).abs().max() == 0


def test_wrong_arguments() -> None:
    hidden, mask = torch.zeros(2, 3, 4, device=DEVICE), torch.ones(2, 3, device=DEVICE)
    with pytest.raises(ValueError, match=r"^mask: expected shape \(2, 3\), got \(3, 2\)"):
        pooling.masked_mean(hidden, mask.T)
    with pytest.raises(ValueError, match=r"^mask: expected a tensor on .*, got one on meta"):
        pooling.masked_mean(hidden, mask.to("meta"))
    with pytest.raises(ValueError, match=r"^tensor: expected hidden states \(B, T, D\)"):
        pooling.masked_mean(hidden[0], mask)
    with pytest.raises(TypeError, match=r"^tensor: expected float32 or bfloat16 or float16 or float64, got int32"):
        pooling.masked_mean(hidden.int(), mask)
    with pytest.raises(TypeError, match=r"^cu_seqlens: expected int32 or int64, got float32"):
        pooling.varlen_mean(hidden[0], mask[0])
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected shape \(B \+ 1,\), got \(0,\)"):
        pooling.varlen_mean(hidden[0], torch.zeros(0, dtype=torch.int32, device=DEVICE))
