"""The gate over what is shipped: nothing in it can run code that came as data, and it holds no more than it should."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = [ROOT / "proteus_fast", ROOT / "kernels" / "proteus_kernels", ROOT / "server" / "proteus_server"]
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save"}
CHECKPOINT_BYTES = 16 * 2**20
LEADING_BYTES_OF_PICKLE = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def dangers_in(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        if any(name.split(".")[0] in FORBIDDEN_MODULES or name in FORBIDDEN_CALLS for name in names):
            yield f"line {node.lineno}: imports {names}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            # any function that unpickles by its own name, such as pandas.read_pickle
            if called in FORBIDDEN_CALLS or "pickle" in called.rpartition(".")[2]:
                yield f"line {node.lineno}: calls {called}"
        # numpy's loaders do not unpickle unless asked to
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield f"line {node.value.lineno}: passes allow_pickle"


def shipped_files(pattern: str) -> list[Path]:
    found = (path for folder in SHIPPED for path in folder.rglob(pattern) if path.is_file())
    return sorted(path for path in found if "__pycache__" not in path.parts)


@pytest.mark.parametrize("path", shipped_files("*.py"), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_comes_in_as_data(path: Path) -> None:
    assert list(dangers_in(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import joblib",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "eval('1')",
        "exec('1')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "pandas.read_pickle('x')",
    ],
)
def test_the_gate_sees(source: str) -> None:
    assert list(dangers_in(source))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "'no pickle here'",
        "import json\njson.load(f)",
        "retrieval(3)",
        "np.load('x.npz', allow_pickle=False)",
    ],
)
def test_the_gate_lets_through(source: str) -> None:
    assert list(dangers_in(source)) == []


def test_only_known_kinds_of_file_are_shipped() -> None:
    kinds = {path.suffix for path in shipped_files("*")}
    assert kinds <= {".py", ".pyi", ".typed", ".proto", ".json", ".safetensors", ".md"}


def test_the_embedded_checkpoints_are_small_and_plain() -> None:
    files = shipped_files("checkpoints/**/*")
    assert {"config.json", "model.safetensors", "certificate.json"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) <= CHECKPOINT_BYTES
    for path in files:
        with path.open("rb") as stream:
            assert not stream.read(2).startswith(LEADING_BYTES_OF_PICKLE), path


def test_the_installed_files_are_the_packages_and_nothing_else() -> None:
    installed = metadata.files("proteus-fast") or []
    if any("direct_url.json" in str(file) and '"editable": true' in (file.read_text() or "") for file in installed):
        pytest.skip("needs a plain install: an editable one keeps the packages in the checkout")
    names = [str(file) for file in installed if ".dist-info" not in str(file) and "__pycache__" not in str(file)]
    roots = {name.split("/")[0] for name in names if not name.startswith("..")}
    assert roots == {"proteus_fast", "proteus_kernels", "proteus_server"}
    assert sum(bool(re.fullmatch(r"proteus_fast/_core\..*so", name)) for name in names) == 1
    for package in roots:
        assert f"{package}/py.typed" in names
    assert "proteus_fast/_core.pyi" in names
    assert not [name for name in names if re.search(r"\.(cpp|hpp|o|a)$", name)]
