"""What Triton's interpreter does otherwise than a GPU, mended for every test of a kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

_create_dot = interpreter.InterpreterBuilder.create_dot


def _float32(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    bits = operand.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _tf32(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounded to the 10 bits of TF32, halves away from zero."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def _three_tf32_products(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the compiler makes of a product of float32 tiles on the tensor cores."""
    a_big, b_big = _tf32(a), _tf32(b)
    product: NDArray[np.float32] = (_tf32(a - a_big) @ b_big + a_big @ _tf32(b - b_big)) + a_big @ b_big
    return product


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, *options: Any) -> Any:
    if str(input_precision).endswith("TF32x3"):
        return interpreter.TensorHandle(_three_tf32_products(a.data, b.data) + d.data, d.dtype.scalar)
    return _create_dot(self, _float32(a), _float32(b), d, input_precision, *options)


@pytest.fixture(autouse=True)
def gpu_arithmetic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # the interpreter multiplies the bit patterns of bfloat16 operands (Triton 3.6 to 3.9), and knows one precision
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot)
    # GPUs compute with NaN and infinities in silence
    with np.errstate(all="ignore"):
        yield
