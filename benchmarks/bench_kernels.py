"""Kernels on a GPU beside torch, waited for: `pytest benchmarks/bench_kernels.py`. Device times: benchmarks/gpu.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks import workload
from proteus_fast.router import Router
from proteus_kernels import reference

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # torch.compile's advice to round float32 products, which the comparison is not about
    pytest.mark.filterwarnings("ignore:TensorFloat32"),
]

FORMS = ("proteus_fast", "captured", "torch_eager", "torch_compile", "reference")


@pytest.fixture(scope="module")
def router() -> Router:
    return workload.build_router()


def waited(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call and the wait for its answers."""

    def run(*arguments: Any) -> Any:
        answers = call(*arguments)
        torch.cuda.synchronize()
        return answers

    return run


def _run_captured(captured: Any, x: torch.Tensor) -> Any:
    return captured.run(x, workload.TAU)


@pytest.mark.parametrize("rows", [1, 64, 4096])
@pytest.mark.parametrize("mode", ["dual", "policy"])
@pytest.mark.parametrize("form", FORMS)
def test_decide(benchmark: Any, router: Router, mode: Any, rows: int, form: str) -> None:
    benchmark.group = f"GPU decide {mode} B={rows}"
    x = torch.from_numpy(workload.embeddings(rows)).cuda()
    # every form of the dual mode serves one vertex: the step's code has no share at this id
    ids = torch.zeros(rows, dtype=torch.int64, device="cuda")
    expected = router.route_batch(x, workload.TAU, mode=mode, ids=ids)
    forms: dict[str, Callable[[], Callable[[torch.Tensor], Any]]] = {
        "proteus_fast": lambda: lambda z: router.route_batch(z, workload.TAU, mode=mode, ids=ids),
        "captured": lambda: partial(_run_captured, router.capture(rows, mode=mode)),
        "torch_eager": lambda: workload.torch_eager(router, mode, "cuda"),
        "torch_compile": lambda: workload.torch_compiled(router, mode, "cuda"),
        "reference": lambda: workload.reference_form(router, mode, "cuda"),
    }
    decide = waited(forms[form]())
    choice, mu, score, *_ = decide(x)
    # the captured form hashes the rows themselves, and may mix two vertices
    if form != "captured" or mode == "policy":
        assert (mu - expected.mu).abs().max() < 2e-3
        assert (score - expected.score).abs().max() < 2e-3
        assert (choice == expected.choice).double().mean() > 0.97
    benchmark(decide, x)


@pytest.mark.parametrize("rows", [1, 64, 1024])
@pytest.mark.parametrize("form", ["proteus_kernels", "torch_einsum", "torch_compile", "reference"])
def test_masked_mean(benchmark: Any, rows: int, form: str) -> None:
    from benchmarks.bench_pooling import einsum
    from proteus_kernels.pooling import masked_mean

    benchmark.group = f"GPU masked mean {rows} x 64 x 768 bf16"
    hidden = torch.randn(rows, 64, 768, device="cuda").bfloat16()
    mask = torch.rand(rows, 64, device="cuda") < 0.8
    forms: dict[str, Callable[..., torch.Tensor]] = {
        "proteus_kernels": masked_mean,
        "torch_einsum": einsum,
        "torch_compile": torch.compile(einsum, dynamic=False),
        "reference": reference.masked_mean_ref,
    }
    expected = reference.masked_mean_ref(hidden.double(), mask)
    assert (forms[form](hidden, mask).double() - expected).abs().max() < 0.05
    benchmark(waited(forms[form]), hidden, mask)


@pytest.mark.parametrize("form", ["proteus_kernels", "torch_dirichlet"])
def test_sample_beta(benchmark: Any, form: str) -> None:
    from proteus_kernels.beta import sample_beta

    benchmark.group = "GPU Beta samples, 4,096"
    conc1, conc0 = 1.0 + 4.0 * torch.rand(2, 4096, device="cuda")
    state = torch.zeros(2, dtype=torch.int64, device="cuda")
    law = torch.distributions.Beta(conc1, conc0, validate_args=False)
    forms: dict[str, Callable[[], torch.Tensor]] = {
        "proteus_kernels": lambda: sample_beta(conc1, conc0, state),
        "torch_dirichlet": law.sample,
    }
    drawn = forms[form]()
    assert (drawn.mean() - law.mean.mean()).abs() < 0.02
    benchmark(waited(forms[form]))
