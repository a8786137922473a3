"""Who may import whom. The layers are those of the diagram in CONTRIBUTING.md, read from the source by ast."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "proteus_fast": ROOT / "proteus_fast",
    "proteus_kernels": ROOT / "kernels" / "proteus_kernels",
    "proteus_server": ROOT / "server" / "proteus_server",
}
SUBPACKAGES = {"training", "evaluation", "experiments", "online"}
# a module of its own layer: it needs torch, and only routing on a GPU needs it
CUDA = "cuda"
SERVING = {"numpy", "safetensors"}
HUB = {"tokenizers", "huggingface_hub"}
GRPC = {"grpc", "grpc_health", "grpc_reflection", "grpc_status", "google"}
LEARNING = {"torch", "pyarrow", "sklearn", "scipy", "matplotlib", "tqdm"}


class Import(NamedTuple):
    module: str
    line: int
    lazy: bool  # inside a function: it costs nothing until that is called


def imports_of(source: str) -> Iterator[Import]:
    """Every import that runs, those for type checkers only left out."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from package import submodule` is an import of the submodule
            for alias in node.names:
                yield Import(f"{module}.{alias.name}", node.lineno, lazy)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield Import(str(node.args[0].value), node.lineno, lazy)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            for child in node.orelse:
                yield from walk(child, lazy)
            return
        inner = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inner)

    yield from walk(ast.parse(source), False)


def layer_of(path: Path) -> str:
    for name, folder in PACKAGES.items():
        if path.is_relative_to(folder):
            first = path.relative_to(folder).parts[0].removesuffix(".py")
            return f"{name}.{first}" if first in SUBPACKAGES | {CUDA} else name
    raise ValueError(f"path: expected a file of a package, got {path}")


def target_of(module: str) -> str:
    """The layer that an imported module belongs to; the distribution's top-level name for what is not ours."""
    first, *rest = module.split(".")
    if first == "proteus_fast" and rest and rest[0] in SUBPACKAGES | {CUDA}:
        return f"{first}.{rest[0]}"
    return first


# layer -> (what it may import anywhere, what it may import inside functions only)
RULES: dict[str, tuple[set[str], set[str]]] = {
    "proteus_kernels": ({"torch", "triton", "numpy"}, set()),
    "proteus_fast": (SERVING, {"torch", "proteus_kernels", "proteus_fast.cuda", "transformers", *HUB}),
    "proteus_fast.cuda": (SERVING | {"torch", "proteus_fast", "proteus_kernels"}, set()),
    "proteus_fast.training": (
        SERVING | LEARNING | {"proteus_fast", "proteus_fast.evaluation", "proteus_kernels"},
        set(),
    ),
    "proteus_fast.evaluation": (SERVING | LEARNING | {"proteus_fast"}, {"proteus_fast.training"}),
    "proteus_fast.experiments": (
        SERVING | LEARNING | {"proteus_fast", "proteus_fast.evaluation", "proteus_fast.training", "proteus_kernels"},
        set(),
    ),
    "proteus_fast.online": (SERVING | {"proteus_fast"}, {"torch"}),
    # tomli is tomllib before Python 3.11
    "proteus_server": (SERVING | GRPC | {"proteus_fast", "tomli"}, set()),
}
# the entry points reach down to what they run, when they run it
ENTRY_POINTS = {"__init__.py", "__main__.py", "cli.py", "demo.py"}
ENTRY_LAZY = {"matplotlib", "tqdm", "grpc", "proteus_server"} | {f"proteus_fast.{name}" for name in SUBPACKAGES}


def sources() -> list[Path]:
    return sorted(path for folder in PACKAGES.values() for path in folder.rglob("*.py"))


def violations(path: Path, source: str) -> list[str]:
    layer = layer_of(path)
    anywhere, lazily = RULES[layer]
    if layer == "proteus_fast" and path.name in ENTRY_POINTS:
        lazily = lazily | ENTRY_LAZY
    found = []
    for module, line, lazy in imports_of(source):
        target = target_of(module)
        if target == layer or target in sys.stdlib_module_names or target in anywhere or (lazy and target in lazily):
            continue
        where = " inside a function" if lazy else ""
        found.append(f"{path.relative_to(ROOT)}:{line}: {layer} may not import {module}{where}")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stay_within_the_layers(path: Path) -> None:
    assert violations(path, path.read_text(encoding="utf-8")) == []


def test_the_plain_references_need_torch_only() -> None:
    source = (PACKAGES["proteus_kernels"] / "reference.py").read_text(encoding="utf-8")
    foreign = {target_of(item.module) for item in imports_of(source)} - set(sys.stdlib_module_names)
    assert foreign <= {"torch"}


def test_the_client_needs_neither_torch_nor_the_router(tmp_path: Path) -> None:
    code = "import sys, proteus_server.client; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "proteus_server.client" in loaded
    assert not loaded & {"torch", "proteus_fast.router", "proteus_fast.checkpoint", *(LEARNING - {"tqdm"})}


def test_source_roots_are_no_packages() -> None:
    # transformers probes for a top-level package named `kernels` and would import ours
    for folder in ("kernels", "server"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_benchmarks_run_without_the_tests() -> None:
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        found = {target_of(item.module) for item in imports_of(path.read_text(encoding="utf-8"))}
        assert "tests" not in found, path.relative_to(ROOT)


def test_only_the_bindings_know_python() -> None:
    include = re.compile(r'^\s*#\s*include\s*[<"](pybind11|Python\.h|torch|ATen|c10)', re.MULTILINE)
    native = sorted((ROOT / "csrc").glob("**/*.[ch]pp"))
    assert native
    for path in native:
        headers = set(include.findall(path.read_text(encoding="utf-8")))
        allowed = {"pybind11", "Python.h"} if path.name == "module.cpp" or path.stem.startswith("bind") else set()
        assert headers <= allowed, path.relative_to(ROOT)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("proteus_fast/router.py", "import torch"),
        ("proteus_fast/router.py", "def f():\n    from proteus_fast import training"),
        ("proteus_fast/router.py", "def f():\n    import grpc"),
        ("proteus_fast/router.py", "from proteus_fast import cuda"),
        ("proteus_fast/cli.py", "from proteus_fast.training import train"),
        ("proteus_fast/checkpoint.py", "try:\n    import pyarrow\nexcept ImportError:\n    pass"),
        ("kernels/proteus_kernels/reference.py", "import proteus_fast"),
        ("server/proteus_server/service.py", "def f():\n    import torch"),
        ("proteus_fast/router.py", "from . import pool"),
    ],
)
def test_a_forbidden_import_is_seen(name: str, line: str) -> None:
    assert len(violations(ROOT / name, line)) == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("proteus_fast/router.py", "import numpy as np\nfrom proteus_fast import _core"),
        ("proteus_fast/router.py", "def f():\n    import torch"),
        ("proteus_fast/router.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("proteus_fast/cli.py", "def f():\n    from proteus_fast.training import train"),
    ],
)
def test_an_allowed_import_is_let_through(name: str, line: str) -> None:
    assert violations(ROOT / name, line) == []
