"""Transformer encoders from local Hugging Face directories: text -> mean of the last hidden states.

The hash encoder lives in the core. torch and transformers are imported with the first text for a transformer.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from proteus_fast import _core

if TYPE_CHECKING:
    from proteus_kernels.deberta import DebertaEncoder

FILES = ("config.json", "tokenizer.json", "model.safetensors")
MAX_TOKENS = 512
# padded tokens of one batch on a GPU
TOKEN_BUDGET = 16_384


@dataclass(frozen=True)
class EncoderSource:
    """Where a checkpoint's transformer is and what it must be.

    Attributes:
        directory: with config.json, tokenizer.json and model.safetensors. sha256: of the three together.
        max_tokens: of a longer text the first so many tokens count.
    """

    directory: str
    sha256: str
    max_tokens: int


def find_directory(name: str | os.PathLike[str]) -> Path:
    """A local directory as it is; any other name is one of the Hugging Face hub's, fetched where there is a network.

    Raises:
        FileNotFoundError: no such directory, and the hub does not have it or is out of reach.
        ValueError: one of the three files is not in it.
    """
    directory = Path(name)
    if not directory.is_dir():
        # what looks like a path is one: a mistyped path must not become a question to the network
        if len(directory.parts) != 2 or directory.is_absolute() or str(name).startswith("."):
            raise FileNotFoundError(f"encoder: expected a directory, got nothing at {directory}")
        from huggingface_hub import snapshot_download

        try:
            directory = Path(snapshot_download(str(name), allow_patterns=list(FILES)))
        except Exception as error:
            kind = type(error).__name__
            raise FileNotFoundError(
                f"encoder: expected a directory or a name on the hub, got {name!r}: {kind}"
            ) from None
    for file in FILES:
        if not (directory / file).is_file():
            raise ValueError(f"encoder: expected {', '.join(FILES)} in {directory}, got no {file}")
    return directory.resolve()


def directory_sha256(directory: Path) -> str:
    """sha256 of the three files of an encoder, one after another."""
    digest = hashlib.sha256()
    for file in FILES:
        with (directory / file).open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def describe(name: str | os.PathLike[str], max_tokens: int | None = None) -> tuple[EncoderSource, int]:
    """The source of an encoder and D, the size of its hidden states, without loading it.

    Args:
        name: see ``find_directory``. max_tokens: None: 512, or fewer where the encoder has fewer positions.
    """
    directory = find_directory(name)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    dim, positions = config.get("hidden_size"), config.get("max_position_embeddings", 1 << 16)
    max_tokens = min(MAX_TOKENS, positions) if max_tokens is None else max_tokens
    if not isinstance(dim, int) or not 1 <= dim <= 1 << 16:
        raise ValueError(f"encoder: expected hidden_size in {directory / 'config.json'}, got {dim!r}")
    if not 2 <= max_tokens <= positions:
        raise ValueError(f"max_tokens: expected 2 to {positions}, what the encoder was made for, got {max_tokens}")
    return EncoderSource(str(directory), directory_sha256(directory), max_tokens), dim


def check_source(source: EncoderSource) -> Path:
    """The directory of a source; raises unless its files are there and are those that the source names."""
    directory = find_directory(source.directory)
    found = directory_sha256(directory)
    if found != source.sha256:
        raise ValueError(f"encoder: expected sha256 {source.sha256} in {directory}, got {found}")
    return directory


class TransformerEncoder:
    """A frozen transformer and its tokenizer. Safe to call from many threads.

    DeBERTa-v3 of the published structure runs through our own forward pass, anything else through transformers.

    Weights are read from safetensors only and no code of the directory is run. Of a text longer than
    ``source.max_tokens`` tokens, special ones included, the first count.

    On a CPU texts are encoded one by one: the products of a batch are rounded otherwise than those of its rows, and
    a query's side of a mixing step hangs on every bit. On a GPU they are encoded in batches of similar length, so that
    there the same text may be served by another side of a step in another batch.

    Attributes:
        source: what was loaded. dim: D. device: where it computes.
    """

    def __init__(self, source: EncoderSource, device: str = "cpu", dtype: str = "float32") -> None:
        """Load; checks the files against ``source.sha256`` first.

        Raises:
            ValueError: the files are others. ImportError: transformers is not installed.
        """
        directory = check_source(source)
        try:
            import torch  # noqa: F401
            import transformers  # noqa: F401
            from tokenizers import Tokenizer
        except ImportError as error:
            message = f"encoder: expected transformers (pip install 'proteus-fast[transformers]'), got: {error}"
            raise ImportError(message) from None
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype!r}")
        self.source = source
        self.device = device
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._tokenizer.enable_truncation(source.max_tokens)
        self._tokenizer.no_padding()
        self._fast = self._load_deberta(directory, dtype)
        self._model: Any = None if self._fast is not None else self._load_any(directory, dtype)
        config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        self.dim = int(config["hidden_size"])

    def _load_deberta(self, directory: Path, dtype: str) -> DebertaEncoder | None:
        """Our own forward pass, where the directory has what it covers; any other runs through transformers."""
        import torch
        from safetensors.torch import load_file

        from proteus_kernels.deberta import DebertaEncoder, read_sizes

        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        try:
            read_sizes(config)
        except ValueError:
            return None
        tensors = load_file(directory / "model.safetensors")
        return DebertaEncoder(config, tensors, self.device, getattr(torch, dtype), self.source.max_tokens)

    def _load_any(self, directory: Path, dtype: str) -> Any:
        import torch
        import transformers

        # a bar for every load is no service's business
        bars: Any = transformers.utils.logging
        shown = bars.is_progress_bar_enabled()
        bars.disable_progress_bar()
        try:
            model: Any = transformers.AutoModel.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False, use_safetensors=True,
                dtype=getattr(torch, dtype),
            )  # fmt: skip
        finally:
            if shown:
                bars.enable_progress_bar()
        return model.to(self.device).eval()

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, truncated."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]

    def encode(self, texts: Sequence[str]) -> Any:
        """Encode texts.

        Args:
            texts: B texts.

        Returns:
            (B, D) float32: NumPy on a CPU, a tensor on a GPU.
        """
        ids = self.tokenize(texts)
        return self._encode_singly(ids) if self.device == "cpu" else self._encode_in_batches(ids)

    def _encode_singly(self, ids: Sequence[list[int]]) -> NDArray[np.float32]:
        import torch

        pooled = np.zeros((len(ids), self.dim), np.float32)
        with torch.inference_mode():
            for row, tokens in enumerate(ids):
                if not tokens:
                    continue
                if self._fast is not None:
                    ends = torch.tensor([0, len(tokens)])
                    hidden = self._fast.forward(torch.tensor(tokens), ends, len(tokens))[None]
                else:
                    hidden = self._model(input_ids=torch.tensor([tokens])).last_hidden_state
                every = np.ones(hidden.shape[:2], bool)
                pooled[row] = _core.masked_mean(hidden.float().contiguous().numpy(), every)[0]
        return pooled

    def _encode_in_batches(self, ids: Sequence[list[int]]) -> Any:
        import torch

        pooled = torch.zeros(len(ids), self.dim, dtype=torch.float32, device=self.device)
        with torch.inference_mode():
            for rows in batches([len(tokens) for tokens in ids], TOKEN_BUDGET):
                encode = self._padded if self._fast is None else self._packed
                pooled[torch.tensor(rows, device=self.device)] = encode([ids[row] for row in rows])
        return pooled

    def _packed(self, ids: Sequence[list[int]]) -> Any:
        """Mean hidden states of texts one after another, without padding."""
        import torch

        from proteus_kernels.pooling import varlen_mean

        assert self._fast is not None
        ends = torch.tensor([0, *(len(tokens) for tokens in ids)]).cumsum(0)
        flat = torch.tensor([token for tokens in ids for token in tokens])
        flat, ends = flat.to(self.device, non_blocking=True), ends.to(self.device, non_blocking=True)
        return varlen_mean(self._fast.forward(flat, ends, max(map(len, ids))), ends)

    def _padded(self, ids: Sequence[list[int]]) -> Any:
        """Mean hidden states of texts padded to the longest."""
        import torch

        from proteus_kernels.pooling import masked_mean as masked_mean_on_gpu

        lengths = torch.tensor([len(tokens) for tokens in ids])
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        padded = torch.zeros(mask.shape, dtype=torch.int64)
        padded[mask] = torch.tensor([token for tokens in ids for token in tokens])
        padded, mask = padded.to(self.device, non_blocking=True), mask.to(self.device, non_blocking=True)
        return masked_mean_on_gpu(self._model(input_ids=padded, attention_mask=mask).last_hidden_state, mask)


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Rows in batches of similar length: at most ``budget`` padded tokens each, or one row."""
    order = [row for row in np.argsort(lengths, kind="stable").tolist() if lengths[row]]
    batch: list[int] = []
    for row in order:
        if batch and (len(batch) + 1) * lengths[row] > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


class LazyEncoder:
    """An encoder that is loaded with its first text: a router of embeddings needs no transformer in memory."""

    def __init__(self, source: EncoderSource, device: str = "cpu") -> None:
        self.source = source
        self._device = device
        self._lock = threading.Lock()
        self._loaded: TransformerEncoder | None = None

    def encode(self, texts: Sequence[str]) -> Any:
        """Encode texts; see ``TransformerEncoder.encode``."""
        with self._lock:
            if self._loaded is None:
                self._loaded = TransformerEncoder(self.source, self._device)
        return self._loaded.encode(texts)
