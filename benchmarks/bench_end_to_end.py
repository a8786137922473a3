"""From a text to a decision, in process and over gRPC on a Unix socket: `pytest benchmarks/bench_end_to_end.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from proteus_fast.demo_queries import queries
from proteus_fast.router import Router
from proteus_kernels import reference
from proteus_server.app import Server
from proteus_server.client import Client

TAU = 0.85
TEXT = queries()[3]


@pytest.fixture(scope="module")
def router() -> Router:
    torch.set_num_threads(1)
    return Router.load()


@pytest.fixture(scope="module")
def client(router: Router, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder: Path = tmp_path_factory.mktemp("socket")
    with Server(router, f"unix:{folder}/s").running() as address, Client(address) as client:
        yield client


def by_reference(router: Router, x: np.ndarray) -> int:
    """The choice by the plain torch functions in float32, from the embedding on."""
    source = router.checkpoint
    tensors = {name: torch.from_numpy(t) for name, t in source.tensors.items() if "encoder" not in name}
    c = torch.from_numpy((router.pool.price_usd / source.config.cost_unit_usd).astype(np.float32))
    path, table = router.certificate.paths["policy"].path, router.certificate.tables["policy"]["certified"]
    z = torch.from_numpy(x)
    code = torch.tensor([int(table.code[round(TAU * 1000)])], dtype=torch.int32)
    vertex = reference.mixing_side_ref(reference.row_hash_ref(z, router.certificate.key), code)
    p = reference.predict_ref(z, tensors, source.config.link)
    mu = reference.policy_ref(z, torch.from_numpy(path.parameter)[vertex], tensors, source.config.head or "").mu
    scores = reference.scores_ref(p, mu, tensors["policy.prior"], c, source.config.kappa, source.config.gamma)
    return int(reference.best_candidate_ref(scores)[0])


@pytest.mark.parametrize("form", ["encode_and_route_batch", "route", "encode_and_reference", "grpc"])
def test_text_to_decision(benchmark: Any, router: Router, client: Client, form: str) -> None:
    benchmark.group = "text -> decision"
    forms = {
        "encode_and_route_batch": lambda: int(router.route_batch(router.encode([TEXT]), TAU).choice[0]),
        "route": lambda: router.route(TEXT, TAU).choice,
        "encode_and_reference": lambda: by_reference(router, router.encode([TEXT])),
        "grpc": lambda: router.pool.names.index(client.route(TEXT, tau=TAU).candidate),
    }
    assert forms[form]() == router.route(TEXT, TAU).choice
    benchmark(forms[form])
