"""What only a GPU can show: no waiting, no allocation in a run, streams, the public entry, compiled graphs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from proteus_fast.encoder import TransformerEncoder, describe
from proteus_fast.router import Router
from tests import encoders

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def router() -> Router:
    return Router.load(device="cuda")


@pytest.fixture(scope="module")
def x(router: Router) -> torch.Tensor:
    """100,000 rows that are mixtures of real ones."""
    rng = np.random.default_rng(0)
    texts = router.encode([f"How much is {i} times {i + 7}? Explain step {i % 13}." for i in range(2000)])
    mixed = rng.random((100_000, 4)).astype(np.float32)
    picked = texts[rng.integers(0, len(texts), (100_000, 4))]
    return torch.from_numpy(np.einsum("bn,bnd->bd", mixed, picked) / 2).cuda()


def set_waiting(mode: str) -> None:
    """What a wait for the device does. The first call says that this is a prototype, in a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    set_waiting("error")
    yield
    set_waiting("default")


@pytest.mark.parametrize("mode", ["dual", "policy"])
def test_choices_are_the_cpus(router: Router, x: torch.Tensor, mode: Any) -> None:
    on_cpu = x.cpu()
    tau = np.random.default_rng(1).uniform(0.7, 0.95, len(x))
    for target in (0.8, torch.from_numpy(tau)):
        gpu = router.route_batch(x, target.cuda() if isinstance(target, torch.Tensor) else target, mode=mode)
        cpu = router.route_batch(on_cpu, target, mode=mode)
        assert gpu.choice.is_cuda
        assert torch.equal(gpu.status.cpu(), cpu.status)
        assert (gpu.mu.cpu() - cpu.mu).abs().max() < 1e-5
        assert (gpu.score.cpu() - cpu.score).abs().max() < 1e-5
        # where they differ the two candidates' scores are one: the scores themselves agree above
        assert (gpu.choice.cpu() == cpu.choice).double().mean() > 0.9999


def test_nothing_waits(router: Router, x: torch.Tensor, waiting_is_an_error: None) -> None:  # noqa: ARG001
    k = len(router.pool)
    rows = x[:300]
    available = torch.zeros(k, dtype=torch.bool, device="cuda")
    price = torch.zeros(300, k, device="cuda")
    tau = torch.zeros((), device="cuda")
    hidden, mask = rows[:, None].expand(-1, 3, -1), torch.zeros(300, 3, dtype=torch.bool, device="cuda")
    calls: list[tuple[torch.Tensor, Any, dict[str, Any]]] = [
        (rows, 0.8, {}),
        (rows, tau, {}),
        (rows[:1], 0.8, {"mode": "dual"}),
        (rows, 0.8, {"available": available, "price_usd": price}),
        (rows, 0.8, {"sample": True, "seed": 2**64 - 1}),
        (rows.bfloat16(), 0.8, {"guarantee": "calibrated"}),
        (hidden, 0.8, {"mask": mask}),
        (hidden[:1], 0.8, {"mask": mask[:1]}),
    ]
    for tensor, target, options in calls:
        router.route_batch(tensor, target, **options)


def test_a_run_allocates_nothing_and_waits_for_nothing(router: Router, x: torch.Tensor) -> None:
    captured = router.capture(256)
    tau = torch.full((256,), 0.8, device="cuda")
    captured.run(x[:256], 0.8)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    set_waiting("error")
    try:
        for rows in (1, 17, 100, 256):
            captured.run(x[:rows], 0.7)
            captured.run(x[:rows], tau[:rows])
    finally:
        set_waiting("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_replays_draw_fresh_numbers(router: Router, x: torch.Tensor) -> None:
    captured = router.capture(64, mode="policy", seed=5)
    runs = torch.stack([captured.run(x[:64], 0.8).mu.clone() for _ in range(4)])
    assert len(runs.unique()) == runs.numel()


def test_the_callers_stream_is_used(router: Router, x: torch.Tensor) -> None:
    """The rows are written late on a stream of their own: a call on another stream would read zeros."""
    expected = router.route_batch(x[:500], 0.8).score.clone()
    captured = router.capture(500)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    for decide in (lambda rows: router.route_batch(rows, 0.8).score, lambda rows: captured.run(rows, 0.8).score):
        with torch.cuda.stream(side):
            rows = torch.zeros_like(x[:500])
            torch.cuda._sleep(50_000_000)
            rows.copy_(x[:500])
            score = decide(rows).clone()
        side.synchronize()
        # graph and call may be kernels of two tiles
        torch.testing.assert_close(score, expected, rtol=0, atol=1e-6)


def test_strict_raises(router: Router, x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"^tau: expected at most"):
        router.route_batch(x[:3], 1.0, strict=True)
    for tau in (1, np.float32(1.0), torch.tensor(1.0, device="cuda"), torch.ones(3, device="cuda")):
        with pytest.raises(ValueError, match=r"^tau: expected at most .*, got 1 at row 0"):
            router.route_batch(x[:3], tau, strict=True)
    with pytest.raises(ValueError, match=r"^tensor: expected rows that can be decided, got INVALID at row 1"):
        router.route_batch(
            torch.tensor([0.0, torch.nan], device="cuda")[:, None].expand(2, x.shape[1]), 0.8, strict=True
        )


def test_compiled_graphs_hold_the_call(router: Router, x: torch.Tensor) -> None:
    compiled = torch.compile(lambda rows: router.route_batch(rows * 1.0, 0.8).choice + 1, fullgraph=True)
    assert torch.equal(compiled(x[:100]), router.route_batch(x[:100], 0.8).choice + 1)


def test_other_libraries_arrays_come_back_as_their_own(router: Router, x: torch.Tensor) -> None:
    cupy = pytest.importorskip("cupy")
    batch = router.route_batch(cupy.from_dlpack(x[:50]), 0.8)
    assert isinstance(batch.choice, cupy.ndarray)
    assert np.array_equal(cupy.asnumpy(batch.choice), router.route_batch(x[:50], 0.8).choice.cpu().numpy())


def test_arrays_of_the_host_are_refused(router: Router, x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"^tau: expected a tensor on cuda:0, got one on cpu"):
        router.route_batch(x[:2], torch.full((2,), 0.8))
    with pytest.raises(TypeError, match=r"^available: expected a tensor on cuda:0, got ndarray"):
        router.route_batch(x[:2], 0.8, available=np.ones(len(router.pool), bool))


WORDS = [f"word{i}" for i in range(60)]
TEXTS = ["word1 word2 word3", "word7", " ".join(WORDS), "", "word9 nothing word11"]


@pytest.fixture(scope="module", params=encoders.CONFIGS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoders.make(request.param, tmp_path_factory.mktemp(request.param), WORDS)


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-5), ("bfloat16", 5e-2), ("float16", 1e-2)])
def test_encoders_are_captured_and_give_the_cpus_embeddings(directory: Path, dtype: str, atol: float) -> None:
    source = describe(directory)[0]
    on_cpu, encoder = TransformerEncoder(source).encode(TEXTS), TransformerEncoder(source, "cuda", dtype)
    encoder.warm_up()
    batches = encoder._batches
    assert batches is not None
    # every one of them is: a fall-back would show here
    assert batches._can_capture
    captured = set(batches._replays)
    for _ in range(2):
        for row, text in enumerate(TEXTS):
            np.testing.assert_allclose(encoder.encode([text])[0].cpu().numpy(), on_cpu[row], rtol=0, atol=atol)
    assert set(batches._replays) == captured
    np.testing.assert_allclose(encoder.encode(TEXTS).cpu().numpy(), on_cpu, rtol=0, atol=atol)
    np.testing.assert_allclose(encoder.encode(TEXTS * 20).cpu().numpy(), np.tile(on_cpu, (20, 1)), rtol=0, atol=atol)


def test_a_replayed_text_waits_for_nothing(directory: Path) -> None:
    encoder = TransformerEncoder(describe(directory)[0], "cuda")
    encoder.warm_up()
    torch.cuda.synchronize()
    set_waiting("error")
    try:
        for text in TEXTS[:3]:
            encoder.encode([text])
    finally:
        set_waiting("default")


def test_streams_share_an_encoder(directory: Path) -> None:
    """Calls of two streams, one of them late: neither reads the other's texts."""
    encoder = TransformerEncoder(describe(directory)[0], "cuda")
    expected = [encoder.encode([text]).clone() for text in TEXTS[:3]]
    torch.cuda.synchronize()
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    got: list[tuple[int, torch.Tensor]] = []
    for call in range(30):
        with torch.cuda.stream(streams[call % 2]):
            if call % 2:
                torch.cuda._sleep(2_000_000)
            got.append((call % 3, encoder.encode([TEXTS[call % 3]])))
    torch.cuda.synchronize()
    for row, pooled in got:
        assert torch.equal(pooled, expected[row])
