from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATUS_UNSPECIFIED: _ClassVar[Status]
    FEASIBLE: _ClassVar[Status]
    INFEASIBLE: _ClassVar[Status]
    UNCERTIFIED: _ClassVar[Status]
    INVALID: _ClassVar[Status]

class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODE_UNSPECIFIED: _ClassVar[Mode]
    MODE_DUAL: _ClassVar[Mode]
    MODE_POLICY: _ClassVar[Mode]

class Guarantee(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GUARANTEE_UNSPECIFIED: _ClassVar[Guarantee]
    GUARANTEE_CERTIFIED: _ClassVar[Guarantee]
    GUARANTEE_CALIBRATED: _ClassVar[Guarantee]
STATUS_UNSPECIFIED: Status
FEASIBLE: Status
INFEASIBLE: Status
UNCERTIFIED: Status
INVALID: Status
MODE_UNSPECIFIED: Mode
MODE_DUAL: Mode
MODE_POLICY: Mode
GUARANTEE_UNSPECIFIED: Guarantee
GUARANTEE_CERTIFIED: Guarantee
GUARANTEE_CALIBRATED: Guarantee

class RouteRequest(_message.Message):
    __slots__ = ("text", "embedding", "tau", "available", "strict", "mode", "guarantee")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    TAU_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    STRICT_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    GUARANTEE_FIELD_NUMBER: _ClassVar[int]
    text: str
    embedding: bytes
    tau: float
    available: _containers.RepeatedScalarFieldContainer[str]
    strict: bool
    mode: Mode
    guarantee: Guarantee
    def __init__(self, text: _Optional[str] = ..., embedding: _Optional[bytes] = ..., tau: _Optional[float] = ..., available: _Optional[_Iterable[str]] = ..., strict: _Optional[bool] = ..., mode: _Optional[_Union[Mode, str]] = ..., guarantee: _Optional[_Union[Guarantee, str]] = ...) -> None: ...

class RouteReply(_message.Message):
    __slots__ = ("candidate", "choice", "mu", "score", "status", "certified_floor", "tau_max", "fallbacks", "timings", "versions")
    CANDIDATE_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    MU_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    CERTIFIED_FLOOR_FIELD_NUMBER: _ClassVar[int]
    TAU_MAX_FIELD_NUMBER: _ClassVar[int]
    FALLBACKS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    candidate: str
    choice: int
    mu: float
    score: float
    status: Status
    certified_floor: float
    tau_max: float
    fallbacks: _containers.RepeatedScalarFieldContainer[str]
    timings: Timings
    versions: Versions
    def __init__(self, candidate: _Optional[str] = ..., choice: _Optional[int] = ..., mu: _Optional[float] = ..., score: _Optional[float] = ..., status: _Optional[_Union[Status, str]] = ..., certified_floor: _Optional[float] = ..., tau_max: _Optional[float] = ..., fallbacks: _Optional[_Iterable[str]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., versions: _Optional[_Union[Versions, _Mapping]] = ...) -> None: ...

class RouteBatchRequest(_message.Message):
    __slots__ = ("texts", "embeddings", "rows", "tau", "available", "strict", "mode", "guarantee")
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TAU_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    STRICT_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    GUARANTEE_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    embeddings: bytes
    rows: int
    tau: _containers.RepeatedScalarFieldContainer[float]
    available: _containers.RepeatedScalarFieldContainer[str]
    strict: bool
    mode: Mode
    guarantee: Guarantee
    def __init__(self, texts: _Optional[_Iterable[str]] = ..., embeddings: _Optional[bytes] = ..., rows: _Optional[int] = ..., tau: _Optional[_Iterable[float]] = ..., available: _Optional[_Iterable[str]] = ..., strict: _Optional[bool] = ..., mode: _Optional[_Union[Mode, str]] = ..., guarantee: _Optional[_Union[Guarantee, str]] = ...) -> None: ...

class RouteBatchReply(_message.Message):
    __slots__ = ("candidates", "choice", "mu", "score", "status", "certified_floor", "tau_max", "timings", "versions")
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    MU_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    CERTIFIED_FLOOR_FIELD_NUMBER: _ClassVar[int]
    TAU_MAX_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    candidates: _containers.RepeatedScalarFieldContainer[str]
    choice: _containers.RepeatedScalarFieldContainer[int]
    mu: _containers.RepeatedScalarFieldContainer[float]
    score: _containers.RepeatedScalarFieldContainer[float]
    status: _containers.RepeatedScalarFieldContainer[Status]
    certified_floor: _containers.RepeatedScalarFieldContainer[float]
    tau_max: float
    timings: Timings
    versions: Versions
    def __init__(self, candidates: _Optional[_Iterable[str]] = ..., choice: _Optional[_Iterable[int]] = ..., mu: _Optional[_Iterable[float]] = ..., score: _Optional[_Iterable[float]] = ..., status: _Optional[_Iterable[_Union[Status, str]]] = ..., certified_floor: _Optional[_Iterable[float]] = ..., tau_max: _Optional[float] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., versions: _Optional[_Union[Versions, _Mapping]] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue_ns", "encode_ns", "decide_ns")
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    ENCODE_NS_FIELD_NUMBER: _ClassVar[int]
    DECIDE_NS_FIELD_NUMBER: _ClassVar[int]
    queue_ns: int
    encode_ns: int
    decide_ns: int
    def __init__(self, queue_ns: _Optional[int] = ..., encode_ns: _Optional[int] = ..., decide_ns: _Optional[int] = ...) -> None: ...

class Versions(_message.Message):
    __slots__ = ("router", "prices", "certificate", "availability", "generation")
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    PRICES_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    AVAILABILITY_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    router: str
    prices: str
    certificate: str
    availability: str
    generation: int
    def __init__(self, router: _Optional[str] = ..., prices: _Optional[str] = ..., certificate: _Optional[str] = ..., availability: _Optional[str] = ..., generation: _Optional[int] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExplainReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReportOutcomeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReportOutcomeReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetInfoReply(_message.Message):
    __slots__ = ("candidates", "input_dim", "takes_text", "default_mode", "delta", "calibration_rows", "tau_max", "data_plane", "checkpoint_schema", "versions", "limits")
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    INPUT_DIM_FIELD_NUMBER: _ClassVar[int]
    TAKES_TEXT_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_MODE_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_ROWS_FIELD_NUMBER: _ClassVar[int]
    TAU_MAX_FIELD_NUMBER: _ClassVar[int]
    DATA_PLANE_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    input_dim: int
    takes_text: bool
    default_mode: Mode
    delta: float
    calibration_rows: int
    tau_max: float
    data_plane: str
    checkpoint_schema: int
    versions: Versions
    limits: Limits
    def __init__(self, candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., input_dim: _Optional[int] = ..., takes_text: _Optional[bool] = ..., default_mode: _Optional[_Union[Mode, str]] = ..., delta: _Optional[float] = ..., calibration_rows: _Optional[int] = ..., tau_max: _Optional[float] = ..., data_plane: _Optional[str] = ..., checkpoint_schema: _Optional[int] = ..., versions: _Optional[_Union[Versions, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("name", "price_usd_per_query")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PRICE_USD_PER_QUERY_FIELD_NUMBER: _ClassVar[int]
    name: str
    price_usd_per_query: float
    def __init__(self, name: _Optional[str] = ..., price_usd_per_query: _Optional[float] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("message_bytes", "batch_rows", "queue_calls")
    MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    BATCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_CALLS_FIELD_NUMBER: _ClassVar[int]
    message_bytes: int
    batch_rows: int
    queue_calls: int
    def __init__(self, message_bytes: _Optional[int] = ..., batch_rows: _Optional[int] = ..., queue_calls: _Optional[int] = ...) -> None: ...

class ReloadRequest(_message.Message):
    __slots__ = ("path",)
    PATH_FIELD_NUMBER: _ClassVar[int]
    path: str
    def __init__(self, path: _Optional[str] = ...) -> None: ...

class SetPricesRequest(_message.Message):
    __slots__ = ("price_usd_per_query",)
    class PriceUsdPerQueryEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    PRICE_USD_PER_QUERY_FIELD_NUMBER: _ClassVar[int]
    price_usd_per_query: _containers.ScalarMap[str, float]
    def __init__(self, price_usd_per_query: _Optional[_Mapping[str, float]] = ...) -> None: ...

class SetAvailabilityRequest(_message.Message):
    __slots__ = ("available",)
    class AvailableEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bool
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bool] = ...) -> None: ...
    AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    available: _containers.ScalarMap[str, bool]
    def __init__(self, available: _Optional[_Mapping[str, bool]] = ...) -> None: ...

class ChangeReply(_message.Message):
    __slots__ = ("versions", "certified")
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    CERTIFIED_FIELD_NUMBER: _ClassVar[int]
    versions: Versions
    certified: bool
    def __init__(self, versions: _Optional[_Union[Versions, _Mapping]] = ..., certified: _Optional[bool] = ...) -> None: ...

class GetPolicyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetPolicyReply(_message.Message):
    __slots__ = ("versions", "certified", "candidates", "default_mode", "tau_max", "targets", "data_plane", "uptime_s")
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    CERTIFIED_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_MODE_FIELD_NUMBER: _ClassVar[int]
    TAU_MAX_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    DATA_PLANE_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    versions: Versions
    certified: bool
    candidates: _containers.RepeatedCompositeFieldContainer[ServedCandidate]
    default_mode: Mode
    tau_max: float
    targets: _containers.RepeatedCompositeFieldContainer[Target]
    data_plane: str
    uptime_s: float
    def __init__(self, versions: _Optional[_Union[Versions, _Mapping]] = ..., certified: _Optional[bool] = ..., candidates: _Optional[_Iterable[_Union[ServedCandidate, _Mapping]]] = ..., default_mode: _Optional[_Union[Mode, str]] = ..., tau_max: _Optional[float] = ..., targets: _Optional[_Iterable[_Union[Target, _Mapping]]] = ..., data_plane: _Optional[str] = ..., uptime_s: _Optional[float] = ...) -> None: ...

class ServedCandidate(_message.Message):
    __slots__ = ("name", "price_usd_per_query", "certified_price_usd_per_query", "available")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PRICE_USD_PER_QUERY_FIELD_NUMBER: _ClassVar[int]
    CERTIFIED_PRICE_USD_PER_QUERY_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    name: str
    price_usd_per_query: float
    certified_price_usd_per_query: float
    available: bool
    def __init__(self, name: _Optional[str] = ..., price_usd_per_query: _Optional[float] = ..., certified_price_usd_per_query: _Optional[float] = ..., available: _Optional[bool] = ...) -> None: ...

class Target(_message.Message):
    __slots__ = ("tau", "status", "certified_floor", "expected_cost_usd")
    TAU_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    CERTIFIED_FLOOR_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_COST_USD_FIELD_NUMBER: _ClassVar[int]
    tau: float
    status: Status
    certified_floor: float
    expected_cost_usd: float
    def __init__(self, tau: _Optional[float] = ..., status: _Optional[_Union[Status, str]] = ..., certified_floor: _Optional[float] = ..., expected_cost_usd: _Optional[float] = ...) -> None: ...
