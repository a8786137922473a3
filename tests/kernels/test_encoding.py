"""Batches of token lists: buckets, what is staged, what fills up and changes nothing; as real graphs on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from proteus_kernels import encoding
from proteus_kernels.deberta import DebertaEncoder
from proteus_kernels.encoding import BatchEncoder, Bucket, PackedLayout, PaddedLayout, batches
from tests.kernels.snapshots import DEVICE
from tests.kernels.test_deberta import TINY, V3_SMALL, random_model

LONGEST = 96
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 100,
    "max_position_embeddings": LONGEST,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertConfig(**SIZES),
    "modernbert": lambda: transformers.ModernBertConfig(**SIZES, pad_token_id=0, local_attention=8),
}
# lengths of batches: past a size and at it, texts of no tokens; longer batches lie before shorter ones
LENGTHS = [[40], [3, 0, 9], [16], [17, 1], [96], [2]]


def texts(lengths: list[int]) -> list[list[int]]:
    generator = np.random.default_rng(sum(lengths))
    return [generator.integers(1, 100, length).tolist() for length in lengths]


def packed_layout(config: dict[str, Any] = TINY, dtype: torch.dtype = torch.float32) -> PackedLayout:
    return PackedLayout(DebertaEncoder(config, random_model(config).state_dict(), DEVICE, dtype, LONGEST))


def padded_layout(kind: str, dtype: torch.dtype = torch.float32) -> PaddedLayout:
    torch.manual_seed(1)
    return PaddedLayout(transformers.AutoModel.from_config(CONFIGS[kind]()).eval().to(DEVICE, dtype), LONGEST)


LAYOUTS: dict[str, Callable[[torch.dtype], PackedLayout | PaddedLayout]] = {
    "deberta": lambda dtype: packed_layout(TINY, dtype),
    "bert": lambda dtype: padded_layout("bert", dtype),
    "modernbert": lambda dtype: padded_layout("modernbert", dtype),
}


def test_a_packed_bucket_is_the_least_that_holds_the_batch() -> None:
    layout = packed_layout()
    assert layout.bucket([1]) == Bucket(1, 16, 16)
    assert layout.bucket([64]) == Bucket(1, 64, 64)
    assert layout.bucket([65]) == Bucket(1, 96, 96)
    assert layout.bucket([96, 1]) == Bucket(4, 96, 128)
    assert layout.bucket([64] * 64) == Bucket(64, 96, 4096)
    assert layout.bucket([64] * 63 + [65]) is None
    assert layout.bucket([1] * 65) is None
    assert layout.exact([5, 96, 0]) == Bucket(3, 96, 101)


def test_a_padded_bucket_is_the_least_that_holds_the_batch() -> None:
    layout = padded_layout("bert")
    assert layout.bucket([1]) == Bucket(1, 16, 16)
    assert layout.bucket([64, 3, 3]) == Bucket(4, 64, 256)
    # no text is longer than the encoder takes
    assert layout.bucket([90]) == Bucket(1, 96, 96)
    assert layout.bucket([64] * 64) == Bucket(64, 64, 4096)
    assert layout.bucket([64] * 63 + [65]) is None
    assert layout.bucket([1] * 65) is None
    assert layout.exact([5, 96, 0]) == Bucket(3, 96, 288)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_buckets_are_few_and_fit_the_buffers(kind: str) -> None:
    layout = LAYOUTS[kind](torch.float32)
    layout.longest = 512
    layout._sizes = [size for size in encoding.TOKEN_SIZES if size <= 512]  # type: ignore[union-attr]
    found = {layout.bucket([length] * rows) for rows in range(1, 66) for length in range(1, 513)} - {None}
    assert len(found) <= 60
    for bucket in found:
        assert bucket is not None
        assert layout.numbers(bucket) <= encoding.MOST_ROWS + 1 + encoding.MOST_TOKENS


def test_what_is_staged() -> None:
    ids = [[5, 6, 7], [], [8]]
    packed, padded = packed_layout(), padded_layout("bert")
    host = np.full(packed.numbers(Bucket(4, 16, 16)), -1, np.int64)
    packed.stage(ids, Bucket(4, 16, 16), host)
    assert host.tolist() == [0, 3, 3, 4, 4, 5, 6, 7, 8, *[0] * 12]
    host = np.full(padded.numbers(Bucket(4, 3, 12)), -1, np.int64)
    padded.stage(ids, Bucket(4, 3, 12), host)
    assert host.tolist() == [3, 0, 1, 0, 5, 6, 7, 0, 0, 0, 8, 0, 0, 0, 0, 0]


def alone(layout: PackedLayout | PaddedLayout, text: list[int], dim: int) -> torch.Tensor:
    """The embedding of one text without anything that fills up: the forward pass itself and torch's mean."""
    if not text:
        return torch.zeros(dim)
    ids = torch.tensor(text, device=DEVICE)
    with torch.no_grad():
        if isinstance(layout, PackedLayout):
            hidden = layout._encoder.forward(ids, torch.tensor([0, len(text)], device=DEVICE), len(text))
        else:
            hidden = layout._model(input_ids=ids[None]).last_hidden_state[0]
    return hidden.float().mean(dim=0).cpu()


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str
)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_what_fills_up_changes_nothing(kind: str, dtype: torch.dtype, atol: float) -> None:
    layout, exact = LAYOUTS[kind](dtype), LAYOUTS[kind](torch.float32)
    encoder = BatchEncoder(layout, 32 if kind != "deberta" else TINY["hidden_size"], DEVICE)
    for lengths in LENGTHS if dtype == torch.float32 else LENGTHS[:2]:
        ids = texts(lengths)
        pooled = encoder.encode(ids)
        assert pooled.shape == (len(ids), 32)
        assert pooled.dtype == torch.float32
        for row, text in enumerate(ids):
            torch.testing.assert_close(pooled[row].cpu(), alone(exact, text, 32), rtol=0, atol=atol)
    assert encoder._can_capture


def test_what_lies_behind_the_last_text_is_never_read() -> None:
    """Neither a text of it nor what an earlier batch left: the bits of the embeddings do not change with it."""
    layout = packed_layout(V3_SMALL)
    bucket, ids = Bucket(4, 64, 64), texts([20, 11])
    host, out = np.zeros(layout.numbers(bucket), np.int64), torch.empty(2, 4, 128, device=DEVICE)
    layout.stage(ids, bucket, host)
    layout.encode(torch.from_numpy(host).to(DEVICE), bucket, out[0])
    host[bucket.rows + 1 + 31 :] = 99
    layout.encode(torch.from_numpy(host).to(DEVICE), bucket, out[1])
    assert torch.equal(out[0], out[1])
    assert not out[0, 2:].any()


@pytest.mark.parametrize("kind", ["deberta", "bert"])
def test_large_batches_are_launched(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LAYOUTS[kind](torch.float32)
    encoder = BatchEncoder(layout, 32, DEVICE)
    # several batches of similar lengths
    monkeypatch.setattr(encoding, "TOKEN_BUDGET", 200)
    ids = texts([*[1] * 60, *range(20, 26), 0])
    pooled = encoder.encode(ids)
    assert not encoder._replays
    for row in (0, 30, 60, 65, 66):
        torch.testing.assert_close(pooled[row].cpu(), alone(layout, ids[row], 32), rtol=0, atol=1e-5)
    assert encoder.encode([]).shape == (0, 32)
    assert not encoder.encode([[], []]).any()


def test_batches_hold_similar_lengths_within_the_budget() -> None:
    lengths = [5, 100, 7, 0, 6, 90, 300, 5]
    made = list(batches(lengths, 200))
    assert sorted(row for batch in made for row in batch) == [0, 1, 2, 4, 5, 6, 7]
    for batch in made:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= 200
    assert made == [[0, 7, 4, 2], [5, 1], [6]]
    assert list(batches([], 10)) == []


@pytest.mark.parametrize("kind", ["deberta", "bert"])
def test_after_warming_up_no_single_text_waits_for_a_capture(kind: str) -> None:
    encoder = BatchEncoder(LAYOUTS[kind](torch.float32), 32, DEVICE)
    encoder.warm_up()
    captured = dict(encoder._replays)
    assert {bucket.rows for bucket in captured} == {1}
    for length in (1, 16, 17, 50, LONGEST):
        encoder.encode(texts([length]))
    assert encoder._replays == captured


class Refuses:
    """A model that looks at values with its first call for some length, which no graph can hold."""

    def __init__(self, model: Any, length: int) -> None:
        self._model, self._length, self.refused = model, length, 0

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        if input_ids.shape == (1, self._length) and not self.refused:
            self.refused += 1
            raise RuntimeError("operation not permitted when stream is capturing")
        return self._model(input_ids=input_ids, attention_mask=attention_mask)


def test_what_cannot_be_captured_is_launched(caplog: pytest.LogCaptureFixture) -> None:
    layout = padded_layout("bert")
    model = Refuses(layout._model, 32)
    encoder = BatchEncoder(PaddedLayout(model, LONGEST), 32, DEVICE)
    short, refused, later = texts([9]), texts([30]), texts([60])
    encoder.encode(short)
    with caplog.at_level(logging.WARNING):
        for ids in (refused, refused, later, short):
            torch.testing.assert_close(encoder.encode(ids)[0].cpu(), alone(layout, ids[0], 32), rtol=0, atol=1e-5)
    assert [record.getMessage() for record in caplog.records] == [
        "an encoder that cannot be captured is launched: RuntimeError"
    ]
    assert model.refused == 1
    # what was captured before is replayed still
    assert list(encoder._replays) == [Bucket(1, 16, 16)]


def test_threads_share_an_encoder() -> None:
    layout = packed_layout()
    encoder = BatchEncoder(layout, 32, DEVICE)
    many = [texts([1 + i % 40]) for i in range(0, 240, 13)]
    with ThreadPoolExecutor(4) as pool:
        pooled = list(pool.map(encoder.encode, many))
    for ids, got in zip(many, pooled, strict=True):
        for row, text in enumerate(ids):
            torch.testing.assert_close(got[row].cpu(), alone(layout, text, 32), rtol=0, atol=1e-5)


def test_embeddings_are_the_callers_own() -> None:
    """A later batch does not overwrite them, and no mode of the first call stays with the buffers."""
    encoder = BatchEncoder(packed_layout(), 32, DEVICE)
    with torch.inference_mode():
        encoder.encode(texts([5]))
    first = encoder.encode(texts([6]))
    kept = first.clone()
    encoder.encode(texts([7]))
    assert torch.equal(first, kept)
    assert not first.is_inference()
    assert not first.requires_grad
