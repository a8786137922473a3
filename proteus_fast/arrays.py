"""Arrays of any kind on the CPU, as the engine takes them and as the caller gets them back."""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proteus_fast.certificate import tau_index

_DLPACK_CUDA = 2
# how the core's errors begin that are about a caller's rows
_ROWS = re.compile(r"^(?:texts|x)(\[\d+\])?(?=: )")


def is_for_torch(tensor: Any) -> bool:
    """Whether torch decides about an array: it is on a CUDA device, or torch.compile is tracing its way."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        return bool(tensor.is_cuda or torch.compiler.is_compiling())
    return hasattr(tensor, "__dlpack_device__") and int(tensor.__dlpack_device__()[0]) == _DLPACK_CUDA


def to_numpy(tensor: Any, name: str, *, from_gpu: bool = False) -> NDArray[Any]:
    """View an array of any kind on the CPU as NumPy, without a copy where that is possible.

    Args:
        from_gpu: copy a torch tensor that is on one, which waits for it.

    Raises:
        TypeError: not a NumPy array, torch tensor or DLPack producer. ValueError: not on the CPU.
    """
    if isinstance(tensor, np.ndarray):
        return tensor
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        if tensor.device.type != "cpu" and not from_gpu:
            raise ValueError(f"{name}: expected a CPU tensor, got one on {tensor.device}")
        tensor = tensor.detach().cpu()
        view: NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        return view
    if hasattr(tensor, "__dlpack__"):
        try:
            return np.from_dlpack(tensor)
        except (BufferError, RuntimeError) as error:
            expected = "a DLPack array that NumPy can hold, on the CPU"
            raise ValueError(f"{name}: expected {expected}, got {error}") from None
    raise TypeError(f"{name}: expected a NumPy array, torch tensor or DLPack array, got {type(tensor).__name__}")


def from_numpy(array: NDArray[Any], like: Any) -> Any:
    """Give ``array`` the kind of ``like``."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.from_numpy(array)
    namespace = getattr(like, "__array_namespace__", None)
    return array if namespace is None else namespace().from_dlpack(array)


def laid_out(array: NDArray[Any]) -> NDArray[Any]:
    """An array as the core takes it, contiguous and aligned; a copy where it is not."""
    flags = array.flags
    return array if flags.c_contiguous and flags.aligned else np.require(array, requirements=["C", "A"])


def to_float32(array: NDArray[Any], name: str) -> NDArray[np.float32]:
    if array.dtype == np.float32:
        return laid_out(array)
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
    return float(array) if array.ndim == 0 else laid_out(array.astype(np.float64, copy=False))


def to_target(tau: Any) -> float:
    """One accuracy target, in [0, 1]."""
    target = to_tau(tau)
    if not isinstance(target, float):
        raise TypeError(f"tau: expected one number, got {type(tau).__name__}")
    tau_index(target)
    return target


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


def by_the_caller_s_name(error: TypeError | ValueError, name: str) -> TypeError | ValueError:
    """An error of the core about rows, which names what the caller gave: `name` of a list, or of one text."""
    text, found = _ROWS.subn(lambda match: name + (match[1] or "" if name == "queries" else ""), str(error))
    if not found:
        return error
    return TypeError(text) if isinstance(error, TypeError) else ValueError(text)
