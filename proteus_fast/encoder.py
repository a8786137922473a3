"""Transformer encoders from local Hugging Face directories: text -> mean of the last hidden states.

The hash encoder lives in the core. torch and transformers are imported with the first text for a transformer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from proteus_fast import _core, strict_json

if TYPE_CHECKING:
    from proteus_kernels.deberta import DebertaEncoder
    from proteus_kernels.encoding import BatchEncoder

FILES = ("config.json", "tokenizer.json", "model.safetensors")
MAX_TOKENS = 512
# seconds between two words about a long call
_SAY_EVERY = 10.0
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncoderSource:
    """Where a checkpoint's transformer is and what it must be.

    Attributes:
        directory: with config.json, tokenizer.json and model.safetensors. sha256: of the three together.
        max_tokens: of a longer text the first so many tokens count. held: whether the checkpoint holds the three files
            in a folder of its own; to write the checkpoint is to copy them there from ``directory``.
    """

    directory: str
    sha256: str
    max_tokens: int
    held: bool = False


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
            raise ValueError(
                f"encoder: expected {', '.join(FILES)} in {directory}, got no {file} (save_pretrained of a transformers"
                " model and of its fast tokenizer writes them)"
            )
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
    place = directory / "config.json"
    try:
        config = json.loads(place.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"encoder: expected JSON in {place}, got {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"encoder: expected an object in {place}, got {type(config).__name__}")
    sizes: list[int] = []
    for name, default in (("hidden_size", None), ("max_position_embeddings", 1 << 16)):
        value = config.get(name, default)
        if type(value) is not int or not 1 <= value <= 1 << 20:
            raise ValueError(f"encoder: expected an integer {name} in {place}, got {strict_json.describe(value)}")
        sizes.append(value)
    dim, positions = sizes
    # RoBERTa counts positions from behind its padding token
    positions -= 2 if "roberta" in str(config.get("model_type")) else 0
    max_tokens = min(MAX_TOKENS, positions) if max_tokens is None else max_tokens
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


def load_tokenizer(directory: Path, max_tokens: int) -> Any:
    """The tokenizer of a directory, which truncates and does not pad."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(max_tokens)
    tokenizer.no_padding()
    return tokenizer


def load_transformer(directory: Path, dtype: str = "float32") -> Any:
    """What transformers makes of a directory, on the CPU, without dropout."""
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
    return model.eval()


class TransformerEncoder:
    """A frozen transformer and its tokenizer. Safe to call from many threads.

    DeBERTa-v3 of the published structure runs through our own forward pass, anything else through transformers.

    Weights are read from safetensors only and no code of the directory is run. Of a text longer than
    ``source.max_tokens`` tokens, special ones included, the first count.

    On a CPU texts are encoded one by one: the products of a batch are rounded otherwise than those of its rows, and
    a query's side of a mixing step hangs on every bit. On a GPU they are encoded in batches, small ones by replays of
    CUDA graphs, so that there the same text may be served by another side of a step in another batch.

    Attributes:
        source: what was loaded. dim: D. device: where it computes.
    """

    def __init__(self, source: EncoderSource, device: str = "cpu", dtype: str = "float32") -> None:
        """Load; checks the files against ``source.sha256`` first.

        Args:
            source: the encoder. device: ``cpu``, ``cuda`` or ``cuda:N``. dtype: of weights and products: ``float32``,
                what certificates are counted with, ``bfloat16`` or ``float16``.

        Raises:
            ValueError: the files are others. ImportError: transformers is not installed, or Triton for a GPU.
        """
        directory = check_source(source)
        try:
            import torch  # noqa: F401
            import transformers  # noqa: F401
        except ImportError as error:
            message = f"encoder: expected transformers (pip install 'proteus-fast[transformers]'), got: {error}"
            raise ImportError(message) from None
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype!r}")
        self.source = source
        self.device = device
        self._tokenizer = load_tokenizer(directory, source.max_tokens)
        self._fast = self._load_deberta(directory, dtype)
        self._model: Any = None if self._fast is not None else load_transformer(directory, dtype).to(device)
        config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        self.dim = int(config["hidden_size"])
        self._batches = None if device == "cpu" else self._build_batches()

    def _load_deberta(self, directory: Path, dtype: str) -> DebertaEncoder | None:
        """Our own forward pass, where the directory has what it covers; any other runs through transformers."""
        import torch
        from safetensors.torch import load_file

        from proteus_kernels.deberta import HEAD_DIMS, DebertaEncoder, read_sizes

        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        try:
            sizes = read_sizes(config)
        except ValueError:
            return None
        if self.device != "cpu" and sizes.hidden // sizes.heads not in HEAD_DIMS:
            return None
        tensors = load_file(directory / "model.safetensors")
        return DebertaEncoder(config, tensors, self.device, getattr(torch, dtype), self.source.max_tokens)

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
        return self._encode_singly(ids) if self._batches is None else self._batches.encode(ids)

    def warm_up(self) -> None:
        """On a GPU capture the graphs of a single text, so that no query waits for them; on a CPU do nothing."""
        if self._batches is not None:
            self._batches.warm_up()

    def _build_batches(self) -> BatchEncoder:
        try:
            from proteus_kernels.encoding import BatchEncoder, PackedLayout, PaddedLayout
        except ImportError as error:
            raise ImportError(f"device: expected Triton (pip install 'proteus-fast[gpu]'), got: {error}") from None
        fast = self._fast
        layout = PaddedLayout(self._model, self.source.max_tokens) if fast is None else PackedLayout(fast)
        return BatchEncoder(layout, self.dim, self.device)

    def _encode_singly(self, ids: Sequence[list[int]]) -> NDArray[np.float32]:
        import torch

        pooled = np.zeros((len(ids), self.dim), np.float32)
        start = said = time.monotonic()
        with torch.inference_mode():
            for row, tokens in enumerate(ids):
                if time.monotonic() - said > _SAY_EVERY:
                    said = time.monotonic()
                    _logger.info("encoded %d of %d texts in %.0f s", row, len(ids), said - start)
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


class LazyEncoder:
    """An encoder that is loaded with its first text: a router of embeddings needs no transformer in memory.

    Args:
        source: the encoder. device: where it computes. precision: its dtype on a GPU; on a CPU it is float32.

    Attributes:
        rounded: its products are coarser than those that a certificate was counted with.
    """

    def __init__(self, source: EncoderSource, device: str = "cpu", precision: str = "float32") -> None:
        self.source = source
        self.rounded = device != "cpu" and precision != "float32"
        self._device = device
        self._dtype = precision if self.rounded else "float32"
        self._lock = threading.Lock()
        self._loaded: TransformerEncoder | None = None

    def encode(self, texts: Sequence[str]) -> Any:
        """Encode texts; see ``TransformerEncoder.encode``."""
        return self._load().encode(texts)

    def warm_up(self) -> None:
        """Load the encoder and do what a first text would wait for; see ``TransformerEncoder.warm_up``."""
        self._load().warm_up()

    def _load(self) -> TransformerEncoder:
        with self._lock:
            if self._loaded is None:
                self._loaded = TransformerEncoder(self.source, self._device, self._dtype)
        return self._loaded
