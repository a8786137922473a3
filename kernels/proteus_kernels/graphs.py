"""CUDA graphs: how one is captured, and decisions as graphs, one a bucket of batch sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from proteus_kernels.launch import FLOATS, INTERPRETED
from proteus_kernels.snapshot import Decisions, Snapshot

SMALLEST_BUCKET = 16
MOST_WINDOWS = 256


class CapturedDecide:
    """A decision of fixed options, captured for 16, 32, 64 ... rows. ``run`` neither allocates nor waits.

    It works in buffers of its own: one at a time, on one stream. A run overwrites the answers of the run before.

    Attributes:
        max_rows: the largest batch. state: seed and offset of the draws, (2,) int64; None where nothing is drawn.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        max_rows: int,
        dtype: torch.dtype = torch.float32,
        *,
        mode: str | None = None,
        guarantee: str = "certified",
        state: Tensor | None = None,
    ) -> None:
        """Allocate and capture.

        Args:
            snapshot: the router. max_rows: the largest batch, >= 1. dtype: of the rows.
            mode, guarantee, state: as in ``Snapshot.decide``. A replay adds its bucket's size to the state's offset, so
                that the next one draws fresh numbers.
        """
        if max_rows < 1:
            raise ValueError(f"max_rows: expected an integer >= 1, got {max_rows!r}")
        if dtype not in FLOATS:
            raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
        self.max_rows = max_rows
        self.state = state
        self._snapshot = snapshot
        buckets = [SMALLEST_BUCKET << i for i in range(_bucket_index(max_rows) + 1)]
        top, device = buckets[-1], snapshot.device
        floats = max(snapshot.scratch_floats(bucket, mode) for bucket in buckets)
        # buffers made in inference mode could not be written outside it
        with torch.inference_mode(False):
            self._x = torch.zeros(top, snapshot.input_dim, dtype=dtype, device=device)
            self._tau = torch.zeros(top, dtype=torch.float64, device=device)
            self._out = Decisions.empty(top, device)
            scratch = torch.empty(floats, dtype=torch.float32, device=device)
        self._tau_number: float | None = 0.0

        def decide(bucket: int) -> None:
            snapshot.decide(
                self._x[:bucket], self._tau[:bucket], mode=mode, guarantee=guarantee, state=state,
                out=Decisions(*(part[:bucket] for part in self._out)), scratch=scratch,
            )  # fmt: skip
            if state is not None:
                state[1:].add_(bucket)

        start = None if state is None else state.clone()
        self._replay = [capture(partial(decide, bucket), device) for bucket in buckets]
        if state is not None and start is not None:
            # what was run to prepare the captures has drawn too
            state.copy_(start)
        # views of the first rows of each buffer, made once for each number of rows that comes
        self._windows: dict[int, tuple[Tensor, Tensor, Decisions]] = {}

    def run(self, x: Tensor, tau: float | Tensor) -> Decisions:
        """Decide up to ``max_rows`` rows on the current stream.

        Args:
            x: (B, D), on the device; another dtype is converted. tau: a number in [0, 1], or (B,) floats on the device.

        Returns:
            The decisions, views of buffers that the next run overwrites.

        Raises:
            TypeError, ValueError: ``argument: expected X, got Y``.
        """
        device, rows = self._snapshot.device, len(x)
        if x.device != device or x.dim() != 2 or x.shape[1] != self._x.shape[1]:
            raise ValueError(
                f"tensor: expected shape (B, {self._x.shape[1]}) on {device}, got {tuple(x.shape)} on {x.device}"
            )
        if not x.dtype.is_floating_point:
            raise TypeError(f"tensor: expected a floating dtype, got {x.dtype}")
        if not 1 <= rows <= self.max_rows:
            raise ValueError(f"tensor: expected 1 to {self.max_rows} rows, got {rows}")
        window = self._windows.get(rows)
        if window is None:
            if len(self._windows) == MOST_WINDOWS:
                self._windows.clear()
            window = self._x[:rows], self._tau[:rows], Decisions(*(part[:rows] for part in self._out))
            self._windows[rows] = window
        x_window, tau_window, answers = window
        if isinstance(tau, Tensor):
            if tau.device != device or not tau.dtype.is_floating_point or tau.shape not in ((rows,), ()):
                raise ValueError(
                    f"tau: expected floats of shape ({rows},) on {device}, got {tau.dtype} of shape "
                    f"{tuple(tau.shape)} on {tau.device}"
                )
            tau_window.copy_(tau.detach())
            self._tau_number = None
        elif isinstance(tau, bool):
            raise TypeError("tau: expected a number or a tensor, got bool")
        elif not 0.0 <= tau <= 1.0:
            raise ValueError(f"tau: expected a number in [0, 1], got {tau}")
        elif tau != self._tau_number:
            self._tau.fill_(tau)
            self._tau_number = tau
        x_window.copy_(x.detach())
        self._replay[_bucket_index(rows)]()
        return answers


def _bucket_index(rows: int) -> int:
    """Index of the least bucket that holds ``rows``."""
    return max((rows - 1).bit_length() - (SMALLEST_BUCKET - 1).bit_length(), 0)


def capture(work: Callable[[], None], device: torch.device, pool: Any = None) -> Callable[[], None]:
    """Run ``work`` once, capture it, and give what replays it; in the interpreter that runs it again.

    Args:
        work: launches on the current stream, and neither waits nor allocates what is kept. pool: where its memory comes
            from, of graphs that are never replayed at the same time.

    Raises:
        RuntimeError: ``work`` cannot be captured.
    """
    if INTERPRETED:
        work()
        return work
    with torch.cuda.device(device):
        # what is compiled and loaded on a first call cannot be captured
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # torch's own capture stream belongs to the device that captured first; other threads' calls go on meanwhile
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            work()
    return graph.replay
