"""Every figure that needs a GPU, in one run: agreement first, then times, then what else was tried.

python benchmarks/gpu.py [--out benchmarks/results] [--only SECTION ...] [--skip-tests]

Runs the tests of the kernels on the GPU; a red test ends the run without a figure. Then writes gpu-NAME.md section by
section, so that a run which is cut short leaves what it had: device time by graph replays and host time of a call
beside the budgets, torch eager and torch.compile in the same run, the share of the copy bandwidth, tiles and pooling by
the sizes that choose between them, a profile of one call. Exit status 1 where a test is red or a section failed.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.testing

# behind everything else, so that the installed package is measured
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import bench_encoder, encoders, workload
from benchmarks.bench_pooling import einsum
from proteus_fast import cuda
from proteus_fast.router import Router
from proteus_kernels import pooling, snapshot
from proteus_kernels.beta import sample_beta

TAU = workload.TAU
# microseconds on one H200: device and host budgets by rows, and of pooling
DEVICE_BUDGET_US = {1: 8, 64: 9, 4096: 12}
HOST_BUDGET_US = {1: 20, 64: 22, 4096: 25}
POOLING_BUDGET_US = {64: 6, 4096: 115}


def device_us(call: Callable[[], Any]) -> float:
    """Median time on the device, by replays of a graph: no launch gaps in it."""
    return 1000.0 * float(triton.testing.do_bench_cudagraph(call, rep=50, return_mode="median"))


def host_us(call: Callable[[], Any], calls: int = 300) -> tuple[float, float]:
    """Median time until a call returns, and until its answers are there."""
    returned, answered = [], []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        call()
        returned.append((time.perf_counter_ns() - start) / 1000)
        torch.cuda.synchronize()
        answered.append((time.perf_counter_ns() - start) / 1000)
    return statistics.median(returned), statistics.median(answered)


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    lines += [f"| {' | '.join(f'{v:.2f}' if isinstance(v, float) else str(v) for v in row)} |" for row in rows]
    return "\n".join(lines)


def machine() -> str:
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    name = torch.cuda.get_device_name()
    return f"{name}, driver {driver}, torch {torch.__version__}, Triton {triton.__version__}, one run"


def agreement() -> str:
    """The tests of the kernels, on the device."""
    # a warning of some other release of some library is no reason for going home without figures
    command = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-m", "not verify"]
    command += ["tests/kernels", "tests/test_cuda.py"]
    if find_spec("xdist"):
        # nearly all of the time is compiling: hundreds of small routers' kernels
        command += ["-n", str(os.cpu_count())]
    # the checkout's folder must not hide the installed package
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(done.stdout[-6000:])
    return f"`pytest -m 'not verify' tests/kernels tests/test_cuda.py`: {done.stdout.strip().splitlines()[-1]}"


def copy_rate() -> float:
    """Bytes read and written by a large copy, per second."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2.0 * source.numel() / (device_us(lambda: target.copy_(source)) * 1e-6)


def decisions() -> str:
    router = workload.build_router()
    device = cuda.find_device("cuda")
    rounded = cuda.build_snapshot(router.checkpoint, device, "bfloat16")
    rows = []
    for mode in ("policy", "dual"):
        for batch in (1, 64, 4096):
            x = torch.from_numpy(workload.embeddings(batch)).to(device)
            captured = router.capture(batch, mode=mode)  # type: ignore[arg-type]
            forms: dict[str, Callable[[], Any]] = {
                "route_batch": partial(router.route_batch, x, TAU, mode=mode),  # type: ignore[arg-type]
                "captured run": partial(captured.run, x, TAU),
                "products in bfloat16": partial(rounded.decide, x, TAU, mode=mode),
                "torch eager": partial(workload.torch_eager(router, mode, "cuda"), x),
                "torch.compile": partial(workload.torch_compiled(router, mode, "cuda"), x),
            }
            for name, call in forms.items():
                call()
                # a graph cannot be captured inside another
                on_device = "" if name == "captured run" else device_us(call)
                rows.append(
                    [mode, batch, name, on_device, *host_us(call), DEVICE_BUDGET_US[batch], HOST_BUDGET_US[batch]]
                )
    head = ["mode", "B", "form", "device, us", "host returns, us", "answers there, us", "device budget", "host budget"]
    return f"D = 256, K = 11, policy of 134 k parameters.\n\n{table(head, rows)}"


def poolings() -> str:
    rate, rows = copy_rate(), []
    for batch in (64, 4096):
        hidden = torch.randn(batch, 64, 768, device="cuda").bfloat16()
        mask = torch.ones(batch, 64, dtype=torch.bool, device="cuda")
        flat, ends = hidden.view(-1, 768), torch.arange(0, batch * 64 + 1, 64, dtype=torch.int32, device="cuda")
        forms: dict[str, Callable[[], Any]] = {
            "masked_mean": partial(pooling.masked_mean, hidden, mask),
            "varlen_mean": partial(pooling.varlen_mean, flat, ends),
            "torch eager": partial(einsum, hidden, mask),
            "torch.compile": partial(torch.compile(einsum, dynamic=False), hidden, mask),
        }
        moved = hidden.numel() * 2 + batch * 768 * 4
        for name, call in forms.items():
            call()
            took = device_us(call)
            rows.append(
                [
                    f"{batch} x 64 x 768",
                    name,
                    took,
                    moved / took / 1e6,
                    moved / (took * 1e-6) / rate,
                    POOLING_BUDGET_US[batch],
                ]
            )
    head = ["bf16", "form", "device, us", "TB/s", "share of the copy rate", "budget, us"]
    return f"A copy of 1 GiB moves {rate / 1e12:.2f} TB/s, read and written.\n\n{table(head, rows)}"


def pooled_in_front() -> str:
    """Where one launch pays for hidden states, and where two do."""
    router = workload.build_router()
    place, rows = router.on_device(cuda.find_device("cuda")), []
    for tokens in (16, 64, 128, 512):
        hidden = torch.randn(1, tokens, 256, device="cuda").bfloat16()
        mask = torch.ones(1, tokens, dtype=torch.bool, device="cuda")
        one = lambda h=hidden, m=mask: place.decide(h, TAU, mask=m)  # noqa: E731
        two = lambda h=hidden, m=mask: place.decide(pooling.masked_mean(h, m), TAU)  # noqa: E731
        rows.append([tokens, device_us(one), device_us(two), host_us(one)[1], host_us(two)[1]])
    return table(["T at B = 1", "one launch, us", "two launches, us", "answers there, one", "answers there, two"], rows)


def tiles() -> str:
    """The batch sizes at which a wide tile is the quicker one, and other shapes of either."""
    router = workload.build_router()
    place, rows = router.on_device(cuda.find_device("cuda")), []
    shapes = [
        (16, 32, 256, 8),
        (16, 32, 128, 8),
        (16, 64, 256, 8),
        (32, 32, 128, 8),
        (32, 64, 128, 8),
        (64, 32, 128, 8),
    ]
    chosen = snapshot.choose_tile
    try:
        for batch in (1, 256, 1024, 2112, 4096, 16384):
            x = torch.from_numpy(workload.embeddings(batch)).cuda()
            for shape in shapes:
                snapshot.choose_tile = lambda *_, shape=shape: snapshot.Tile(*shape)
                try:
                    took: float | str = device_us(lambda x=x: place.decide(x, TAU, mode="policy"))
                except Exception as error:
                    took = type(error).__name__
                rows.append([batch, str(shape), took])
    finally:
        snapshot.choose_tile = chosen
    return table(["B", "rows, depth, columns, warps", "device, us"], rows)


def forward_passes() -> str:
    """DeBERTa-v3-small's shape, tokens to hidden states, and its difference from transformers."""
    theirs, ours = bench_encoder.build("cuda", torch.bfloat16)
    compiled, rows = torch.compile(theirs, dynamic=False), []
    for batch, tokens in ((1, 16), (1, 64), (1, 128), (64, 64)):
        ids = torch.randint(0, 1000, (batch, tokens), device="cuda")
        ends = torch.arange(0, batch * tokens + 1, tokens, device="cuda")
        forms: dict[str, Callable[[], Any]] = {
            "proteus_kernels": partial(ours.forward, ids.flatten(), ends, tokens),
            "transformers": partial(theirs, input_ids=ids),
            "torch.compile": partial(compiled, input_ids=ids),
        }
        with torch.inference_mode():
            expected = theirs(input_ids=ids).last_hidden_state.flatten(0, 1)
            away = float((forms["proteus_kernels"]() - expected).abs().max())
            for name, call in forms.items():
                call()
                rows.append([f"{batch} x {tokens}", name, device_us(call), *host_us(call, 100), away])
    head = ["bf16", "form", "device, us", "host returns, us", "answers there, us", "largest difference"]
    return f"Budgets: 250 us on the device at 1 x 64, 1,000 us at 64 x 64.\n\n{table(head, rows)}"


def texts_to_decisions() -> str:
    """From text to a choice on the host in this process, with DeBERTa-v3-small's shape."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        directory = encoders.write("DeBERTa-v3-small's shape", Path(folder))
        for precision, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
            router = encoders.text_router(directory, "cuda:0", precision)
            tokenizer, theirs = encoders.by_transformers(directory, "cuda", dtype)
            compiled = torch.compile(theirs, dynamic=False)
            head = {name: torch.from_numpy(x).cuda() for name, x in router.checkpoint.tensors.items()}

            def plain(model: Any, texts: list[str], *, tokenizer: Any = tokenizer, head: Any = head) -> Any:
                x = encoders.embed(tokenizer, model, texts, "cuda")
                return (x @ head["predictor.weight"] + head["predictor.bias"]).argmax(dim=1).cpu()

            def ours(texts: list[str], *, router: Router = router) -> Any:
                return router.route_batch(router.encode(texts), TAU).choice.cpu()

            for batch, tokens in ((1, 16), (1, 64), (1, 128), (64, 64), (256, 64)):
                texts = encoders.texts(tokens, batch)
                away = (router.encode(texts) - encoders.embed(tokenizer, theirs, texts, "cuda")).abs().max()
                forms: dict[str, Callable[[], Any]] = {
                    "encode and route_batch": partial(ours, texts),
                    "transformers": partial(plain, theirs, texts),
                    "torch.compile": partial(plain, compiled, texts),
                }
                if batch == 1:
                    forms["route"] = partial(router.route, texts[0], TAU)
                took = encoders.interleaved_us(forms, 1000 if batch == 1 else 100)
                for name, us in took.items():
                    p50, p99 = np.percentile(us[:, 0], [50, 99])
                    rows.append(
                        [precision, f"{batch} x {tokens}", name, float(p50), float(p99), batch / p50 * 1e6, float(away)]
                    )
    titles = ["precision", "texts", "form", "p50, us", "p99, us", "queries/s", "largest difference"]
    note = "A text's tokens are those of MiniLM's tokenizer; the plain forms end in a product and an argmax."
    return f"{note} Budgets at 1 x 64: p50 600 us, p99 1,000 us over gRPC.\n\n{table(titles, rows)}"


def served_texts() -> str:
    """The same over gRPC, on a Unix socket, from the Python client: the GPU encodes, the CPU decides."""
    from proteus_server.app import Server
    from proteus_server.client import Client

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        router = encoders.text_router(encoders.write("DeBERTa-v3-small's shape", Path(folder)), "cuda:0", "float32")
        server = Server(router, f"unix:{folder}/s")
        with server.running() as place, Client(place, timeout_s=60.0) as client:
            for tokens in (16, 64, 128):
                texts = encoders.texts(tokens, 64)
                same = [client.route(text, tau=TAU).choice == router.route(text, TAU).choice for text in texts]
                took = []
                for i in range(1000):
                    start = time.perf_counter()
                    client.route(texts[i % len(texts)], tau=TAU)
                    took.append(1e6 * (time.perf_counter() - start))
                with ThreadPoolExecutor(64) as pool:
                    start = time.perf_counter()
                    list(pool.map(lambda text: client.route(text, tau=TAU), texts * 50))
                    rate = 50 * len(texts) / (time.perf_counter() - start)
                p50, p99 = np.percentile(took, [50, 99])
                rows.append([tokens, float(p50), float(p99), rate, f"{np.mean(same):.0%}"])
    titles = ["tokens", "one at a time: p50, us", "p99, us", "64 callers: queries/s", "the router's own choices"]
    return f"Budgets at 64 tokens: p50 600 us, p99 1,000 us.\n\n{table(titles, rows)}"


def samples() -> str:
    rows = []
    for count in (64, 4096, 1 << 20):
        conc1, conc0 = 1.0 + 4.0 * torch.rand(2, count, device="cuda")
        state = torch.zeros(2, dtype=torch.int64, device="cuda")
        law = torch.distributions.Beta(conc1, conc0, validate_args=False)
        rows.append([count, device_us(partial(sample_beta, conc1, conc0, state)), device_us(law.sample)])
    return table(["Beta samples", "sample_beta, us", "torch, us"], rows)


def profile() -> str:
    """Where the host's time goes in a call, and the device's."""
    router, x = workload.build_router(), torch.from_numpy(workload.embeddings(1)).cuda()
    for _ in range(20):
        router.route_batch(x, TAU, mode="policy")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(100):
            router.route_batch(x, TAU, mode="policy")
        torch.cuda.synchronize()
    return f"```\n{profiler.key_averages().table(sort_by='self_cpu_time_total', row_limit=12)}\n```"


def loaded() -> str:
    start = time.perf_counter()
    Router.load(device="cuda")
    return f'`Router.load(device="cuda")`, kernels compiled or from the cache: {time.perf_counter() - start:.1f} s'


SECTIONS: dict[str, Callable[[], str]] = {
    "Decisions": decisions,
    "Mean over tokens": poolings,
    "Pooled in front of the decision": pooled_in_front,
    "Tiles": tiles,
    "Beta samples": samples,
    "DeBERTa": forward_passes,
    "Text to decision": texts_to_decisions,
    "Text to decision over gRPC": served_texts,
    "Loading": loaded,
    "Profile of 100 calls of route_batch, B = 1": profile,
}


def run_section(title: str) -> str:
    try:
        body = SECTIONS[title]()
    except Exception:
        # the other sections are still worth their time
        body = f"FAILED\n\n```\n{traceback.format_exc()}```"
    return f"\n## {title}\n\n{body}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--skip-tests", action="store_true", help="where they were green a moment ago")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, got none")
    try:
        agreed = "tests skipped" if options.skip_tests else agreement()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    options.out.mkdir(parents=True, exist_ok=True)
    failed = False
    with (options.out / f"gpu-{name}.md").open("w", encoding="utf-8") as file:

        def write(text: str) -> None:
            for stream in (file, sys.stdout):
                stream.write(text)
                stream.flush()

        write(f"# {machine()}\n\n`python benchmarks/gpu.py {' '.join(sys.argv[1:])}`\n\n{agreed}\n")
        for title in options.only:
            text = run_section(title)
            failed |= "\nFAILED\n" in text
            write(text)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
