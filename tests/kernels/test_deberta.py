"""DeBERTa: the reference and the encoder against transformers' model, the kernel against the reference.

Largest differences measured, of hidden states up to 9: float32 2.4e-6, bfloat16 .09 (transformers' own: .11), float16
.013 (.013); of the kernel's output up to 2.9: 5e-7, .01 and 6e-4.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DebertaV2Config, DebertaV2Model

from proteus_kernels import deberta, reference
from proteus_kernels.deberta import DebertaEncoder
from proteus_kernels.disentangled import disentangled_attention
from tests.kernels.snapshots import DEVICE

# one side of the identity of the log buckets and the other; the longest is the models' own limit
LENGTHS = [1, 2, 17, 64, 127, 128, 129, 300, 512]
# what the published configurations have in common
PUBLISHED: dict[str, Any] = {
    "model_type": "deberta-v2", "hidden_act": "gelu", "layer_norm_eps": 1e-7, "max_position_embeddings": 512,
    "max_relative_positions": -1, "norm_rel_ebd": "layer_norm", "pos_att_type": "p2c|c2p", "position_buckets": 256,
    "position_biased_input": False, "relative_attention": True, "share_att_key": True, "type_vocab_size": 0,
    "vocab_size": 100,
}  # fmt: skip
SMALL = PUBLISHED | {
    "hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 80, "num_hidden_layers": 2,
    "position_buckets": 32,
}  # fmt: skip
# microsoft/deberta-v3-small with fewer, smaller layers; its heads have 64 columns too
V3_SMALL = PUBLISHED | {
    "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512, "num_hidden_layers": 3,
}  # fmt: skip
NARROW_WORDS = SMALL | {"embedding_size": 24, "num_hidden_layers": 1}
TINY = SMALL | {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}


def random_model(config: dict[str, Any]) -> DebertaV2Model:
    """A model whose attention is far from uniform and whose biases and norms count."""
    torch.manual_seed(1)
    model = DebertaV2Model(DebertaV2Config(**config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "LayerNorm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "attention.self" in name:
                parameter.mul_(8.0)
    return model


def packed(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Tokens of all sequences and their bounds."""
    generator = torch.Generator().manual_seed(2)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return torch.randint(1, 100, (int(bounds[-1]),), generator=generator), bounds.to(torch.int32)


def padded(ids: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    rows = [ids[first:last] for first, last in pairwise(bounds.tolist())]
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return batch, torch.arange(batch.shape[1])[None] < (bounds[1:] - bounds[:-1])[:, None]


def by_transformers(model: DebertaV2Model, ids: Tensor, bounds: Tensor) -> Tensor:
    """Hidden states of a padded batch, packed: (N, H)."""
    batch, mask = padded(ids, bounds)
    with torch.no_grad():
        hidden: Tensor = model(batch, attention_mask=mask).last_hidden_state[mask]
    return hidden


def encode(encoder: DebertaEncoder, ids: Tensor, bounds: Tensor) -> Tensor:
    longest = int((bounds[1:] - bounds[:-1]).max())
    return encoder.forward(ids.to(encoder.device), bounds.to(encoder.device), longest).cpu()


@pytest.mark.parametrize("config", [SMALL, V3_SMALL], ids=["small", "v3-small"])
def test_the_reference_is_transformers_attention(config: dict[str, Any]) -> None:
    model = random_model(config).double()
    attention = model.encoder.layer[0].attention.self
    ids, bounds = packed(LENGTHS)
    batch, mask = padded(ids, bounds)
    with torch.no_grad():
        hidden = model.embeddings(batch)
        positions = model.encoder.get_rel_embedding()
        both = mask[:, None, :, None] & mask[:, None, None, :]
        expected, _ = attention(hidden, both, rel_embeddings=positions)
        heads = (-1, config["num_attention_heads"], config["hidden_size"] // config["num_attention_heads"])
        q, k, v, position_key, position_query = (
            project(x).view(heads)
            for project, x in (
                (attention.query_proj, hidden[mask]),
                (attention.key_proj, hidden[mask]),
                (attention.value_proj, hidden[mask]),
                (attention.key_proj, positions),
                (attention.query_proj, positions),
            )
        )
    got = reference.disentangled_attention_ref(q, k, v, position_key, position_query, bounds, 512)
    # they round the scale to float32
    torch.testing.assert_close(got.flatten(1), expected[mask], rtol=0, atol=1e-5)


def test_up_to_half_the_buckets_a_bucket_is_the_distance() -> None:
    distance = torch.arange(-128, 129)
    assert torch.equal(reference.log_bucket_ref(distance, 256, 512), distance)
    far = reference.log_bucket_ref(torch.tensor([129, 130, 511, -511]), 256, 512)
    assert far.tolist() == [129, 130, 255, -255]


@pytest.mark.parametrize("config", [SMALL, V3_SMALL, NARROW_WORDS], ids=["small", "v3-small", "narrow words"])
def test_packed_is_transformers_padded(config: dict[str, Any]) -> None:
    model = random_model(config)
    ids, bounds = packed(LENGTHS)
    expected = by_transformers(model, ids, bounds)
    encoder = DebertaEncoder(config, model.state_dict(), DEVICE)
    got = encode(encoder, ids, bounds)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    # a sequence by itself, and beside empty ones
    first, last = int(bounds[4]), int(bounds[5])
    alone = encode(encoder, ids[first:last], torch.tensor([0, 0, last - first, last - first]))
    torch.testing.assert_close(alone, expected[first:last], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_off_than_transformers(dtype: torch.dtype) -> None:
    model = random_model(V3_SMALL)
    ids, bounds = packed([1, 17, 128, 129, 160])
    expected = by_transformers(model, ids, bounds)
    encoder = DebertaEncoder(V3_SMALL, {f"deberta.{name}": x for name, x in model.state_dict().items()}, DEVICE, dtype)
    got = encode(encoder, ids, bounds)
    assert got.dtype == dtype
    error = (got.float() - expected).square().mean().sqrt()
    theirs = (by_transformers(model.to(dtype), ids, bounds).float() - expected).square().mean().sqrt()
    assert error <= 1.05 * theirs


def tables(position_key: Tensor, position_query: Tensor, reach: int, positions: int) -> tuple[Tensor, Tensor]:
    """What the kernel takes, from what the reference takes."""
    buckets = len(position_key) // 2
    slots = (reference.log_bucket_ref(torch.arange(-reach, reach + 1), buckets, positions) + buckets).clamp(0)
    slots = slots.clamp_max(2 * buckets - 1)
    return position_key[slots.flip(0)], position_query[slots]


TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "heads", "dim"),
    [
        ([1], 1, 64),
        ([5, 0, 16, 1], 3, 16),
        ([17, 32, 33], 2, 32),
        ([128], 1, 64),
        ([64, 7, 127, 100], 2, 64),
        ([140, 3], 1, 16),
    ],
    ids=str,
)
def test_the_kernel_is_the_reference(lengths: list[int], heads: int, dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    _, bounds = packed(lengths)
    qkv = torch.randn(int(bounds[-1]), 3, heads, dim, generator=generator).to(dtype)
    # the last case goes past the buckets' identity
    buckets = 64 if max(lengths) > 128 else 256
    compact = torch.randn(2, 2 * buckets, heads, dim, generator=generator).to(dtype)
    position_key, position_query = (x.to(DEVICE) for x in tables(*compact, reach=max(lengths) + 2, positions=512))
    expected = reference.disentangled_attention_ref(*qkv.double().unbind(1), *compact.double(), bounds, 512)
    q, k, v = qkv.to(DEVICE).unbind(1)
    # what no program wrote is seen
    out = torch.full(q.shape, 77.0, dtype=dtype, device=DEVICE)
    given = disentangled_attention(q, k, v, position_key, position_query, bounds.to(DEVICE), max(lengths), out)
    assert given is out
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=TOLERANCES[dtype])
    on_cpu = deberta.attend(*qkv.unbind(1), position_key.cpu(), position_query.cpu(), bounds.tolist())
    torch.testing.assert_close(on_cpu.double(), expected, rtol=0, atol=TOLERANCES[dtype])


def test_encoding_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the tables and the views of the fused projection are what the kernel takes."""
    ids, bounds = packed([40, 1, 33])
    model = random_model(TINY)
    expected = encode(DebertaEncoder(TINY, model.state_dict()), ids, bounds)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, position_key: Tensor, position_query: Tensor, given: list[int]
    ) -> Tensor:
        return disentangled_attention(q, k, v, position_key, position_query, torch.tensor(given, device=DEVICE), 40)

    monkeypatch.setattr(deberta, "attend", attend)
    got = encode(DebertaEncoder(TINY, model.state_dict(), DEVICE), ids, bounds)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_sequences_longer_than_the_published_limit() -> None:
    model = random_model(TINY)
    ids, bounds = packed([600])
    encoder = DebertaEncoder(TINY, model.state_dict(), DEVICE, longest=600)
    torch.testing.assert_close(encode(encoder, ids, bounds), by_transformers(model, ids, bounds), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type 'deberta-v2', got 'bert'"),
        ({"relative_attention": False}, "relative_attention True, got False"),
        ({"share_att_key": None}, "share_att_key True, got None"),
        ({"position_biased_input": True}, "position_biased_input False, got True"),
        ({"norm_rel_ebd": "none"}, "norm_rel_ebd 'layer_norm', got 'none'"),
        ({"conv_kernel_size": 3}, "conv_kernel_size 0, got 3"),
        ({"type_vocab_size": 2}, "type_vocab_size 0, got 2"),
        ({"hidden_act": "relu"}, "hidden_act 'gelu', got 'relu'"),
        ({"pos_att_type": ["c2p"]}, r"pos_att_type c2p and p2c, got \['c2p'\]"),
        ({"position_buckets": -1}, "position_buckets to be a whole number above 0, got -1"),
        (
            {"position_buckets": 1024},
            r"position_buckets to be even and below 2 \(max_relative_positions - 1\), got 1024",
        ),
        ({"num_attention_heads": 5}, "hidden_size to be that of all 5 heads together, got 32"),
        ({"attention_head_size": 64}, "hidden_size to be that of all 2 heads together, got 32"),
        ({"hidden_size": None}, "hidden_size to be a whole number above 0, got None"),
    ],
    ids=str,
)
def test_other_configurations_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^config: expected {message}$"):
        DebertaEncoder(TINY | change, {})


def test_settings_that_are_absent_are_those_of_transformers() -> None:
    with pytest.raises(ValueError, match=r"^config: expected relative_attention True, got False"):
        DebertaEncoder({"hidden_size": 32}, {})


def test_wrong_tensors() -> None:
    tensors = random_model(TINY).state_dict()
    with pytest.raises(ValueError, match=r"^tensors: expected deberta\.embeddings\.word_embeddings\.weight, got none"):
        DebertaEncoder(TINY, {"deberta.other": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r"^tensors: expected encoder\.rel_embeddings\.weight with shape \(64, 32\), got"
    ):
        DebertaEncoder(TINY, tensors | {"encoder.rel_embeddings.weight": torch.zeros(512, 32)})
    with pytest.raises(ValueError, match=r"^dtype: expected float32, bfloat16 or float16, got torch\.float64"):
        DebertaEncoder(TINY, tensors, dtype=torch.float64)


def test_wrong_arguments_of_the_encoder() -> None:
    encoder = DebertaEncoder(TINY, random_model(TINY).state_dict())
    ids, bounds = packed([4, 3])
    assert encoder.forward(ids[:0], bounds[:1], 0).shape == (0, 32)
    with pytest.raises(ValueError, match=r"^input_ids: expected \(n,\) int32 or int64, got \(1, 7\) torch\.int64"):
        encoder.forward(ids[None], bounds, 4)
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected a tensor on cpu, got one on meta"):
        encoder.forward(ids, bounds.to("meta"), 4)
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected shape \(B \+ 1,\), got \(0,\)"):
        encoder.forward(ids, bounds[:0], 4)
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected to ascend from 0 to at most 6, got \[0, 4, 7\]"):
        encoder.forward(ids[:6], bounds, 4)
    with pytest.raises(ValueError, match=r"^max_seqlen: expected at least 4, got 3"):
        encoder.forward(ids, bounds, 3)
    with pytest.raises(ValueError, match=r"^max_seqlen: expected 0 to 512, got 513"):
        encoder.forward(ids, bounds, 513)


def test_wrong_arguments_of_the_kernel() -> None:
    x, table = torch.zeros(6, 2, 16, device=DEVICE), torch.zeros(9, 2, 16, device=DEVICE)
    bounds = torch.tensor([0, 6], device=DEVICE)
    with pytest.raises(ValueError, match=r"^q: expected a last dimension of \(16, 32, 64\), got 8"):
        disentangled_attention(x[..., :8], x, x, table, table, bounds, 5)
    with pytest.raises(ValueError, match=r"^k: expected shape \(6, 2, 16\), got \(5, 2, 16\)"):
        disentangled_attention(x, x[:5], x, table, table, bounds, 5)
    with pytest.raises(TypeError, match=r"^v: expected float32, got float16"):
        disentangled_attention(x, x, x.half(), table, table, bounds, 5)
    with pytest.raises(ValueError, match=r"^v: expected tokens 32 apart as in q, got 64"):
        disentangled_attention(x, x, torch.zeros(12, 2, 16, device=DEVICE)[::2], table, table, bounds, 5)
    with pytest.raises(ValueError, match=r"^v: expected heads and columns next to each other, got strides"):
        disentangled_attention(x, x, x.transpose(1, 2).contiguous().transpose(1, 2), table, table, bounds, 5)
    with pytest.raises(ValueError, match=r"^position_query: expected shape \(9, 2, 16\), got \(8, 2, 16\)"):
        disentangled_attention(x, x, x, table, table[:8], bounds, 5)
    with pytest.raises(ValueError, match=r"^max_seqlen: expected 0 to 5, got 6"):
        disentangled_attention(x, x, x, table, table, bounds, 6)
    none = torch.zeros(0, 2, 16, device=DEVICE)
    assert disentangled_attention(none, none, none, table, table, bounds[:1], 0).shape == (0, 2, 16)
