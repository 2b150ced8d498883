"""Write an edited adapter: new factors under the names of an existing one; other tensors are copied unchanged.

Scales are folded into the factors and alpha is each module's rank, so that every runtime computes the same (some do
not support rsLoRA, some no patterns). Factors are computed for one module at a time, to bound memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from ..architectures.prefixes import PEFT_PREFIX
from ..errors import InputError, NeedsFlag
from ..files.containers.safetensors_file import data_order
from ..files.dtypes import TensorSpec
from ..files.tensor_ref import TensorRef
from ..files.weights_file import WeightsFile
from ..numerics.arrays import Array, Numbers, fetched, rounded_to
from ..numerics.forms import F32, Form
from .adapter import Adapter
from .formats import FORMATS, usual_format
from .formats.content import AdapterContent
from .formats.format import Format
from .formats.kohya import rank_and_alpha
from .formats.peft import adapter_names
from .formats.peft_config import WEIGHTS_NAMES, base_mutating_init_of, listed_as_parameters, lora_config
from .image_metadata import former_metadata
from .updates.add import AddDelta
from .updates.diff import Diff
from .updates.replace import ReplaceTensor
from .updates.rows import ReplaceRows
from .updates.update import UpdateSpec

# kinds without factors, whose one tensor can be copied or summed
CARRIED = (AddDelta, Diff, ReplaceTensor, ReplaceRows)


@dataclass(frozen=True)
class CarriedTensor:
    """A tensor beside the factors: the sum of tensors of one shape, or a copy of one."""

    terms: tuple[tuple[TensorRef, float], ...]  # (tensor, its factor)

    @property
    def is_copy(self) -> bool:
        return len(self.terms) == 1 and self.terms[0][1] == 1

    @property
    def spec(self) -> TensorSpec:
        stored = self.terms[0][0].spec
        return stored if self.is_copy else TensorSpec("F32", stored.shape)

    @np.errstate(all="ignore")
    def load(self) -> Numbers:
        """Read a copy in its stored type, or compute a sum in float64 and round it to float32.

        Raises:
            InputError: a tensor holds nan or inf, or is not of a float type.
        """
        first, _ = self.terms[0]
        if self.is_copy:
            total = first.file.numbers(first.name)
        else:
            summed = np.zeros(first.spec.shape)
            for ref, factor in self.terms:
                summed += ref.file.numbers(ref.name).wide() * factor
            total = rounded_to(summed, F32)
        if not total.all_finite():
            raise InputError("holds nan or inf", culprit=first.name)
        return total


@dataclass(frozen=True)
class EditedAdapter:
    """An adapter to be written, with the format, names and config of an existing one."""

    template: Adapter  # the adapter whose format and config the output has
    updates: Mapping[str, UpdateSpec]  # module -> the update that gives names and shapes (except the rank)
    ranks: Mapping[str, int]  # module -> rank
    # module -> (B (E, out, r), A (E, r, in)), with the scale folded in: float64, or already rounded
    factors: Callable[[str], tuple[Array | Numbers, Array | Numbers]]
    carried: Mapping[str, CarriedTensor]  # name -> a tensor beside the factors
    dtype: Form = F32  # of the factors
    fields: Mapping[str, object] = field(default_factory=dict)  # fields of PEFT's config that replace the template's
    metadata: Mapping[str, str] = field(default_factory=dict)  # entries of the file that replace the template's
    differing: Collection[str] = ()  # keys of the template's metadata that do not apply to the output

    @property
    def format(self) -> Format:
        return FORMATS[self.template.format]

    def names(self, module: str) -> tuple[str, str]:
        """Return the names of A and B in the output."""
        return self._names[module]

    @cached_property
    def _names(self) -> dict[str, tuple[str, str]]:
        sides = {module: update.tensors for module, update in self.updates.items()}
        return {module: (self._saved(each["A"]), self._saved(each["B"])) for module, each in sides.items()}

    def _saved(self, name: str) -> str:
        return self.format.edited_name(name, self._named)

    @cached_property
    def _named(self) -> set[str]:
        """Adapter names that keys may contain; they are removed, because PEFT would not find such keys."""
        files = [self.template.file, *(each.terms[0][0].file for each in self.carried.values())]
        return set().union(*(adapter_names(file.specs) for file in {id(file): file for file in files}.values()))

    def specs_of(self, module: str) -> dict[str, TensorSpec]:
        """Return name -> type and shape of A and B in the output."""
        dtype = self.dtype.name
        update, rank = self.updates[module], self.ranks[module]
        A, B, E = update.specs["A"].shape, update.specs["B"].shape, update.experts
        key_A, key_B = self.names(module)
        return {key_A: TensorSpec(dtype, (E * rank, *A[1:])), key_B: TensorSpec(dtype, (B[0], rank * E, *B[2:]))}

    def specs(self) -> dict[str, TensorSpec]:
        """Return name -> type and shape of every tensor of the output."""
        specs = {}
        for module in self.updates:
            specs.update(self.specs_of(module))
            if alpha := self.format.edited_alpha(module):
                specs[alpha] = TensorSpec("F32", ())
        for name, carried in self.carried.items():
            specs[self._saved(name)] = carried.spec
        return specs

    def order(self) -> list[str]:
        """Return the modules in the order in which their factors are written."""
        module_of = {key: module for module in self.updates for key in self.names(module)}
        return list(dict.fromkeys(module_of[name] for name in data_order(self.specs()) if name in module_of))

    def budget(self, rule: str, value: float) -> int:
        """Return how many parameters the factors may have under `rule`, a key of `rank_rules.BUDGETS`."""
        factors = {key for module in self.updates for key in self.names(module)}
        rest = [spec for key, spec in self.specs().items() if key not in factors]
        if rule == "size":
            return (int(value) - sum(spec.nbytes for spec in rest)) // self.dtype.itemsize
        return int(value) - sum(spec.size for spec in rest)

    def loader(self) -> Callable[[str], Numbers]:
        """Return a function from an output tensor's name to its numbers.

        A module's factors are computed once if they are requested one after the other.
        """
        module_of = {key: module for module in self.updates for key in self.names(module)}
        carried = {self._saved(name): each for name, each in self.carried.items()}
        alphas = {name: module for module in self.updates if (name := self.format.edited_alpha(module))}
        last: dict[str, Numbers] = {}

        def load(key: str) -> Numbers:
            if key in carried:
                return carried[key].load()
            if key in alphas:
                return Numbers.of(np.array([self.ranks[alphas[key]]], np.float32)).reshape()
            if key not in last:
                last.clear()
                last.update(self._stored_factors(module_of[key]))
            return last[key]

        return load

    def _stored_factors(self, module: str) -> dict[str, Numbers]:
        B, A = (self._rounded(side) for side in self.factors(module))
        specs, names = self.specs_of(module), self.names(module)
        A_spec, B_spec = (specs[name] for name in names)
        B = Numbers(B.bits.transpose(1, 2, 0), B.form)
        return {names[0]: A.reshape(*A_spec.shape), names[1]: B.reshape(*B_spec.shape)}

    def _rounded(self, side: Array | Numbers) -> Numbers:
        rounded = isinstance(side, Numbers)
        return Numbers(side.host(), side.form) if rounded else rounded_to(fetched(side), self.dtype)


def require_writable(template: Adapter) -> None:
    """Raise NeedsFlag for a format that is read-only, or that cannot store the new ranks and scales."""
    can = FORMATS[template.format].can
    if can.alpha == "none" or not can.writes:
        many, reason = can.components == "many", "whose files cannot record the new ranks and scales"
        raise NeedsFlag(
            f"is in {template.format}'s format, {reason if can.writes else 'which is only read'}",
            culprit=template.name,
            flags=f"--to {usual_format('single file' if many else 'model').key}",
        )


def edited_output(
    template: Adapter, to: str | None, out: str | os.PathLike[str] | None, command: str
) -> tuple[Path, bool]:
    """Return the output's path, and whether it is a file, in the template's format or in `to`.

    Without `out` the path is the command's name. It is a folder if the format has folders and the template is in one or
    `to` is given.
    """
    in_folder = to is not None or template.file.path.name in WEIGHTS_NAMES
    return FORMATS[to or template.format].output(out, command, in_folder)


def require_same_init(template: Adapter, ranks: Mapping[str, int]) -> None:
    """Raise InputError if PEFT would not subtract the same init from the base as when training began.

    PEFT repeats a base-mutating init at each load. What it subtracts depends on the rank, with OLoRA also on the scale.
    """
    for module, rank in ranks.items():
        init, update, reason = base_mutating_init_of(template.config, module), template.updates.get(module), None
        if init and update and update.rank != rank:
            reason = "removes as many directions from the base as the adapter has rank: at another rank"
        elif init and update and init.lower().startswith("olora") and update.scale != 1:
            reason = "subtracts alpha / rank times its factors from the base: at alpha = rank, as it would be written,"
        if reason:
            raise InputError(
                f"was initialized with {init}, which {reason} it would be wrong on any base",
                culprit=template.name,
                remedy="save it with peft's path_initial_model_for_weight_conversion first; if its base is the "
                "changed one, set init_lora_weights to true in its config",
            )


def write_edited(
    edited: EditedAdapter,
    path: Path,
    is_file: bool,
    inputs: Collection[WeightsFile],
    card: Callable[[], bytes] | None,
) -> None:
    """Write the adapter.

    Args:
        inputs: the files that it is made of, which must not change during the write.
        card: as in `AdapterContent`.
    """
    template = edited.template
    metadata = {**former_metadata(template.file.metadata or {}, new_ranks=True), **edited.metadata}
    metadata = {key: value for key, value in metadata.items() if key not in edited.differing}
    if "ss_network_dim" in (template.file.metadata or {}):
        metadata |= rank_and_alpha(edited.ranks.values(), map(float, edited.ranks.values()))
    content = AdapterContent(
        edited.specs(),
        edited.loader(),
        edited_adapter_config(edited),
        {**metadata, **edited.format.edited_metadata(template.config, edited.ranks)},
        bare=is_file and not any(key.startswith(PEFT_PREFIX) for key in template.file.specs),
        card=card,
    )
    edited.format.write(path, is_file, content, inputs)


# How PEFT's names of tensors end -> the config field without which PEFT ignores them
SAID_BY_FIELDS = {".lora_magnitude_vector": "use_dora", ".lora_B.bias": "lora_bias"}


def edited_adapter_config(edited: EditedAdapter) -> dict[str, object]:
    """Return the template's config fields with the new ranks and scales."""
    ranks = {update.target: edited.ranks[module] for module, update in edited.updates.items()}
    parameters = listed_as_parameters(edited.updates.values())
    modules = {name: rank for name, rank in ranks.items() if name not in parameters}
    new = lora_config(modules, {name: ranks[name] for name in sorted(parameters)})
    keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters", "use_rslora")
    rest = {key: value for key, value in edited.template.config.peft.items() if key not in keys}
    specs = edited.specs()
    new |= {field: True for mark, field in SAID_BY_FIELDS.items() if any(name.endswith(mark) for name in specs)}
    defaults = {k: v for k, v in new.items() if k not in rest}
    return {**edited.template.config.other_fields, **defaults, **rest, **edited.fields, "peft_type": "LORA"}
