"""Report the modules of adapters that a base lacks or has in other shapes, and whether it is the wrong base.

If most of an adapter does not fit, the error says so. Else it offers --exclude, if a few patterns are enough.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...adapters.adapter import Adapter
from ...adapters.config import named_base
from ...adapters.formats import capabilities
from ...architectures.components import component_of
from ...architectures.families import FAMILIES
from ...architectures.image import image_modules
from ...architectures.numbered_names import grouped
from ...architectures.prefixes import KOHYA_PREFIXES, module_path
from ...errors import InputError, LoratoolError, NeedsFlag, shell_word
from ...files.dtypes import TensorSpec
from .image_modules import image_family
from .placement import Match, ShapeError, place_update
from .selection import matches_pattern

PATTERNS_OFFERED = 4  # patterns of --exclude; more of them mean another base

# a name with ranges or numbers: the part up to the first, which is a layer's number, and the rest
_IN_LAYERS = re.compile(r"(.*?[._](?:\{[^}]*\}|\d+))[._].+", re.DOTALL)

# keys of metadata that name a base: sd-scripts' and those of Stability's standard
TELLING = ("ss_base_model_version", "modelspec.architecture")

GROUPS_SHOWN, ENDS_SHOWN = 3, 4  # lines of modules, and names in each


@dataclass(frozen=True)
class Fit:
    """The fit of an adapter's selected modules to a base."""

    adapter: Adapter
    matches: Mapping[str, Sequence[Match]]  # of the modules that the base has
    absent: Sequence[str]
    misfits: Mapping[str, ShapeError]  # modules of `matches` with other shapes in the base

    @property
    def is_wrong(self) -> bool:
        """Return whether most modules do not fit; components that the base lacks do not count."""
        components = {component_of(module)[0] for module in self.matches}
        absent = [module for module in self.absent if not components or component_of(module)[0] in components]
        return 2 * (len(absent) + len(self.misfits)) > len(absent) + len(self.matches)


def misfits(
    adapter: Adapter,
    matches: Mapping[str, Sequence[Match]],
    specs: Mapping[str, TensorSpec],
    model_types: Sequence[str],
) -> dict[str, ShapeError]:
    """Return module -> the error of its placement, for modules of other shapes than the base's."""
    errors = {}
    for module, candidates in matches.items():
        try:
            for match in candidates:
                place_update(adapter, module, 1.0, match, specs, model_types, matches)
        except ShapeError as error:
            errors[module] = error
        except InputError:
            continue  # an error of another kind, raised later by `bind`
    return errors


def misfit_error(
    fits: Sequence[Fit],
    specs: Mapping[str, TensorSpec],
    added: Sequence[str],
    reasons: Mapping[str, str],
    bound_without: Callable[[Sequence[str]], object],
) -> LoratoolError:
    """Return the error for modules that do not fit the base.

    Args:
        specs: of the base.
        added: tensors that are added to the base.
        reasons: missing module -> reason, where one is known.
        bound_without: binds with these additional patterns of --exclude, or raises an error.
    """
    for fit in fits:
        if fit.is_wrong:
            return _wrong_base(fit, specs, reasons)
    misfit = next((error for fit in fits for error in fit.misfits.values()), None)
    if misfit:
        return misfit
    absent = [module for fit in fits for module in fit.absent]
    fitting = [
        path
        for fit in fits
        for m, found_matches in fit.matches.items()
        for path in (m, module_path(found_matches[0].name))
    ]
    patterns = exclude_patterns(absent, [*fitting, *map(module_path, added)])
    modules = {module for fit in fits for module in fit.adapter.updates}
    names = " and ".join(fit.adapter.name for fit in fits if fit.absent)
    message = f"{len(absent):,} of {len(modules):,} modules are not in the base:\n"
    message += "\n".join(_lines(absent, specs, reasons))
    if len(patterns) > PATTERNS_OFFERED:
        return InputError(message, culprit=names, remedy=_base_of(next(fit.adapter for fit in fits if fit.absent)))
    try:
        bound_without(patterns)
    except LoratoolError as error:
        return error
    return NeedsFlag(message, culprit=names, remedy=f"to exclude them: {exclude_options(patterns)}")


def _wrong_base(fit: Fit, specs: Mapping[str, TensorSpec], reasons: Mapping[str, str]) -> InputError:
    """Return the error for an adapter that mostly does not fit."""
    adapter, total = fit.adapter, len(fit.absent) + len(fit.matches)
    of_image = capabilities(adapter).components == "many"
    base = image_modules({name: spec.shape for name, spec in specs.items()})
    family = FAMILIES[key].title if (key := image_family(adapter)) else None
    where = "the base, an image model" if base else "the base"
    if base.family and not base.family.up_attention:  # UNets of several families have the same names
        where = f"the base ({base.family.title})"
    if of_image and not base and not fit.matches:
        of = (
            f"is an adapter for {family}"
            if family
            else f"is an image model's adapter, with modules like {fit.absent[0]}"
        )
        remedy = _named_base(adapter) or "pass the image model that it was trained on"
        return InputError(f"{of}, but the base is not an image model", culprit=adapter.name, remedy=remedy)
    if len(fit.absent) < len(fit.misfits):
        first = next(iter(fit.misfits.values()))
        if total == 1:
            return first
        text = f"{len(fit.misfits):,} of {total:,} modules have other shapes in {where}, like {first.culprit}: "
        return InputError(text + first.message, culprit=adapter.name, remedy=_base_of(adapter, family))
    lines = "\n".join(_lines(fit.absent, specs, reasons))
    message = f"{len(fit.absent):,} of {total:,} modules are not in {where}:\n{lines}"
    return InputError(message, culprit=adapter.name, remedy=_base_of(adapter, family))


def _base_of(adapter: Adapter, family: str | None = None) -> str:
    family_text = f"its modules are those of {family}: " if family else ""
    return _named_base(adapter) or f"{family_text}is this the base that it was trained on?"


def _named_base(adapter: Adapter) -> str:
    """Return a sentence with the base that the config or an image adapter's metadata names; empty without one."""
    if adapter.config.base_model:
        return f"its config names its base: {adapter.config.base_model}"
    metadata = adapter.file.metadata or {}
    named = next(filter(None, (named_base(metadata.get(key)) for key in TELLING)), None)
    return f"its metadata names its base: {named[:80]}" if named else ""


def _lines(modules: Sequence[str], specs: Mapping[str, TensorSpec], reasons: Mapping[str, str]) -> list[str]:
    """Return lines that list modules: modules in the same layers share a line; at most GROUPS_SHOWN + 1 lines."""
    lines = [f"  {module}: {reasons[module]}" for module in modules if module in reasons]
    groups: dict[str, list[str]] = {}
    for name in grouped((m for m in modules if m not in reasons), underscores=True):
        match = _IN_LAYERS.fullmatch(name)
        groups.setdefault(match[1] if match else "", []).append(name)
    for number, (layers, names) in enumerate(groups.items()):
        similar = nearest_names(re.sub(r"\{(\d+)[^}]*\}", r"\1", names[0]), specs) if number == 0 else []
        is_short = layers and len(names) > 1
        ends = [name[len(layers) + 1 :] if is_short else name for name in names]
        more = f" and {len(ends) - ENDS_SHOWN} more" if len(ends) > ENDS_SHOWN else ""
        where = (f" in {layers}" if is_short else "") + (f"; nearest there: {similar[0]}" if similar else "")
        lines.append(f"  {', '.join(ends[:ENDS_SHOWN])}{more}{where}")
    rest = len(lines) - GROUPS_SHOWN
    lines = [line.replace("\n", "\\n") for line in lines[:GROUPS_SHOWN]]  # a file's names may contain line breaks
    return lines + ([f"  and {rest} group{'s' * (rest > 1)} more"] if rest > 0 else [])


def exclude_patterns(modules: Sequence[str], others: Sequence[str]) -> list[str]:
    """Return patterns for all of `modules` and nothing of `others`.

    kohya's prefixes and last names are preferred; if they would match `others`, the full path is used.
    """
    patterns: list[str] = []
    for module in modules:
        if any(matches_pattern(pattern, module) for pattern in patterns):
            continue
        candidates = [f"{prefix}*" for prefix in KOHYA_PREFIXES if module.startswith(prefix)]
        candidates += [name for name in (module.rpartition(".")[2], module) if re.fullmatch(r"[\w./-]+", name)]
        candidates.append(f"re:^{re.escape(module)}$")
        free = (p for p in candidates if not any(matches_pattern(p, path) for path in others))
        patterns.append(next(free, candidates[-1]))
    return patterns


def exclude_options(patterns: Sequence[str]) -> str:
    """Return --exclude options for patterns; a regular expression gets an option of its own."""
    lists = [",".join(p for p in patterns if not p.startswith("re:"))] + [p for p in patterns if p.startswith("re:")]
    return " ".join(f"--exclude {shell_word(each)}" for each in lists if each)


def nearest_names(module: str, specs: Mapping[str, TensorSpec]) -> list[str]:
    """Return up to two names of the base that are similar to `module`, preferably with the same last part."""
    last = re.split(r"[._]", module)[-1]
    names = [name for name in specs if name.endswith(".weight")]
    pool = [name for name in names if name.removesuffix(".weight").endswith(last)] or names
    return difflib.get_close_matches(module + ".weight", pool[:2000], 2, 0.5)
