"""Find what a program for image models would not apply of an unconverted adapter: names, scales, kinds, norms."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from ...adapters.adapter import Adapter
from ...adapters.formats import FORMATS, loaded_by, open_adapter
from ...adapters.formats.peft_config import base_mutating_init
from ...architectures.families import FAMILIES
from ...architectures.runtimes.runtime import ImageRuntime
from ...binding.modules.image_modules import KNOWN, SourceModule, settle_components
from ...errors import InputError, NeedsFlag
from ...transform.for_image_program import (
    divides_otherwise,
    ignores_norm,
    is_known_kind,
    require_family,
    unloaded_modules,
)
from ...transform.module_map import plan_target_modules
from ...transform.plan import find_target_model
from ...transform.request import ConvertRequest
from ...views.inspect_runtime import Finding, RuntimeInspection
from ..inputs import given_base
from .call import InspectFor


def inspect_for_image_program(call: InspectFor, row: ImageRuntime) -> RuntimeInspection:
    """Report from headers what a program does with an image model's adapter."""
    with ExitStack() as opened:
        base = given_base(call.base, opened) if call.base is not None else None
        model = base.config if base else None
        adapter = open_adapter(call.path, call.alpha, model=model, runtime=call.runtime)
        opened.callback(adapter.file.close)
        to = loaded_by(row.key).key
        named = FORMATS[adapter.format].with_standard_names(adapter)
        try:
            target = find_target_model(named, ConvertRequest(to, base=base), None)
        except NeedsFlag as error:  # its flag is one of convert
            why = "with the model, whose family decides"
            raise NeedsFlag(error.message, culprit=error.culprit, flags="--base BASE", why=why) from error
        if target.family is None:
            raise InputError(f"is not an adapter of a known image model ({KNOWN})", culprit=adapter.name)
        require_family(row, target.family, adapter.name)
        findings = (
            *_of_format(adapter, row),
            *_of_updates(adapter, row, target.family),
            *_of_names(adapter, row, target.family, target.modules),
        )
        title = FAMILIES[target.family].title
        newer = () if target.family in row.families else (f"{row.version} has no {title}: newer ones were not checked",)
        return RuntimeInspection(
            path=os.fspath(call.path),
            runtime=row.key,
            version=row.version,
            checked=row.checked,
            base=None if call.base is None else os.fspath(call.base),
            modules=len(adapter.updates),
            findings=findings,
            notes=newer,
        )


def _looks_for(row: ImageRuntime, key: str) -> bool:
    """Return whether a program looks for all names of a format. key: of FORMATS."""
    return row.key in (*FORMATS[key].loaded_by, *FORMATS[key].also_loaded_by)


def _of_format(adapter: Adapter, row: ImageRuntime) -> Iterator[Finding]:
    """Yield the findings on the file: its spelling, the place of its alphas, its init."""
    can = FORMATS[adapter.format].can
    if not _looks_for(row, adapter.format):
        says = f"the format is {adapter.format}, whose names it may not know"
        yield Finding("format", "ignores", says, f"convert --for writes {loaded_by(row.key).key}'s")
    scaled = tuple(m for m, u in adapter.updates.items() if u.cls.divisor(u) and u.scale != 1)
    if scaled and can.alpha in ("metadata", "config") and not row.metadata_alpha:
        says = "alphas beside the tensors would be ignored without a warning: it would take 1 for the scale"
        yield Finding("scale", "ignores", says, "convert --for writes them as it reads them", scaled)
    if init := base_mutating_init(adapter.config):
        says = f"{init} subtracted the initial factors from the base, and it would not"
        yield Finding("start", "misreads", says, "convert --for with --initial subtracts them from the adapter")


def _of_updates(adapter: Adapter, row: ImageRuntime, family: str) -> Iterator[Finding]:
    """Yield the findings on kinds of updates."""
    updates = adapter.updates.items()
    if others := tuple(m for m, u in updates if divides_otherwise(row, u) and adapter.only_for != row.key):
        says = "DoRA along the outputs would be divided by the norm of the base's weight without the change"
        yield Finding("dora", "misreads", says, "convert --for with --base writes magnitudes that undo that", others)
    if others := tuple(m for m, u in updates if ignores_norm(row, u)):
        what = "misread" if row.along_inputs else "ignored"
        outcome = "misreads" if row.along_inputs else "ignores"
        says = f"DoRA's magnitudes would be {what} without a warning"
        yield Finding("dora", outcome, says, "convert --for with --base makes it plain LoRA", others)
    if unknown := {m: u.cls.without_norm(u).kind for m, u in updates if not is_known_kind(row, u, family)}:
        named = " and ".join(dict.fromkeys(unknown.values()))
        says = f"it is {named}, which is not known to be applied as a merge does"
        remedy = "convert --for makes LoRA of kinds with factors; a merge applies all"
        yield Finding("kind", "misreads", says, remedy, tuple(unknown))


def _of_names(adapter: Adapter, row: ImageRuntime, family: str, sources: Sequence[SourceModule]) -> Iterator[Finding]:
    """Yield the findings on modules that the program does not load, or not under these names."""
    unloaded = dict(unloaded_modules(row, loaded_by(row.key).key, family, sources))
    for reason in dict.fromkeys(unloaded.values()):
        modules = tuple(module for module, other in unloaded.items() if other == reason)
        yield Finding(
            "never", "ignores", f"modules are {reason}", "convert --for with --exclude leaves them out", modules
        )
    if not _looks_for(row, adapter.format):
        return
    to, known = FORMATS[adapter.format], settle_components(sources, FAMILIES[family])
    loaded = [source for source in known if source.module not in unloaded]
    own = to if FAMILIES[family].up_attention else loaded_by(row.key)  # a UNet's are looked for in both namings
    targets = plan_target_modules(loaded, family, own.naming(family)) if loaded else ()
    names = {to.module_name(target.component, target.path, family) for target in targets}
    if others := tuple(source.module for source in loaded if source.module not in names):
        says = f"modules have other names than those that it is known to look for, like {min(names)}"
        yield Finding("names", "ignores", says, "convert --for writes its names", others)
