"""`convert`: an adapter in another convention, each tensor carried exactly, or named as what cannot be carried."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..converting import (
    TARGETS,
    Factors,
    Source,
    Target,
    alpha_of,
    family_of,
    make_factors,
    plan_targets,
    read_sources,
    spell,
    uses_own_names,
)
from ..draft import DTYPES, STALE
from ..errors import InputError, NeedsFlag, UsageError
from ..fileio import partial_file, require_free_space, write_at
from ..formats import open_adapter
from ..formats.peft_write import SAFETENSORS, lora_config, tensor_bytes, write_adapter
from ..output import check_name, check_path, named
from ..targets import Selection
from ..tensorfile import TensorSpec, build_header, data_order

CONVERT_DTYPES = {"keep": None, **DTYPES}
BASE_VERSIONS = {"sd1": "sd_v1", "sdxl": "sdxl_base_v1-0", "flux": "flux1"}


@dataclass(frozen=True)
class ModuleConvert:
    """One module of the output: what of the source it is made of, and how (`converting.Target`)."""

    name: str
    sources: tuple[str, ...]
    how: str
    rank: int
    alpha: float


@dataclass(frozen=True)
class ConvertReport:
    """The result of `convert`. family: `sd1`, `sdxl`, `flux`, None for a language model; dropped: modules left out."""

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


def convert(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    to: str,
    drop: Sequence[str] = (),
    alpha: float | None = None,
    dtype: str = "keep",
    force: bool = False,
    dry_run: bool = False,
) -> ConvertReport:
    """Write an adapter in another convention, a key of TARGETS. `peft` is a folder, or a file where `out` ends in
    .safetensors; the others are files.

    drop: patterns of modules that may be left out where they cannot be carried. alpha: for a file that does not say its
    own. dtype: of the factors, a key of CONVERT_DTYPES. Raises NeedsFlag for what can only be dropped, and InputError
    for what nothing could load: nothing is written then.
    """
    if to not in TARGETS:
        raise UsageError(f"format {to!r} is none of {', '.join(TARGETS)}")
    if dtype not in CONVERT_DTYPES:
        raise UsageError(f"dtype {dtype!r} is none of {', '.join(CONVERT_DTYPES)}")
    with ExitStack() as opened:
        source = open_adapter(adapter, alpha)
        opened.callback(source.file.close)
        path, is_file = check_name(
            out if out is not None else ("converted" if to == "peft" else "converted.safetensors")
        )
        if to != "peft" and not is_file:
            raise UsageError(f"{to} adapters are single files", culprit=str(path), remedy="name it X.safetensors")
        check_path(path, is_file, [source.file.path], force)
        job = _plan(source, to, tuple(drop), CONVERT_DTYPES[dtype])
        if not dry_run:
            opened.enter_context(named(path))
            job.write(path, is_file)
        return job.report(os.fspath(adapter), str(path), dry_run)


@dataclass(frozen=True)
class _Job:
    """Everything of an output but its bytes. made: name -> its target and factors."""

    source: Adapter
    to: str
    family: str
    made: Mapping[str, tuple[Target, Factors]]
    dropped: tuple[str, ...]

    def tensors(self) -> dict[str, Tensor]:
        found = {}
        for name, (_, factors) in self.made.items():
            A, B = ("lora_down", "lora_up") if self.to in ("kohya", "comfy") else ("lora_A", "lora_B")
            found[f"{name}.{A}.weight"], found[f"{name}.{B}.weight"] = factors.A, factors.B
            if self.to in ("kohya", "comfy"):
                found[f"{name}.alpha"] = torch.tensor(alpha_of(factors), dtype=torch.float32)
        return found

    def write(self, path: Path, is_file: bool) -> None:
        tensors = self.tensors()
        specs = {
            n: TensorSpec(SAFETENSORS[str(t.dtype).removeprefix("torch.")], tuple(t.shape)) for n, t in tensors.items()
        }
        if self.to == "peft":
            write_adapter(path, is_file, specs, tensors.__getitem__, self._peft_config())
            return
        header, begin = build_header(specs, names := data_order(specs), self._metadata())
        require_free_space(path.absolute().parent, len(header) + sum(spec.nbytes for spec in specs.values()))
        with partial_file(path) as file:
            write_at(file, memoryview(header), 0)
            for name in names:
                write_at(file, tensor_bytes(tensors[name], specs[name]), begin[name])

    def _metadata(self) -> dict[str, str]:
        former = {k: v for k, v in (self.source.file.metadata or {}).items() if k not in (*STALE, "loratool")}
        former.pop("lora_adapter_metadata", None)
        if self.to == "diffusers":
            return {"format": "pt", "lora_adapter_metadata": json.dumps(self._by_component(), sort_keys=True)}
        ranks = {len(factors.A) for _, factors in self.made.values()}
        alphas = {alpha_of(factors) for _, factors in self.made.values()}
        return {
            **former,
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
            "ss_network_alpha": f"{alphas.pop()}" if len(alphas) == 1 else "Dynamic",
            "ss_base_model_version": former.get("ss_base_model_version", BASE_VERSIONS[self.family]),
        }

    def _by_component(self) -> dict[str, Any]:
        """diffusers' metadata: the fields of a LoraConfig, each after its component."""
        found: dict[str, Any] = {}
        parts: dict[str, dict[str, Factors]] = {}
        for name, (_, factors) in self.made.items():
            component, _, path = name.partition(".")
            parts.setdefault(component, {})[path] = factors
        for component, modules in parts.items():
            config = _config(modules)
            fields = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora")
            found |= {f"{component}.{field}": config[field] for field in fields}
        return found

    def _peft_config(self) -> dict[str, Any]:
        return _config({name: factors for name, (_, factors) in self.made.items()})

    def report(self, adapter: str, out: str, dry_run: bool) -> ConvertReport:
        rows = [
            ModuleConvert(
                name,
                tuple(dict.fromkeys(part.source.module for part in target.parts)),
                target.how,
                len(factors.A),
                alpha_of(factors),
            )
            for name, (target, factors) in self.made.items()
        ]
        tensors = self.tensors().values()
        size = sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors)
        names = (adapter, self.source.format, out, self.to, self.family, dry_run)
        return ConvertReport(*names, tuple(rows), self.dropped, *size)


def _config(modules: Mapping[str, Factors]) -> dict[str, Any]:
    """PEFT's, with the alphas that the scales need."""
    config = lora_config({name: len(factors.A) for name, factors in modules.items()}, {})
    alphas = {name: alpha_of(factors) for name, factors in modules.items()}
    common = Counter(alphas.values()).most_common(1)[0][0]
    patterns = {f"^{name.replace('.', chr(92) + '.')}": alpha for name, alpha in alphas.items() if alpha != common}
    return {**config, "lora_alpha": common, "alpha_pattern": patterns}


def _plan(source: Adapter, to: str, drop: tuple[str, ...], dtype: torch.dtype | None) -> _Job:
    sources, impossible = read_sources(source)
    family = family_of(sources)
    if family is None:
        raise InputError(
            "is no adapter of an image model that is known (SD 1, SD 2, SDXL, Flux)"
            + ("" if to == "peft" else f": nothing could load it as {to}"),
            culprit=source.name,
        )
    selection = Selection(drop or ("",))
    wanted = [each for each in sources if not selection.selects(each.module)]
    if to == "peft":
        wanted, more = _one_component(wanted)
        impossible += more
    lost = [module for module in impossible if not selection.selects(module)]
    if lost:
        raise NeedsFlag(
            f"{len(lost)} modules of {source.name} cannot be carried to {to}: {', '.join(lost[:3])}"
            + (", ..." if len(lost) > 3 else ""),
            remedy=f"add --drop {','.join(lost) if len(lost) < 4 else _prefixes(lost)} to leave them out",
        )
    if not wanted:
        raise InputError("nothing is left to convert", culprit=source.name)
    targets = plan_targets(wanted, family, uses_own_names(to, family))
    texts = len({each.component for each in wanted if each.component != "unet"})
    loaded: dict[str, Any] = {}

    def load(each: Source) -> Any:
        if each.module not in loaded:
            loaded[each.module] = source.load(each.update)
        return loaded[each.module]

    made = {}
    for target in targets:
        factors = make_factors(source, target, load)
        if dtype is not None:
            factors = replace(factors, A=factors.A.to(dtype), B=factors.B.to(dtype))
        made[spell(target, to, family, texts)] = target, factors
    dropped = [m for m in source.updates if m not in {part.source.module for t in targets for part in t.parts}]
    return _Job(source, to, family, made, tuple(dropped))


def _one_component(sources: list[Source]) -> tuple[list[Source], list[str]]:
    """A PEFT adapter is for one model: the denoiser, or else the first text encoder."""
    first = "unet" if any(s.component == "unet" for s in sources) else sources[0].component if sources else ""
    return [s for s in sources if s.component == first], [s.module for s in sources if s.component != first]


def _prefixes(modules: Sequence[str]) -> str:
    """One glob for each way in which they begin."""
    heads = dict.fromkeys(m[: m.index("_", 5) + 1] if m.startswith("lora_") else m.split(".")[0] + "." for m in modules)
    return ",".join(f"'{head}*'" for head in heads)
