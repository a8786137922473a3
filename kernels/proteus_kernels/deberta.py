"""DeBERTa-v3's encoder for packed batches: projections of positions computed once, queries, keys and values in one.

The published models only (He et al. 2023, DeBERTaV3); a configuration with other parts is refused. Torch operations on
the CPU; on a GPU attention is the kernel of ``disentangled.py``, and nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from proteus_kernels.reference import log_bucket_ref

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# columns of a head that the kernel of a GPU covers
HEAD_DIMS = (16, 32, 64)
# numbers of a product of all of a sequence's tokens with a position table, on the CPU
_CACHED = 1 << 20
# name: what is supported, what transformers takes where it is absent
_SETTINGS: dict[str, tuple[Any, Any]] = {
    "model_type": ("deberta-v2", "deberta-v2"),
    "relative_attention": (True, False),
    "share_att_key": (True, False),
    "position_biased_input": (False, True),
    "norm_rel_ebd": ("layer_norm", "none"),
    "hidden_act": ("gelu", "gelu"),
    "type_vocab_size": (0, 0),
    "conv_kernel_size": (0, 0),
}


class Sizes(NamedTuple):
    """What an encoder needs of its configuration; ``embedding`` is the width of the words' vectors."""

    layers: int
    hidden: int
    heads: int
    inner: int
    vocabulary: int
    embedding: int
    buckets: int
    max_relative_positions: int
    max_positions: int
    eps: float


def read_sizes(config: Mapping[str, Any]) -> Sizes:
    """Sizes of a ``config.json``; raises ValueError unless it describes an encoder of the published structure."""
    for name, (expected, default) in _SETTINGS.items():
        value = config.get(name, default)
        if value != expected:
            raise ValueError(f"config: expected {name} {expected!r}, got {value!r}")
    terms = config.get("pos_att_type") or ()
    if isinstance(terms, str):
        terms = [term.strip() for term in terms.lower().split("|")]
    if sorted(terms) != ["c2p", "p2c"]:
        raise ValueError(f"config: expected pos_att_type c2p and p2c, got {config.get('pos_att_type')!r}")
    counts: dict[str, Any] = {}
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"):
        counts[name] = config.get(name)
    hidden = counts["hidden_size"]
    counts["embedding_size"] = config.get("embedding_size", hidden)
    counts["position_buckets"] = config.get("position_buckets", -1)
    max_positions = counts["max_position_embeddings"] = config.get("max_position_embeddings", 512)
    reach = config.get("max_relative_positions", -1)
    reach = counts["max_relative_positions"] = max_positions if reach is None or reach < 1 else reach
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"config: expected {name} to be a whole number above 0, got {value!r}")
    heads, buckets = counts["num_attention_heads"], counts["position_buckets"]
    if hidden % heads or config.get("attention_head_size", hidden // heads) * heads != hidden:
        raise ValueError(f"config: expected hidden_size to be that of all {heads} heads together, got {hidden}")
    if buckets % 2 or 2 * (reach - 1) <= buckets:
        raise ValueError(
            f"config: expected position_buckets to be even and below 2 (max_relative_positions - 1), got {buckets}"
        )
    return Sizes(
        counts["num_hidden_layers"], hidden, heads, counts["intermediate_size"], counts["vocab_size"],
        counts["embedding_size"], buckets, reach, max_positions, config.get("layer_norm_eps", 1e-7),
    )  # fmt: skip


class _Tensors:
    """Named tensors of a checkpoint, with or without the prefix of the model's class, looked up with their shapes."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._prefix = "deberta." if any(name.startswith("deberta.") for name in tensors) else ""

    def get(self, name: str, *shape: int) -> Tensor:
        name = self._prefix + name
        if name not in self._tensors:
            raise ValueError(f"tensors: expected {name}, got none of that name")
        tensor = self._tensors[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"tensors: expected {name} with shape {shape}, got {tuple(tensor.shape)}")
        return tensor.detach()

    def pair(self, name: str, *shape: int) -> tuple[Tensor, Tensor]:
        """Weight and bias."""
        return self.get(f"{name}.weight", *shape), self.get(f"{name}.bias", shape[0])


class _Layer(NamedTuple):
    """One layer: (weight, bias) of each projection and norm; tables (2 R + 1, heads, d) of each distance's positions.

    ``position_key`` has the distances by key - query, ``position_query`` by query - key, both from -R to R.
    """

    qkv: tuple[Tensor, Tensor]
    mix: tuple[Tensor, Tensor]
    mix_norm: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    norm: tuple[Tensor, Tensor]
    position_key: Tensor
    position_query: Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, position_key: Tensor, position_query: Tensor, bounds: Sequence[int]
) -> Tensor:
    """Self-attention of DeBERTa on packed sequences in torch operations, those of ``disentangled_attention``.

    A sequence's position terms are read from its products with the tables by strides, not by a gather: what key j has
    in the row of query i lies j - i from the middle, one place on in the next column and one back in the next row.

    Args:
        q, k, v: (N, heads, d), any strides. position_key: Kr by key's position - query's, (2 R + 1, heads, d).
        position_query: Qr by query's position - key's, likewise. bounds: where each sequence starts and the last one
            ends, B + 1 of them; a sequence has R + 1 tokens at most.

    Returns:
        (N, heads, d), of the dtype of ``q``; computed in float32.
    """
    _, heads, dim = q.shape
    middle = position_key.shape[0] // 2
    scale = 1.0 / math.sqrt(3 * dim)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for first, last in pairwise(bounds):
        length = last - first
        if not length:
            continue
        near = slice(middle - length + 1, middle + length)
        q_, k_, v_ = (x[first:last].transpose(0, 1).float() for x in (q, k, v))
        key_rows, query_rows = (x[near].permute(1, 2, 0).float() for x in (position_key, position_query))
        # so many heads at a time that a product stays in the second-level cache
        width = 2 * length - 1
        group = max(1, _CACHED // (length * width))
        for here in (slice(start, start + group) for start in range(0, heads, group)):
            to_position = torch.bmm(q_[here], key_rows[here])
            to_content = torch.bmm(k_[here], query_rows[here])
            shape, head = (len(to_position), length, length), length * width
            scores = to_position.as_strided(shape, (head, width - 1, 1), length - 1)
            scores = scores + to_content.as_strided(shape, (head, 1, width - 1), length - 1)
            scores.baddbmm_(q_[here], k_[here].transpose(1, 2), beta=scale, alpha=scale)
            out[first:last, here] = torch.bmm(torch.softmax(scores, dim=-1), v_[here]).transpose(0, 1)
    return out


class DebertaEncoder:
    """A DeBERTa-v3 encoder, for inference.

    Args:
        config: the keys of a ``config.json``. tensors: by the names of ``DebertaV2Model``, with or without
            ``deberta.``; further ones are ignored, and what has the device and dtype is kept, not copied.
        device, dtype: of the weights and of what ``forward`` returns; float32, bfloat16 or float16. A CPU computes
            attention in float32.
        longest: tokens of the longest sequence, None for the configuration's; each layer keeps 2 (2 longest - 1) rows
            of H numbers for it.

    Raises:
        ValueError: a configuration that is not covered, a tensor that is missing or has another shape.
    """

    def __init__(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32, longest: int | None = None,
    ) -> None:  # fmt: skip
        self.sizes = read_sizes(config)
        self.device = torch.device(device)
        self.dtype = dtype
        self.longest = self.sizes.max_positions if longest is None else longest
        if dtype not in WEIGHT_DTYPES:
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
        if self.longest < 1:
            raise ValueError(f"longest: expected at least 1, got {longest}")
        hidden, embedding = self.sizes.hidden, self.sizes.embedding
        found = _Tensors(tensors)
        self._words = self._place(found.get("embeddings.word_embeddings.weight", self.sizes.vocabulary, embedding))
        self._widen = None
        if embedding != hidden:
            self._widen = self._place(found.get("embeddings.embed_proj.weight", hidden, embedding))
        self._norm = self._place_pair(found.pair("embeddings.LayerNorm", hidden))
        positions = found.get("encoder.rel_embeddings.weight", 2 * self.sizes.buckets, hidden).to(self.device).float()
        weight, bias = (x.to(self.device).float() for x in found.pair("encoder.LayerNorm", hidden))
        positions = functional.layer_norm(positions, (hidden,), weight, bias, self.sizes.eps)
        distance = torch.arange(1 - self.longest, self.longest)
        slots = log_bucket_ref(distance, self.sizes.buckets, self.sizes.max_relative_positions) + self.sizes.buckets
        slots = slots.clamp(0, 2 * self.sizes.buckets - 1).to(self.device)
        self._layers = [self._layer(found, f"encoder.layer.{n}.", positions, slots) for n in range(self.sizes.layers)]

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)

    def _place_pair(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self._place(pair[0]), self._place(pair[1])

    def _layer(self, found: _Tensors, prefix: str, positions: Tensor, slots: Tensor) -> _Layer:
        hidden, inner = self.sizes.hidden, self.sizes.inner
        heads = (-1, self.sizes.heads, hidden // self.sizes.heads)
        query, key, value = (
            found.pair(f"{prefix}attention.self.{name}_proj", hidden, hidden) for name in ("query", "key", "value")
        )
        # in float32 whatever the dtype, since it is done once
        position_key, position_query = (
            self._place(functional.linear(positions, weight.to(positions), bias.to(positions))).view(heads)
            for weight, bias in (key, query)
        )
        return _Layer(
            qkv=(
                torch.cat([self._place(pair[0]) for pair in (query, key, value)]),
                torch.cat([self._place(pair[1]) for pair in (query, key, value)]),
            ),
            mix=self._place_pair(found.pair(f"{prefix}attention.output.dense", hidden, hidden)),
            mix_norm=self._place_pair(found.pair(f"{prefix}attention.output.LayerNorm", hidden)),
            up=self._place_pair(found.pair(f"{prefix}intermediate.dense", inner, hidden)),
            down=self._place_pair(found.pair(f"{prefix}output.dense", hidden, inner)),
            norm=self._place_pair(found.pair(f"{prefix}output.LayerNorm", hidden)),
            position_key=position_key[slots.flip(0)],
            position_query=position_query[slots],
        )

    def _normalise(self, x: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
        return functional.layer_norm(x, (self.sizes.hidden,), *norm, self.sizes.eps)

    def _bounds(self, tokens: int, cu_seqlens: Tensor, max_seqlen: int) -> list[int]:
        """The sequences' bounds, after the checks that a GPU would have to wait for."""
        bounds: list[int] = cu_seqlens.tolist()
        lengths = [last - first for first, last in pairwise(bounds)]
        if bounds[0] != 0 or bounds[-1] > tokens or min(lengths, default=0) < 0:
            raise ValueError(f"cu_seqlens: expected to ascend from 0 to at most {tokens}, got {bounds}")
        if max(lengths, default=0) > max_seqlen:
            raise ValueError(f"max_seqlen: expected at least {max(lengths)}, got {max_seqlen}")
        return bounds

    @torch.no_grad()
    def forward(self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Hidden states of the last layer.

        Args:
            input_ids: the tokens of all sequences one after another, (N,) int32 or int64, on the encoder's device.
            cu_seqlens: where each sequence starts and the last one ends, (B + 1,) int32 or int64, on that device. What
                it holds is looked at on the CPU only. Tokens behind the last one's end belong to none, and what is
                returned for them means nothing.
            max_seqlen: no sequence is longer, at most ``longest``.

        Returns:
            (N, H), of the encoder's dtype.

        Raises:
            ValueError: another shape or device, or a sequence longer than it may be.
        """
        for name, tensor in (("input_ids", input_ids), ("cu_seqlens", cu_seqlens)):
            if tensor.dim() != 1 or tensor.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"{name}: expected (n,) int32 or int64, got {tuple(tensor.shape)} {tensor.dtype}")
            if tensor.device != self._words.device:
                raise ValueError(f"{name}: expected a tensor on {self._words.device}, got one on {tensor.device}")
        if not len(cu_seqlens):
            raise ValueError("cu_seqlens: expected shape (B + 1,), got (0,)")
        if not 0 <= max_seqlen <= self.longest:
            raise ValueError(f"max_seqlen: expected 0 to {self.longest}, got {max_seqlen}")
        on_gpu = self._words.is_cuda
        bounds = [] if on_gpu else self._bounds(len(input_ids), cu_seqlens, max_seqlen)
        x = functional.embedding(input_ids, self._words)
        if self._widen is not None:
            x = functional.linear(x, self._widen)
        x = self._normalise(x, self._norm)
        for layer in self._layers:
            qkv = functional.linear(x, *layer.qkv).view(len(x), 3, *layer.position_key.shape[1:])
            q, k, v = qkv.unbind(1)
            positions = layer.position_key, layer.position_query
            if on_gpu:
                # Triton is needed where there is a GPU
                from proteus_kernels.disentangled import disentangled_attention

                mixed = disentangled_attention(q, k, v, *positions, cu_seqlens, max_seqlen)
            else:
                mixed = attend(q, k, v, *positions, bounds)
            mixed = functional.linear(mixed.flatten(1), *layer.mix)
            x = self._normalise(mixed.add_(x), layer.mix_norm)
            inner = functional.gelu(functional.linear(x, *layer.up))
            x = self._normalise(functional.linear(inner, *layer.down).add_(x), layer.norm)
        return x
