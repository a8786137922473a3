"""Random routers in the kernels' form, on the GPU where there is one and in Triton's interpreter where not."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from proteus_kernels.snapshot import Decisions, PathTable, Snapshot
from tests.core.routers import RandomRouter

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def build(router: RandomRouter, **changes: Any) -> Snapshot:
    fields = {field.name: getattr(router, field.name) for field in dataclasses.fields(router)}
    fields["dual"] = PathTable(**vars(router.dual))
    fields["policy"] = PathTable(**vars(router.policy)) if router.policy else None
    return Snapshot(**{**fields, "device": DEVICE, **changes})


def on_device(values: Any) -> Any:
    """Arrays as tensors of the device; anything else as it is."""
    if not hasattr(values, "dtype"):
        return values
    if values.dtype == "uint64":
        values = values.view("int64")
    return torch.from_numpy(values).to(DEVICE)


def decide(snapshot: Snapshot, x: Any, call: dict[str, Any]) -> Decisions:
    """The call's decisions, written over poison: a value that no program wrote is seen."""
    x = x if isinstance(x, Tensor) else on_device(x)
    out = Decisions.empty(len(x), DEVICE)
    for part in out:
        part.fill_(77)
    given = {name: on_device(value) for name, value in call.items()}
    snapshot.decide(x, given.pop("tau"), out=out, **given)
    return Decisions(*(part.cpu() for part in out))
