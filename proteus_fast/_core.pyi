from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Never

class QueueFullError(RuntimeError): ...

@final
class HashEncoder:
    def __init__(
        self,
        table: NDArray[np.int8],
        row_scale: NDArray[np.float32],
        idf: NDArray[np.float32],
        block_weight: NDArray[np.float32],
    ) -> None: ...
    @property
    def dim(self) -> int: ...
    @property
    def rows(self) -> int: ...
    def encode(self, texts: Sequence[str | bytes]) -> NDArray[np.float32]: ...

def hash_features(
    texts: Sequence[str | bytes], rows: int
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32], NDArray[np.uint8]]: ...
def row_hash(x: NDArray[np.float32] | NDArray[np.uint64], key: int) -> NDArray[np.uint64]: ...
def masked_mean(hidden: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.float32]: ...
def philox(seed: int, row: int, tries: int) -> NDArray[np.uint32]: ...
def sample_beta(conc1: NDArray[np.float64], conc0: NDArray[np.float64], seed: int) -> NDArray[np.float64]: ...

@final
class Path:
    def __init__(
        self,
        parameter: NDArray[np.float32],
        certified: NDArray[np.int32],
        certified_max: int,
        calibrated: NDArray[np.int32],
        calibrated_max: int,
    ) -> None: ...

@final
class Tally:
    def __init__(self, candidates: int) -> None: ...
    def counts(self) -> NDArray[np.uint64]: ...

@final
class Snapshot:
    def __init__(
        self,
        *,
        tensors: dict[str, NDArray[np.float32]],
        link: str,
        head: str | None,
        kappa: float,
        gamma: float,
        price_usd: NDArray[np.float32],
        cost_unit_usd: float,
        key: int,
        default_mode: str,
        dual: Path,
        policy: Path | None,
        encoder: HashEncoder | None,
        version: int = 0,
    ) -> None: ...
    @property
    def input_dim(self) -> int: ...
    @property
    def candidates(self) -> int: ...
    @property
    def version(self) -> int: ...
    def route(
        self,
        x: NDArray[np.float32],
        tau: float | NDArray[np.float64] | NDArray[np.float32],
        mode: str | None = None,
        guarantee: str = "certified",
        available: NDArray[np.bool_] | None = None,
        price_usd: NDArray[np.float64] | NDArray[np.float32] | None = None,
        ids: NDArray[np.uint64] | None = None,
        sample: bool = False,
        seed: int = 0,
    ) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8], NDArray[np.float32]]: ...
    def scores(
        self,
        x: NDArray[np.float32],
        tau: float | NDArray[np.float64] | NDArray[np.float32],
        mode: str | None = None,
        guarantee: str = "certified",
        available: NDArray[np.bool_] | None = None,
        price_usd: NDArray[np.float64] | NDArray[np.float32] | None = None,
        ids: NDArray[np.uint64] | None = None,
        sample: bool = False,
        seed: int = 0,
    ) -> tuple[
        NDArray[np.int32],
        NDArray[np.float32],
        NDArray[np.float32],
        NDArray[np.uint8],
        NDArray[np.float32],
        NDArray[np.float32],
        NDArray[np.float32],
    ]: ...
    def changed(
        self,
        *,
        price_usd: NDArray[np.float32] | None = None,
        available: int = ...,
        certified: bool = True,
        version: int = 0,
        tally: Tally | None = None,
    ) -> Snapshot: ...
    def choose_path(
        self,
        x: NDArray[np.float32],
        mode: str,
        price_usd: NDArray[np.float64] | NDArray[np.float32] | None = None,
    ) -> NDArray[np.int32]: ...

@final
class BatchResult:
    def __init__(self, /, *args: Never, **kwargs: Never) -> None: ...
    @property
    def choice(self) -> NDArray[np.int32]: ...
    @property
    def mu(self) -> NDArray[np.float32]: ...
    @property
    def score(self) -> NDArray[np.float32]: ...
    @property
    def status(self) -> NDArray[np.uint8]: ...
    @property
    def certified_floor(self) -> NDArray[np.float32]: ...
    @property
    def scores(self) -> NDArray[np.float32]: ...
    @property
    def queue_ns(self) -> int: ...
    @property
    def encode_ns(self) -> int: ...
    @property
    def decide_ns(self) -> int: ...
    @property
    def version(self) -> int: ...

@final
class Completions:
    def __init__(self) -> None: ...
    def fileno(self) -> int: ...
    def drain(self) -> list[int]: ...

@final
class Ticket:
    def __init__(self, /, *args: Never, **kwargs: Never) -> None: ...
    def result(self) -> BatchResult: ...
    def abandon(self) -> None: ...

@final
class Served:
    def __init__(
        self,
        snapshot: Snapshot,
        *,
        names: Sequence[str],
        tau_max: Sequence[Sequence[float | None]],
        versions: bytes,
        decides_text: bool = True,
        decides_embedding: bool = True,
    ) -> None: ...

@final
class ForwardedCall:
    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @property
    def method(self) -> str: ...
    @property
    def message(self) -> bytes: ...
    @property
    def remaining_s(self) -> float | None: ...
    def is_active(self) -> bool: ...
    def reply(self, message: bytes) -> None: ...
    def refuse(self, code: int, text: str, details: bytes = b"") -> None: ...

# absent where libnghttp2 was not found at the build, as the two above
@final
class Listener:
    def __init__(
        self,
        sockets: Sequence[int],
        served: Served,
        *,
        calls: Sequence[str] = (),
        streams: Sequence[str] = (),
        threads: int = 1,
        connections: int = 1024,
        max_calls: int = 256,
        max_rows: int = 65536,
        max_forwarded: int = 264,
        age_s: float = 0.0,
    ) -> None: ...
    def swap(self, served: Served) -> None: ...
    def set_health(self, service: str, status: int) -> None: ...
    def refuse_new(self) -> None: ...
    def drain(self, seconds: float) -> None: ...
    def take(self, wait_s: float) -> ForwardedCall | None: ...
    def stats(self) -> dict[str, int]: ...
    def times(self) -> dict[str, NDArray[np.uint64]]: ...
    def calls(self) -> dict[str, list[int]]: ...

@final
class Batcher:
    def __init__(
        self,
        snapshot: Snapshot,
        *,
        encode: Callable[[list[str]], NDArray[np.float32]] | None = None,
        route: Callable[
            [
                list[str] | None,
                NDArray[np.float32] | None,
                NDArray[np.float64],
                str,
                str,
                NDArray[np.uint64],
            ],
            Sequence[NDArray[Any]],
        ]
        | None = None,
        max_batch_size: int = 256,
        max_queue_rows: int = 4096,
        window_us: int = 0,
        token_budget: int = 0,
        max_text_tokens: int = 0,
        lanes: int = 1,
        before: Batcher | None = None,
    ) -> None: ...
    def route(
        self,
        texts: Sequence[str | bytes] | None,
        x: NDArray[np.float32] | None,
        tau: float | NDArray[np.float64],
        *,
        mode: str | None = None,
        guarantee: str = "certified",
        available: int = ...,
        deadline_s: float | None = None,
    ) -> BatchResult: ...
    def submit(
        self,
        texts: Sequence[str | bytes] | None,
        x: NDArray[np.float32] | None,
        tau: float | NDArray[np.float64],
        *,
        completions: Completions,
        tag: int,
        mode: str | None = None,
        guarantee: str = "certified",
        available: int = ...,
        deadline_s: float | None = None,
    ) -> Ticket: ...
    def close(self, drain: bool = True) -> None: ...
    def stats(self) -> dict[str, int]: ...
    def times(self) -> dict[str, NDArray[np.uint64]]: ...
