"""Represent an adapter of any format as a lazy mapping from module path to update.

All of it comes from headers, the config and scalar alphas, so that plans, binding and `inspect` need no
torch; `Adapter.load` reads the tensors of one update.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..architectures.image import weighed_component
from ..errors import InputError, LoratoolError, NeedsFlag
from ..files.dtypes import TensorSpec
from ..files.fileio import sha256_file
from ..files.tensor_ref import is_finite
from ..files.weights_file import WeightsFile
from .patterns import Patterns, Targets
from .updates import UPDATES, Update

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of PEFT's `adapter_config.json` that decide rank and scale, or their equivalent in another format."""

    rank: int | None = None  # None if the file does not say
    alpha: float | None = None  # None if the file does not say
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # pattern -> rank
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)  # pattern -> alpha
    fan_in_fan_out: bool | None = None
    base_model: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # all fields as they are in the file
    base_mutating_inits: Mapping[str, str] = field(default_factory=dict)  # component of a diffusers file -> init

    @cached_property
    def _ranks(self) -> Patterns:
        return Patterns(self.rank_pattern)

    @cached_property
    def _alphas(self) -> Patterns:
        return Patterns(self.alpha_pattern)

    @cached_property
    def parameters(self) -> Mapping[str, Sequence[tuple[int, str]]]:
        """Return `target_parameters` by module ("" for bare names): (index in the list, parameter's name)."""
        found: dict[str, list[tuple[int, str]]] = {}
        for number, listed in enumerate(self.extra["target_parameters"]):
            owner, _, parameter = listed.rpartition(".")
            found.setdefault(owner, []).append((number, parameter))
        return found

    @cached_property
    def targets(self) -> Targets:
        return Targets(self.extra.get("target_modules"))

    def rank_of(self, module: str) -> int | None:
        rank: int | None = self._ranks.value(module, self.rank)
        return rank

    def for_module(self, parameter: str) -> AdapterConfig:
        """Return the config of one bare parameter: patterns are matched with its own path, not with its module's."""
        alpha = self._alphas.value(parameter, self.alpha)
        return replace(self, rank=self.rank_of(parameter), alpha=alpha, rank_pattern={}, alpha_pattern={})

    def scale_of(self, module: str, rank: int) -> float:
        """Return alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023).

        Raises:
            NeedsFlag: the adapter does not say its alpha.
        """
        alpha: float | None = self._alphas.value(module, self.alpha)
        if alpha is None:
            raise NeedsFlag(
                "the adapter does not say its alpha",
                culprit=module,
                remedy="pass --alpha with the value it was trained with",
            )
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def is_in_listed_module(entry: str, module: str) -> bool:
    """Return whether `module` is, or is inside, a module whose path ends in `entry`: PEFT's rule.

    `entry` is one of modules_to_save.
    """
    parts = module.split(".")
    return any(".".join(parts[:stop]).endswith(entry) for stop in range(1, len(parts) + 1))


UNPAIRED = "unpaired"


@dataclass(frozen=True)
class UpdateSpec:
    """One update before its tensors are read."""

    kind: str  # a key of UPDATES, or UNPAIRED
    module: str  # path of the module whose `weight` it changes, or of another parameter
    tensors: Mapping[str, str]  # role (A, B, ...) -> tensor in the adapter's file
    specs: Mapping[str, TensorSpec]  # role -> type and shape, of B with all rows, transposed if is_transposed_dora
    scale: float = 1.0
    transposed: bool | None = None  # the base stores (in, out); None if the format does not say
    experts: int = 1  # how many the factors are stacked of
    indices: tuple[int, ...] = ()  # of the rows that it replaces
    base: str | None = None  # tensor in the adapter's file that replaces the weight under the update
    enabled_slices: tuple[bool, ...] = ()  # which of a MergedLinear's equal slices of rows the stored B has
    norm_over_inputs: bool = False  # DoRA's magnitudes are of V's columns (the inputs), not of its rows
    is_transposed_dora: bool = False  # DoRA of the transposed weight; the stored tensors are not transposed
    fault: str | None = None  # why it cannot be merged, if a damaged file is read leniently

    @property
    def stored(self) -> tuple[str, ...]:
        """All of its tensors in the adapter's file."""
        return (*self.tensors.values(), *((self.base,) if self.base else ()))

    @property
    def rank(self) -> int:
        """The rank of the update of one matrix; 0 if the update has no factors."""
        return self.specs["A"].shape[0] // self.experts if "A" in self.specs else 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that it changes: (out, in) for a linear layer, (experts, out, in) for a stack."""
        if "A" not in self.specs:
            return self.specs["value"].shape
        stack = (self.experts,) if self.kind == "experts" else ()
        return (*stack, self.specs["B"].shape[0], *self.specs["A"].shape[1:])

    def transpose(self) -> UpdateSpec:
        """Return DoRA normed over the inputs as DoRA of the transposed weight, (B A)^T = A^T B^T."""
        tensors = {**self.tensors, "A": self.tensors["B"], "B": self.tensors["A"]}
        A, B = (TensorSpec(self.specs[role].dtype, self.specs[role].shape[::-1]) for role in "BA")
        return replace(
            self, tensors=tensors, specs={**self.specs, "A": A, "B": B}, norm_over_inputs=False, is_transposed_dora=True
        )


@dataclass(frozen=True)
class Adapter:
    """An open adapter: its updates by module path, and the file that holds their tensors."""

    name: str  # as the user gave it
    format: str  # a key of `adapters.formats.FORMATS`
    file: WeightsFile
    config: AdapterConfig
    updates: Mapping[str, UpdateSpec]  # module path -> update
    flattened: bool = False  # the paths are kohya's, with `_` for dots
    notes: tuple[str, ...] = ()  # sentences for the user
    missing: tuple[str, ...] = ()  # sentences on what the config announces and the file does not have
    component_weights: Mapping[str, float] = field(default_factory=dict)  # component -> weight, if not the adapter's

    @property
    def base_hint(self) -> str:
        """A sentence on the base that it was trained on, for a remedy; empty if the config does not name one."""
        base = self.config.base_model
        if not isinstance(base, str) or not base or not base.isprintable():
            return ""
        return f"{self.name} says it was trained on {base}"

    def weight_of(self, module: str, weight: float) -> float:
        """Return the weight of one module of an adapter whose weight is `weight`."""
        component = weighed_component(module) if self.component_weights else None
        return self.component_weights.get(component, weight) if component else weight

    def load(self, spec: UpdateSpec) -> Update:
        """Read the tensors of one update.

        Raises:
            InputError: a tensor holds nan or inf.
        """
        cls, roles = UPDATES[spec.kind]
        tensors = {role: self.file.tensor(spec.tensors[role]) for role in roles}
        for role, tensor in tensors.items():
            if not is_finite(tensor):
                raise InputError(f"holds nan or inf; {self.name} is damaged", culprit=spec.tensors[role])
        if spec.enabled_slices:
            tensors["B"] = _expand_merged_linear(tensors["B"], spec.enabled_slices)
        if spec.is_transposed_dora:
            tensors |= {role: tensors[role].T.contiguous() for role in "AB"}
        values: dict[str, Any] = {"scale": spec.scale, "experts": spec.experts}
        names = {field.name for field in fields(cls)}
        if "indices" in names:
            import torch

            values["indices"] = torch.tensor(spec.indices, dtype=torch.int64)
        return cls(**tensors, **{name: value for name, value in values.items() if name in names})

    def in_modules_to_save(self, module: str) -> bool:
        """Return whether `module` is, or is inside, a module that the config lists in modules_to_save."""
        listed = self.config.extra.get("modules_to_save")
        if not isinstance(listed, list) or self.updates[module].kind != "replace":
            return False
        return any(isinstance(entry, str) and is_in_listed_module(entry, module) for entry in listed)

    def is_duplicate_bias(self, module: str, others: Container[str]) -> bool:
        """Return whether `module` is a head's bias that is in `others` under the owner's name, with the same values.

        `cls.predictions.decoder.bias` is `cls.predictions.bias` in transformers, and PEFT saves both.
        """
        owner, _, last = module.rpartition(".")
        other = f"{owner.rpartition('.')[0]}.{last}"
        if self.updates[module].kind != "replace" or other not in others or self.updates[other].kind != "replace":
            return False
        one, two = (self.updates[path].tensors["value"] for path in (module, other))
        return self.file.specs[one] == self.file.specs[two] and self.file.read(one) == self.file.read(two)

    @cached_property
    def sha256(self) -> str:
        """The hash of the weights file, as `sha256sum` prints it."""
        return sha256_file(self.file.path)

    @cached_property
    def scales_sha256(self) -> str:
        """The hash of what the weights file does not determine: each module's scale and the indices of its rows."""
        lines = "".join(
            f"{module} {spec.scale.hex()}" + "".join(f" {index}" for index in spec.indices) + "\n"
            for module, spec in sorted(self.updates.items())
        )
        return hashlib.sha256(lines.encode()).hexdigest()


def _expand_merged_linear(B: Tensor, enabled: Sequence[bool]) -> Tensor:
    """Expand a MergedLinear's B (rows of the n enabled slices, r) to the B (out, r * n) of LoRA, which is block-sparse.

    The g-th enabled slice uses rows g * r to (g + 1) * r of A: loralib convolves A with B in n groups
    (microsoft/LoRA: loralib/layers.py).
    """
    n, (rows, r) = sum(enabled), B.shape
    size = rows // n
    expanded = B.new_zeros(size * len(enabled), r * n)
    for g, slot in enumerate(i for i, on in enumerate(enabled) if on):
        expanded[slot * size : (slot + 1) * size, g * r : (g + 1) * r] = B[g * size : (g + 1) * size]
    return expanded


def pair_factors(
    module: str,
    roles: Mapping[str, str],
    file: WeightsFile,
    config: AdapterConfig,
    transposed: bool | None = None,
    stacked: bool = False,
    lenient: bool = False,
) -> UpdateSpec:
    """Make the LoRA or DoRA update of a module from the tensors found for it.

    Args:
        roles: role (A, B, magnitude, base) -> tensor in the file.
        transposed: as `UpdateSpec.transposed`.
        stacked: a tensor has the factors of several experts; the config's rank is that of one.
        lenient: record errors in `UpdateSpec.fault` instead of raising them.

    Raises:
        InputError: a factor is missing, or the ranks of A, B and the config differ.
        NeedsFlag: the file does not say its alpha.
    """
    specs = {role: file.specs[name] for role, name in roles.items() if role != "base"}
    factors = {role: roles[role] for role in specs}
    kind = "dora" if "magnitude" in specs else "experts" if stacked else "lora"
    try:
        _check_pair(module, roles, specs)
    except InputError as error:
        if not lenient:
            raise
        key = next(iter(roles.values()))
        return UpdateSpec(UNPAIRED, module, {"value": key}, {"value": file.specs[key]}, fault=error.message)
    rank, expected, fault, scale = specs["A"].shape[0], config.rank_of(module), None, 1.0
    experts = rank // expected if stacked and expected and rank % expected == 0 else 1
    try:
        if expected is not None and expected * experts != rank:
            raise InputError(
                f"the config says rank {expected}, but A is {specs['A'].shape}",
                culprit=module,
                remedy="the config is of another adapter",
            )
        scale = config.scale_of(module, rank // experts)
        if not math.isfinite(scale):
            raise InputError(f"its scale would be {scale}", culprit=module)
    except LoratoolError as error:
        if not lenient:
            raise
        fault = f"{error.message}; {error.remedy}" if error.remedy else error.message
    scale = scale if math.isfinite(scale) else 1.0
    return UpdateSpec(kind, module, factors, specs, scale, transposed, experts, base=roles.get("base"), fault=fault)


def _check_pair(module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
    for role in ("A", "B"):
        if role not in roles:
            other = next(iter(roles.values()))
            raise InputError(f"has no partner: the {role} factor of {module} is missing", culprit=other)
    A, B = specs["A"].shape, specs["B"].shape
    if min(len(A), len(B)) < 2 or any(size != 1 for size in B[2:]):
        raise InputError(f"A is {A} and B is {B}: no low-rank pair", culprit=module)
    if A[0] != B[1] or A[0] == 0:
        hint = "; a grouped convolution has no LoRA that could be merged" if len(A) > 2 and A[0] else ""
        raise InputError(f"A is {A} and B is {B}: they do not share a rank{hint}", culprit=module)
    if "magnitude" in specs and specs["magnitude"].size != B[0]:
        raise InputError(f"has {specs['magnitude'].size} magnitudes for {B[0]} outputs", culprit=roles["magnitude"])
