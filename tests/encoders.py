"""Small transformer encoders with random weights, made on the spot in the form that the hub has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

from proteus_fast import checkpoint
from proteus_fast.checkpoint import Checkpoint
from proteus_fast.encoder import describe
from proteus_fast.router import Router

_SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40,
}  # fmt: skip
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (transformers.BertConfig, {}),
    "modernbert": (
        transformers.ModernBertConfig,
        {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "deberta-v2": (
        transformers.DebertaV2Config,
        {
            "num_attention_heads": 2, "relative_attention": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm",
            "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0,
        },
    ),
}  # fmt: skip
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")


def make(kind: str, folder: Path, words: Sequence[str]) -> Path:
    """Write config.json, model.safetensors and tokenizer.json; a word is a token."""
    torch.manual_seed(1)
    config, options = CONFIGS[kind]
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    model = transformers.AutoModel.from_config(config(vocab_size=len(vocabulary), **_SIZES | options))
    model.save_pretrained(folder)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def save_router(encoder: Path, folder: Path, max_tokens: int = 20) -> Path:
    """The embedded router's certificate and pool over a transformer with a random predictor, as a checkpoint."""
    embedded = Router.load().checkpoint
    source, dim = describe(encoder, max_tokens=max_tokens)
    k = len(embedded.config.pool)
    config = replace(embedded.config, encoder="transformer", source=source, input_dim=dim, block_weight=(), head=None,
                     mode="dual", projection="none")  # fmt: skip
    weight = np.random.default_rng(0).standard_normal((dim, k)).astype(np.float32)
    tensors = {"predictor.weight": weight, "predictor.bias": np.zeros(k, np.float32)}
    evidence = embedded.certificate
    only = {"paths": {"dual": evidence.paths["dual"]}, "tables": {"dual": evidence.tables["dual"]}}
    checkpoint.save(Checkpoint(config, tensors, replace(evidence, **only)), folder)
    return folder
