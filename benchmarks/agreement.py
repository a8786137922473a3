"""How far encoders are from transformers' own output: the same weights, its float32 and single texts the reference.

python benchmarks/agreement.py [--out FILE] [--only WORD ...]

Largest difference of a hidden state by number of tokens, for every dtype that the CPU computes in: a text by itself,
the eight texts of the table in one batch, packed for DeBERTa and padded for the others, and transformers' own forward
pass of a text by itself in that dtype. Weights are random, the attention far from uniform, or MiniLM's. Exit status 1
where a float32 difference is above 1e-5 of the largest hidden state.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

# behind everything else, so that the installed package is measured
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import encoders
from proteus_fast.encoder import TransformerEncoder, describe

TOKENS = (1, 2, 7, 16, 64, 128, 256, 512)
DTYPES = ("float32", "bfloat16", "float16")
BOUND = 1e-5


def by_deberta(encoder: TransformerEncoder, ids: list[list[int]]) -> list[Tensor]:
    """Hidden states of texts packed into one batch."""
    fast = encoder._fast
    assert fast is not None
    ends = torch.tensor([0, *map(len, ids)]).cumsum(0)
    hidden = fast.forward(torch.tensor([token for row in ids for token in row]), ends, max(map(len, ids)))
    return [hidden[first:last].float() for first, last in pairwise(ends.tolist())]


def by_model(model: Any, ids: list[list[int]]) -> list[Tensor]:
    """Hidden states of texts padded to the longest."""
    batch = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    mask = torch.arange(batch.shape[1])[None] < torch.tensor([len(row) for row in ids])[:, None]
    hidden = model(input_ids=batch, attention_mask=mask).last_hidden_state.float()
    return [hidden[row, : len(text)] for row, text in enumerate(ids)]


def largest(got: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [float((mine - theirs).abs().max()) for mine, theirs in zip(got, expected, strict=True)]


@torch.inference_mode()
def measure(name: str, folder: Path) -> tuple[list[str], bool]:
    """Rows of one architecture, and whether float32 is within the bound."""
    directory = encoders.write(name, folder)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1000, encoders.VOCABULARY, (count,), generator=generator).tolist() for count in TOKENS]
    exact = transformers.AutoModel.from_pretrained(directory).eval()
    expected = [exact(input_ids=torch.tensor([row])).last_hidden_state[0] for row in ids]
    scale = max(float(hidden.abs().max()) for hidden in expected)
    source, rows, within = describe(directory, max_tokens=max(TOKENS))[0], [], True
    for dtype in DTYPES:
        encoder = TransformerEncoder(source, dtype=dtype)
        theirs = copy.deepcopy(exact).to(getattr(torch, dtype))
        if encoder._fast is None:
            ours, together = (lambda row, e=encoder: by_model(e._model, [row])[0]), "padded"
            batch: Callable[[], list[Tensor]] = lambda e=encoder: by_model(e._model, ids)  # noqa: E731
        else:
            ours, together = (lambda row, e=encoder: by_deberta(e, [row])[0]), "packed"
            batch = lambda e=encoder: by_deberta(e, ids)  # noqa: E731
        forms: dict[str, Callable[[], list[Tensor]]] = {
            "ours, alone": lambda ours=ours: [ours(row) for row in ids],
            f"ours, {together}": batch,
        }
        if dtype != "float32":
            forms["transformers, alone"] = lambda m=theirs: [by_model(m, [row])[0] for row in ids]
        elif together == "packed":
            forms["transformers, padded"] = lambda m=theirs: by_model(m, ids)
        for form, call in forms.items():
            away = largest(call(), expected)
            within &= dtype != "float32" or max(away) <= BOUND * max(scale, 1.0)
            cells = " | ".join("0" if value == 0 else f"{value:.1e}" for value in away)
            rows.append(f"| {name} | {scale:.1f} | {dtype} | {form} | {cells} |")
    return rows, within


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="of the architectures' names")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    names = [name for name in (encoders.MINILM, *encoders.SHAPES) if any(word in name for word in options.only)]
    rows, within = [], True
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found, sound = measure(name, Path(folder))
        # what takes long is seen
        print(*found, sep="\n", file=sys.stderr, flush=True)
        rows += found
        within &= sound
    text = "\n".join(
        [
            f"# Agreement with transformers {transformers.__version__}: {encoders.cpu_name()}, Python "
            f"{platform.python_version()}, torch {torch.__version__}",
            "",
            "`python benchmarks/agreement.py`: largest absolute difference of a hidden state from transformers' "
            "float32 output for the same text by itself, by number of tokens; `largest` is the largest hidden state. "
            "Weights are random but for MiniLM's. What is not DeBERTa runs through transformers itself, so that in "
            "float32 a text alone differs by 0.",
            "",
            f"| architecture | largest | dtype | form | {' | '.join(map(str, TOKENS))} |",
            f"| --- | ---: | --- | --- |{' ---: |' * len(TOKENS)}",
            *rows,
            "",
        ]
    )
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
