"""An adapter to be, in the form of one that exists: other factors under the same names, and the rest carried along.

All scales end up in the factors, alpha being each module's rank, so that every runtime agrees on them (some know no
rsLoRA, some no patterns). Factors are asked for one module at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .adapter import Adapter, UpdateSpec
from .architectures.wrappers import PEFT_PREFIX
from .errors import InputError, UsageError
from .fileio import partial_file, require_free_space, write_at
from .formats.peft import saved_names
from .formats.peft_config import find_config
from .formats.peft_write import SAFETENSORS, lora_config, tensor_bytes, write_adapter
from .source import Source
from .tensorfile import TensorSpec, build_header, data_order
from .updates import Experts, LowRank, Update

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LARGEST = 1e150  # of a change's norm
STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "ss_network_dim", "ss_network_alpha")


def stacked(update: Update) -> tuple[Tensor, Tensor]:
    """(B (E, out, r), A (E, r, in)) in float64, the scale in B; E is 1 but for a stack of experts."""
    if isinstance(update, Experts):
        each = [update.expert(number) for number in range(update.experts)]
        B, A = torch.stack([one.B for one in each]), torch.stack([one.A for one in each])
    else:
        assert isinstance(update, LowRank)
        B, A = update.B.flatten(1).unsqueeze(0), update.A.flatten(1).unsqueeze(0)
    return B.double() * update.scale, A.double()


def load_stacked(adapter: Adapter, spec: UpdateSpec) -> tuple[Tensor, Tensor]:
    """The factors of one update as `stacked` lays them. Raises InputError for nan and inf, for a change of nothing, and
    for one whose squares float64 does not hold.
    """
    B, A = stacked(adapter.load(spec))
    if not B.numel() or not A.numel():
        raise InputError(f"its factors are empty in {adapter.name}", culprit=spec.module)
    largest = float(B.abs().max()) * float(A.abs().max())
    if not largest * math.sqrt(B[0, :, 0].numel() * A.numel()) * A.shape[1] < LARGEST:
        raise InputError(f"its change in {adapter.name} is too large for float64's squares", culprit=spec.module)
    return B, A


@dataclass(frozen=True)
class Carried:
    """A tensor that goes along, times a factor where it is not 1."""

    source: Source
    factor: float = 1.0


@dataclass(frozen=True)
class Draft:
    """like: whose format and config the output has. updates: path -> the update whose names and shapes it has there;
    ranks: of those; factors: path -> (B (E, out, r), A (E, r, in)) with the scale in them. carried: the other tensors,
    by their names.
    """

    like: Adapter
    updates: Mapping[str, UpdateSpec]
    ranks: Mapping[str, int]
    factors: Callable[[str], tuple[Tensor, Tensor]]
    carried: Mapping[str, Carried]
    dtype: torch.dtype = torch.float32

    def names(self, module: str) -> tuple[str, str]:
        """Of A and B in the output."""
        one, two = (self.updates[module].tensors[role] for role in ("A", "B"))
        return self._name(one), self._name(two)

    def _name(self, key: str) -> str:
        return self._saved.get(key, key)

    @cached_property
    def _saved(self) -> dict[str, str]:
        """PEFT's names without an adapter's and wrappers, under which PEFT would find nothing."""
        return saved_names(self.like.file.specs) if self.like.format == "peft" else {}

    def specs(self) -> dict[str, TensorSpec]:
        letters = SAFETENSORS[str(self.dtype).removeprefix("torch.")]
        found = {}
        for module, update in self.updates.items():
            A, B = (update.specs[role].shape for role in ("A", "B"))
            rank, E = self.ranks[module], update.experts
            key_A, key_B = self.names(module)
            found[key_A] = TensorSpec(letters, (E * rank, *A[1:]))
            found[key_B] = TensorSpec(letters, (B[0], rank * E, *B[2:]))
            if self.like.format == "kohya":
                found[f"{module}.alpha"] = TensorSpec("F32", ())
        for name, each in self.carried.items():
            spec = each.source.spec
            found[self._name(name)] = spec if each.factor == 1 else TensorSpec("F32", spec.shape)
        return found

    def loader(self) -> Callable[[str], Tensor]:
        """name -> tensor; the two of a module, asked for one after the other, are computed once."""
        module_of = {key: module for module in self.updates for key in self.names(module)}
        carried = {self._name(name): each for name, each in self.carried.items()}
        last: dict[str, Tensor] = {}

        def load(key: str) -> Tensor:
            if key in carried:
                value = carried[key].source.file.tensor(carried[key].source.name)
                return value if carried[key].factor == 1 else (value.double() * carried[key].factor).float()
            if key not in module_of:  # kohya's alpha
                return torch.tensor(float(self.ranks[key.removesuffix(".alpha")]))
            if key not in last:
                last.clear()
                last.update(self._lay(module_of[key]))
            return last[key]

        return load

    def _lay(self, module: str) -> dict[str, Tensor]:
        B, A = (side.to(self.dtype) for side in self.factors(module))
        specs, (key_A, key_B) = self.updates[module].specs, self.names(module)
        return {
            key_A: A.flatten(0, 1).reshape(-1, *specs["A"].shape[1:]),
            key_B: B.permute(1, 2, 0).reshape(len(B[0]), -1, *specs["B"].shape[2:]),
        }


def write_draft(draft: Draft, path: Path, is_file: bool) -> None:
    """Raises UsageError for a folder where the format is a file."""
    specs, load = draft.specs(), draft.loader()
    if draft.like.format == "peft":
        bare = is_file and not any(key.startswith(PEFT_PREFIX) for key in draft.like.file.specs)  # as diffusers has it
        write_adapter(path, is_file, specs, load, _peft_config(draft), prefix="" if bare else PEFT_PREFIX)
        return
    if not is_file:
        raise UsageError(f"{draft.like.format} adapters are single files", culprit=str(path), remedy="-o X.safetensors")
    metadata = {key: value for key, value in (draft.like.file.metadata or {}).items() if key not in STALE}
    header, begin = build_header(specs, names := data_order(specs), metadata)
    require_free_space(path.absolute().parent, len(header) + sum(spec.nbytes for spec in specs.values()))
    with partial_file(path) as file:
        write_at(file, memoryview(header), 0)
        for name in names:
            write_at(file, tensor_bytes(load(name), specs[name]), begin[name])


def _peft_config(draft: Draft) -> dict[str, object]:
    """The fields of the one it is like, but for what rank and scale are now."""
    _, component = find_config(draft.like.file)  # diffusers' prefix, which is a part of the names that are written
    path = {module: f"{component}.{module}" if component else module for module in draft.updates}
    stacks = {module for module, update in draft.updates.items() if update.kind == "experts"}
    modules = {path[module]: draft.ranks[module] for module in draft.updates if module not in stacks}
    ours = lora_config(modules, {path[module]: draft.ranks[module] for module in sorted(stacks)})
    keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters", "use_rslora")
    rest = {key: value for key, value in draft.like.config.extra.items() if key not in keys}
    return {**{k: v for k, v in ours.items() if k not in rest}, **rest, "peft_type": "LORA"}
