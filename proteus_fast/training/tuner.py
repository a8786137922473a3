"""The training loop of a transformer and its head, in one file: steps, rates, state.

Everything that a step draws depends on (seed, step) alone, so that a resumed run goes on as an unbroken one does. Under
torch.distributed each process takes its share of a step's rows, and gradients are added: the result is that of one
process up to rounding.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from proteus_fast.encoder import load_transformer
from proteus_fast.training.distributed import add_gradients, is_distributed, own_share
from proteus_kernels.token_batches import batches

if TYPE_CHECKING:
    from proteus_fast.training.finetune import FinetuneConfig

_LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)\.")
# steps whose rows are sorted by length together: more save padding, fewer leave more to chance
_SORTED_STEPS = 8


class RouterNetwork(nn.Module):
    """A transformer, and the K logits of predicted accuracy that a linear head reads from its mean hidden state."""

    def __init__(self, encoder: nn.Module, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(*weight.shape)
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(weight.T))
            self.head.bias.copy_(torch.from_numpy(bias))

    def forward(self, ids: Tensor, mask: Tensor, precision: torch.dtype) -> Tensor:
        """Logits (B, K), float32, of token ids (B, T) under a bool mask of them."""
        with torch.autocast(ids.device.type, precision, enabled=precision != torch.float32):
            hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        kept = mask.unsqueeze(2)
        mean = torch.where(kept, hidden.float(), 0.0).sum(dim=1) / kept.sum(dim=1)
        logits: Tensor = self.head(mean)
        return logits


def depth_of(name: str, layers: int) -> int:
    """Depth of a transformer's parameter: embeddings and what layers share 0, layers 1 ... L, the last norm L."""
    found = _LAYER.search(name)
    if found is not None:
        return int(found.group(1)) + 1
    return layers if name.startswith("final_norm") else 0


def parameter_groups(network: RouterNetwork, config: FinetuneConfig) -> list[dict[str, Any]]:
    """AdamW's groups: a rate for every depth, decay for matrices only; ``rate`` is a group's largest learning rate."""
    named = [(name, p) for name, p in network.encoder.named_parameters() if p.requires_grad]
    layers = max((depth_of(name, 0) for name, _ in named), default=0)
    found: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        found.setdefault((depth_of(name, layers), parameter.ndim > 1), []).append(parameter)
    for parameter in network.head.parameters():
        found.setdefault((layers + 1, parameter.ndim > 1), []).append(parameter)
    groups = []
    for depth, decays in sorted(found):
        rate = config.learning_rate * config.layer_decay ** (layers + 1 - depth)
        decay = config.weight_decay if decays else 0.0
        groups.append({"params": found[depth, decays], "lr": rate, "rate": rate, "weight_decay": decay})
    return groups


def steps_of_epoch(lengths: Tensor, rows: int, seed: int, epoch: int) -> list[Tensor]:
    """Rows of every step of an epoch, ``rows`` each but the last, of similar length.

    Args:
        lengths: tokens of every row, (n,). seed, epoch: of the order.
    """
    generator = torch.Generator().manual_seed(_seed_of(seed, 0, epoch))
    order = torch.randperm(len(lengths), generator=generator)
    steps: list[Tensor] = []
    for chunk in order.split(_SORTED_STEPS * rows):  # type: ignore[no-untyped-call]
        steps += chunk[torch.argsort(lengths[chunk], stable=True)].split(rows)
    return [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]


def _seed_of(seed: int, stream: int, number: int) -> int:
    entropy = np.random.SeedSequence([seed, stream, number]).generate_state(1, np.uint64)[0]
    return int(entropy >> np.uint64(1))


class Tuner:
    """One network in training.

    Attributes:
        network: as trained so far. step: steps done. steps_per_epoch: of the rows that have a token.
    """

    def __init__(
        self,
        directory: Path,
        ids: Sequence[list[int]],
        score: NDArray[np.float64],
        head: tuple[NDArray[np.float32], NDArray[np.float32]],
        config: FinetuneConfig,
        *,
        device: str,
        seed: int,
    ) -> None:
        """Load the transformer.

        Args:
            directory: of the transformer. ids: token ids of n rows. score: their labels in [0, 1], (n, K). head: weight
                (D, K) and bias (K,) that training starts at. config: with its precision.
        """
        self.config, self.device, self.seed = config, device, seed
        self.step = 0
        rows = [row for row, tokens in enumerate(ids) if tokens]
        self._ids = [ids[row] for row in rows]
        self._score = torch.from_numpy(score[rows].astype(np.float32)).to(device)
        self._lengths = torch.tensor([len(tokens) for tokens in self._ids])
        self._rows = config.batch_size * config.accumulate
        self.steps_per_epoch = -(-len(rows) // self._rows)
        self._precision: torch.dtype = getattr(torch, config.precision or "float32")
        self._order: tuple[int, list[Tensor]] = (-1, [])
        self.network = RouterNetwork(load_transformer(directory), *head).to(device)
        self._pad = int(getattr(self.network.encoder.config, "pad_token_id", None) or 0)
        # weights that the hidden states do not hang on, as a pooler's, get no gradient and stay as they are
        self._logits([self._ids[0]]).sum().backward()  # type: ignore[no-untyped-call]
        for parameter in self.network.parameters():
            parameter.requires_grad_(parameter.grad is not None)
        self._parameters = [p for p in self.network.parameters() if p.requires_grad]
        self._optimiser = torch.optim.AdamW(parameter_groups(self.network, config), fused=True)
        self.network.train(config.dropout)

    def train(self, step: int) -> None:
        """Train until so many steps are done."""
        while self.step < step:
            self._one_step()
            self.step += 1

    def _one_step(self) -> None:
        epoch, number = divmod(self.step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, steps_of_epoch(self._lengths, self._rows, self.seed, epoch)
        rows = self._order[1][number]
        for group in self._optimiser.param_groups:
            group["lr"] = group["rate"] * self._rate()
        if self.config.dropout:
            rank = torch.distributed.get_rank() if is_distributed() else 0
            torch.manual_seed(_seed_of(self.seed, 1 + rank, self.step))
        # zeros, not None: a process without rows adds nothing, but it does add
        self._optimiser.zero_grad(set_to_none=False)
        for part in self._parts(own_share(rows)):
            score = self._score[torch.tensor(part, device=self.device)]
            logits = self._logits([self._ids[row] for row in part])
            loss = nn.functional.binary_cross_entropy_with_logits(logits, score, reduction="sum")
            # the mean over the step, of which this is a part
            (loss / (len(rows) * score.shape[1])).backward()  # type: ignore[no-untyped-call]
        add_gradients(self._parameters)
        nn.utils.clip_grad_norm_(self._parameters, self.config.gradient_clip)
        self._optimiser.step()

    def _rate(self) -> float:
        """Share of the largest learning rate at this step."""
        total = self.config.epochs * self.steps_per_epoch
        warm = max(round(self.config.warm_up * total), 1)
        return min((self.step + 1) / warm, (total - self.step) / max(total - warm, 1))

    def _parts(self, rows: Tensor) -> Iterator[list[int]]:
        for batch in rows.split(self.config.batch_size) if len(rows) else ():  # type: ignore[no-untyped-call]
            for part in batches(self._lengths[batch].tolist(), self.config.token_budget):
                yield batch[part].tolist()

    def _logits(self, ids: Sequence[list[int]]) -> Tensor:
        lengths = torch.tensor([len(tokens) for tokens in ids])
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        padded = torch.full(mask.shape, self._pad)
        padded[mask] = torch.tensor([token for tokens in ids for token in tokens])
        logits: Tensor = self.network(padded.to(self.device), mask.to(self.device), self._precision)
        return logits

    def predict(self, ids: Sequence[list[int]]) -> NDArray[np.float64]:
        """Logits of other rows, (m, K), without dropout; of a row without tokens the head's bias."""
        logits = torch.zeros(len(ids), self._score.shape[1], device=self.device)
        lengths = [len(tokens) for tokens in ids]
        mine = own_share(torch.arange(len(ids))).tolist()
        self.network.eval()
        with torch.no_grad():
            for part in batches([lengths[row] for row in mine], self.config.token_budget):
                rows = [mine[i] for i in part]
                logits[torch.tensor(rows, device=self.device)] = self._logits([ids[row] for row in rows])
            if is_distributed():
                torch.distributed.all_reduce(logits)
            logits[torch.tensor(lengths, device=self.device) == 0] = self.network.head.bias
        self.network.train(self.config.dropout)
        return logits.double().cpu().numpy()

    def weights(self) -> dict[str, NDArray[Any]]:
        """All weights, under ``model.`` and their names."""
        return {f"model.{name}": t.detach().cpu().numpy().copy() for name, t in self.network.state_dict().items()}

    def take(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Put the weights of :meth:`weights` in place."""
        part = {n.removeprefix("model."): torch.tensor(t) for n, t in arrays.items() if n.startswith("model.")}
        self.network.load_state_dict(part)

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything that a resumed run needs: weights, AdamW's moments, the step, on which all draws depend."""
        moments = {
            f"adam.{number}.{name}": torch.as_tensor(value).detach().cpu().numpy().copy()
            for number, fields in self._optimiser.state_dict()["state"].items()
            for name, value in fields.items()
        }
        return self.weights() | moments | {"step": np.array(self.step)}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take a run up where :meth:`state` left it."""
        self.take(arrays)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, values in arrays.items():
            if name.startswith("adam."):
                _, number, field = name.split(".")
                moments.setdefault(int(number), {})[field] = torch.tensor(values, device=self.device)
        self._optimiser.load_state_dict({**self._optimiser.state_dict(), "state": moments})
        self.step = int(arrays["step"])

    def write(self, directory: Path, folder: Path) -> None:
        """Write the transformer as it is now to a folder, float32, with the tokenizer of its directory."""
        shutil.rmtree(folder, ignore_errors=True)
        encoder: Any = self.network.encoder
        encoder.config.save_pretrained(folder)
        # the names of a model without a head are those that AutoModel and our own DeBERTa read
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        shutil.copyfile(directory / "tokenizer.json", folder / "tokenizer.json")
