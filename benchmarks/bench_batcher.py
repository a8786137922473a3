"""A row's way through the batcher beside the same decision called directly and through an executor, and texts through
MiniLM by the number of callers.

`pytest benchmarks/bench_batcher.py`: answers are compared before a time counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from benchmarks import encoders, workload
from proteus_fast.batcher import Batcher
from proteus_fast.router import Router

CALLS = 200
TEXTS = encoders.texts(16, 16)


@pytest.fixture(scope="module")
def router() -> Router:
    return workload.build_router()


@pytest.fixture(scope="module")
def batcher(router: Router) -> Iterator[Batcher]:
    with Batcher(router) as made:
        yield made


@pytest.mark.parametrize("form", ["direct", "batcher"])
def test_one_row_from_a_thread(benchmark: Any, router: Router, batcher: Batcher, form: str) -> None:
    benchmark.group = "one row from a blocked thread"
    x = workload.embeddings(1)
    call = (router if form == "direct" else batcher).route_batch
    assert call(x, workload.TAU).choice[0] == router.route_batch(x, workload.TAU).choice[0]
    benchmark(call, x, workload.TAU)


@pytest.mark.parametrize("form", ["executor", "batcher"])
@pytest.mark.parametrize("tasks", [1, 32])
def test_rows_from_coroutines(benchmark: Any, router: Router, batcher: Batcher, form: str, tasks: int) -> None:
    """The time is that of 200 calls by so many tasks in turn."""
    benchmark.group = f"{CALLS} rows from {tasks} task(s)"
    x = workload.embeddings(1)
    expected = router.route_batch(x, workload.TAU).choice[0]

    async def one() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(CALLS // tasks):
            if form == "executor":
                answer = await loop.run_in_executor(None, router.route_batch, x, workload.TAU)
            else:
                answer = await batcher.route_batch_async(x, workload.TAU)
            assert answer.choice[0] == expected

    async def all_of_them() -> None:
        await asyncio.gather(*[one() for _ in range(tasks)])

    loop = asyncio.new_event_loop()
    try:
        benchmark(lambda: loop.run_until_complete(all_of_them()))
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


@pytest.fixture(scope="module")
def transformer() -> Router:
    torch.set_num_threads(1)
    return encoders.text_router(encoders.minilm())


@pytest.mark.parametrize("form", ["direct", "batcher"])
@pytest.mark.parametrize("callers", [1, 4, 16])
def test_texts_of_callers(benchmark: Any, transformer: Router, form: str, callers: int) -> None:
    """The time is that of 16 texts of 16 tokens by so many threads, through MiniLM."""
    benchmark.group = f"{len(TEXTS)} texts from {callers} thread(s)"
    expected = [transformer.route(text, workload.TAU) for text in TEXTS]
    with Batcher(transformer) as batcher, ThreadPoolExecutor(callers) as pool:
        route = (transformer if form == "direct" else batcher).route

        def all_of_them() -> Any:
            return list(pool.map(lambda text: route(text, workload.TAU), TEXTS))

        assert all_of_them() == expected
        benchmark(all_of_them)
