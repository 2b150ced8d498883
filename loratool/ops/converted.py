"""An adapter as it would be in another convention, opened: the input of verbs that write one and take `--to`.

`convert` plans it, its tensors are made when they are asked for, and nothing is written. So every verb sees the names,
the fused modules and the ranks that its output has, and several adapters meet by what their modules mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ..adapter import Adapter
from ..architectures.wrappers import PEFT_PREFIX
from ..choices import TARGETS
from ..converting import FAMILIES, SINGLE_COMPONENT, family_of, plan_targets, read_sources
from ..errors import InputError, UsageError
from ..formats import FORMATS
from ..formats.diffusers import ENDS
from ..inputs import Loaded
from ..targets import matches
from ..unwritten import UnwrittenFile
from .convert import plan_convert
from .convert_language import ModuleConvert, Output, Wish, asked_by, name_alphas

COMFY = ("diffusion_model.", "text_encoders.")  # how its names begin


def check_target(to: str | None) -> None:
    if to is not None and to not in TARGETS:
        raise UsageError(f"format {to!r} is none of {', '.join(TARGETS)}")


def as_converted(
    source: Adapter, wish: Wish, verb: str, folder: Path, opened: ExitStack, family: str | None = None
) -> tuple[Adapter, Output]:
    """What would be opened, were `source` converted and written. verb: that asks; family: where others than the
    adapter itself tell it.
    """
    with asked_by(verb):
        made = plan_convert(source, wish, folder, opened, family)
    prefix = PEFT_PREFIX if wish.to == "peft" else ""
    metadata = dict(made.metadata)
    if wish.to == "peft":
        metadata["loratool"] = json.dumps({"adapter_config": made.config})
    specs = {prefix + name: spec for name, spec in made.specs.items()}
    file = UnwrittenFile(source.file, specs, lambda name: made.load(name.removeprefix(prefix)), metadata)
    form = "diffusers" if wish.to == "comfy" else wish.to
    adapter = FORMATS[form].read(source.name, file, 1.0 if wish.to == "loralib" else None, False)
    scales = {row.name: row.alpha / row.rank for row in made.modules}  # of which loralib's files say nothing
    updates = {m: replace(u, scale=scales[m]) if m in scales else u for m, u in adapter.updates.items()}
    return replace(adapter, updates=updates), made


def warnings_of(made: Sequence[Output]) -> tuple[str, ...]:
    """What the conversion of the inputs lost."""
    errors = [row.error for each in made for row in each.modules if row.error]
    if not errors:
        return ()
    return (
        f"{len(errors)} modules of the input could not be carried to the bit; at most {max(errors):.0e} of a change is "
        "lost by that, which `loratool convert` shows",
    )


def loralib_notes(like: Adapter, ranks: Mapping[str, int]) -> tuple[str, ...]:
    """The alphas, which are the ranks, where the format has no place for them."""
    if like.format != "loralib":
        return ()
    return name_alphas([ModuleConvert(m, (m,), "exact", rank, float(rank)) for m, rank in ranks.items()])


def bring_together(
    loaded: Loaded, to: str | None, exclude: tuple[str, ...], folder: Path, opened: ExitStack
) -> tuple[Loaded, tuple[str, ...], list[Output]]:
    """Adapters in one convention: `to`, or the first one's where they are not spelled alike. And the patterns of
    `exclude` that are still to be heeded, since the others named modules by their former names.
    """
    adapters = [adapter for adapter, _ in loaded]
    if to is None and _are_alike(adapters):
        return loaded, exclude, []
    family = _common_family(adapters)
    _require_known(adapters, family)
    to = to or _convention(adapters[0])
    found = [as_converted(adapter, Wish(to, exclude), "combine", folder, opened, family) for adapter in adapters]
    former = [module for adapter in adapters for module in adapter.updates]
    there = [module for adapter, _ in found for module in adapter.updates]
    rest = [p for p in exclude if any(matches(p, m) for m in there) or not any(matches(p, module) for module in former)]
    return (
        tuple((adapter, w) for (adapter, _), (_, w) in zip(found, loaded, strict=True)),
        tuple(rest),
        [m for _, m in found],
    )


def _require_known(adapters: Sequence[Adapter], family: str | None) -> None:
    """Only a language model's two formats and an image model's are each other's."""
    first, known = adapters[0], ", ".join(FAMILIES.values())
    for adapter in adapters if family is None else ():
        if adapter.format != first.format and {adapter.format, first.format} != {*SINGLE_COMPONENT}:
            raise InputError(
                f"is in the {adapter.format} format, {first.name} in {first.format}'s, and of no image model that is "
                f"known ({known}): combine adapters of one format",
                culprit=adapter.name,
            )
        if (one := _endings(first)) != (two := _endings(adapter)):
            raise InputError(
                f"spells its factors {' '.join(two)}, {first.name} {' '.join(one)}, and is of no image model that is "
                f"known ({known}): no loader takes both in one file",
                culprit=adapter.name,
            )


def _convention(adapter: Adapter) -> str:
    comfy = adapter.format == "diffusers" and any(module.startswith(COMFY) for module in adapter.updates)
    return "comfy" if comfy else adapter.format


def _are_alike(adapters: Sequence[Adapter]) -> bool:
    """Of one format and one spelling, and no two of their names mean one module."""
    if len({adapter.format for adapter in adapters}) > 1 or len({_endings(each) for each in adapters}) > 1:
        return False
    names: dict[tuple[str, str], str] = {}
    return all(
        names.setdefault(meaning, module) == module for each in adapters for meaning, module in _meanings(each).items()
    )


def _endings(adapter: Adapter) -> tuple[str, ...]:
    """How the names of an image adapter's factors end, where that differs."""
    if adapter.format not in ("diffusers", "kohya"):
        return ()
    keys = [update.tensors[role] for update in adapter.updates.values() for role in ("A", "B") if update.rank]
    return tuple(sorted({max((end for end in ENDS if key.endswith(end)), key=len, default=key) for key in keys}))


def _meanings(adapter: Adapter) -> dict[tuple[str, str], str]:
    """(component, path in diffusers' names) -> the module that is it, or that it is a part of."""
    sources, _ = read_sources(adapter)
    family = family_of(sources)
    if family is None:
        return {}
    return {
        (target.component, target.path.removeprefix("text_model.")): part.source.module
        for target in plan_targets(sources, family, False)
        for part in target.parts
    }


def _common_family(adapters: Sequence[Adapter]) -> str | None:
    """Of image models: the denoisers' where there are any. Raises InputError where they are of two."""
    sources = [read_sources(adapter)[0] for adapter in adapters]
    told: dict[str | None, Adapter] = {}
    for adapter, own in zip(adapters, sources, strict=True):
        family = family_of(own)
        if family is None or any(each.component == "unet" for each in own):
            told.setdefault(family, adapter)
    if len(told) > 1:
        (one, first), (two, second) = list(told.items())[:2]
        names = [FAMILIES.get(family or "", "no image model that is known") for family in (one, two)]
        raise InputError(f"is of {names[1]}, {first.name} of {names[0]}: no base is both's", culprit=second.name)
    return next(iter(told)) if told else family_of([each for own in sources for each in own])
