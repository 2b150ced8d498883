"""Plan an image model's adapter in any format, for `convert`, `extract` and `init`.

Modules that keep their factors are planned from headers. The tensors are made when they are written, one module at a
time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...adapters.formats import FORMATS, written_formats
from ...adapters.formats.content import AdapterContent, NewModule
from ...adapters.image_metadata import former_metadata
from ...adapters.stacked import factor_dtypes, round_factors
from ...adapters.updates.dora import DoRA
from ...architectures.families.table import DENOISERS
from ...binding.image_modules import SourceModule, find_unknown_modules
from ...binding.selection import Selection
from ...errors import InputError, NeedsFlag, shell_word
from ...files.dtypes import TensorSpec, safetensors_name
from .factors import (
    NO_LOSS,
    Loss,
    ModuleFactors,
    alpha_for_scale,
    cast_factors,
    delta_error,
    dtype_holds,
    fold_scale,
    is_zero_filler,
    make_factors,
    truncate_factors,
)
from .module_map import TargetModule, plan_target_modules
from .request import ADD_INITIAL, AdapterOutput, ConvertRequest, ModuleConvert, alpha_notes, cannot_convert


@dataclass(frozen=True)
class ImageAdapter:
    """An adapter or a model that the factors come from."""

    name: str  # for messages
    metadata: Mapping[str, str]
    family: str  # a key of FAMILIES
    load: Callable[[SourceModule], ModuleFactors]
    lost: Mapping[str, Loss] = field(default_factory=dict)  # module -> what it lost so far
    start: Callable[[str], str | None] = lambda module: None  # module -> the init that altered its base, or None


def plan_image(
    image: ImageAdapter, request: ConvertRequest, sources: list[SourceModule], impossible: list[str]
) -> AdapterOutput:
    """Plan the output.

    Args:
        impossible: modules that no format of image adapters can hold.

    Raises:
        NeedsFlag: modules have to be dropped or made plain first.
        InputError: nothing is left, or two modules would become one.
    """
    return _ImagePlan(image, request, sources, impossible).output()


@dataclass(frozen=True)
class _ConvertedModule:
    """A module of the output."""

    target: TargetModule
    how: str  # as in ModuleConvert
    rank: int
    alpha: float
    error: float  # ||D' - D|| / ||D||
    specs: Mapping[str, TensorSpec]  # role -> spec


class _ImagePlan:
    """The modules of the output, with the loader of their tensors."""

    def __init__(
        self, image: ImageAdapter, request: ConvertRequest, sources: list[SourceModule], impossible: list[str]
    ) -> None:
        self._image, self._request, family = image, request, image.family
        self._format = FORMATS[request.to]
        wanted = self._wanted(sources, impossible + find_unknown_modules(sources, family))
        targets = plan_target_modules(wanted, family, self._format.naming(family))
        for target in targets:
            module = target.parts[0].source.module
            if (init := image.start(module)) and target.how != "exact":
                message = f"would be {target.how}, and was initialized with {init} from the whole matrix of its base"
                raise NeedsFlag(message, culprit=module, remedy=ADD_INITIAL)
        self._made: dict[str, _ConvertedModule] = {}
        self._loaded: tuple[SourceModule, ModuleFactors] | None = None
        for target in targets:
            name = self._format.module_name(target.component, target.path, family)
            if name in self._made:
                raise InputError("two modules of the adapter would become this one", culprit=name)
            made = self._make(target)
            self._made |= {name: made} if made else {}
        self._last: dict[str, dict[str, Tensor]] = {}
        carried = {part.source.module for target in targets for part in target.parts}
        every = (*(each.module for each in sources), *impossible)
        self._dropped = tuple(module for module in every if module not in carried)

    def _wanted(self, sources: list[SourceModule], impossible: list[str]) -> list[SourceModule]:
        to, can, selection = self._request.to, self._format.can, Selection(self._request.exclude or ("",))
        wanted = [each for each in sources if each.module not in impossible and not selection.selects(each.module)]
        if can.components == "one":
            wanted, more = _one_component(wanted)
            impossible = impossible + more
        columns = next((s.module for s in wanted if s.update.along_inputs and not can.input_norms), None)
        if columns:
            message = f"is DoRA along the inputs, which {to}'s files cannot say"
            raise NeedsFlag(message, culprit=columns, remedy="add --plain --base BASE with the model")
        lost = [s.module for s in wanted if s.update.cls not in can.kinds or (not can.kernels and _has_kernel(s))]
        lost += [s.module for s in wanted if s.update.base]  # a new weight under the factors, which has no name there
        wanted = [each for each in wanted if each.module not in lost]
        lost += [module for module in impossible if not selection.selects(module)]
        if lost:
            what = f"cannot be carried to {to}{' as plain LoRA' if self._request.plain else ''}"
            exclude = "" if len(lost) < 4 else f"--exclude {shell_word(_prefixes(lost))}"
            raise cannot_convert(self._image.name, what, lost, exclude)
        if not wanted:
            raise InputError("nothing is left to convert", culprit=self._image.name)
        return wanted

    def _make(self, target: TargetModule) -> _ConvertedModule | None:
        """Plan a module, from headers alone if it keeps its factors; return None for zeros that fusing filled in."""
        first, dtype, how = target.parts[0].source.update, self._request.dtype, target.how
        if (
            how == "exact"
            and not self._folds(first.scale, first.rank)
            and (dtype is None or dtype_holds(dtype, *factor_dtypes(first)))
        ):
            specs = {role: first.specs[role] for role in ("A", "B")}
            if dtype is not None:
                letters = safetensors_name(dtype)
                specs = {role: TensorSpec(letters, spec.shape) for role, spec in specs.items()}
            if "magnitude" in first.specs:
                specs["magnitude"] = first.specs["magnitude"]
            alpha = alpha_for_scale(first.scale, first.rank)
            error = abs(self._scale(alpha, first.rank) / first.scale - 1.0) if first.scale else 0.0
            rank = first.rank
        else:
            factors, updates = self._factors(target)
            if is_zero_filler(target, updates, factors):
                return None
            tensors = {"A": factors.A, "B": factors.B, "magnitude": factors.magnitude}
            specs = {
                role: TensorSpec(safetensors_name(t.dtype), tuple(t.shape))
                for role, t in tensors.items()
                if t is not None
            }
            rank = len(factors.A)
            alpha = alpha_for_scale(factors.scale, rank)
            error = delta_error(target, updates, factors, self._scale(alpha, rank))
            if how == "exact" and self._folds(first.scale, first.rank) and first.scale != 1.0:
                how = "folded"
        former = sum((self._image.lost.get(part.source.module, NO_LOSS) for part in target.parts), NO_LOSS)
        error = math.hypot(error, former.relative)
        if error:
            how = "truncated" if self._request.rank or former.how == "truncated" else "rounded"
        formed = {
            role: self._with_format_shape(role, spec, specs["B"], first.along_inputs)
            for role in self._format.ends
            if (spec := specs.get(role))
        }
        return _ConvertedModule(target, how, rank, alpha, error, formed)

    def _folds(self, scale: float, rank: int) -> bool:
        """Return whether a scale has to be folded into the factors.

        It has to if its alpha is infinite in float32, or is 0 there, where a scale is not 0 or 0 stands for the rank;
        and in files without alphas, which mean a scale of 1 where the modules are an image model's.
        """
        alpha = abs(float(torch.tensor(alpha_for_scale(scale, rank), dtype=torch.float32))) if self._has_alphas else 1.0
        lost = alpha == math.inf or (alpha == 0 and (self._format.can.zero_alpha_is_rank or scale != 0))
        return self._request.plain or self._format.can.alpha == "none" or lost

    def _scale(self, alpha: float, rank: int) -> float:
        """Return the scale that a reader of the output computes from this alpha."""
        return (float(torch.tensor(alpha, dtype=torch.float32)) if self._has_alphas else alpha) / rank

    @property
    def _has_alphas(self) -> bool:
        return self._format.can.alpha == "tensor"

    def _factors(self, target: TargetModule) -> tuple[ModuleFactors, list[ModuleFactors]]:
        updates = [self._update(part.source) for part in target.parts]
        factors = make_factors(target, updates)
        if self._request.rank is not None:
            factors = truncate_factors(factors, self._request.rank)
        elif self._folds(factors.scale, len(factors.A)):
            factors = fold_scale(factors)
        dtype = self._request.dtype or factors.B.dtype
        if self._request.plain or self._request.dtype or target.how == "fused":  # else nothing is rounded
            round_factors(target.path, (factors.B, factors.A), dtype)
        return cast_factors(factors, dtype) if self._request.dtype else factors, updates

    def _update(self, source: SourceModule) -> ModuleFactors:
        """Load an update, once for all targets that a fused module is split into, since they follow each other."""
        if self._loaded is None or self._loaded[0] is not source:
            self._loaded = source, self._image.load(source)
        return self._loaded[1]

    def _with_format_shape(self, role: str, spec: TensorSpec, B: TensorSpec, inputs: bool) -> TensorSpec:
        """Return the spec with the format's shape; magnitudes along the inputs are (1, in) in every format."""
        if role != "magnitude":
            return spec if self._format.can.kernels else replace(spec, shape=spec.shape[:2])
        if inputs:
            return replace(spec, shape=(1, spec.size))
        return replace(spec, shape=self._format.magnitude_shape(B.shape[0], (1,) * (len(B.shape) - 2)))

    def output(self) -> AdapterOutput:
        of_tensor = {
            self._format.tensor_name(name, role): (name, role)
            for name, made in self._made.items()
            for role in made.specs
        }
        specs = {key: self._made[name].specs[role] for key, (name, role) in of_tensor.items()}
        if self._has_alphas:
            alphas = {self._format.tensor_name(name, "alpha"): (name, "alpha") for name in self._made}
            specs |= dict.fromkeys(alphas, TensorSpec("F32", ()))
            of_tensor |= alphas
        rows = [
            ModuleConvert(
                name, tuple(dict.fromkeys(p.source.module for p in m.target.parts)), m.how, m.rank, m.alpha, m.error
            )
            for name, m in self._made.items()
        ]
        modules = {name: self._describe(made) for name, made in self._made.items()}
        self._refuse_mixed(modules)
        former = former_metadata(self._image.metadata, new_ranks=self._request.rank is not None)
        former.pop("loratool", None)
        config, metadata = self._format.describe(self._image.family, former, modules)
        content = AdapterContent(specs, lambda key: self._load(*of_tensor[key]), config, metadata)
        notes = (*alpha_notes(self._request.to, rows), *self._format.notes(self._image.family, modules))
        return AdapterOutput(content, tuple(rows), self._dropped, notes, self._image.family)

    def _load(self, name: str, role: str) -> Tensor:
        """Make a tensor; those of one module are made together, and kept until another module's is loaded."""
        made = self._made[name]
        if role == "alpha":
            return torch.tensor(made.alpha, dtype=torch.float32)
        if name not in self._last:
            factors, _ = self._factors(made.target)
            tensors = {"A": factors.A, "B": factors.B, "magnitude": factors.magnitude}
            self._last.clear()
            self._last[name] = {role: tensor for role, tensor in tensors.items() if tensor is not None}
        return self._last[name][role].reshape(made.specs[role].shape)

    def _describe(self, made: _ConvertedModule) -> NewModule:
        first = made.target.parts[0].source
        dora, init = first.update.cls is DoRA, self._image.start(first.module)
        along_inputs = first.update.along_inputs
        return NewModule(made.target.component, made.rank, made.alpha, dora, along_inputs, init)

    def _refuse_mixed(self, modules: Mapping[str, NewModule]) -> None:
        """Raise InputError if only some modules of a component are DoRA, where a config has one flag for all."""
        if self._format.can.alpha not in ("config", "metadata"):
            return
        for component in dict.fromkeys(module.component for module in modules.values()):
            found = {name: module for name, module in modules.items() if module.component == component}
            dora = [name for name, module in found.items() if module.dora]
            other = next((name for name in found if dora and name not in dora), None)
            if other:
                message = (
                    f"is no DoRA, {dora[0]} is; {self._request.to}'s loader wants all modules of a model of one kind"
                )
                free = " and ".join(key for key, each in written_formats().items() if each.can.alpha == "tensor")
                remedy = f"--to {free} say it of each module; or add --plain --base BASE with the model"
                raise InputError(message, culprit=other, remedy=remedy)


def _has_kernel(source: SourceModule) -> bool:
    return math.prod(source.update.specs["A"].shape[2:]) != 1


def _one_component(sources: list[SourceModule]) -> tuple[list[SourceModule], list[str]]:
    """Split off the modules of the denoiser, or else of the first text encoder, from the names of the others.

    A PEFT adapter is for one model only.
    """
    components = [source.component for source in sources]
    first = next((each for each in DENOISERS if each in components), next(iter(components), ""))
    return [s for s in sources if s.component == first], [s.module for s in sources if s.component != first]


def _prefixes(modules: Sequence[str]) -> str:
    """Return a comma-separated list of globs, one for each prefix of the names."""
    prefixes = dict.fromkeys(
        m[: m.index("_", 5) + 1] if m.startswith("lora_") else m.split(".")[0] + "." for m in modules
    )
    return ",".join(f"{prefix}*" for prefix in prefixes)
