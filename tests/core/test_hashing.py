"""The featuriser against its plain Python statement, on texts of every kind."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from proteus_fast import _core
from tests.core import plain_hashing

ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz     ",
    "The Quick brown fox? 0123456789 \n\t",
    "{}();=<>[]_+-*/ \n  ifforreturnx1",
    "äöüßéñçœ ŁńА БВ где ",
    "日本語中文한국어。、　 ",
    "😀👍🏽👩‍💻🇪🇺 ok ",
    "\0\x01\x7f\x80\xff \v\f\r",
    "\ud800\udfff\udc80 a",
]
SPECIAL = [
    "",
    " ",
    "\0\0\t\n",
    "a",
    "A a A a",
    "?",
    "abc",
    "  abc \n\n DEF  ",
    "x" * 16384,
    "x" * 16385,
    "word " * 5000,
    "\n" * 20000,
    b"\xff\xfe\x00\xc3\x28 \xe2\x82",
    bytes(range(256)),
]


def random_texts(count: int, seed: int) -> Iterator[str | bytes]:
    rng = np.random.default_rng(seed)
    for i in range(count):
        size = int(rng.integers(0, 200 if i % 500 else 20_000))
        if i % 9 == 8:
            yield rng.bytes(size)
        else:
            letters = np.array(list(ALPHABETS[i % 9]), dtype=object)
            yield "".join(rng.choice(letters, size))


def assert_features(texts: list[str | bytes], rows: int) -> None:
    indptr, index, count, block = _core.hash_features(texts, rows)
    assert (indptr.dtype, index.dtype, count.dtype, block.dtype) == (np.int64, np.int32, np.float32, np.uint8)
    assert indptr[0] == 0
    assert len(index) == len(count) == len(block) == indptr[-1]
    for i, text in enumerate(texts):
        part = slice(indptr[i], indptr[i + 1])
        got = list(zip(index[part].tolist(), block[part].tolist(), count[part].tolist(), strict=True))
        expected = [(row, b, float(n)) for (row, b), n in plain_hashing.features(text, rows).items()]
        assert got == expected, repr(text[:80])


def make_table(rows: int, dim: int, seed: int = 0) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    table = rng.integers(-127, 128, (rows, dim), dtype=np.int8)
    return table, rng.random(rows, dtype=np.float32) / 127, rng.random(rows, dtype=np.float32) * 8


BLOCK_WEIGHT = np.array([1.0, 0.5, 2.0, 0.25], dtype=np.float32)


@pytest.mark.parametrize("rows", [2, 64, 65536, 2**28])
def test_features_of_special_texts(rows: int) -> None:
    assert_features(SPECIAL, rows)


def test_features_of_random_texts() -> None:
    assert_features(list(random_texts(10_000, seed=1)), 4096)


@pytest.mark.verify
def test_features_of_many_random_texts() -> None:
    for seed in range(10):
        assert_features(list(random_texts(10_000, seed=100 + seed)), 65536)


@pytest.mark.parametrize("dim", [1, 8, 17, 88, 130])
def test_embedding_is_the_weighted_sum(dim: int) -> None:
    table, row_scale, idf = make_table(1024, dim)
    encoder = _core.HashEncoder(table, row_scale, idf, BLOCK_WEIGHT)
    assert (encoder.dim, encoder.rows) == (dim, 1024)
    texts = [*SPECIAL, *random_texts(200, seed=2)]
    got = encoder.encode(texts)
    assert got.shape == (len(texts), dim)
    assert got.dtype == np.float32
    for text, row in zip(texts, got, strict=True):
        expected = plain_hashing.encode(text, table, row_scale, idf, BLOCK_WEIGHT)
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(encoder.encode([text])[0], row)


def test_str_and_its_utf8_are_one_text() -> None:
    texts = ["naïve", "日本", "😀", "\ud800"]
    encoder = _core.HashEncoder(*make_table(64, 8), BLOCK_WEIGHT)
    raw = [text.encode("utf-8", "surrogatepass") for text in texts]
    np.testing.assert_array_equal(encoder.encode(texts), encoder.encode(raw))


def test_empty_blocks_and_zero_weights_add_nothing() -> None:
    table, row_scale, idf = make_table(64, 8)
    encoder = _core.HashEncoder(table, row_scale, np.zeros_like(idf), BLOCK_WEIGHT)
    np.testing.assert_array_equal(encoder.encode(["some words", ""]), np.zeros((2, 8)))
    words_only = _core.HashEncoder(table, row_scale, idf, np.array([1, 1, 1, 0], dtype=np.float32))
    np.testing.assert_array_equal(words_only.encode([""]), np.zeros((1, 8)))


def test_no_texts() -> None:
    assert _core.HashEncoder(*make_table(64, 8), BLOCK_WEIGHT).encode([]).shape == (0, 8)
    assert _core.hash_features([], 64)[0].tolist() == [0]


def test_time_does_not_grow_with_the_middle() -> None:
    """The aim is 4,000 prompts in a second, the 5 MiB one among them; a slow machine has ten."""
    words = " ".join(f"word{i % 977}" for i in range(45))
    begin = time.perf_counter()
    _core.hash_features([f"{words} {i}" for i in range(4000)], 65536)
    _core.hash_features(["word " * (1 << 20)], 65536)
    assert time.perf_counter() - begin < 10.0


@pytest.mark.parametrize(
    ("texts", "error"),
    [("abc", TypeError), (b"abc", TypeError), ([1], TypeError), ([None], TypeError), (None, TypeError), (3, TypeError)],
)
def test_wrong_texts(texts: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^texts(\[0\])?: expected .*, got "):
        _core.hash_features(texts, 64)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [-8, 0, 1, 3, 2**28 + 1, 2**29])
def test_wrong_rows(rows: int) -> None:
    with pytest.raises(ValueError, match=r"^rows: expected a power of two"):
        _core.hash_features(["a"], rows)


def test_wrong_tables() -> None:
    table, row_scale, idf = make_table(64, 8)
    for change, text in [
        ((table[:63], row_scale[:63], idf[:63], BLOCK_WEIGHT), "table: expected a power of two"),
        ((table.astype(np.int16), row_scale, idf, BLOCK_WEIGHT), "table: expected a C-contiguous int8 array"),
        ((table.T, row_scale, idf, BLOCK_WEIGHT), "table: expected a C-contiguous int8 array"),
        ((table, row_scale[:5], idf, BLOCK_WEIGHT), "row_scale: expected shape"),
        ((table, row_scale, idf.astype(np.float64), BLOCK_WEIGHT), "idf: expected a C-contiguous float32 array"),
        ((table, row_scale, idf * np.float32(np.nan), BLOCK_WEIGHT), "idf: expected finite values"),
        ((table, row_scale, idf, BLOCK_WEIGHT[:3].copy()), "block_weight: expected shape"),
    ]:
        with pytest.raises((TypeError, ValueError), match=f"^{text}"):
            _core.HashEncoder(*change)  # type: ignore[arg-type]
