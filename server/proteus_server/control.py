"""What is served, and how it changes: a generation is all that a reply is made of, and one exchange replaces it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proteus_fast._core import Batcher, Tally
from proteus_fast.batcher import ALL_CANDIDATES, backend_options
from proteus_fast.certificate import Status
from proteus_fast.router import EMBEDDED, Router
from proteus_server import errors, logs
from proteus_server import proteus_pb2 as pb

_log = logging.getLogger("proteus_server")
PROBE_TEXT = "ready?"
_MAX_PATH_BYTES = 4096
# prices are float32 in the core
_MAX_PRICE_USD = float(np.finfo(np.float32).max)


class Generation:
    """A loaded router with the prices and the candidates that are served, and the batcher that decides by them.

    Immutable. A call takes the present one once and makes its whole reply of it. An old one's batcher ends with the
    last call that holds it.

    Attributes:
        router: as loaded. price_usd: (K,) float64 that scores use. available: bit i is candidate i.
        certified: whether the certificate covers both. versions: what every reply says of it.
    """

    def __init__(
        self,
        router: Router,
        *,
        number: int,
        tally: Tally,
        price_usd: NDArray[np.float64],
        available: int,
        batching: Mapping[str, Any],
    ) -> None:
        self.router = router
        self.number = number
        self.names: tuple[str, ...] = router.pool.names
        self.bit = {name: 1 << index for index, name in enumerate(self.names)}
        self.everyone = (1 << len(self.names)) - 1
        self.available = available & self.everyone
        # the core decides by prices in float32: those that round to the checkpoint's are the checkpoint's
        has_own_prices = not np.array_equal(price_usd.astype(np.float32), router.pool.price_usd.astype(np.float32))
        self.price_usd = price_usd if has_own_prices else router.pool.price_usd
        self.certified = not has_own_prices and self.available == self.everyone
        self.input_dim = router.input_dim
        self.takes_text = router.checkpoint.config.encoder != "none"
        self.has_policy = _has_policy(router)
        self.snapshot = router.snapshot.changed(
            price_usd=self.price_usd.astype(np.float32) if has_own_prices else None,
            available=self.available,
            certified=not has_own_prices,
            version=number,
            tally=tally,
        )
        self.batcher = Batcher(self.snapshot, **backend_options(router), **batching)
        self.versions = pb.Versions(
            router=router.versions["router"],
            prices=_digest(self.price_usd.tobytes()),
            certificate=router.versions["certificate"],
            availability=_digest(self.available.to_bytes(8, "little")),
            generation=number,
        )


class Control:
    """Holds the present generation and replaces it. Safe to call from many threads; changes wait for each other."""

    def __init__(
        self,
        router: Router,
        *,
        batching: Mapping[str, Any],
        checkpoint: str | None = None,
        encoder: str | None = None,
        device: str = "cpu",
        root: str | None = None,
    ) -> None:
        """Serve `router`.

        Args:
            batching: of every batcher. checkpoint, encoder, device: how the router was loaded, as `Router.load` takes
                them. root: the folder whose checkpoints `reload` may load; None: it reads `checkpoint` again and
                nothing else.
        """
        self._batching = dict(batching)
        self._start = (checkpoint, encoder)
        self._device = device
        self._root = None if root is None else Path(root).resolve()
        self._loading = threading.Lock()
        self._changing = threading.Lock()
        self._counting = threading.Lock()
        self._followers: list[Callable[[Generation], Callable[[], None]]] = []
        # by names: counts go on where a router of the same pool follows
        self._tallies: dict[tuple[str, ...], Tally] = {}
        self.changes: Counter[tuple[str, str]] = Counter()
        self.generation = self._make(router, 1, router.pool.price_usd, ALL_CANDIDATES)

    def follow(self, prepare: Callable[[Generation], Callable[[], None]]) -> None:
        """Call `prepare` with each generation from now on, and what it returns once all followers are prepared.

        What can fail belongs into `prepare`: then nothing is changed anywhere.
        """
        self._followers.append(prepare)

    def reload(self, path: str) -> Generation:
        """Load, check and serve a checkpoint. Nothing of it runs where calls are answered, but for the exchange.

        Its prices are the checkpoint's own again. Candidates that both pools have stay available or not; others are.

        Args:
            path: inside the root, relative to it or absolute, links followed; empty: what the server was started with.

        Raises:
            PermissionError: a path that the operator has not allowed, or that no path is.
            ValueError, OSError, ImportError, RuntimeError: the checkpoint does not load, or makes no decision.
        """
        with self._change("reload") as done, self._loading:
            folder, encoder = self._allowed(path)
            router = Router.load(folder, self._device, encoder=encoder)
            check(router)
            with self._changing:
                old = self.generation
                kept = {name: bool(old.available & bit) for name, bit in old.bit.items()}
                available = sum(1 << i for i, name in enumerate(router.pool.names) if kept.get(name, True))
                done.update(path=path)
                return self._exchange(router, router.pool.price_usd, available, done)

    def set_prices(self, price_usd: Mapping[str, float]) -> Generation:
        """Change some prices, USD per query. They count in scores at once; the path stays that of the old ones.

        So answers are UNCERTIFIED from then on: laying a path for new prices takes the calibration rows, which a
        checkpoint does not hold. Prices that are all the checkpoint's own are certified.

        Raises:
            ValueError: none given, a name that the pool has not, or a price that is none.
        """
        with self._change("prices") as done, self._changing:
            old = self.generation
            _check_names(price_usd, old)
            prices = np.array(old.price_usd)
            for name, price in price_usd.items():
                if not 0.0 <= price <= _MAX_PRICE_USD:
                    raise ValueError(f"{name}: expected a finite price >= 0, got {price!r}")
                prices[old.names.index(name)] = price
            return self._exchange(old.router, prices, old.available, done)

    def set_availability(self, available: Mapping[str, bool]) -> Generation:
        """Let candidates answer, or not: a mask that every request's own narrows further.

        Raises:
            ValueError: none given, or a name that the pool has not.
        """
        with self._change("availability") as done, self._changing:
            old = self.generation
            _check_names(available, old)
            bits = old.available
            for name, is_available in available.items():
                bits = bits | old.bit[name] if is_available else bits & ~old.bit[name]
            done.update(available=[name for name, bit in old.bit.items() if bits & bit])
            return self._exchange(old.router, old.price_usd, bits, done)

    def decisions(self) -> Counter[tuple[str, int]]:
        """Rows decided since the start, by candidate (empty where none) and status."""
        rows: Counter[tuple[str, int]] = Counter()
        for names, tally in list(self._tallies.items()):
            for name, counts in zip((*names, ""), tally.counts().tolist(), strict=True):
                rows.update({(name, status): count for status, count in enumerate(counts) if count})
        return rows

    def _allowed(self, path: str) -> tuple[Path, str | None]:
        """The folder that a path means, and where its transformer is."""
        start, encoder = self._start
        if not path:
            return EMBEDDED if start is None else Path(start), encoder
        size = len(path.encode())
        if size > _MAX_PATH_BYTES:
            raise PermissionError(f"path: expected at most {_MAX_PATH_BYTES} bytes, got {size}")
        if logs.CONTROL.search(path):
            raise PermissionError("path: expected no control characters, got some")
        if self._root is None:
            raise PermissionError("path: expected none (the server has no --checkpoint-root), got one")
        folder = (self._root / path).resolve()
        if not folder.is_relative_to(self._root):
            raise PermissionError(f"path: expected a folder inside {self._root}, got {path[:200]!r}")
        return folder, None

    def _make(
        self, router: Router, number: int, price_usd: NDArray[np.float64], available: int, **batching: Any
    ) -> Generation:
        names = router.pool.names
        return Generation(
            router,
            number=number,
            tally=self._tallies.setdefault(names, Tally(len(names))),
            price_usd=price_usd,
            available=available,
            batching={**self._batching, **batching},
        )

    def _exchange(
        self, router: Router, price_usd: NDArray[np.float64], available: int, done: dict[str, Any]
    ) -> Generation:
        old = self.generation
        # counts go on where the old one's are
        made = self._make(router, old.number + 1, price_usd, available, before=old.batcher)
        swaps = [prepare(made) for prepare in self._followers]
        self.generation = made
        for swap in swaps:
            swap()
        done.update(logs.versions(made.versions), certified=made.certified)
        return made

    @contextlib.contextmanager
    def _change(self, kind: str) -> Iterator[dict[str, Any]]:
        """Count and log a change, with what its block has put into the dict, or its refusal."""
        done: dict[str, Any] = {}
        try:
            yield done
        except Exception as error:
            self._count(kind, "refused")
            # of this package's checks, which an operator's values go through, never a prompt
            is_ours = isinstance(error, ValueError | OSError | ImportError | RuntimeError)
            reason = errors.shortened(str(error)) if is_ours else type(error).__name__
            logs.event(_log, logging.WARNING, kind, outcome="refused", reason=reason)
            raise
        self._count(kind, "done")
        logs.event(_log, logging.INFO, kind, outcome="done", **done)

    def _count(self, kind: str, outcome: str) -> None:
        # a refused change may end beside another
        with self._counting:
            self.changes[kind, outcome] += 1


def check(router: Router) -> None:
    """Make one decision, of a text where the router takes texts; a transformer is loaded for it.

    Raises:
        RuntimeError: it is not a valid one. ValueError, OSError, ImportError: the transformer does not load.
    """
    if router.checkpoint.config.encoder == "none":
        x = np.zeros((1, router.input_dim), np.float32)
    else:
        x = router.encode([PROBE_TEXT])
    batch = router.route_batch(x, 0.5)
    if int(batch.status[0]) == Status.INVALID:
        raise RuntimeError("router: expected a decision, got none")


def _check_names(values: Mapping[str, object], generation: Generation) -> None:
    if not values:
        raise ValueError("names: expected at least one candidate, got none")
    for name in values:
        if name not in generation.bit:
            raise ValueError(f"names: expected candidates of the pool, got {name[:200]!r}")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _has_policy(router: Router) -> bool:
    try:
        router.snapshot.route(np.zeros((1, router.input_dim), np.float32), 0.0, mode="policy")
    except ValueError:
        return False
    return True
