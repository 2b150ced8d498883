"""Make an adapter with a base-mutating init fit the original base: subtract its initial factors.

The result [A; A0], [B | -B0] at the adapter's scale is peft's `subtract_mutated_init`: exact, at twice the rank.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from ...adapters.adapter import Adapter
from ...files.dtypes import TensorSpec
from ...files.virtual import VirtualFile
from ..inputs import subtract_initial

RANKS = {"A": 0, "B": 1}  # role -> the dimension of the ranks


def subtract_init(source: Adapter, initial: str | os.PathLike[str], opened: ExitStack) -> Adapter:
    """Return the adapter less `initial`, its tensors made when they are loaded; `opened` closes the file of `initial`.

    Raises:
        UsageError, InputError: `initial` is not this adapter before training.
        NeedsFlag: the adapter is DoRA.
    """
    (_, (before, _)) = subtract_initial(((source, 1.0),), initial, False, opened)
    specs, updates, pairs = dict(source.file.specs), dict(source.updates), dict[str, tuple[str, str]]()
    for module, former in before.updates.items():
        update = updates[module]
        for role, ranks in RANKS.items():
            spec, other = update.specs[role], former.specs[role]
            shape = tuple(n + other.shape[i] if i == ranks else n for i, n in enumerate(spec.shape))
            name = update.tensors[role]
            specs[name] = TensorSpec(spec.dtype if spec.dtype == other.dtype else "F32", shape)
            pairs[name] = module, role
        updates[module] = replace(update, specs={role: specs[update.tensors[role]] for role in RANKS})

    def load(name: str) -> Tensor:
        if name not in pairs:
            return source.file.tensor(name)
        module, role = pairs[name]
        former = before.file.tensor(before.updates[module].tensors[role])
        sides = [source.file.tensor(name), former if role == "A" else -former]
        if specs[name].dtype == "F32":
            sides = [side.float() for side in sides]
        return torch.cat(sides, RANKS[role])

    config = replace(source.config, peft={**source.config.peft, "init_lora_weights": True}, base_mutating_inits={})
    file = VirtualFile(source.file, specs, load, source.file.metadata or {})
    return replace(source, file=file, updates=updates, config=config)
