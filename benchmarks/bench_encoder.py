"""DeBERTa-v3-small's shape with random weights on one core: our forward pass beside transformers'.

`pytest benchmarks/bench_encoder.py`. A group is one number of tokens, B = 1; hidden states are compared first.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from proteus_kernels.deberta import DebertaEncoder

SHAPE: dict[str, Any] = {
    "vocab_size": 1000, "hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12,
    "intermediate_size": 3072, "max_position_embeddings": 512, "relative_attention": True, "position_buckets": 256,
    "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip


def build(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, DebertaEncoder]:
    """The same weights in transformers' form and in ours."""
    torch.manual_seed(0)
    config = transformers.DebertaV2Config(**SHAPE)
    theirs = transformers.AutoModel.from_config(config).eval().to(device, dtype)
    return theirs, DebertaEncoder(config.to_dict(), theirs.state_dict(), device, dtype)


@pytest.fixture(scope="module")
def models() -> tuple[Any, DebertaEncoder]:
    torch.set_num_threads(1)
    return build()


@pytest.mark.parametrize("form", ["proteus_kernels", "transformers"])
@pytest.mark.parametrize("tokens", [16, 64, 128])
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
