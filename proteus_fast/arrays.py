"""Arrays of any kind on the CPU, as the engine takes them and as the caller gets them back."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DLPACK_CUDA = 2


def is_for_torch(tensor: Any) -> bool:
    """Whether torch decides about an array: it is on a CUDA device, or torch.compile is tracing its way."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        return bool(tensor.is_cuda or torch.compiler.is_compiling())
    return hasattr(tensor, "__dlpack_device__") and int(tensor.__dlpack_device__()[0]) == _DLPACK_CUDA


def to_numpy(tensor: Any, name: str) -> NDArray[Any]:
    """View an array of any kind on the CPU as NumPy, without a copy where that is possible.

    Raises:
        TypeError: not a NumPy array, torch tensor or DLPack producer. ValueError: not on the CPU.
    """
    if isinstance(tensor, np.ndarray):
        return tensor
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        if tensor.device.type != "cpu":
            raise ValueError(f"{name}: expected a CPU tensor, got one on {tensor.device}")
        tensor = tensor.detach()
        view: NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        return view
    if hasattr(tensor, "__dlpack__"):
        try:
            return np.from_dlpack(tensor)
        except (BufferError, RuntimeError) as error:
            raise ValueError(f"{name}: expected a DLPack array on the CPU, got {error}") from None
    raise TypeError(f"{name}: expected a NumPy array, torch tensor or DLPack array, got {type(tensor).__name__}")


def to_host(array: Any) -> NDArray[Any]:
    """An array as NumPy, from a GPU too, for which this waits."""
    host: NDArray[Any] = array if isinstance(array, np.ndarray) else array.cpu().numpy()
    return host


def from_numpy(array: NDArray[Any], like: Any) -> Any:
    """Give ``array`` the kind of ``like``."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.from_numpy(array)
    namespace = getattr(like, "__array_namespace__", None)
    return array if namespace is None else namespace().from_dlpack(array)


def to_float32(array: NDArray[Any], name: str) -> NDArray[np.float32]:
    if array.dtype == np.float32 and array.flags.c_contiguous:
        return array
    if array.dtype.kind != "f":
        raise TypeError(f"{name}: expected a floating dtype, got {array.dtype}")
    return np.ascontiguousarray(array, np.float32)


def _is_numbers(values: object) -> bool:
    return isinstance(values, list | tuple) and all(
        isinstance(value, float | int) and not isinstance(value, bool) for value in values
    )


def to_tau(tau: Any) -> float | NDArray[np.float64]:
    if isinstance(tau, float | int | np.floating | np.integer) and not isinstance(tau, bool):
        return float(tau)
    array = np.asarray(tau, np.float64) if _is_numbers(tau) else to_numpy(tau, "tau")
    if array.dtype.kind != "f":
        raise TypeError(f"tau: expected a floating dtype, got {array.dtype}")
    return float(array) if array.ndim == 0 else np.ascontiguousarray(array, np.float64)


def to_prices(value: Any) -> NDArray[np.float32]:
    """Prices of one query's candidates, in USD.

    Raises:
        TypeError: no sequence of numbers. ValueError: a price is negative or not finite.
    """
    try:
        prices = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        expected = "prices in the order of the pool's candidates"
        raise TypeError(f"price_usd: expected {expected}, got {type(value).__name__}") from None
    if not (np.isfinite(prices) & (prices >= 0)).all():
        raise ValueError("price_usd: expected finite values >= 0, got others")
    return prices
