"""An adapter as a lazy mapping from module path to update, whatever its format.

All of it comes from headers, the config and scalar alphas, so that plans, binding and `inspect` need no
torch; `Adapter.load` reads one update's tensors.
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
    """What PEFT's `adapter_config.json` says of rank and scale; `extra` keeps every other field.

    `rank` and `alpha` are None where the file does not say. starts: of diffusers' files, component -> the
    initialization that changed the base under it.
    """

    rank: int | None = None
    alpha: float | None = None
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool | None = None
    base_model: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    base_mutating_inits: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _ranks(self) -> Patterns:
        return Patterns(self.rank_pattern)

    @cached_property
    def _alphas(self) -> Patterns:
        return Patterns(self.alpha_pattern)

    @cached_property
    def parameters(self) -> Mapping[str, Sequence[tuple[int, str]]]:
        """Of `target_parameters` by the module named ("" for none): each one's place in the list, and its name."""
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
        """The config of one parameter, whose patterns are held against its own path and not its module's."""
        alpha = self._alphas.value(parameter, self.alpha)
        return replace(self, rank=self.rank_of(parameter), alpha=alpha, rank_pattern={}, alpha_pattern={})

    def scale_of(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023); never a guess where alpha is missing."""
        alpha: float | None = self._alphas.value(module, self.alpha)
        if alpha is None:
            raise NeedsFlag(
                "the adapter does not say its alpha",
                culprit=module,
                remedy="pass --alpha with the value it was trained with",
            )
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def is_in_listed_module(entry: str, module: str) -> bool:
    """Whether `module` is, or lies in, one whose path ends in `entry`: PEFT's rule for modules_to_save."""
    parts = module.split(".")
    return any(".".join(parts[:stop]).endswith(entry) for stop in range(1, len(parts) + 1))


UNPAIRED = "unpaired"


@dataclass(frozen=True)
class UpdateSpec:
    """One update before its tensors are read: `tensors` maps a role (A, B, ...) to a name in the adapter's file.

    module: the path of the module whose `weight` it changes; for another parameter the path of that one.
    transposed: whether the base stores (in, out), where the format itself knows it.
    base: the tensor of the adapter's file that holds the weight under the update, if the adapter brought its own.
    enabled: of a MergedLinear's rows in equal slices, those that the stored B has; `specs` describe B with all rows.
    inputs: DoRA's magnitudes are of the inputs, V's columns, and not of its rows. turned: of such a one that is placed,
    as DoRA of the transposed weight: `specs` and roles are those of the transpose, the stored tensors are not.
    fault: why it cannot be merged, in a view of a damaged file (kind UNPAIRED where it has no pair of factors).
    """

    kind: str
    module: str
    tensors: Mapping[str, str]
    specs: Mapping[str, TensorSpec]
    scale: float = 1.0
    transposed: bool | None = None
    experts: int = 1
    indices: tuple[int, ...] = ()
    base: str | None = None
    enabled_slices: tuple[bool, ...] = ()
    norm_over_inputs: bool = False
    is_transposed_dora: bool = False
    fault: str | None = None

    @property
    def stored(self) -> tuple[str, ...]:
        """All of its tensors in the adapter's file."""
        return (*self.tensors.values(), *((self.base,) if self.base else ()))

    @property
    def rank(self) -> int:
        """Of the change to one matrix; 0 where the change has no factors."""
        return self.specs["A"].shape[0] // self.experts if "A" in self.specs else 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor it changes, a linear layer being (out, in) and a stack of experts (experts, out, in)."""
        if "A" not in self.specs:
            return self.specs["value"].shape
        stack = (self.experts,) if self.kind == "experts" else ()
        return (*stack, self.specs["B"].shape[0], *self.specs["A"].shape[1:])

    def transpose(self) -> UpdateSpec:
        """DoRA along the inputs as DoRA of the transposed weight: A^T B^T, each factor in the other's place."""
        tensors = {**self.tensors, "A": self.tensors["B"], "B": self.tensors["A"]}
        A, B = (TensorSpec(self.specs[role].dtype, self.specs[role].shape[::-1]) for role in "BA")
        return replace(
            self, tensors=tensors, specs={**self.specs, "A": A, "B": B}, norm_over_inputs=False, is_transposed_dora=True
        )


@dataclass(frozen=True)
class Adapter:
    """Updates by module path.

    flattened: the paths are kohya's, with `_` where the module path has dots. lacks: what the config announces and
    the file does not have. components: of an image model's, those with another weight than the adapter's own.
    """

    name: str
    format: str
    file: WeightsFile
    config: AdapterConfig
    updates: Mapping[str, UpdateSpec]
    flattened: bool = False
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    component_weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def base_hint(self) -> str:
        """What it says of its base, as a sentence for a remedy; nothing where it does not say."""
        told = self.config.base_model
        if not isinstance(told, str) or not told or not told.isprintable():
            return ""
        return f"{self.name} says it was trained on {told}"

    def weight_of(self, module: str, weight: float) -> float:
        """The weight of one module, where the adapter's is `weight`."""
        component = weighed_component(module) if self.component_weights else None
        return self.component_weights.get(component, weight) if component else weight

    def load(self, spec: UpdateSpec) -> Update:
        """Read one update. Raises InputError naming the tensor that holds a nan or an infinity."""
        cls, roles = UPDATES[spec.kind]
        tensors = {role: self.file.tensor(spec.tensors[role]) for role in roles}
        for role, tensor in tensors.items():
            if not is_finite(tensor):
                raise InputError(f"holds nan or inf; {self.name} is damaged", culprit=spec.tensors[role])
        if spec.enabled_slices:
            tensors["B"] = _expand_merged_linear(tensors["B"], spec.enabled_slices)
        if spec.is_transposed_dora:
            tensors |= {role: tensors[role].T.contiguous() for role in "AB"}
        rest: dict[str, Any] = {"scale": spec.scale, "experts": spec.experts}
        names = {field.name for field in fields(cls)}
        if "indices" in names:
            import torch

            rest["indices"] = torch.tensor(spec.indices, dtype=torch.int64)
        return cls(**tensors, **{name: value for name, value in rest.items() if name in names})

    def in_modules_to_save(self, module: str) -> bool:
        """Whether `module` is a whole one that the adapter announces, or lies in one."""
        listed = self.config.extra.get("modules_to_save")
        if not isinstance(listed, list) or self.updates[module].kind != "replace":
            return False
        return any(isinstance(entry, str) and is_in_listed_module(entry, module) for entry in listed)

    def is_duplicate_bias(self, module: str, others: Container[str]) -> bool:
        """Whether `module` is one of `others` again: the bias of a head under its owner's name and its decoder's.

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
        """Of the weights file, as `sha256sum` prints it."""
        return sha256_file(self.file.path)

    @cached_property
    def scales_sha256(self) -> str:
        """Of what the weights file alone does not determine: every module's scale, and rows that are replaced."""
        lines = "".join(
            f"{module} {spec.scale.hex()}" + "".join(f" {index}" for index in spec.indices) + "\n"
            for module, spec in sorted(self.updates.items())
        )
        return hashlib.sha256(lines.encode()).hexdigest()


def _expand_merged_linear(B: Tensor, enabled: Sequence[bool]) -> Tensor:
    """A MergedLinear's B (rows of the enabled slices, r) as a low-rank change's: (out, r * n), block-sparse.

    Slice g of the enabled ones has the ranks g * r on of A (loralib's grouped convolution of A by B).
    """
    n, (rows, r) = sum(enabled), B.shape
    size = rows // n
    whole = B.new_zeros(size * len(enabled), r * n)
    for g, slot in enumerate(i for i, on in enumerate(enabled) if on):
        whole[slot * size : (slot + 1) * size, g * r : (g + 1) * r] = B[g * size : (g + 1) * size]
    return whole


def pair_factors(
    module: str,
    roles: Mapping[str, str],
    file: WeightsFile,
    config: AdapterConfig,
    transposed: bool | None = None,
    stacked: bool = False,
    lenient: bool = False,
) -> UpdateSpec:
    """The LoRA or DoRA of a module from the tensors found for it, its pair complete and of one rank.

    stacked: the factors of several experts lie in one tensor, and the config's rank is that of one.
    Raises InputError for a missing side, a rank that differs between the sides or from the config's, and NeedsFlag
    for a missing alpha; with `lenient` these are the update's fault.
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
