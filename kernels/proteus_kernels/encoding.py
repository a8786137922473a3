"""Token lists to embeddings on a GPU: small batches by replays of graphs, one a bucket of sizes, others by launches.

A batch goes to the device in one copy, its lengths in front of its tokens. What fills a bucket up belongs to no text:
rows of no tokens, and tokens that no mean reads.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from proteus_kernels.deberta import DebertaEncoder
from proteus_kernels.graphs import capture
from proteus_kernels.pooling import masked_mean, varlen_mean
from proteus_kernels.token_batches import TOKEN_BUDGET, batches

# of a bucket: above these sizes the device has work for longer than launches take
MOST_TOKENS = 4096
MOST_ROWS = 64
TOKEN_SIZES = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
_logger = logging.getLogger(__name__)


class Bucket(NamedTuple):
    """Sizes of a batch: ``rows`` texts, none longer than ``longest``, ``tokens`` together with what fills up."""

    rows: int
    longest: int
    tokens: int


def _round_up(size: int, sizes: Sequence[int]) -> int | None:
    """The least of ``sizes`` that holds ``size``."""
    index = bisect_left(sizes, size)
    return sizes[index] if index < len(sizes) else None


class PackedLayout:
    """Texts one after another, for DeBERTa: where each starts and the last one ends, rows + 1, then the tokens.

    Rows that fill up are empty texts at the end; tokens that fill up lie behind the last text.
    """

    # an empty row costs programs that return at once
    row_sizes = (1, 4, 16, 64)

    def __init__(self, encoder: DebertaEncoder) -> None:
        self._encoder = encoder
        self.longest = encoder.longest

    def exact(self, lengths: Sequence[int]) -> Bucket:
        """Sizes without anything to fill up."""
        return Bucket(len(lengths), max(lengths), sum(lengths))

    def bucket(self, lengths: Sequence[int]) -> Bucket | None:
        """The least bucket that holds texts of these lengths; None: it is no small batch."""
        rows, tokens = _round_up(len(lengths), self.row_sizes), _round_up(sum(lengths), TOKEN_SIZES)
        if rows is None or tokens is None:
            return None
        return Bucket(rows, min(tokens, self.longest), tokens)

    def numbers(self, bucket: Bucket) -> int:
        """int64 numbers that ``stage`` writes."""
        return bucket.rows + 1 + bucket.tokens

    def stage(self, ids: Sequence[Sequence[int]], bucket: Bucket, host: NDArray[np.int64]) -> None:
        """Write texts as the device wants them, (numbers,)."""
        ends, tokens = host[: bucket.rows + 1], host[bucket.rows + 1 :]
        ends[0] = 0
        np.cumsum([len(row) for row in ids], out=ends[1 : len(ids) + 1])
        total = int(ends[len(ids)])
        ends[len(ids) + 1 :] = total
        tokens[:total] = np.fromiter(chain.from_iterable(ids), np.int64, total)
        tokens[total:] = 0

    def encode(self, staged: Tensor, bucket: Bucket, out: Tensor) -> None:
        """Mean hidden states of what was staged, to ``out``, (rows, D) float32."""
        ends, tokens = staged[: bucket.rows + 1], staged[bucket.rows + 1 :]
        varlen_mean(self._encoder.forward(tokens, ends, bucket.longest), ends, out)


class PaddedLayout:
    """Texts of one length, for any encoder: the lengths, then the tokens, (rows, longest).

    Args:
        model: takes ``input_ids`` and ``attention_mask`` and gives ``last_hidden_state``. longest: tokens of a text.
    """

    row_sizes = (1, 2, 4, 8, 16, 32, 64)

    def __init__(self, model: Callable[..., Any], longest: int) -> None:
        self._model = model
        self.longest = longest
        self._sizes = [*(size for size in TOKEN_SIZES if size < longest), longest]

    def exact(self, lengths: Sequence[int]) -> Bucket:
        """Sizes with nothing more than the longest text to fill up to."""
        return Bucket(len(lengths), max(lengths), len(lengths) * max(lengths))

    def bucket(self, lengths: Sequence[int]) -> Bucket | None:
        """The least bucket that holds texts of these lengths; None: it is no small batch."""
        rows, longest = _round_up(len(lengths), self.row_sizes), _round_up(max(lengths), self._sizes)
        if rows is None or longest is None or rows * longest > MOST_TOKENS:
            return None
        return Bucket(rows, longest, rows * longest)

    def numbers(self, bucket: Bucket) -> int:
        """int64 numbers that ``stage`` writes."""
        return bucket.rows + bucket.tokens

    def stage(self, ids: Sequence[Sequence[int]], bucket: Bucket, host: NDArray[np.int64]) -> None:
        """Write texts as the device wants them, (numbers,)."""
        host[:] = 0
        tokens = host[bucket.rows :].reshape(bucket.rows, bucket.longest)
        for row, text in enumerate(ids):
            host[row] = len(text)
            tokens[row, : len(text)] = text

    def encode(self, staged: Tensor, bucket: Bucket, out: Tensor) -> None:
        """Mean hidden states of what was staged, to ``out``, (rows, D) float32."""
        lengths, tokens = staged[: bucket.rows], staged[bucket.rows :].view(bucket.rows, bucket.longest)
        mask = torch.arange(bucket.longest, device=staged.device)[None] < lengths[:, None]
        with torch.no_grad():
            hidden = self._model(input_ids=tokens, attention_mask=mask).last_hidden_state
        masked_mean(hidden, mask, out)


class BatchEncoder:
    """Embeddings of token lists on a GPU. Safe to call from many threads; their streams follow one another.

    A graph is captured with the first batch of its bucket, or by ``warm_up``. The graphs share their memory, their
    number is that of the buckets: 60 packed, fewer than 60 padded. An encoder that cannot be captured is launched.

    Args:
        layout: the encoder and how it takes a batch. dim: D. device: where the encoder is.
    """

    def __init__(self, layout: PackedLayout | PaddedLayout, dim: int, device: torch.device | str) -> None:
        self._layout = layout
        self._device = torch.device(device)
        self._dim = dim
        self._lock = threading.Lock()
        self._replays: dict[Bucket, Callable[[], None]] = {}
        self._can_capture = True
        on_gpu = self._device.type == "cuda"
        numbers = MOST_ROWS + 1 + MOST_TOKENS
        # buffers made in inference mode could not be written outside it
        with torch.inference_mode(False):
            self._host = torch.zeros(numbers, dtype=torch.int64, pin_memory=on_gpu)
            self._staged = torch.zeros(numbers, dtype=torch.int64, device=self._device)
            self._out = torch.zeros(MOST_ROWS, dim, dtype=torch.float32, device=self._device)
        self._pool: Any = torch.cuda.graph_pool_handle() if on_gpu else None
        # from when on the host's buffer may be written again, and the device's
        self._copied: Any = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self._done: Any = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]

    def encode(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Embeddings of texts, on the current stream.

        Args:
            ids: the tokens of each text.

        Returns:
            (B, D) float32, on the device; a text without tokens is all zeros.
        """
        lengths = [len(row) for row in ids]
        bucket = self._layout.bucket(lengths) if any(lengths) else None
        if bucket is not None:
            with self._lock:
                pooled = self._replay(ids, bucket)
            if pooled is not None:
                return pooled
        return self._launch(ids, lengths)

    def warm_up(self) -> None:
        """Capture the graphs of a single text of any length that a bucket holds."""
        for size in sorted({min(size, self._layout.longest) for size in TOKEN_SIZES}):
            self.encode([[0] * size])

    def _replay(self, ids: Sequence[Sequence[int]], bucket: Bucket) -> Tensor | None:
        on_gpu = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device) if on_gpu else None
        if on_gpu:
            # the batch before may be another stream's
            self._done.wait(stream)
        replay = self._replays.get(bucket) or self._capture(bucket)
        if replay is None:
            return None
        size = self._layout.numbers(bucket)
        if on_gpu:
            # until the batch before has been copied, not until it has been encoded
            self._copied.synchronize()
        self._layout.stage(ids, bucket, self._host[:size].numpy())
        self._staged[:size].copy_(self._host[:size], non_blocking=True)
        if on_gpu:
            self._copied.record(stream)
        replay()
        pooled = self._out[: len(ids)].clone()
        if on_gpu:
            self._done.record(stream)
        return pooled

    def _capture(self, bucket: Bucket) -> Callable[[], None] | None:
        if not self._can_capture:
            return None
        staged, out = self._staged[: self._layout.numbers(bucket)], self._out[: bucket.rows]
        # what is there may be no batch of this bucket: texts without tokens are one
        staged.zero_()
        try:
            replay = capture(partial(self._layout.encode, staged, bucket, out), self._device, self._pool)
        except RuntimeError as error:
            self._can_capture = False
            _logger.warning("an encoder that cannot be captured is launched: %s", type(error).__name__)
            return None
        self._replays[bucket] = replay
        return replay

    def _launch(self, ids: Sequence[Sequence[int]], lengths: Sequence[int]) -> Tensor:
        pooled = torch.zeros(len(ids), self._dim, dtype=torch.float32, device=self._device)
        pinned = self._device.type == "cuda"
        for rows in batches(lengths, TOKEN_BUDGET):
            bucket = self._layout.exact([lengths[row] for row in rows])
            host = torch.empty(self._layout.numbers(bucket), dtype=torch.int64, pin_memory=pinned)
            self._layout.stage([ids[row] for row in rows], bucket, host.numpy())
            out = torch.empty(len(rows), self._dim, dtype=torch.float32, device=self._device)
            self._layout.encode(host.to(self._device, non_blocking=True), bucket, out)
            place = torch.tensor(rows, pin_memory=pinned).to(self._device, non_blocking=True)
            pooled[place] = out
        return pooled
