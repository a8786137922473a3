"""The loaded router on a device: its numbers in three arenas, and one call that decides a batch."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from proteus_kernels.decide import decide_kernel
from proteus_kernels.launch import FLOATS, launch
from proteus_kernels.layout import TAU_STEPS, pack, padded
from proteus_kernels.pooling import check_mask, columns_together, masked_mean

FEASIBLE, INFEASIBLE, UNCERTIFIED, INVALID = 1, 2, 3, 4
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class PathTable:
    """A path and which of its steps serves a target; the arguments of ``_core.Path``.

    Attributes:
        parameter: path parameter of each vertex, (V,) float32. certified, calibrated: step code (vertex * 16 + share)
            of each grid target, (1001,) int32. certified_max, calibrated_max: largest grid index served, -1 for none.
    """

    parameter: NDArray[np.float32]
    certified: NDArray[np.int32]
    certified_max: int
    calibrated: NDArray[np.int32]
    calibrated_max: int


class Decisions(NamedTuple):
    """choice (B,) int32, mu, score (B,) float32, status (B,) uint8, certified_floor (B,) float32."""

    choice: Tensor
    mu: Tensor
    score: Tensor
    status: Tensor
    certified_floor: Tensor

    @staticmethod
    def empty(rows: int, device: torch.device) -> Decisions:
        """Room for the answers of ``rows`` rows."""
        int32, float32 = torch.int32, torch.float32
        dtypes = (int32, float32, float32, torch.uint8, float32)
        return Decisions(*(torch.empty(rows, dtype=dtype, device=device) for dtype in dtypes))


class Tile(NamedTuple):
    """Shape of a program: rows, depth and columns of a step of its matrix products, warps."""

    rows: int
    depth: int
    columns: int
    warps: int


# Narrow tiles leave more of them for the multiprocessors, wide ones read the weights less often. The warps are those
# at which nothing spills on sm_90 (benchmarks/resources.py).
NARROW_POLICY = Tile(16, 32, 256, 8)
NARROW_DUAL = Tile(16, 32, 256, 4)
WIDE = Tile(32, 32, 128, 8)
BFLOAT16 = Tile(64, 32, 128, 8)


def choose_tile(rows: int, policy: bool, precision: str, multiprocessors: int) -> Tile:
    """The tile that a batch is cut into."""
    if precision == "bfloat16":
        return BFLOAT16
    if rows > NARROW_DUAL.rows * multiprocessors:
        return WIDE
    return NARROW_POLICY if policy else NARROW_DUAL


def _float_bits(values: NDArray[Any]) -> NDArray[np.int32]:
    return values.astype(np.float32).view(np.int32)


def _table(path: PathTable, guarantee: str, tensors: Mapping[str, Tensor], residual: bool) -> NDArray[np.int32]:
    """Code, status and floor of each grid target, then parameter, dual and logit(start) of each vertex."""
    certified = guarantee == "certified"
    codes, most = (path.certified, path.certified_max) if certified else (path.calibrated, path.calibrated_max)
    grid = np.arange(TAU_STEPS + 1)
    reached = grid <= most
    code = np.where(reached, codes, 0).astype(np.int32)
    status = np.where(reached, FEASIBLE if certified else UNCERTIFIED, INFEASIBLE).astype(np.int32)
    best = most / TAU_STEPS if most > 0 else np.nan
    floor = np.where(reached, grid / TAU_STEPS, best) if certified else np.full(len(grid), np.nan)
    parameter = path.parameter.astype(np.float64)
    dual = start = np.zeros(len(parameter))
    if "policy.knots_tau" in tensors:
        knots = tensors["policy.knots_tau"].double().numpy()
        dual = np.interp(parameter, knots, tensors["policy.knots_dual"].double().numpy())
        mu = np.interp(parameter, knots, tensors["policy.knots_mu"].double().numpy()).clip(1e-4, 1.0 - 1e-4)
        start = np.log(mu / (1.0 - mu)) if residual else start
    return np.concatenate([code, status, *map(_float_bits, (floor, parameter, dual, start))])


class Snapshot:
    """Immutable router on one device; the arguments are those of ``_core.Snapshot``.

    Attributes:
        layout: sizes and places. device: where it is. precision: ``float32``, whose choices are the core's, or
            ``bfloat16``, whose matrix products are rounded to it. default_mode: dual or policy.
    """

    def __init__(
        self,
        *,
        tensors: Mapping[str, NDArray[np.float32]],
        link: str,
        head: str | None,
        kappa: float,
        gamma: float,
        price_usd: NDArray[np.float32],
        cost_unit_usd: float,
        key: int,
        default_mode: str,
        dual: PathTable,
        policy: PathTable | None,
        device: torch.device,
        precision: str = "float32",
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision: expected 'float32' or 'bfloat16', got {precision!r}")
        self.device = device
        self.precision = precision
        self.default_mode = default_mode
        on_cpu = {name: torch.from_numpy(np.ascontiguousarray(tensor, np.float32)) for name, tensor in tensors.items()}
        cost = torch.from_numpy((price_usd.astype(np.float64) / cost_unit_usd).astype(np.float32))
        self.layout, matrices, vectors = pack(on_cpu, cost, link, head, PRECISIONS[precision])
        self._matrices, self._vectors = matrices.to(device), vectors.to(device)
        # in the order in which the kernel reads them
        words = struct.unpack("<4q", struct.pack("<dddQ", kappa, gamma, cost_unit_usd, key))
        self._words = torch.tensor(words, dtype=torch.int64, device=device)
        self._tables: dict[tuple[str, str], Tensor] = {}
        self._vertices: dict[str, int] = {}
        for mode, path in (("dual", dual), ("policy", policy)):
            if path is None:
                continue
            self._vertices[mode] = len(path.parameter)
            for guarantee in ("certified", "calibrated"):
                table = _table(path, guarantee, on_cpu, head == "residual")
                self._tables[mode, guarantee] = torch.from_numpy(table).to(device)
        self._multiprocessors = (
            torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        )

    @property
    def candidates(self) -> int:
        """K."""
        return self.layout.candidates

    @property
    def input_dim(self) -> int:
        """D."""
        return self.layout.dim

    @property
    def wide_rows(self) -> int:
        """The least batch that is cut into wide tiles."""
        return NARROW_DUAL.rows * self._multiprocessors + 1

    def decide(
        self,
        x: Tensor,
        tau: float | Tensor,
        *,
        mask: Tensor | None = None,
        mode: str | None = None,
        guarantee: str = "certified",
        available: Tensor | None = None,
        price_usd: Tensor | None = None,
        ids: Tensor | None = None,
        state: Tensor | None = None,
        out: Decisions | None = None,
        scratch: Tensor | None = None,
    ) -> Decisions:
        """Decide a batch on the current stream, in one launch; nothing is waited for, no value is looked at.

        Args:
            x: rows, (B, D), float32, bfloat16, float16 or float64; or hidden states, (B, T, D), with ``mask``
                (B, T), which are pooled first: in the same launch where B is 1, else in one more.
            tau: target in [0, 1], or (B,) or () on the device.
            mode, guarantee: as in ``Router.route_batch``. available: bool, (K,) or (B, K). price_usd: (K,) or (B, K).
            ids: (B,) int64 or uint64. state: seed and offset of sampled preferences, (2,) int64, seen as unsigned; None
                for the mean. Row r draws what the core draws for row offset + r.
            out, scratch: where to write and to work, so that a graph can be captured; ``scratch_floats`` says how much.

        Returns:
            The decisions; ``out`` where it was given.

        Raises:
            TypeError, ValueError: ``argument: expected X, got Y``, from what can be seen without waiting.
        """
        layout = self.layout
        if x.device != self.device:
            raise ValueError(f"tensor: expected a tensor on {self.device}, got one on {x.device}")
        if x.dim() == 3 or mask is not None:
            mask = check_mask(x, mask)
        elif x.dim() != 2:
            raise ValueError(f"tensor: expected shape (B, {layout.dim}), got {tuple(x.shape)}")
        if x.shape[-1] != layout.dim:
            raise ValueError(f"tensor: expected {layout.dim} columns, got shape {tuple(x.shape)}")
        if x.dtype not in FLOATS:
            raise TypeError(f"tensor: expected a floating dtype, got {_name(x.dtype)}")
        rows, mode = x.shape[0], mode or self.default_mode
        if mode not in ("dual", "policy"):
            raise ValueError(f'mode: expected "dual" or "policy", got "{mode}"')
        if guarantee not in ("certified", "calibrated"):
            raise ValueError(f'guarantee: expected "certified" or "calibrated", got "{guarantee}"')
        policy = mode == "policy"
        if policy and not layout.hidden:
            raise ValueError('mode: expected "dual" (the checkpoint has no policy), got "policy"')
        if state is not None:
            if not policy:
                raise ValueError('sample: expected mode "policy", got mode "dual"')
            # read by its address, and advanced in place by who replays a graph
            if not self._check("state", state, (torch.int64,), ((2,),)).is_contiguous():
                raise ValueError(f"state: expected a contiguous tensor, got strides {state.stride()}")
        tau_tensor, tau_stride, tau_number, grid_index = None, 0, 0.0, 0
        if isinstance(tau, Tensor):
            tau_tensor = self._check("tau", tau, FLOATS, ((rows,), ()))
            tau_stride = tau.stride(0) if tau.dim() else 0
        else:
            if not 0.0 <= tau <= 1.0:
                raise ValueError(f"tau: expected a number in [0, 1], got {tau}")
            tau_number, grid_index = float(tau), max(int(np.ceil(tau * TAU_STEPS - 1e-3)), 0)
        available_stride = price_stride = 0
        per_row = ((layout.candidates,), (rows, layout.candidates))
        if available is not None:
            available = self._check("available", available, (torch.bool,), per_row).contiguous()
            available_stride = layout.candidates if available.dim() == 2 else 0
        if price_usd is not None:
            price_usd = self._check("price_usd", price_usd, FLOATS, per_row).contiguous()
            price_stride = layout.candidates if price_usd.dim() == 2 else 0
        if ids is not None:
            ids = self._check("ids", ids, (torch.int64, torch.uint64), ((rows,),)).contiguous().view(torch.int64)
        out = out or Decisions.empty(rows, self.device)
        if rows == 0:
            return out
        hidden, token_stride, mask_stride, tokens = None, 0, 0, 0
        if mask is not None and rows == 1:
            hidden, tokens = columns_together(x), x.shape[1]
            token_stride, mask_stride = hidden.stride(1), mask.stride(1)
            x = torch.empty(1, layout.dim, dtype=torch.float32, device=self.device)
        elif mask is not None:
            x, mask = masked_mean(x, mask), None
        x = columns_together(x)
        tile = choose_tile(rows, policy, self.precision, self._multiprocessors)
        if scratch is None:
            scratch = torch.empty(self.scratch_floats(rows, mode), dtype=torch.float32, device=self.device)
        table = self._tables.get((mode, guarantee))
        # another function than the certified one: rounded products, another mode, anything of the caller's own
        uncertified = (
            self.precision != "float32" or mode != self.default_mode or table is None
            or price_usd is not None or ids is not None or state is not None
        )  # fmt: skip
        launch(
            decide_kernel, (triton.cdiv(rows, tile.rows),), self.device,
            x, x.stride(0), rows, hidden, token_stride, mask, mask_stride, tokens,
            self._matrices, self._vectors, self._words, table, self._vertices.get(mode, 0),
            tau_tensor, tau_stride, tau_number, grid_index,
            None if available is None else available.view(torch.uint8), available_stride, price_usd, price_stride,
            ids, state, int(uncertified), scratch, *out,
            LAYOUT=layout, POLICY=policy, SAMPLE=state is not None,
            BLOCK_B=tile.rows, BLOCK_K=tile.depth, BLOCK_N=tile.columns, num_warps=tile.warps, num_stages=3,
        )  # fmt: skip
        return out

    def scratch_floats(self, rows: int, mode: str | None = None) -> int:
        """How many float32 a batch works in."""
        policy = (mode or self.default_mode) == "policy"
        tile = choose_tile(rows, policy, self.precision, self._multiprocessors)
        buffers = 2 if self.layout.width else int(policy)
        return max(buffers * padded(rows, tile.rows) * self.layout.span, 1)

    def _check(
        self, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shapes: tuple[tuple[int, ...], ...]
    ) -> Tensor:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor on {self.device}, got {type(tensor).__name__}")
        if tensor.device != self.device:
            raise ValueError(f"{name}: expected a tensor on {self.device}, got one on {tensor.device}")
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name}: expected {' or '.join(map(_name, dtypes))}, got {_name(tensor.dtype)}")
        if tuple(tensor.shape) not in shapes:
            raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got {tuple(tensor.shape)}")
        return tensor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
