"""What `convert` makes of a language model's adapter: PEFT's or loralib's, as it is or as plain LoRA.

As it is: tensors byte for byte, scales in the config. As plain LoRA: all scales in the factors, alpha being the rank,
and the start of an adapter that changed its base subtracted: [A; A0] and [s B | -s B0] (peft's
`subtract_mutated_init`), so that it is right on the original base.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter, UpdateSpec
from ..converting import Source, make_factors
from ..draft import Carried, Draft, draft_config, rounded, stacked
from ..errors import InputError, NeedsFlag, UsageError
from ..formats.peft import adapter_names, saved_name
from ..formats.peft_config import changes_base
from ..formats.peft_write import SAFETENSORS, lora_config
from ..inputs import Loaded, subtract_initial
from ..numerics.factors import svd
from ..relayout import plan_layout, read_sizes
from ..source import Source as Stored
from ..targets import Selection
from ..tensorfile import TensorSpec
from ..updates import LowRank

PEFT_ENDS = {"A": ".lora_A.weight", "B": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}


@dataclass(frozen=True)
class ModuleConvert:
    """One module of the output: what of the source it is made of, and how: `exact` (the very factors), `split`,
    `fused` or `swapped` (converting.Target), `folded` (its scale in its factors, exactly), `rounded` (the same,
    not exactly) or `truncated` to a lower rank.
    """

    name: str
    sources: tuple[str, ...]
    how: str
    rank: int
    alpha: float


@dataclass(frozen=True)
class Wish:
    """What is asked of `convert`. dtype: of the factors, None to keep theirs; layout: a key of LAYOUTS, None for its
    own; base: what says the sizes of a layout's parts.
    """

    to: str
    drop: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    plain: bool = False
    initial: str | os.PathLike[str] | None = None
    rank: int | None = None
    layout: str | None = None
    base: str | os.PathLike[str] | None = None


@dataclass(frozen=True)
class Output:
    """Everything of an output but its bytes. config: PEFT's; metadata: of the other formats."""

    specs: Mapping[str, TensorSpec]
    load: Callable[[str], Tensor]
    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    modules: tuple[ModuleConvert, ...]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    family: str | None = None


def plan_language(source: Adapter, wish: Wish, opened: ExitStack) -> Output:
    """Raises NeedsFlag for what the target cannot hold, and for an initial adapter that it takes."""
    kept, dropped = _kept(source, wish)
    if wish.plain:
        return _plain(source, wish, kept, dropped, opened)
    if wish.to == "loralib" and changes_base(source.config):
        raise NeedsFlag(
            f"was initialized with {changes_base(source.config)}, which changed the base under it, and loralib's files "
            "cannot say so",
            culprit=source.name,
            remedy="add --plain --initial ADAPTER with the adapter as it was before training",
        )
    return _as_it_is(source, wish, kept, dropped)


def _kept(source: Adapter, wish: Wish) -> tuple[dict[str, UpdateSpec], tuple[str, ...]]:
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
        raise NeedsFlag(
            f"{len(lost)} modules of {source.name} are more than {what} can hold: {', '.join(lost[:3])}"
            + (", ..." if len(lost) > 3 else ""),
            remedy=f"add --drop {','.join(lost)} to leave them out",
        )
    if not any(update.rank for update in kept.values()):
        raise InputError("nothing is left to convert", culprit=source.name)
    return kept, tuple(module for module in source.updates if module not in kept)


def _as_it_is(source: Adapter, wish: Wish, kept: Mapping[str, UpdateSpec], dropped: tuple[str, ...]) -> Output:
    if wish.layout:
        return _relaid(source, wish, kept, dropped)
    if source.format == wish.to == "peft" and wish.dtype is None and not dropped:
        names = adapter_names(source.file.specs)
        keys = {saved_name(key, names): key for key in source.file.specs}
        specs = {name: source.file.specs[key] for name, key in keys.items()}
        return Output(
            specs,
            lambda name: source.file.tensor(keys[name]),
            _config(source, kept),
            {"format": "pt"},
            _rows(kept),
            (),
            (),
        )
    specs, load = _copied(source, wish, kept)
    rows = _rows(kept)
    notes = loralib_notes(rows) if wish.to == "loralib" else ()
    return Output(specs, load, _config(source, kept), {"format": "pt"}, rows, dropped, notes)


def _copied(
    source: Adapter, wish: Wish, kept: Mapping[str, UpdateSpec]
) -> tuple[dict[str, TensorSpec], Callable[[str], Tensor]]:
    """The tensors of these updates, under the output's names, factors in its type."""
    pieces, specs = _named(source, kept, wish.to), {}
    letters = SAFETENSORS[str(wish.dtype).removeprefix("torch.")] if wish.dtype else None

    def load(name: str) -> Tensor:
        module, role = pieces[name]
        tensor: Tensor = getattr(source.load(kept[module]), role)
        return rounded(module, (tensor, tensor), wish.dtype)[0] if wish.dtype and role in "AB" else tensor

    for name, (module, role) in pieces.items():
        spec = kept[module].specs[role]
        specs[name] = TensorSpec(letters, spec.shape) if letters and role in "AB" else spec
    return specs, load


def _relaid(source: Adapter, wish: Wish, kept: Mapping[str, UpdateSpec], dropped: tuple[str, ...]) -> Output:
    """With the modules that the layout has otherwise split or fused, each when it is written."""
    assert wish.layout is not None
    pairs = [Source(m, u, "", m) for m, u in kept.items() if u.kind in ("lora", "dora") and len(u.shape) == 2]
    targets = plan_layout(pairs, wish.layout, read_sizes(wish.base))
    changed = {target.path: target for target in targets if target.how != "exact"}
    if not changed:
        raise UsageError(f"--for {wish.layout} changes nothing: the adapter has no such modules", culprit=source.name)
    taken = {part.source.module for target in changed.values() for part in target.parts}
    others = {module: update for module, update in kept.items() if module not in taken}
    bare = next((m for m in others if m.rpartition(".")[0] in taken or m in changed), None)
    if bare:
        raise InputError("has another change beside its factors, which no other layout has", culprit=bare)
    specs, copy = _copied(source, wish, others)
    ends = {"A": ".lora_A", "B": ".lora_B"} if wish.to == "loralib" else PEFT_ENDS
    rows, made, last = list(_rows(others)), {}, dict[str, dict[str, Tensor]]()

    def make(path: str) -> tuple[dict[str, Tensor], float]:
        factors = make_factors(changed[path], lambda each: low_rank(source, each))
        B, A = rounded(path, (factors.B, factors.A), wish.dtype or factors.B.dtype)
        tensors = {"A": A, "B": B, "magnitude": factors.magnitude}
        return {path + ends[role]: t for role, t in tensors.items() if t is not None}, factors.scale

    for path, target in changed.items():
        tensors, scale = make(path)
        for name, tensor in tensors.items():
            specs[name] = TensorSpec(SAFETENSORS[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
            made[name] = path
        rank = specs[path + ends["A"]].shape[0]
        rows.append(ModuleConvert(path, tuple(p.source.module for p in target.parts), target.how, rank, scale * rank))

    def load(name: str) -> Tensor:
        if name not in made:
            return copy(name)
        if made[name] not in last:
            last.clear()
            last[made[name]] = make(made[name])[0]
        return last[made[name]][name]

    notes = loralib_notes(rows) if wish.to == "loralib" else ()
    config = _relaid_config(source, kept, rows)
    return Output(specs, load, config, {"format": "pt"}, tuple(rows), dropped, notes)


def low_rank(adapter: Adapter, source: Source) -> LowRank:
    update = adapter.load(source.update)
    assert isinstance(update, LowRank)
    return update


def _relaid_config(source: Adapter, kept: Mapping[str, UpdateSpec], rows: Sequence[ModuleConvert]) -> dict[str, Any]:
    stacks = {module for module, update in kept.items() if update.kind == "experts"}
    ours = config_of({row.name: (row.rank, row.alpha) for row in rows}, stacks)
    former = _config(source, kept)
    keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters", "use_rslora")
    return {**ours, **{key: value for key, value in former.items() if key not in keys}}


def _named(source: Adapter, kept: Mapping[str, UpdateSpec], to: str) -> dict[str, tuple[str, str]]:
    """Name in the output -> module and role."""
    names, found = adapter_names(source.file.specs), {}
    for module, update in kept.items():
        for role, key in update.tensors.items():
            if to == "loralib" and role in "AB":
                found[f"{module}.lora_{role}"] = module, role
            elif source.format == "loralib" and role in "AB":
                found[f"{module}.lora_{role}.weight"] = module, role
            elif source.format == "loralib" and to == "peft" and kept.get(module.rpartition(".")[0]) is not None:
                owner, _, parameter = module.rpartition(".")
                found[f"{owner}.base_layer.{parameter}" if kept[owner].rank else key] = module, role
            else:
                name = saved_name(key, names)
                found[name.replace(".base_layer.", ".") if to == "loralib" else name] = module, role
    return found


def _config(source: Adapter, kept: Mapping[str, UpdateSpec]) -> dict[str, Any]:
    """PEFT's own fields, and those that a file without a config lacks."""
    if "r" in source.config.extra:
        return {"lora_alpha": source.config.alpha, **source.config.extra}
    both = {module: (u.rank, u.scale * u.rank) for module, u in kept.items() if u.rank}
    replaced = {module for module, update in kept.items() if update.kind == "replace"}
    saved = {m for m in replaced if not m.endswith(".bias")}
    biases = {m for m in replaced - saved if m.rpartition(".")[0] not in saved}
    return {**config_of(both), "modules_to_save": sorted(saved) or None, "bias": "all" if biases else "none"}


def config_of(modules: Mapping[str, tuple[int, float]], stacks: Collection[str] = ()) -> dict[str, Any]:
    """PEFT's of modules with these ranks and alphas, of which `stacks` are bare parameters."""
    ranks = {name: rank for name, (rank, _) in modules.items()}
    config = lora_config({n: r for n, r in ranks.items() if n not in stacks}, {n: ranks[n] for n in sorted(stacks)})
    common = Counter(alpha for _, alpha in modules.values()).most_common(1)[0][0]
    patterns = {f"^{re.escape(name)}": alpha for name, (_, alpha) in modules.items() if alpha != common}
    return {**config, "lora_alpha": common, "alpha_pattern": patterns}


def _rows(kept: Mapping[str, UpdateSpec]) -> tuple[ModuleConvert, ...]:
    return tuple(ModuleConvert(m, (m,), "exact", u.rank, u.scale * u.rank) for m, u in kept.items() if u.rank)


def loralib_notes(rows: Sequence[ModuleConvert]) -> tuple[str, ...]:
    """The alphas that its files have no place for."""
    both = sorted({(row.rank, row.alpha) for row in rows})
    said = "; ".join(f"r={rank}, lora_alpha={alpha:g}" for rank, alpha in both[:4]) + ("; ..." if both[4:] else "")
    each = "" if len(both) == 1 else ", each module's own"
    return (f"loralib's files hold no alpha: make the layers with {said}{each}",)


def _plain(
    source: Adapter, wish: Wish, kept: Mapping[str, UpdateSpec], dropped: tuple[str, ...], opened: ExitStack
) -> Output:
    init = changes_base(source.config)
    if init and wish.initial is None:
        raise NeedsFlag(
            f"was initialized with {init}, which changed the base under it",
            culprit=source.name,
            remedy="add --initial ADAPTER with the adapter as it was before training",
        )
    loaded: Loaded = ((source, 1.0),)
    if wish.initial is not None:
        loaded = subtract_initial(loaded, wish.initial, False, opened)
    names = {m: {key: name for name, (own, key) in _named(source, kept, wish.to).items() if own == m} for m in kept}
    updates = {m: replace(u, tensors={**u.tensors, **names[m]}) for m, u in kept.items() if u.rank}
    dtype = wish.dtype or torch.float32

    def factors(module: str) -> tuple[Tensor, Tensor]:
        terms = [
            (weight, *stacked(adapter.load(adapter.updates[module])))
            for adapter, weight in loaded
            if module in adapter.updates
        ]
        B, A = torch.cat([weight * B for weight, B, _ in terms], -1), torch.cat([A for *_, A in terms], -2)
        if wish.rank is not None:
            B, A = svd(B, A).truncated(wish.rank)
        return rounded(module, (B, A), dtype)

    ranks = {m: wish.rank or u.rank * len(loaded) for m, u in updates.items()}
    fields: dict[str, object] = {"init_lora_weights": True} if len(loaded) > 1 else {}
    like = replace(source, format="peft") if source.format == "peft" else _as_peft(source, kept)
    draft = Draft(like, updates, ranks, factors, _carried(source, kept, names), dtype, fields)
    hows = {m: "truncated" if wish.rank else "folded" if _folds(u, dtype) else "rounded" for m, u in updates.items()}
    rows = tuple(ModuleConvert(m, (m,), hows[m], ranks[m], float(ranks[m])) for m in updates)
    notes = loralib_notes(rows) if wish.to == "loralib" else ()
    return Output(draft.specs(), draft.loader(), draft_config(draft), {"format": "pt"}, rows, dropped, notes)


def _folds(update: UpdateSpec, dtype: torch.dtype) -> bool:
    """Whether the scale goes into the factors without a rounding: a power of two, and float32 for what has no more."""
    wide = any(update.specs[role].dtype == "F64" for role in "AB")
    return math.frexp(abs(update.scale))[0] in (0.0, 0.5) and dtype == torch.float32 and not wide


def _as_peft(source: Adapter, kept: Mapping[str, UpdateSpec]) -> Adapter:
    config = replace(source.config, extra=_config(source, kept))
    return replace(source, format="peft", config=config)


def _carried(
    source: Adapter, kept: Mapping[str, UpdateSpec], names: Mapping[str, Mapping[str, str]]
) -> dict[str, Carried]:
    """All but the factors; an added bias had their alpha / r for its scale."""
    found = {}
    for module, update in kept.items():
        for role, key in update.tensors.items():
            if role not in "AB":
                factor = update.scale if update.kind == "add" else 1.0
                found[names[module][role]] = Carried(((Stored(source.file, key), factor),))
        if update.base:
            found[update.base] = Carried(((Stored(source.file, update.base), 1.0),))
    return found
