"""What Triton's interpreter does otherwise than a GPU, mended for every test of a kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

_create_dot = interpreter.InterpreterBuilder.create_dot


def _float32(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    bits = operand.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _dot_of_values(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
    return _create_dot(self, _float32(a), _float32(b), d, *options)


@pytest.fixture(autouse=True)
def gpu_arithmetic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # the interpreter multiplies the bit patterns of bfloat16 operands (Triton 3.6 to 3.9)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot_of_values)
    # GPUs compute with NaN and infinities in silence
    with np.errstate(all="ignore"):
        yield
