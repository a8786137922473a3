"""Encoders on one core: DeBERTa's forward pass beside transformers', and from a text to an embedding.

`pytest benchmarks/bench_encoder.py` times the forward pass: a group is one number of tokens, B = 1, DeBERTa-v3-small's
shape with random weights; hidden states are compared first.

`python benchmarks/bench_encoder.py [--rounds 200] [--out FILE]` times text -> embedding of the encoders that a router
can have, beside transformers' own tokenizer call and model, round by round; embeddings are compared first.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

# behind everything else, so that the installed package is measured
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import encoders
from proteus_fast.encoder import TransformerEncoder, describe
from proteus_fast.router import Router
from proteus_kernels.deberta import DebertaEncoder

DEBERTA = "DeBERTa-v3-small's shape"
TABLE = (encoders.MINILM, DEBERTA, "ModernBERT, 12 layers of 384")
TOKENS = (16, 64, 128)


def build(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, DebertaEncoder]:
    """The same weights in transformers' form and in ours."""
    torch.manual_seed(0)
    config = transformers.DebertaV2Config(**encoders.DEBERTA | {"vocab_size": 1000})
    theirs = transformers.AutoModel.from_config(config).eval().to(device, dtype)
    return theirs, DebertaEncoder(config.to_dict(), theirs.state_dict(), device, dtype)


@pytest.fixture(scope="module")
def models() -> tuple[Any, DebertaEncoder]:
    torch.set_num_threads(1)
    return build()


@pytest.mark.parametrize("form", ["proteus_kernels", "transformers"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_forward(benchmark: Any, models: tuple[Any, DebertaEncoder], tokens: int, form: str) -> None:
    benchmark.group = f"DeBERTa-v3-small, {tokens} tokens"
    theirs, ours = models
    ids = torch.randint(0, 1000, (tokens,), generator=torch.Generator().manual_seed(tokens))
    ends = torch.tensor([0, tokens])
    with torch.inference_mode():
        expected = theirs(input_ids=ids[None]).last_hidden_state[0]
        assert (ours.forward(ids, ends, tokens) - expected).abs().max() < 1e-5
        if form == "transformers":
            benchmark(lambda: theirs(input_ids=ids[None]))
        else:
            benchmark(ours.forward, ids, ends, tokens)


def measure(name: str, folder: Path, rounds: int) -> list[str]:
    """Rows of the table for one encoder; fewer rounds where one takes long."""
    directory = encoders.write(name, folder)
    ours = TransformerEncoder(describe(directory, max_tokens=512)[0])
    tokenizer, model = encoders.by_transformers(directory)
    rows = []
    for tokens in TOKENS:
        text = encoders.texts(tokens)
        assert len(ours.tokenize(text)[0]) == tokens
        away = np.abs(ours.encode(text) - encoders.embed(tokenizer, model, text).numpy()).max()
        if not away < 1e-5:
            raise RuntimeError(f"{name}: expected embeddings within 1e-5, got {away}")
        calls: dict[str, Callable[[], Any]] = {
            "proteus_fast": lambda text=text: ours.encode(text),  # type: ignore[misc]
            "transformers": lambda text=text: encoders.embed(tokenizer, model, text),  # type: ignore[misc]
        }
        once = sum(float(us[:, 0].min()) for us in encoders.interleaved_us(calls, 3).values())
        count = max(30, min(rounds, int(2e7 / once)))
        took = encoders.interleaved_us(calls, count)
        rows += table_rows(f"{name} | {tokens}", count, took, float(away))
    return rows


def table_rows(place: str, rounds: int, took: dict[str, NDArray[np.float64]], away: float | None = None) -> list[str]:
    ours, rows, difference = took["proteus_fast"], [], "" if away is None else f"{away:.0e}"
    for form, us in took.items():
        wall, cpu = np.percentile(us[:, 0], [50, 99]), np.median(us[:, 1])
        ratio = np.median(us[:, 1] / ours[:, 1])
        times = f"{wall[0]:,.0f} | {wall[1]:,.0f} | {cpu:,.0f}"
        rows.append(f"| {place} | {form} | {rounds} | {times} | {ratio:.2f} | {difference} |")
    return rows


def hash_rows(rounds: int) -> list[str]:
    router, rows = Router.load(), []
    for tokens in TOKENS:
        text = encoders.texts(tokens)
        took = encoders.interleaved_us({"proteus_fast": lambda text=text: router.encode(text)}, rounds)  # type: ignore[misc]
        rows += table_rows(f"hash (the embedded router's) | {tokens}", rounds, took)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="at most; 20 s a cell, but not below 30 rounds")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    load = os.getloadavg()[0]
    rows = hash_rows(options.rounds)
    for name in TABLE:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(name, Path(folder), options.rounds)
    text = "\n".join(
        [
            f"# {encoders.cpu_name()}, one thread; Python {platform.python_version()}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}",
            "",
            "`python benchmarks/bench_encoder.py`: text -> embedding (tokens, forward pass, mean), one text at a time, "
            "microseconds. The forms take turns in every round; the ratio is the median over rounds of that of the CPU "
            f"time. Load average of the machine's {os.cpu_count()} cores {load:.1f} at the start and "
            f"{os.getloadavg()[0]:.1f} at the end: above 1, the wall times are mostly those of waiting for others.",
            "",
            "| encoder | tokens | form | rounds | p50 | p99 | CPU, median | / ours | largest difference |",
            "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
            *rows,
            "",
        ]
    )
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
