"""Routers on CUDA tensors, and the operator that torch.compile keeps whole; imported with the first use of either."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.utils.dlpack
from numpy.typing import NDArray
from torch import Tensor

from proteus_fast.certificate import Guarantee, Mode
from proteus_fast.router import Router, by_number, snapshot_arguments

if TYPE_CHECKING:
    from proteus_fast.checkpoint import Checkpoint
    from proteus_kernels.graphs import CapturedDecide
    from proteus_kernels.snapshot import Decisions, Snapshot

_MASK64 = (1 << 64) - 1
Answers = tuple[Any, Any, Any, Any, Any]


def find_device(name: Any) -> torch.device:
    """The CUDA device of that name, with its index.

    Raises:
        ValueError: no CUDA device of that name.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type != "cuda":
        raise ValueError(f"device: expected 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    devices = torch.cuda.device_count()
    current = torch.cuda.current_device() if devices else 0
    index = device.index if ":" in str(device) else current
    if index >= devices:
        raise ValueError(f"device: expected one of the {devices} CUDA devices that torch sees, got {name!r}")
    return torch.device("cuda", index)


def build_snapshot(source: Checkpoint, device: torch.device, precision: str) -> Snapshot:
    """The kernels' form of a checkpoint, on ``device``.

    Raises:
        ImportError: Triton is not installed.
    """
    try:
        from proteus_kernels.snapshot import PathTable, Snapshot
    except ImportError as error:
        raise ImportError(f"device: expected Triton (pip install 'proteus-fast[gpu]'), got: {error}") from None
    return Snapshot(**snapshot_arguments(source, PathTable), device=device, precision=precision)


def warm_up(snapshot: Snapshot) -> None:
    """Compile and load what a plain call needs, for one target and for one a row, narrow batches and wide ones."""
    for rows in (1, snapshot.wide_rows):
        x = torch.zeros(rows, snapshot.input_dim, dtype=torch.float32, device=snapshot.device)
        snapshot.decide(x, 0.5)
        snapshot.decide(x, torch.full((rows,), 0.5, dtype=torch.float32, device=snapshot.device))


def draw_state(seed: Any, device: torch.device) -> Tensor:
    """Seed and offset of the draws as a tensor on the device, without waiting for it; a tensor passes as it is.

    Raises:
        TypeError, ValueError: neither an integer of 64 bits nor a tensor.
    """
    if isinstance(seed, Tensor):
        return seed
    state = torch.full((2,), _signed(seed), dtype=torch.int64, device=device)
    state[1:].zero_()
    return state


def _signed(seed: Any) -> int:
    """The bits of a seed as a signed integer, which tensors and operators take."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(f"seed: expected an int or a tensor of seed and offset, got {type(seed).__name__}")
    if not 0 <= seed <= _MASK64:
        raise ValueError(f"seed: expected an int from 0 to {_MASK64}, got {seed}")
    return int(seed) - (1 << 64) if int(seed) >> 63 else int(seed)


def _to_tau(tau: Any, place: object) -> float | Tensor:
    if isinstance(tau, float | Tensor):
        return tau
    if isinstance(tau, bool) or not isinstance(tau, int | np.integer | np.floating):
        raise TypeError(f"tau: expected a number or a tensor on {place}, got {type(tau).__name__}")
    return float(tau)


def _to_tensor(array: Any) -> Any:
    """A tensor that shares the memory of a DLPack array; anything else as it is."""
    if isinstance(array, Tensor) or not hasattr(array, "__dlpack__") or isinstance(array, np.ndarray):
        return array
    return torch.utils.dlpack.from_dlpack(array)


def decide(
    snapshot: Snapshot,
    tensor: Tensor,
    tau: Any,
    *,
    mask: Any = None,
    available: Any = None,
    price_usd: Any = None,
    ids: Any = None,
    mode: Mode | None = None,
    guarantee: Guarantee = "certified",
    sample: bool = False,
    seed: Any = None,
) -> Decisions:
    """``Router.route_batch`` without ``strict`` for a tensor of the snapshot's device."""
    mask, available, price_usd, ids = (_to_tensor(array) for array in (mask, available, price_usd, ids))
    return snapshot.decide(
        tensor.detach(), _to_tau(_to_tensor(tau), tensor.device), mask=mask, mode=mode, guarantee=guarantee,
        available=available, price_usd=price_usd, ids=ids, state=draw_state(seed, tensor.device) if sample else None,
    )  # fmt: skip


def route_batch(
    router: Router, tensor: Any, tau: Any, *, mode: Mode | None, guarantee: Guarantee, strict: bool, **arguments: Any
) -> Answers:
    """``Router.route_batch`` for CUDA arrays, and for every tensor while torch.compile traces."""
    if torch.compiler.is_compiling():
        return _call_operator(router, tensor, tau, mode=mode, guarantee=guarantee, strict=strict, **arguments)
    x = _to_tensor(tensor)
    tau = _to_tau(_to_tensor(tau), x.device)
    answers = decide(router.on_device(x.device), x, tau, mode=mode, guarantee=guarantee, **arguments)
    if strict:
        target = tau.double().cpu().numpy() if isinstance(tau, Tensor) and tau.dim() else float(tau)
        router.check_strict(answers.status.cpu().numpy(), target, mode, guarantee)
    if x is tensor:
        return answers
    # not every library with DLPack has the array standard's door to its functions; all have their module
    namespace = getattr(tensor, "__array_namespace__", None)
    library = sys.modules[type(tensor).__module__.partition(".")[0]] if namespace is None else namespace()
    if not hasattr(library, "from_dlpack"):
        return answers
    return tuple(library.from_dlpack(answer) for answer in answers)


def batch_route(router: Router, snapshot: Snapshot) -> Callable[..., list[NDArray[Any]]]:
    """What ``_core.Batcher`` calls to route whole batches by ``snapshot``, on its device; see ``_core.Batcher``."""

    def route(
        texts: list[str] | None,
        x: NDArray[np.float32] | None,
        tau: NDArray[np.float64],
        mode: Mode,
        guarantee: Guarantee,
        available: NDArray[np.uint64],
    ) -> list[NDArray[Any]]:
        rows = torch.as_tensor(x if texts is None else router.encode(texts)).to(snapshot.device)
        bits = available[:, None] >> np.arange(len(router.pool), dtype=np.uint64) & np.uint64(1)
        # nothing missing is how a certified decision is asked for
        mask = None if bits.all() else torch.from_numpy(bits.astype(np.bool_)).to(snapshot.device)
        target = torch.from_numpy(tau).to(snapshot.device)
        answers = decide(snapshot, rows, target, mode=mode, guarantee=guarantee, available=mask)
        columns = (answers.choice, answers.mu, answers.score, answers.status, answers.certified_floor)
        return [column.cpu().numpy() for column in columns]

    return route


def capture(
    snapshot: Snapshot, max_rows: int, dtype: Any, mode: Mode | None, guarantee: Guarantee, seed: Any
) -> CapturedDecide:
    """Graphs of a decision; see ``Router.capture``."""
    from proteus_kernels.graphs import CapturedDecide

    state = None if seed is None else draw_state(seed, snapshot.device)
    return CapturedDecide(snapshot, max_rows, dtype or torch.float32, mode=mode, guarantee=guarantee, state=state)


def _run_operator(
    tensor: Tensor, tau: Any, number: float, mask: Any, available: Any, price_usd: Any, ids: Any, mode: Any,
    guarantee: Any, seed: Any, seed_number: int, sample: bool, strict: bool, router: int,
) -> Answers:  # fmt: skip
    batch = by_number[router].route_batch(
        tensor, number if tau is None else tau, mask=mask, available=available, price_usd=price_usd, ids=ids, mode=mode,
        guarantee=guarantee, sample=sample, seed=seed_number & _MASK64 if seed is None else seed, strict=strict,
    )  # fmt: skip
    return batch.choice, batch.mu, batch.score, batch.status, batch.certified_floor


def _shape_answers(tensor: Tensor, *_: Any) -> Answers:
    rows = tensor.shape[:1]
    int32, float32 = torch.int32, torch.float32
    return (
        tensor.new_empty(rows, dtype=int32),
        tensor.new_empty(rows, dtype=float32),
        tensor.new_empty(rows, dtype=float32),
        tensor.new_empty(rows, dtype=torch.uint8),
        tensor.new_empty(rows, dtype=float32),
    )


_operator = torch.library.custom_op(
    "proteus_fast::route_batch",
    _run_operator,
    mutates_args=(),
    schema=(
        "(Tensor tensor, Tensor? tau, float number, Tensor? mask, Tensor? available, Tensor? price_usd, Tensor? ids, "
        "str? mode, str guarantee, Tensor? seed, int seed_number, bool sample, bool strict, int router) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
_operator.register_fake(_shape_answers)


def _call_operator(
    router: Router, tensor: Tensor, tau: Any, *, mask: Any, available: Any, price_usd: Any, ids: Any,
    mode: Mode | None, guarantee: Guarantee, strict: bool, sample: bool, seed: Any,
) -> Answers:  # fmt: skip
    number, tau = (0.0, tau) if isinstance(tau, Tensor) else (_to_tau(tau, tensor.device), None)
    words, seed = (0, seed) if isinstance(seed, Tensor) or seed is None else (_signed(seed), None)
    answers: Answers = _operator(
        tensor,
        tau,
        number,
        mask,
        available,
        price_usd,
        ids,
        mode,
        guarantee,
        seed,
        words,
        sample,
        strict,
        router.number,
    )
    return answers
