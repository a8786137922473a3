"""The loaded router: decisions for embeddings and texts, on the caller's arrays."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from proteus_fast import _core, checkpoint
from proteus_fast.answers import Decision, Explanation, Feasibility, RouteBatch
from proteus_fast.arrays import (
    by_the_caller_s_name,
    from_numpy,
    is_for_torch,
    laid_out,
    to_float32,
    to_numpy,
    to_prices,
    to_target,
    to_tau,
)
from proteus_fast.certificate import Certificate, Guarantee, Mode, Status, tau_index
from proteus_fast.encoder import LazyEncoder, check_source
from proteus_fast.pool import Pool

if TYPE_CHECKING:
    from proteus_fast.checkpoint import Checkpoint

_FLOAT32 = np.dtype(np.float32)
EMBEDDED = Path(__file__).parent / "checkpoints" / "zeroeval"
_lock = threading.Lock()
_numbers = count()
# routers that live, for an operator whose arguments are tensors and numbers
by_number: WeakValueDictionary[int, Router] = WeakValueDictionary()


def _cuda() -> ModuleType:
    """The module for CUDA, which imports torch."""
    try:
        from proteus_fast import cuda
    except ImportError as error:
        raise ImportError(f"device: expected torch (pip install 'proteus-fast[gpu]'), got: {error}") from None
    return cuda


class Router:
    """A loaded router. It is immutable and safe to call from many threads.

    Attributes:
        pool: the candidates. input_dim: D, the width of what ``route_batch`` takes and ``encode`` returns.
        mode: the default mode. certificate: what the targets rest on. versions: what this router is made of.
        snapshot: the engine's form of it. texts_certified: where it is not, every answer for a text is UNCERTIFIED.
    """

    def __init__(self, source: Checkpoint, precision: str = "float32", encoder_device: str = "cpu") -> None:
        config = source.config
        self._checkpoint = source
        self._precision = precision
        self._on_device: dict[Any, Any] = {}
        self.number = next(_numbers)
        by_number[self.number] = self
        self.pool: Pool = config.pool
        self.input_dim: int = config.input_dim
        self.mode: Mode = config.mode
        self.certificate: Certificate = source.certificate
        self.versions = {
            "router": source.sha256[:16] or "unsaved",
            "prices": hashlib.sha256(self.pool.price_usd.tobytes()).hexdigest()[:16],
            "certificate": checkpoint.certificate_digest(self.certificate)[:16],
        }
        hashed = _build_hash_encoder(source)
        self._encoder = hashed if config.source is None else LazyEncoder(config.source, encoder_device, precision)
        self.texts_certified = not (isinstance(self._encoder, LazyEncoder) and self._encoder.rounded)
        self.snapshot = _core.Snapshot(**snapshot_arguments(source, _core.Path), encoder=hashed)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        device: str = "cpu",
        precision: str = "float32",
        encoder: str | os.PathLike[str] | None = None,
    ) -> Router:
        """Load a checkpoint folder; None: the embedded router.

        Args:
            path: the folder. device: ``cuda`` or ``cuda:N`` also puts it on that GPU and compiles its usual kernels;
                a router gets to a GPU by itself with the first tensor from there, only later.
            precision: of matrix products on GPUs, a transformer's there too: ``float32``, which chooses as the CPU
                does, or ``bfloat16``, whose answers are UNCERTIFIED: no certificate was counted with it.
            encoder: where the transformer of a checkpoint is, if not where it was; its files must be the same.

        Raises:
            FileNotFoundError, ValueError: see :func:`proteus_fast.checkpoint.load`; also where the transformer is not
                there or is another. ImportError: no torch or Triton.
        """
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision: expected 'float32' or 'bfloat16', got {precision!r}")
        cuda = None if device == "cpu" else _cuda()
        place = None if cuda is None else cuda.find_device(device)
        source = checkpoint.load(EMBEDDED if path is None else path)
        if source.config.source is not None:
            where = replace(source.config.source, directory=str(encoder or source.config.source.directory))
            where = replace(where, directory=str(check_source(where)))
            source = replace(source, config=replace(source.config, source=where))
        elif encoder is not None:
            raise ValueError("encoder: expected a checkpoint with a transformer, got one without")
        router = cls(source, precision, "cpu" if place is None else str(place))
        if cuda is not None:
            cuda.warm_up(router.on_device(place))
        return router

    def on_device(self, device: Any) -> Any:
        """The kernels' form of this router on a CUDA device, put there when it is first asked for."""
        found = self._on_device.get(device)
        if found is None:
            from proteus_fast import cuda

            with _lock:
                found = self._on_device.setdefault(
                    device, cuda.build_snapshot(self._checkpoint, device, self._precision)
                )
        return found

    def capture(
        self,
        max_rows: int,
        device: str = "cuda",
        dtype: Any = None,
        *,
        mode: Mode | None = None,
        guarantee: Guarantee = "certified",
        seed: Any = None,
    ) -> Any:
        """Capture decisions as CUDA graphs, for callers that repeat one kind of call: each costs a copy and a replay.

        Args:
            max_rows: the largest batch. device: ``cuda`` or ``cuda:N``. dtype: of the rows, torch.float32 unless given.
            mode, guarantee: as in :meth:`route_batch`. seed: draw mu, from this seed (an int, or a tensor of seed and
                offset), with fresh numbers in every call.

        Returns:
            An object with ``run(tensor, tau)``, see ``proteus_kernels.graphs.CapturedDecide``.
        """
        place = self.on_device(_cuda().find_device(device))
        return _cuda().capture(place, max_rows, dtype, mode, guarantee, seed)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write this router as a checkpoint folder; see :func:`proteus_fast.checkpoint.save`."""
        checkpoint.save(self._checkpoint, path)

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that this router was made from."""
        return self._checkpoint

    @property
    def tau_max(self) -> float | None:
        """Largest certified target of the default mode."""
        return self.certificate.tau_max(self.mode)

    def encode(self, queries: Sequence[str]) -> NDArray[np.float32]:
        """Encode texts.

        Args:
            queries: B texts. The hash encoder takes the first and last 8 KiB of one longer than 16 KiB, a transformer
                the first ``max_tokens`` tokens.

        Returns:
            (B, D) float32, what ``route_batch`` takes: NumPy; a tensor on the GPU from a transformer that is there.

        Raises:
            ValueError: the router has no text encoder. TypeError: ``queries`` is one str, or holds something else.
        """
        if isinstance(queries, str):
            raise TypeError("queries: expected a sequence of str, got one str")
        if self._encoder is None:
            raise ValueError("queries: expected embeddings, got texts: this router has no text encoder")
        try:
            encoded: NDArray[np.float32] = self._encoder.encode(queries)
        except (TypeError, ValueError) as error:
            raise by_the_caller_s_name(error, "queries") from None
        return encoded

    def route_batch(
        self,
        tensor: Any,
        tau: Any,
        *,
        mask: Any = None,
        available: Any = None,
        price_usd: Any = None,
        ids: Any = None,
        mode: Mode | None = None,
        guarantee: Guarantee = "certified",
        strict: bool = False,
        sample: bool = False,
        seed: Any = None,
    ) -> RouteBatch:
        """Choose a candidate for every row.

        Args:
            tensor: embeddings (B, D) as ``encode`` returns them, or hidden states (B, T, D) with ``mask``; NumPy, torch
                or DLPack, any floating dtype, on the CPU or on a CUDA device. There every other array is a tensor of
                that device too, nothing is waited for, and only what needs no look at values is an error.
            tau: accuracy target, a float in [0, 1] or (B,) floats, on the CPU a list of them too.
            mask: 1 where a token counts, (B, T); only with hidden states.
            available: candidates that may be chosen, bool, (K,) or (B, K).
            price_usd: prices that replace the pool's, USD per query, (K,) or (B, K).
            ids: (B,) uint64 that replace the rows' own bytes in the mixing hash; such rows are UNCERTIFIED.
            mode: ``dual`` or ``policy``; None: the checkpoint's.
            guarantee: ``certified`` or ``calibrated``.
            strict: raise where a row is INFEASIBLE or INVALID instead of answering; on a CUDA device this waits.
            sample: draw mu from the policy's Beta instead of taking its mean. seed: of the draws, with the row's index;
                required with ``sample``. On a CUDA device also a tensor of seed and offset, (2,) int64.

        Returns:
            The answers, in the caller's kind of array. A row with NaN, a tau outside [0, 1] inside an array, a price
            below 0 or nothing available has choice -1 and status INVALID.

        Raises:
            TypeError, ValueError: ``argument: expected X, got Y``.
        """
        if sample and seed is None:
            raise ValueError("seed: expected an integer where sample is true, got None")
        if type(tensor) is not np.ndarray and is_for_torch(tensor):
            from proteus_fast import cuda

            return RouteBatch(
                *cuda.route_batch(
                    self, tensor, tau, mask=mask, available=available, price_usd=price_usd, ids=ids, mode=mode,
                    guarantee=guarantee, strict=strict, sample=sample, seed=seed,
                )
            )  # fmt: skip
        x = tensor if type(tensor) is np.ndarray else to_numpy(tensor, "tensor")
        if x.ndim == 3 or mask is not None:
            x = self._pool_tokens(x, mask)
        flags = x.flags
        if x.dtype is not _FLOAT32 or not (flags.c_contiguous and flags.aligned):
            x = to_float32(x, "tensor")
        if x.ndim != 2 or x.shape[1] != self.input_dim:
            raise ValueError(f"tensor: expected shape (B, {self.input_dim}), got {x.shape}")
        if type(tau) is not float:
            tau = to_tau(tau)
        if available is not None:
            available = laid_out(to_numpy(available, "available"))
        if price_usd is not None:
            price_usd = to_float32(to_numpy(price_usd, "price_usd"), "price_usd")
        if ids is not None:
            ids = laid_out(to_numpy(ids, "ids"))
        arrays = self.snapshot.route(x, tau, mode, guarantee, available, price_usd, ids, sample, seed or 0)
        if strict:
            self.check_strict(arrays[3], tau, mode, guarantee)
        if type(tensor) is np.ndarray:
            return RouteBatch(*arrays)
        return RouteBatch(*[from_numpy(array, tensor) for array in arrays])

    def route(
        self,
        text: str,
        tau: float,
        *,
        available: Iterable[str] | None = None,
        price_usd: Any = None,
        mode: Mode | None = None,
        guarantee: Guarantee = "certified",
        strict: bool = False,
    ) -> Decision:
        """Choose a candidate for one text.

        Args:
            text: the query. tau: accuracy target, in [0, 1]. available: names of the candidates that may be chosen.
            price_usd, mode, guarantee, strict: as in :meth:`route_batch`.

        Raises:
            TypeError, ValueError: ``argument: expected X, got Y``; also where no candidate is eligible.
        """
        return self._explain("text", text, tau, available, price_usd, mode, guarantee, strict).decision

    def explain(
        self,
        query: str,
        tau: float,
        *,
        available: Iterable[str] | None = None,
        price_usd: Any = None,
        mode: Mode | None = None,
        guarantee: Guarantee = "certified",
        strict: bool = False,
    ) -> Explanation:
        """The decision for one text with what it rests on; arguments as in :meth:`route`."""
        return self._explain("query", query, tau, available, price_usd, mode, guarantee, strict)

    def _explain(
        self,
        name: str,
        query: str,
        tau: float,
        available: Iterable[str] | None,
        price_usd: Any,
        mode: Mode | None,
        guarantee: Guarantee,
        strict: bool,
    ) -> Explanation:
        target, mask = check_query(self.pool, query, tau, available, name)
        if self._encoder is None:
            raise ValueError(f"{name}: expected a router with a text encoder, got one of embeddings")
        prices = None if price_usd is None else to_prices(price_usd)
        x = to_numpy(self.encode([query]), name, from_gpu=True)
        answers = self.snapshot.scores(x, target, mode, guarantee, mask, prices)
        choice, mu, score, status, floor, predicted, scores = answers
        if not self.texts_certified and status[0] != Status.INVALID:
            status[0], floor[0] = Status.UNCERTIFIED, np.nan
        if strict:
            self.check_strict(status, target, mode, guarantee)
        decision = self.decision_of((choice, mu, score, status, floor, scores), mode, guarantee)
        used = self.pool.price_usd if prices is None else np.ravel(prices)
        values = (predicted[0].tolist(), used.tolist(), scores[0].tolist())
        return Explanation(decision, *[dict(zip(self.pool.names, column, strict=True)) for column in values])

    def decision_of(self, answers: Sequence[NDArray[Any]], mode: Mode | None, guarantee: Guarantee) -> Decision:
        """The first row of the engine's choice, mu, score, status, floor and scores (B, K) as a decision."""
        # plain floats: K is small, and NumPy's scalars cost more than the decision
        choice, mu, score, status, floor, score_of = (column[0].tolist() for column in answers)
        if choice < 0:
            raise ValueError("price_usd: expected prices that leave finite scores, got others")
        names = self.pool.names
        eligible = [i for i, value in enumerate(score_of) if math.isfinite(value)]
        order = sorted(eligible, key=lambda i: -score_of[i])
        return Decision(
            candidate=names[choice],
            choice=choice,
            mu=mu,
            score=score,
            status=Status(status),
            certified_floor=None if math.isnan(floor) else round(floor, 3),
            tau_max=self.certificate.tau_max(mode or self.mode, guarantee),
            fallbacks=tuple(names[i] for i in order if i != choice),
            versions=dict(self.versions),
        )

    def feasibility(self, tau: float, guarantee: Guarantee = "certified") -> Feasibility:
        """What the default mode would promise for a target, without a query.

        Raises:
            ValueError: tau is not in [0, 1].
        """
        index = tau_index(to_target(tau))
        if guarantee not in ("certified", "calibrated"):
            raise ValueError(f"guarantee: expected certified or calibrated, got {guarantee!r}")
        tau_max = self.certificate.tau_max(self.mode, guarantee)
        cost = float(self.certificate.expected_cost_usd(self.mode, guarantee)[index])
        if index > self.certificate.tables[self.mode][guarantee].max_index:
            floor = tau_max if guarantee == "certified" else None
            return Feasibility(tau, Status.INFEASIBLE, floor, tau_max, cost)
        if guarantee == "calibrated":
            return Feasibility(tau, Status.UNCERTIFIED, None, tau_max, cost)
        return Feasibility(tau, Status.FEASIBLE, index / 1000, tau_max, cost)

    def _pool_tokens(self, x: NDArray[Any], mask: Any) -> NDArray[np.float32]:
        if mask is None:
            raise ValueError("mask: expected (B, T) with hidden states (B, T, D), got None")
        if x.ndim != 3:
            raise ValueError(f"tensor: expected hidden states (B, T, D) with a mask, got shape {x.shape}")
        tokens = to_numpy(mask, "mask")
        if tokens.shape != x.shape[:2]:
            raise ValueError(f"mask: expected shape {x.shape[:2]}, got {tokens.shape}")
        return _core.masked_mean(to_float32(x, "tensor"), np.ascontiguousarray(tokens != 0))

    def check_strict(
        self, status: NDArray[np.uint8], tau: float | NDArray[np.float64], mode: Mode | None, guarantee: Guarantee
    ) -> None:
        invalid = np.flatnonzero(status == Status.INVALID)
        if invalid.size:
            raise ValueError(f"tensor: expected rows that can be decided, got INVALID at row {invalid[0]}")
        infeasible = np.flatnonzero(status == Status.INFEASIBLE)
        if infeasible.size:
            target = tau if isinstance(tau, float) else tau[infeasible[0]]
            tau_max = self.certificate.tau_max(mode or self.mode, guarantee)
            raise ValueError(f"tau: expected at most {tau_max} (tau_max), got {target:g} at row {infeasible[0]}")


def check_query(
    pool: Pool, text: str, tau: float, available: Iterable[str] | None, name: str = "text"
) -> tuple[float, NDArray[np.bool_] | None]:
    """The target and the mask of candidates of one text; raises for what is wrong about any of the three."""
    if not isinstance(text, str):
        raise TypeError(f"{name}: expected a str, got {type(text).__name__}")
    mask = None if available is None else pool.available(available)
    if mask is not None and not mask.any():
        raise ValueError("available: expected at least one candidate, got none")
    return to_target(tau), mask


def _build_hash_encoder(source: Checkpoint) -> _core.HashEncoder | None:
    if source.config.encoder != "hash":
        return None
    table = source.tensors["encoder.table"].astype(np.int8, copy=False)
    scale, idf = (source.tensors[f"encoder.{name}"].astype(np.float32, copy=False) for name in ("row_scale", "idf"))
    return _core.HashEncoder(table, scale, idf, np.array(source.config.block_weight, np.float32))


def snapshot_arguments(source: Checkpoint, path: Callable[..., Any]) -> dict[str, Any]:
    """A checkpoint as the arguments that ``_core.Snapshot`` and the kernels' have in common; ``path`` makes a path."""
    config, certificate = source.config, source.certificate
    paths = {}
    for mode, entry in certificate.paths.items():
        certified, calibrated = (certificate.tables[mode][g] for g in ("certified", "calibrated"))
        paths[mode] = path(
            entry.path.parameter, certified.code, certified.max_index, calibrated.code, calibrated.max_index
        )
    return {
        "tensors": {n: np.asarray(t, np.float32) for n, t in source.tensors.items() if not n.startswith("encoder.")},
        "link": config.link,
        "head": config.head,
        "kappa": config.kappa,
        "gamma": config.gamma,
        "price_usd": config.pool.price_usd.astype(np.float32),
        "cost_unit_usd": config.cost_unit_usd,
        "key": certificate.key,
        "default_mode": config.mode,
        "dual": paths["dual"],
        "policy": paths.get("policy"),
    }


_current: Router | None = None


def use(router: Router | str | os.PathLike[str]) -> Router:
    """Make a router, or the checkpoint in a folder, the one that :func:`route_batch` uses in this process."""
    global _current
    loaded = router if isinstance(router, Router) else Router.load(router)
    with _lock:
        _current = loaded
    return loaded


def current() -> Router:
    """The router in use: the one given to :func:`use`, else ``$PROTEUS_CHECKPOINT``, else the embedded one."""
    global _current
    if _current is None:
        with _lock:
            if _current is None:
                _current = Router.load(checkpoint.default_place())
    return _current


def route_batch(tensor: Any, tau: Any, **options: Any) -> RouteBatch:
    """:meth:`Router.route_batch` of the router in use; see :func:`use`."""
    return (_current or current()).route_batch(tensor, tau, **options)
