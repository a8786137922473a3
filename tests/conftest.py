"""What every test may use: the real outcome tables where they are present, and one way of running Hypothesis."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TABLES = sorted(path.parent.name for path in DATA.glob("*/train.parquet"))

# without a GPU kernels run in Triton's interpreter, which must be said before anything imports Triton
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# one seed and no stored examples: a run on one machine is the run on another
settings.register_profile("default", max_examples=500, deadline=None, derandomize=True, database=None)
settings.register_profile("verify", parent=settings.get_profile("default"), max_examples=20_000)
settings.load_profile("default")


def pytest_report_header() -> str:
    if TABLES:
        return f"outcome tables: {', '.join(TABLES)}"
    return "outcome tables: none at ../shared/data beside the checkout; the tests on real tables are skipped"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of the real outcome tables, one folder a table; a test that asks for it is skipped without."""
    if not TABLES:
        pytest.skip("real outcome tables: expected ../shared/data beside the checkout, got no such folder")
    return DATA
