"""Encoding of texts by the hash encoder beside scikit-learn's hashing: `pytest benchmarks/bench_hashing.py`.

The two do not compute the same: ours also pools the features into an embedding. Both answers are checked for being one
of theirs: ours against a text encoded alone, scikit-learn's for its shape and norm.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import HashingVectorizer

from proteus_fast.demo_queries import queries
from proteus_fast.router import Router

LENGTHS = {"131 bytes": 1, "4 KiB": 32}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("form", ["proteus_fast", "sklearn_hashing"])
def test_encode(benchmark: Any, length: str, form: str) -> None:
    benchmark.group = f"encode a text of {length}"
    texts = [" ".join(queries()[i : i + LENGTHS[length]]) for i in range(32)]
    if form == "proteus_fast":
        router = Router.load()
        together = router.encode(texts)
        assert np.array_equal(together[3], router.encode(texts[3:4])[0])
        assert np.abs(together).max() > 0
        benchmark(router.encode, texts[3:4])
    else:
        vectorizer = HashingVectorizer(n_features=2**16, analyzer="char_wb", ngram_range=(4, 4))
        features = vectorizer.transform(texts)
        assert features.shape == (32, 2**16)
        assert np.allclose(np.sqrt(features.multiply(features).sum(axis=1)), 1.0)
        benchmark(vectorizer.transform, texts[3:4])
