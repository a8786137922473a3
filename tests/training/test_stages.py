"""Stages of a training on disk: what a machine that stopped leaves behind is made again."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from proteus_fast.training.stages import Stages


@pytest.mark.parametrize("left", [0, 1, 100, -1, -30])
def test_half_a_stage_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture, left: int) -> None:
    stages = Stages(tmp_path, "f" * 64)
    stages.save("search", h=np.arange(1000.0))
    found = stages.load("search")
    assert found is not None
    np.testing.assert_array_equal(found["h"], np.arange(1000.0))
    (file,) = tmp_path.glob("stage-*")
    whole = file.read_bytes()
    for broken in (whole[:left], bytes(len(whole))):
        file.write_bytes(broken)
        with caplog.at_level(logging.WARNING, "proteus_fast"):
            assert stages.load("search") is None
        assert "expected a finished stage, got" in caplog.text
        caplog.clear()
    stages.save("search", h=np.zeros(3))
    assert stages.load("search") is not None


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    stages = Stages(tmp_path, "f" * 64)
    with pytest.raises(ValueError, match="no stage"):
        stages.save("search", h=_Unwritable())
    assert not list(tmp_path.iterdir())


class _Unwritable:
    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        raise ValueError("no stage")
