"""An adapter to be, in the form of one that exists: other factors under the same names, and the rest carried along.

All scales end up in the factors, alpha being each module's rank, so that every runtime agrees on them (some know no
rsLoRA, some no patterns). Factors are asked for one module at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..architectures.prefixes import PEFT_PREFIX
from ..errors import InputError, NeedsFlag, UsageError
from ..files.dtypes import SAFETENSORS, TensorSpec
from ..files.tensor_ref import TensorRef, is_finite
from ..files.weights_file import WeightsFile
from .adapter import Adapter, UpdateSpec
from .formats.diffusers import metadata_of, split_component
from .formats.peft import adapter_names, saved_name
from .formats.peft_config import base_mutating_init, base_mutating_init_of
from .formats.peft_write import lora_config, write_adapter
from .formats.single_file import STALE_KEYS, write_single_file


@dataclass(frozen=True)
class CarriedTensor:
    """A tensor that goes along: the sum of tensors of one shape, each times its factor; one of factor 1 as it is."""

    terms: tuple[tuple[TensorRef, float], ...]

    @property
    def is_copy(self) -> bool:
        return len(self.terms) == 1 and self.terms[0][1] == 1

    @property
    def spec(self) -> TensorSpec:
        own = self.terms[0][0].spec
        return own if self.is_copy else TensorSpec("F32", own.shape)

    def load(self) -> Tensor:
        """Raises InputError naming a tensor that holds a nan or an infinity, or is of no float type."""
        first, _ = self.terms[0]
        if self.is_copy:
            total = first.file.tensor(first.name)
        else:
            total = torch.zeros(first.spec.shape, dtype=torch.float64)
            for source, factor in self.terms:
                total.add_(source.file.tensor(source.name).double(), alpha=factor)
            total = total.float()
        if not is_finite(total):
            raise InputError("holds nan or inf", culprit=first.name)
        return total


@dataclass(frozen=True)
class EditedAdapter:
    """like: whose format and config the output has. updates: path -> the update whose names and shapes it has there;
    ranks: of those; factors: path -> (B (E, out, r), A (E, r, in)) with the scale in them. carried: the other tensors,
    by their names. fields: of PEFT's config, where they are other than those of `like`.
    """

    template: Adapter
    updates: Mapping[str, UpdateSpec]
    ranks: Mapping[str, int]
    factors: Callable[[str], tuple[Tensor, Tensor]]
    carried: Mapping[str, CarriedTensor]
    dtype: torch.dtype = torch.float32
    fields: Mapping[str, object] = field(default_factory=dict)

    def names(self, module: str) -> tuple[str, str]:
        """Of A and B in the output."""
        one, two = (self._saved(self.updates[module].tensors[role]) for role in ("A", "B"))
        return one, two

    def _saved(self, name: str) -> str:
        return saved_name(name, self._named) if self.template.format == "peft" else name

    @cached_property
    def _named(self) -> set[str]:
        """Names of adapters that keys may have in them; PEFT would not find them under these."""
        files = [self.template.file, *(each.terms[0][0].file for each in self.carried.values())]
        return set().union(*(adapter_names(file.specs) for file in {id(file): file for file in files}.values()))

    def specs_of(self, module: str) -> dict[str, TensorSpec]:
        """Of A and B."""
        letters = SAFETENSORS[str(self.dtype).removeprefix("torch.")]
        update, rank = self.updates[module], self.ranks[module]
        A, B, E = update.specs["A"].shape, update.specs["B"].shape, update.experts
        key_A, key_B = self.names(module)
        return {key_A: TensorSpec(letters, (E * rank, *A[1:])), key_B: TensorSpec(letters, (B[0], rank * E, *B[2:]))}

    def specs(self) -> dict[str, TensorSpec]:
        found = {}
        for module in self.updates:
            found.update(self.specs_of(module))
            if self.template.format == "kohya":
                found[f"{module}.alpha"] = TensorSpec("F32", ())
        for name, each in self.carried.items():
            found[self._saved(name)] = each.spec
        return found

    def budget(self, rule: str, value: float) -> int:
        """The parameters that a rule of ranks.BUDGETS leaves for the factors."""
        factors = {key for module in self.updates for key in self.names(module)}
        rest = [spec for key, spec in self.specs().items() if key not in factors]
        if rule == "size":
            return (int(value) - sum(spec.nbytes for spec in rest)) // self.dtype.itemsize
        return int(value) - sum(spec.size for spec in rest)

    def loader(self) -> Callable[[str], Tensor]:
        """name -> tensor; the two of a module, asked for one after the other, are computed once."""
        module_of = {key: module for module in self.updates for key in self.names(module)}
        carried = {self._saved(name): each for name, each in self.carried.items()}
        last: dict[str, Tensor] = {}

        def load(key: str) -> Tensor:
            if key in carried:
                return carried[key].load()
            if key not in module_of:  # kohya's alpha
                return torch.tensor(float(self.ranks[key.removesuffix(".alpha")]), dtype=torch.float32)
            if key not in last:
                last.clear()
                last.update(self._lay(module_of[key]))
            return last[key]

        return load

    def _lay(self, module: str) -> dict[str, Tensor]:
        B, A = (side.to(self.dtype) for side in self.factors(module))
        specs, names = self.specs_of(module), self.names(module)
        A_spec, B_spec = (specs[name] for name in names)
        return {names[0]: A.reshape(A_spec.shape), names[1]: B.permute(1, 2, 0).reshape(B_spec.shape)}


WRITABLE_FORMATS = ("peft", "kohya", "diffusers")


def require_writable(like: Adapter) -> None:
    """Refuse a format whose files cannot say the new ranks and scales."""
    if like.format not in WRITABLE_FORMATS:
        raise NeedsFlag(
            f"is in {like.format}'s format, whose files cannot say the new ranks and scales",
            culprit=like.name,
            remedy=f"add --to {'kohya' if like.format == 'cloneofsimo' else 'peft'}",
        )


def default_output_name(like: Adapter, to: str | None, verb: str) -> str:
    """Of an output that was given none: a folder where PEFT is asked for, or the input was a folder's file; else a
    file.
    """
    in_folder = like.format == "peft" and like.file.path.name.startswith("adapter_model")
    return verb if (in_folder if to is None else to == "peft") else f"{verb}.safetensors"


def require_same_init(like: Adapter, ranks: Mapping[str, int]) -> None:
    """Refuse what PEFT would not take out of the base as it was when training began: it does so at each load."""
    for module, rank in ranks.items():
        start, update, said = base_mutating_init_of(like.config, module), like.updates.get(module), None
        if start and update and update.rank != rank:
            said = "takes as many directions out of the base as the adapter has rank: of another rank"
        elif start and update and start.lower().startswith("olora") and update.scale != 1:
            said = "takes alpha / rank times its factors out of the base: at alpha = rank, as it would be written,"
        if said:
            raise InputError(
                f"was initialized with {start}, which {said} it would be wrong on any base",
                culprit=like.name,
                remedy="save it with peft's path_initial_model_for_weight_conversion first; if its base is the "
                "changed one, set init_lora_weights to true in its config",
            )


def require_folder_or_file(like: Adapter, path: Path, is_file: bool) -> None:
    """Raises UsageError for a folder where the format is a file."""
    if like.format != "peft" and not is_file:
        raise UsageError(f"{like.format} adapters are single files", culprit=str(path), remedy="-o X.safetensors")


def write_edited(draft: EditedAdapter, path: Path, is_file: bool, inputs: Collection[WeightsFile]) -> None:
    specs, load = draft.specs(), draft.loader()
    if draft.template.format == "peft":
        bare = is_file and not any(key.startswith(PEFT_PREFIX) for key in draft.template.file.specs)
        write_adapter(
            path, is_file, specs, load, edited_adapter_config(draft), inputs, prefix="" if bare else PEFT_PREFIX
        )
        return
    metadata = {key: value for key, value in (draft.template.file.metadata or {}).items() if key not in STALE_KEYS}
    write_single_file(path, specs, load, {**metadata, **_init_metadata(draft)}, inputs)


def _init_metadata(draft: EditedAdapter) -> dict[str, str]:
    """diffusers' metadata, where a loader has to know that the base was changed; else the tensors say it all."""
    if draft.template.format != "diffusers" or not base_mutating_init(draft.template.config):
        return {}
    parts: dict[str, dict[str, int]] = {}
    for module, rank in draft.ranks.items():
        component, path = split_component(module)
        parts.setdefault(component, {})[path] = rank
    starts = {part: base_mutating_init_of(draft.template.config, part) or True for part in parts}
    return metadata_of({part: lora_config(own, {}, init_lora_weights=starts[part]) for part, own in parts.items()})


def edited_adapter_config(draft: EditedAdapter) -> dict[str, object]:
    """The fields of the one it is like, but for what rank and scale are now."""
    stacks = {module for module, update in draft.updates.items() if update.kind == "experts"}
    modules = {module: draft.ranks[module] for module in draft.updates if module not in stacks}
    ours = lora_config(modules, {module: draft.ranks[module] for module in sorted(stacks)})
    keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters", "use_rslora")
    rest = {key: value for key, value in draft.template.config.extra.items() if key not in keys}
    return {**{k: v for k, v in ours.items() if k not in rest}, **rest, **draft.fields, "peft_type": "LORA"}
