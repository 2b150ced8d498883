"""`convert`: an adapter in another convention, each tensor carried exactly, or named as what cannot be carried.

Here of image models; `convert_language` has the others. What is written is planned first, tensors come one by one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..converting import (
    SINGLE_COMPONENT,
    TARGETS,
    Factors,
    Source,
    Target,
    alpha_of,
    family_of,
    fold,
    make_factors,
    plan_targets,
    read_sources,
    spell,
    uses_own_names,
)
from ..draft import DTYPES, STALE, write_single
from ..errors import InputError, NeedsFlag, UsageError
from ..formats import FORMATS, open_adapter
from ..formats.peft_write import SAFETENSORS, write_adapter
from ..output import check_name, check_path, named
from ..relayout import LAYOUTS
from ..targets import Selection
from ..tensorfile import TensorSpec
from .convert_language import ModuleConvert, Output, Wish, config_of, loralib_notes, low_rank, plan_language

CONVERT_DTYPES = {"keep": None, **DTYPES}
BASE_VERSIONS = {"sd1": "sd_v1", "sdxl": "sdxl_base_v1-0", "flux": "flux1"}


@dataclass(frozen=True)
class ConvertReport:
    """The result of `convert`. family: `sd1`, `sdxl`, `flux`, None for a language model; dropped: modules left out;
    notes: what the output cannot say.
    """

    adapter: str
    source_format: str
    out: str
    to: str
    family: str | None
    dry_run: bool
    modules: tuple[ModuleConvert, ...]
    dropped: tuple[str, ...]
    parameters: int
    nbytes: int
    notes: tuple[str, ...] = ()


def convert(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    to: str,
    from_format: str | None = None,
    drop: Sequence[str] = (),
    alpha: float | None = None,
    enable_lora: Sequence[bool] = (),
    plain: bool = False,
    initial: str | os.PathLike[str] | None = None,
    rank: int | None = None,
    layout: str | None = None,
    base: str | os.PathLike[str] | None = None,
    dtype: str = "keep",
    force: bool = False,
    dry_run: bool = False,
) -> ConvertReport:
    """Write an adapter in another convention, a key of TARGETS. `peft` is a folder, or a file where `out` ends in
    .safetensors; the others are files.

    from_format: a key of FORMATS, where the tensors' names do not tell. drop: patterns of modules that may be left out
    where they cannot be carried. alpha: for a file that does not say its own; enable_lora: which slices loralib's
    MergedLinear has. plain: as standard LoRA, alpha being the rank everywhere; of an adapter whose start changed its
    base, `initial` is subtracted, exactly, at twice the rank; `rank`: truncated to it. layout: of a language
    model's fused modules, a key of LAYOUTS, whose sizes `base` or its config.json says. dtype: of the factors, a key of
    CONVERT_DTYPES. Raises NeedsFlag for what can only be dropped, and InputError for what nothing could load: nothing
    is written then.
    """
    if to not in TARGETS:
        raise UsageError(f"format {to!r} is none of {', '.join(TARGETS)}")
    if dtype not in CONVERT_DTYPES:
        raise UsageError(f"dtype {dtype!r} is none of {', '.join(CONVERT_DTYPES)}")
    if from_format is not None and from_format not in FORMATS:
        raise UsageError(f"format {from_format!r} is none of {', '.join(FORMATS)}")
    if (initial is not None or rank is not None) and not plain:
        raise UsageError("--initial and --rank are for --plain")
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"layout {layout!r} is none of {', '.join(LAYOUTS)}")
    if (layout is None and base is not None) or (layout is not None and plain):
        raise UsageError("--base is for --for, and --plain is another conversion: one after the other")
    with ExitStack() as opened:
        source = open_adapter(adapter, alpha, format=from_format, enabled=tuple(enable_lora))
        opened.callback(source.file.close)
        path, is_file = check_name(
            out if out is not None else ("converted" if to == "peft" else "converted.safetensors")
        )
        if to != "peft" and not is_file:
            raise UsageError(f"{to} adapters are single files", culprit=str(path), remedy="name it X.safetensors")
        check_path(path, is_file, [source.file.path], force)
        wish = Wish(to, tuple(drop), CONVERT_DTYPES[dtype], plain, initial, rank, layout, base)
        made = _plan(source, wish, opened)
        if not dry_run:
            opened.enter_context(named(path))
            if to == "peft":
                write_adapter(path, is_file, made.specs, made.load, made.config)
            else:
                write_single(path, made.specs, made.load, made.metadata)
        size = sum(spec.size for spec in made.specs.values()), sum(spec.nbytes for spec in made.specs.values())
        names = (os.fspath(adapter), source.format, str(path), to, made.family, dry_run)
        return ConvertReport(*names, made.modules, made.dropped, *size, made.notes)


def _plan(source: Adapter, wish: Wish, opened: ExitStack) -> Output:
    sources, impossible = read_sources(source)
    family = family_of(sources)
    if family is not None:
        if wish.initial is not None or wish.rank is not None or wish.layout:
            raise UsageError("--initial, --rank and --for are for adapters of language models")
        return _Image(source, wish, family, sources, impossible).output()
    if source.format in SINGLE_COMPONENT and wish.to in SINGLE_COMPONENT:
        return plan_language(source, wish, opened)
    raise InputError(
        "is no adapter of an image model that is known (SD 1, SD 2, SDXL, Flux)"
        + ("" if wish.to == "peft" else f": nothing could load it as {wish.to}"),
        culprit=source.name,
    )


@dataclass(frozen=True)
class _Made:
    """One module of the output: rank, alpha and the specs of its tensors, by their ends."""

    target: Target
    how: str
    rank: int
    alpha: float
    specs: Mapping[str, TensorSpec]


class _Image:
    """An image model's adapter, module by module."""

    def __init__(self, source: Adapter, wish: Wish, family: str, sources: list[Source], impossible: list[str]) -> None:
        self._source, self._wish, self._family = source, wish, family
        wanted = self._wanted(sources, impossible)
        targets = plan_targets(wanted, family, uses_own_names(wish.to, family))
        texts = len({each.component for each in wanted if each.component != "unet"})
        self._made = {spell(target, wish.to, family, texts): self._make(target) for target in targets}
        self._last: dict[str, dict[str, Tensor]] = {}
        dora = [name for name, made in self._made.items() if made.target.parts[0].source.update.kind == "dora"]
        self._use_dora = bool(dora)
        if dora and len(dora) < len(self._made) and wish.to in ("peft", "diffusers"):
            other = next(name for name in self._made if name not in dora)
            raise InputError(
                f"is no DoRA, {dora[0]} is; {wish.to}'s loader wants all modules of one kind", culprit=other
            )
        carried = {part.source.module for target in targets for part in target.parts}
        self._dropped = tuple(module for module in source.updates if module not in carried)

    def _wanted(self, sources: list[Source], impossible: list[str]) -> list[Source]:
        to, selection = self._wish.to, Selection(self._wish.drop or ("",))
        wanted = [each for each in sources if not selection.selects(each.module)]
        if to in SINGLE_COMPONENT:
            wanted, more = _one_component(wanted)
            impossible = impossible + more
        refuse = {"dora"} if to == "loralib" or self._wish.plain else set()
        lost = [s.module for s in wanted if s.update.kind in refuse or (to == "loralib" and _has_kernel(s))]
        wanted = [each for each in wanted if each.module not in lost]
        lost += [module for module in impossible if not selection.selects(module)]
        if lost:
            raise NeedsFlag(
                f"{len(lost)} modules of {self._source.name} cannot be carried to {to}"
                f"{' as plain LoRA' if self._wish.plain else ''}: {', '.join(lost[:3])}"
                + (", ..." if len(lost) > 3 else ""),
                remedy=f"add --drop {','.join(lost) if len(lost) < 4 else _prefixes(lost)} to leave them out",
            )
        if not wanted:
            raise InputError("nothing is left to convert", culprit=self._source.name)
        return wanted

    def _make(self, target: Target) -> _Made:
        """From headers alone, where the very factors are carried."""
        first, dtype, how = target.parts[0].source.update, self._wish.dtype, target.how
        if how == "exact" and not self._wish.plain:
            specs = {role: first.specs[role] for role in ("A", "B")}
            if dtype is not None:
                letters = SAFETENSORS[str(dtype).removeprefix("torch.")]
                specs = {role: TensorSpec(letters, spec.shape) for role, spec in specs.items()}
            if "magnitude" in first.specs:
                specs["magnitude"] = first.specs["magnitude"]
            rank, alpha = first.rank, first.scale * first.rank
        else:
            factors, folded = self._factors(target)
            how = folded if how == "exact" else how
            tensors = {"A": factors.A, "B": factors.B, "magnitude": factors.magnitude}
            specs = {
                role: TensorSpec(SAFETENSORS[str(t.dtype).removeprefix("torch.")], tuple(t.shape))
                for role, t in tensors.items()
                if t is not None
            }
            rank, alpha = len(factors.A), alpha_of(factors)
        ends = {
            end: self._laid(role, spec, specs["B"]) for role, end in self._ends().items() if (spec := specs.get(role))
        }
        return _Made(target, how, rank, alpha, ends)

    def _factors(self, target: Target) -> tuple[Factors, str]:
        factors, how = make_factors(target, lambda each: low_rank(self._source, each)), "exact"
        if self._wish.plain:
            factors, exact = fold(factors)
            how = "folded" if exact else "rounded"
        if self._wish.dtype is not None:
            factors = replace(factors, A=factors.A.to(self._wish.dtype), B=factors.B.to(self._wish.dtype))
        return factors, how

    def _ends(self) -> dict[str, str]:
        if self._wish.to in ("kohya", "comfy"):
            return {"A": "lora_down.weight", "B": "lora_up.weight", "magnitude": "dora_scale"}
        if self._wish.to == "loralib":
            return {"A": "lora_A", "B": "lora_B"}
        return {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}

    def _laid(self, role: str, spec: TensorSpec, B: TensorSpec) -> TensorSpec:
        """In the shape that the convention has: a magnitude stands by the rows of the weight, or in PEFT by its own."""
        if role != "magnitude":
            return replace(spec, shape=spec.shape[:2]) if self._wish.to == "loralib" else spec
        rows, ones = (B.shape[0],), (1,) * (len(B.shape) - 2)
        if self._wish.to in ("kohya", "comfy"):
            return replace(spec, shape=(*rows, 1, *ones))
        return replace(spec, shape=(1, *rows, *ones) if ones else rows)

    def output(self) -> Output:
        specs = {f"{name}.{end}": spec for name, made in self._made.items() for end, spec in made.specs.items()}
        if self._wish.to in ("kohya", "comfy"):
            specs |= {f"{name}.alpha": TensorSpec("F32", ()) for name in self._made}
        rows = [
            ModuleConvert(name, tuple(dict.fromkeys(p.source.module for p in m.target.parts)), m.how, m.rank, m.alpha)
            for name, m in self._made.items()
        ]
        config = self._config(self._made) if self._wish.to == "peft" else {}
        notes = loralib_notes(rows) if self._wish.to == "loralib" else ()
        return Output(specs, self._load, config, self._metadata(), tuple(rows), self._dropped, notes, self._family)

    def _load(self, key: str) -> Tensor:
        """The tensors of a module, asked for one after the other, are computed once."""
        name = next(name for name in (key.rpartition(".")[0], key.rsplit(".", 2)[0]) if name in self._made)
        made, end = self._made[name], key.removeprefix(f"{name}.")
        if end == "alpha":
            return torch.tensor(made.alpha, dtype=torch.float32)
        if name not in self._last:
            factors, _ = self._factors(made.target)
            tensors = {"A": factors.A, "B": factors.B, "magnitude": factors.magnitude}
            self._last.clear()
            self._last[name] = {e: t for role, e in self._ends().items() if (t := tensors[role]) is not None}
        return self._last[name][end].reshape(made.specs[end].shape)

    def _metadata(self) -> dict[str, str]:
        former = {k: v for k, v in (self._source.file.metadata or {}).items() if k not in (*STALE, "loratool")}
        if self._wish.to not in ("kohya", "comfy"):
            return {"format": "pt"} | (
                {"lora_adapter_metadata": json.dumps(self._by_component(), sort_keys=True)}
                if self._wish.to == "diffusers"
                else {}
            )
        ranks = {made.rank for made in self._made.values()}
        alphas = {made.alpha for made in self._made.values()}
        return {
            **former,
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
            "ss_network_alpha": f"{alphas.pop()}" if len(alphas) == 1 else "Dynamic",
            "ss_base_model_version": former.get("ss_base_model_version", BASE_VERSIONS[self._family]),
        }

    def _by_component(self) -> dict[str, Any]:
        """diffusers' metadata: the fields of a LoraConfig, each after its component."""
        found: dict[str, Any] = {}
        parts: dict[str, dict[str, _Made]] = {}
        for name, made in self._made.items():
            component, _, path = name.partition(".")
            parts.setdefault(component, {})[path] = made
        for component, modules in parts.items():
            config = self._config(modules)
            fields = ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora"]
            fields += ["use_dora"] if self._use_dora else []
            found |= {f"{component}.{field}": config[field] for field in fields}
        return found

    def _config(self, modules: Mapping[str, _Made]) -> dict[str, Any]:
        both = {name: (made.rank, made.alpha) for name, made in modules.items()}
        return {**config_of(both), "use_dora": self._use_dora}


def _has_kernel(source: Source) -> bool:
    return math.prod(source.update.specs["A"].shape[2:]) != 1


def _one_component(sources: list[Source]) -> tuple[list[Source], list[str]]:
    """A PEFT adapter is for one model: the denoiser, or else the first text encoder."""
    first = "unet" if any(s.component == "unet" for s in sources) else sources[0].component if sources else ""
    return [s for s in sources if s.component == first], [s.module for s in sources if s.component != first]


def _prefixes(modules: Sequence[str]) -> str:
    """One glob for each way in which they begin."""
    heads = dict.fromkeys(m[: m.index("_", 5) + 1] if m.startswith("lora_") else m.split(".")[0] + "." for m in modules)
    return ",".join(f"'{head}*'" for head in heads)
