"""The featuriser of csrc/hashing.cpp in plain Python: what is right."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1
HEAD = 8192
MAX_FEATURES = 4096
WORDS, BIGRAMS, FOUR_GRAMS, SHAPE = range(4)
SPACE = b" \t\n\r\v\f\0"  # bytes.split() splits at all of them but NUL


def mix64(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def fnv1a(token: bytes) -> int:
    h = 0xCBF29CE484222325
    for byte in token:
        h = (h ^ byte) * 0x100000001B3 & MASK
    return h


def to_bytes(text: str | bytes) -> bytes:
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text


def tokenize(text: bytes) -> list[bytes]:
    """Maximal runs of [0-9a-z] and bytes >= 0x80; any other byte but a space by itself."""
    tokens: list[bytes] = []
    run = bytearray()
    for byte in text + b" ":
        if byte >= 0x80 or chr(byte) in "0123456789abcdefghijklmnopqrstuvwxyz":
            run.append(byte)
            continue
        if run:
            tokens.append(bytes(run))
            run.clear()
        if byte != ord(" "):
            tokens.append(bytes([byte]))
    return tokens


def half_steps(n: int) -> int:
    """2 log2(n), rounded down; 2^32 - 1 and above count as that."""
    n = min(n, 2**32 - 1)
    return (n * n).bit_length() - 1


def share(part: int, whole: int) -> int:
    """0 for none, else 1 + sixteenths of the whole, at most 8."""
    return 0 if part == 0 else min(8, 1 + part * 16 // whole)


def shape_buckets(size: int, text: bytes, tokens: list[bytes]) -> list[int]:
    whole = max(1, len(text))
    upper = sum(65 <= byte <= 90 for byte in text)
    lower = sum(97 <= byte <= 122 for byte in text)
    digits = sum(48 <= byte <= 57 for byte in text)
    non_ascii = sum(byte >= 128 for byte in text)
    spaces = sum(byte in SPACE for byte in text)
    return [
        half_steps(size + 1),
        half_steps(len(tokens) + 1),
        half_steps(text.count(b"\n") + 1),
        share(digits, whole),
        share(len(text) - upper - lower - digits - non_ascii - spaces, whole),
        share(sum(byte in b"{};=()" for byte in text), whole),
        share(non_ascii, whole),
        share(upper, whole),
        int(b"?" in text),
        min(15, len(text) // max(1, len(tokens))),
    ]


def features(text: str | bytes, rows: int) -> dict[tuple[int, int], int]:
    """(row, block) -> count of a text, in order of first appearance: shape, words, bigrams, 4-grams.

    Texts above 16,384 bytes are cut to their first and last 8,192, but the length bucket knows the whole.
    """
    data = to_bytes(text)
    size = len(data)
    if size > 2 * HEAD:
        data = data[:HEAD] + data[-HEAD:]
    # bytes.lower changes ASCII letters only; split drops empty parts, and with them runs of spaces
    normal = b" ".join(data.lower().replace(b"\0", b" ").split())
    tokens = tokenize(normal)
    words = [fnv1a(token) for token in tokens]
    padded = b" " + normal + b" "
    hashes = [
        *((SHAPE, kind * 256 + bucket) for kind, bucket in enumerate(shape_buckets(size, data, tokens))),
        *((WORDS, word) for word in words),
        *((BIGRAMS, (mix64(left) + 3 * right) & MASK) for left, right in itertools.pairwise(words)),
        *((FOUR_GRAMS, int.from_bytes(padded[i : i + 4], "little")) for i in range(len(padded) - 3)),
    ]
    counts: dict[tuple[int, int], int] = {}
    for block, h in hashes:
        row = mix64(h ^ ((block + 1) * GOLDEN & MASK)) >> (64 - (rows.bit_length() - 1))
        if (row, block) in counts:
            counts[row, block] += 1
        elif len(counts) < MAX_FEATURES:
            counts[row, block] = 1
    return counts


def encode(
    text: str | bytes,
    table: NDArray[np.int8],
    row_scale: NDArray[np.float32],
    idf: NDArray[np.float32],
    block_weight: NDArray[np.float32],
) -> NDArray[np.float64]:
    """Embedding in float64, (D,)."""
    counts = features(text, len(table))
    row = np.array([r for r, _ in counts])
    block = np.array([b for _, b in counts])
    value = (1.0 + np.log(np.array(list(counts.values()), dtype=np.float64))) * idf[row]
    for b in range(4):
        norm = float(np.sqrt((value[block == b] ** 2).sum()))
        value[block == b] *= block_weight[b] / norm if norm > 0.0 else 0.0
    return np.asarray((value * row_scale[row]) @ table[row].astype(np.float64))
