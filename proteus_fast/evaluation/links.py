"""What turns the line of a regression into accuracies: it clipped, or a sigmoid with the line as its tangent."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
FloatArray = NDArray[np.float64]
Link = Literal["clip", "sigmoid"]
LINKS: tuple[Link, ...] = ("clip", "sigmoid")

_EXTREME_MEAN = 0.02
_LEAST_SLOPE = 0.1 * 0.9


def to_logits(linear: FloatArray, mean: FloatArray) -> FloatArray:
    """Logits that agree with linear predictions (..., K) in value and slope at the mean scores (K,), up to .9 and .1.

    Regression on scores sees a line where accuracy bends towards 0 and 1. The tangent costs nothing to fit, and what
    candidates differ by shrinks where all of them are nearly sure.
    """
    m = mean.clip(_EXTREME_MEAN, 1.0 - _EXTREME_MEAN)
    return np.asarray(np.log(m / (1.0 - m)) + (linear - mean) / _slope(mean))


def _slope(mean: FloatArray) -> FloatArray:
    """Slope of the sigmoid where it is ``mean``, at least that at .9."""
    return np.maximum(mean * (1.0 - mean), _LEAST_SLOPE)


def through_link(linear: FloatArray, mean: FloatArray, link: Link) -> FloatArray:
    """Predicted accuracies, (..., K), from linear predictions: those clipped, or the sigmoid of ``to_logits``."""
    if link == "clip":
        return np.clip(linear, 0.0, 1.0)
    return np.asarray(1.0 / (1.0 + np.exp(-to_logits(linear, mean))))


def linked_head(weight: FloatArray, bias: FloatArray, mean: FloatArray, link: Link) -> tuple[Float32, Float32]:
    """The weight (D, K) and bias (K,) of a linear predictor as a link wants them."""
    if link == "sigmoid":
        weight, bias = weight / _slope(mean), to_logits(bias, mean)
    return weight.astype(np.float32), bias.astype(np.float32)
