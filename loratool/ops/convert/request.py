"""The request (`ConvertRequest`) and the result (`AdapterOutput`, `ModuleConvert`) of a conversion."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...adapters.adapter import Adapter, UpdateSpec
from ...adapters.updates import LowRank
from ...binding.selection import Selection
from ...errors import InputError, NeedsFlag
from ...files.dtypes import TensorSpec
from .source_modules import SourceModule

ADD_INITIAL = "add --plain --initial ADAPTER with the adapter as it was before training"


DROP_OPTIONS = {"combine": "--exclude", "init": "--exclude"}  # what --drop is called in another verb that has it


@dataclass(frozen=True)
class ModuleConvert:
    """One module of the output: what of the source it is made of, and how: `exact` (the very factors), `split`,
    `fused` or `swapped` (converting.Target), `folded` (its scale in its factors): the same change, to the bit. Or
    `rounded` (a scale or a type that it could not be) or `truncated` to a rank, and then error is ||D' - D|| / ||D||.
    """

    name: str
    sources: tuple[str, ...]
    how: str
    rank: int
    alpha: float
    error: float = 0.0


@dataclass(frozen=True)
class ConvertRequest:
    """What is asked of `convert`. dtype: of the factors, None to keep theirs; layout: a key of LAYOUTS, None for its
    own; base: what says the sizes of a layout's parts, or what DoRA changes.
    """

    to: str
    drop: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    plain: bool = False
    initial: str | os.PathLike[str] | None = None
    rank: int | None = None
    layout: str | None = None
    base: str | os.PathLike[str] | None = None


@contextmanager
def request_for(verb: str) -> Iterator[None]:
    """What `convert` would ask for, as another verb can say it: an option of its own, or a conversion first."""
    try:
        yield
    except NeedsFlag as error:
        remedy = error.remedy or ""
        if remedy.startswith("add --drop ") and verb in DROP_OPTIONS:
            own = remedy.replace("--drop", DROP_OPTIONS[verb], 1)
            raise NeedsFlag(error.message, culprit=error.culprit, remedy=own) from error
        first = remedy.replace("add ", "first loratool convert with ", 1)
        raise InputError(error.message, culprit=error.culprit, remedy=first) from error


def cannot_convert(name: str, what: str, modules: Sequence[str], patterns: str = "") -> NeedsFlag:
    """patterns: what names all of the modules, where they are too many to list."""
    said = f"{len(modules)} modules of {name} {what}: {', '.join(modules[:3])}" + (", ..." if modules[3:] else "")
    return NeedsFlag(said, remedy=f"add --drop {patterns or ','.join(modules)} to leave them out")


@dataclass(frozen=True)
class AdapterOutput:
    """Everything of an output but its bytes. config: PEFT's; metadata: of the other formats."""

    specs: Mapping[str, TensorSpec]
    load: Callable[[str], Tensor]
    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    modules: tuple[ModuleConvert, ...]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    family: str | None = None


def select_updates(source: Adapter, wish: ConvertRequest) -> tuple[dict[str, UpdateSpec], tuple[str, ...]]:
    """The updates that are carried, and the modules dropped. Raises NeedsFlag for what the target cannot hold."""
    selection = Selection(wish.drop or ("",))
    kept = {module: update for module, update in source.updates.items() if not selection.selects(module)}
    kinds = ("lora", "replace") if wish.to == "loralib" else ("lora", "experts", "add", "replace", "rows")
    holds = (*kinds, "dora") if wish.to == "peft" and not wish.plain else kinds
    lost = [
        module
        for module, update in kept.items()
        if update.kind not in holds or (wish.to == "loralib" and len(update.shape) > 2)
    ]
    if lost:
        what = "loralib's files" if wish.to == "loralib" else "plain LoRA"
        raise cannot_convert(source.name, f"are more than {what} can hold", lost)
    if not any(update.rank for update in kept.values()):
        raise InputError("nothing is left to convert", culprit=source.name)
    return kept, tuple(module for module in source.updates if module not in kept)


def low_rank_modules(adapter: Adapter, source: SourceModule) -> LowRank:
    update = adapter.load(source.update)
    assert isinstance(update, LowRank)
    return update


def alpha_notes(rows: Sequence[ModuleConvert]) -> tuple[str, ...]:
    """The alphas that its files have no place for."""
    both = sorted({(row.rank, row.alpha) for row in rows})
    said = "; ".join(f"r={rank}, lora_alpha={alpha:g}" for rank, alpha in both[:4]) + ("; ..." if both[4:] else "")
    each = "" if len(both) == 1 else ", each module's own"
    return (f"loralib's files hold no alpha: make the layers with {said}{each}",)
