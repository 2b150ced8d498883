"""Plan an image model's adapter in any format, for `convert`, `extract` and `init`.

Modules that keep their factors are planned from headers. The tensors are made when they are written, one module at a
time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...adapters.formats.diffusers import metadata_of, split_component
from ...adapters.formats.peft_write import write_adapter
from ...adapters.formats.single_file import STALE_KEYS, write_single_file
from ...adapters.stacked import round_factors
from ...adapters.updates import LowRank
from ...architectures.families import FAMILIES
from ...binding.selection import Selection
from ...errors import InputError, NeedsFlag
from ...files.dtypes import SAFETENSORS, TORCH_FLOATS, TensorSpec
from ...files.weights_file import WeightsFile
from .factors import (
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
from .language import config_of
from .module_map import TargetModule, plan_target_modules, target_name, uses_maker_names
from .request import ADD_INITIAL, AdapterOutput, ConvertRequest, ModuleConvert, alpha_notes, cannot_convert
from .source_modules import SINGLE_COMPONENT, SourceModule, find_unknown_modules


@dataclass(frozen=True)
class ImageAdapter:
    """An adapter or a model that the factors come from."""

    name: str  # for messages
    metadata: Mapping[str, str]
    family: str  # a key of FAMILIES
    load: Callable[[SourceModule], LowRank]
    lost: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # module -> (||D' - D||^2, ||D||^2) so far
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


def write_output(made: AdapterOutput, to: str, path: Path, is_file: bool, inputs: Collection[WeightsFile]) -> None:
    if to == "peft":
        write_adapter(path, is_file, made.specs, made.load, made.config, inputs)
    else:
        write_single_file(path, made.specs, made.load, made.metadata, inputs)


@dataclass(frozen=True)
class _ConvertedModule:
    """A module of the output."""

    target: TargetModule
    how: str  # as in ModuleConvert
    rank: int
    alpha: float
    error: float  # ||D' - D|| / ||D||
    specs: Mapping[str, TensorSpec]  # suffix of the tensor's name -> spec


class _ImagePlan:
    """The modules of the output, with the loader of their tensors."""

    def __init__(
        self, image: ImageAdapter, request: ConvertRequest, sources: list[SourceModule], impossible: list[str]
    ) -> None:
        self._image, self._request, family = image, request, image.family
        wanted = self._wanted(sources, impossible + find_unknown_modules(sources, family))
        targets = plan_target_modules(wanted, family, uses_maker_names(request.to, family))
        for target in targets:
            module = target.parts[0].source.module
            if (init := image.start(module)) and target.how != "exact":
                message = f"would be {target.how}, and was initialized with {init} from the whole matrix of its base"
                raise NeedsFlag(message, culprit=module, remedy=ADD_INITIAL)
        self._made: dict[str, _ConvertedModule] = {}
        self._loaded: tuple[SourceModule, LowRank] | None = None
        for target in targets:
            name = target_name(target, request.to, family)
            if name in self._made:
                raise InputError("two modules of the adapter would become this one", culprit=name)
            made = self._make(target)
            self._made |= {name: made} if made else {}
        self._last: dict[str, dict[str, Tensor]] = {}
        carried = {part.source.module for target in targets for part in target.parts}
        every = (*(each.module for each in sources), *impossible)
        self._dropped = tuple(module for module in every if module not in carried)

    def _wanted(self, sources: list[SourceModule], impossible: list[str]) -> list[SourceModule]:
        to, selection = self._request.to, Selection(self._request.drop or ("",))
        wanted = [each for each in sources if each.module not in impossible and not selection.selects(each.module)]
        if to in SINGLE_COMPONENT:
            wanted, more = _one_component(wanted)
            impossible = impossible + more
        columns = next((s.module for s in wanted if s.update.norm_over_inputs and not self._has_alphas), None)
        if columns:
            message = f"is DoRA along the inputs, which {to}'s files cannot say"
            raise NeedsFlag(message, culprit=columns, remedy="add --plain --base BASE with the model")
        lost = [s.module for s in wanted if to == "loralib" and _has_kernel(s)]
        wanted = [each for each in wanted if each.module not in lost]
        lost += [module for module in impossible if not selection.selects(module)]
        if lost:
            what = f"cannot be carried to {to}{' as plain LoRA' if self._request.plain else ''}"
            raise cannot_convert(self._image.name, what, lost, "" if len(lost) < 4 else _prefixes(lost))
        if not wanted:
            raise InputError("nothing is left to convert", culprit=self._image.name)
        return wanted

    def _make(self, target: TargetModule) -> _ConvertedModule | None:
        """Plan a module, from headers alone if it keeps its factors; return None for zeros that fusing filled in."""
        first, dtype, how = target.parts[0].source.update, self._request.dtype, target.how
        stored = [getattr(torch, TORCH_FLOATS.get(first.specs[role].dtype, "float64")) for role in ("A", "B")]
        if (
            how == "exact"
            and not self._folds(first.scale, first.rank)
            and (dtype is None or dtype_holds(dtype, *stored))
        ):
            specs = {role: first.specs[role] for role in ("A", "B")}
            if dtype is not None:
                letters = SAFETENSORS[str(dtype).removeprefix("torch.")]
                specs = {role: TensorSpec(letters, spec.shape) for role, spec in specs.items()}
            if "magnitude" in first.specs:
                specs["magnitude"] = first.specs["magnitude"]
            alpha = alpha_for_scale(first.scale, first.rank)
            error = abs(self._scale(alpha, first.rank) / first.scale - 1.0) if first.scale else 0.0
            how, rank = "rounded" if error else "exact", first.rank
        else:
            factors, updates = self._factors(target)
            if is_zero_filler(target, updates, factors):
                return None
            tensors = {"A": factors.A, "B": factors.B, "magnitude": factors.magnitude}
            specs = {
                role: TensorSpec(SAFETENSORS[str(t.dtype).removeprefix("torch.")], tuple(t.shape))
                for role, t in tensors.items()
                if t is not None
            }
            rank = len(factors.A)
            alpha = alpha_for_scale(factors.scale, rank)
            error = delta_error(target, updates, factors, self._scale(alpha, rank))
            if how == "exact" and self._folds(first.scale, first.rank) and first.scale != 1.0:
                how = "folded"
            former = [pair for part in target.parts if (pair := self._image.lost.get(part.source.module))]
            total = math.fsum(norm for _, norm in former)
            error = math.hypot(error, math.sqrt(math.fsum(lost for lost, _ in former) / total) if total else 0.0)
            how = how if not error else "truncated" if self._request.rank or total else "rounded"
        suffixes = {
            suffix: self._with_format_shape(role, spec, specs["B"], first.norm_over_inputs)
            for role, suffix in self._suffixes().items()
            if (spec := specs.get(role))
        }
        return _ConvertedModule(target, how, rank, alpha, error, suffixes)

    def _folds(self, scale: float, rank: int) -> bool:
        """Return whether a scale has to be folded into the factors.

        It has to if its alpha is infinite in float32, or is 0 there: in kohya's files 0 stands for the rank.
        """
        alpha = abs(float(torch.tensor(alpha_for_scale(scale, rank), dtype=torch.float32))) if self._has_alphas else 1.0
        lost = alpha == math.inf or (alpha == 0 and (self._request.to == "kohya" or scale != 0))
        return self._request.plain or lost

    def _scale(self, alpha: float, rank: int) -> float:
        """Return the scale that a reader of the output computes from this alpha."""
        return (float(torch.tensor(alpha, dtype=torch.float32)) if self._has_alphas else alpha) / rank

    @property
    def _has_alphas(self) -> bool:
        return self._request.to in ("kohya", "comfy")

    def _factors(self, target: TargetModule) -> tuple[ModuleFactors, list[LowRank]]:
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

    def _update(self, source: SourceModule) -> LowRank:
        """Load an update, once for all targets that a fused module is split into, since they follow each other."""
        if self._loaded is None or self._loaded[0] is not source:
            self._loaded = source, self._image.load(source)
        return self._loaded[1]

    def _suffixes(self) -> dict[str, str]:
        if self._has_alphas:
            return {"A": "lora_down.weight", "B": "lora_up.weight", "magnitude": "dora_scale"}
        if self._request.to == "loralib":
            return {"A": "lora_A", "B": "lora_B"}
        return {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}

    def _with_format_shape(self, role: str, spec: TensorSpec, B: TensorSpec, inputs: bool) -> TensorSpec:
        """Return the spec with the format's shape.

        kohya's magnitudes are (out, 1, ...), PEFT's (out,) or (1, out, ...), and (1, in) along the inputs in both.
        """
        if role != "magnitude":
            return replace(spec, shape=spec.shape[:2]) if self._request.to == "loralib" else spec
        if inputs:
            return replace(spec, shape=(1, spec.size))
        rows, ones = (B.shape[0],), (1,) * (len(B.shape) - 2)
        if self._has_alphas:
            return replace(spec, shape=(*rows, 1, *ones))
        return replace(spec, shape=(1, *rows, *ones) if ones else rows)

    def output(self) -> AdapterOutput:
        specs = {f"{name}.{suffix}": spec for name, made in self._made.items() for suffix, spec in made.specs.items()}
        if self._has_alphas:
            specs |= {f"{name}.alpha": TensorSpec("F32", ()) for name in self._made}
        rows = [
            ModuleConvert(
                name, tuple(dict.fromkeys(p.source.module for p in m.target.parts)), m.how, m.rank, m.alpha, m.error
            )
            for name, m in self._made.items()
        ]
        config = self._config(self._made) if self._request.to == "peft" else {}
        notes = alpha_notes(rows) if self._request.to == "loralib" else self._ignored_note()
        return AdapterOutput(
            specs, self._load, config, self._metadata(), tuple(rows), self._dropped, notes, self._image.family
        )

    def _ignored_note(self) -> tuple[str, ...]:
        """Return a note on modules that diffusers ignores, those outside its pipelines' `_lora_loadable_modules`."""
        t5 = [name for name, made in self._made.items() if made.target.component == "text_encoder_3"]
        if self._request.to != "diffusers" or not t5:
            return ()
        return (f"diffusers loads no adapter of a T5: {len(t5)} modules will not be read, {t5[0]} the first",)

    def _load(self, key: str) -> Tensor:
        """Make a tensor; those of one module are made together, and kept until another module's is loaded."""
        name = next(name for name in (key.rpartition(".")[0], key.rsplit(".", 2)[0]) if name in self._made)
        made, suffix = self._made[name], key.removeprefix(f"{name}.")
        if suffix == "alpha":
            return torch.tensor(made.alpha, dtype=torch.float32)
        if name not in self._last:
            factors, _ = self._factors(made.target)
            tensors = {"A": factors.A, "B": factors.B, "magnitude": factors.magnitude}
            self._last.clear()
            self._last[name] = {
                suffix: t for role, suffix in self._suffixes().items() if (t := tensors[role]) is not None
            }
        return self._last[name][suffix].reshape(made.specs[suffix].shape)

    def _metadata(self) -> dict[str, str]:
        former = {k: v for k, v in self._image.metadata.items() if k not in (*STALE_KEYS, "loratool")}
        if not self._has_alphas:
            return {**former, "format": "pt", **(self._by_component() if self._request.to == "diffusers" else {})}
        family = FAMILIES[self._image.family]
        version = former.get("ss_base_model_version", family.kohya_version)
        ranks = {made.rank for made in self._made.values()}
        alphas = {made.alpha for made in self._made.values()}
        return {
            **former,
            "ss_network_module": family.kohya_network,
            "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
            "ss_network_alpha": f"{alphas.pop()}" if len(alphas) == 1 else "Dynamic",
            **({"ss_base_model_version": version} if version else {}),
        }

    def _by_component(self) -> dict[str, str]:
        parts: dict[str, dict[str, _ConvertedModule]] = {}
        for name, made in self._made.items():
            component, path = split_component(name)
            parts.setdefault(component, {})[path] = made
        return metadata_of({component: self._config(modules) for component, modules in parts.items()})

    def _config(self, modules: Mapping[str, _ConvertedModule]) -> dict[str, Any]:
        """Return PEFT's config for the modules of one component.

        Raises:
            InputError: some are DoRA and others not, for which the config has only one flag.
        """
        both = {name: (made.rank, made.alpha) for name, made in modules.items()}
        dora = [name for name, made in modules.items() if made.target.parts[0].source.update.kind == "dora"]
        other = next((name for name in modules if dora and name not in dora), None)
        if other:
            message = f"is no DoRA, {dora[0]} is; {self._request.to}'s loader wants all modules of a model of one kind"
            remedy = "--to kohya and comfy say it of each module; or add --plain --base BASE with the model"
            raise InputError(message, culprit=other, remedy=remedy)
        init = next((i for m in modules.values() if (i := self._image.start(m.target.parts[0].source.module))), True)
        return {**config_of(both), "use_dora": bool(dora), "init_lora_weights": init}


def _has_kernel(source: SourceModule) -> bool:
    return math.prod(source.update.specs["A"].shape[2:]) != 1


def _one_component(sources: list[SourceModule]) -> tuple[list[SourceModule], list[str]]:
    """Split off the modules of the denoiser, or else of the first text encoder, from the names of the others.

    A PEFT adapter is for one model only.
    """
    first = "unet" if any(s.component == "unet" for s in sources) else sources[0].component if sources else ""
    return [s for s in sources if s.component == first], [s.module for s in sources if s.component != first]


def _prefixes(modules: Sequence[str]) -> str:
    """Return a comma-separated list of globs, one for each prefix of the names."""
    prefixes = dict.fromkeys(
        m[: m.index("_", 5) + 1] if m.startswith("lora_") else m.split(".")[0] + "." for m in modules
    )
    return ",".join(f"'{prefix}*'" for prefix in prefixes)
