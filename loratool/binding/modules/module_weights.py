"""Weight an adapter's modules separately, by the components and patterns of `ADAPTER:0.8,te=0.4,PATTERN=0.5`.

The last entry that matches a module counts; without a match it is the adapter's weight. A narrow component (`te1`) has
precedence over a wide one (`te`) in any order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ...adapters.adapter import Adapter, ModuleWeights
from ...architectures.components import WEIGHED, weighed_component
from ...errors import UsageError
from .selection import matches_pattern, similar_modules

_NARROW = {listed[0]: name for name, listed in WEIGHED.items() if len(listed) == 1}  # component -> its name


def resolve_weights(adapter: Adapter, weights: Mapping[str, float]) -> ModuleWeights:
    """Return an adapter's weights with wide components split into the adapter's components, in a canonical form.

    Args:
        weights: key of WEIGHED, or pattern -> weight, in the user's order.

    Raises:
        UsageError: the adapter has no module of a component.
    """
    present = {weighed_component(module) for module in adapter.updates} if WEIGHED.keys() & weights.keys() else set()
    narrow = {WEIGHED[name][0] for name in weights if name in _NARROW.values()}
    patterns, entries = 0, list[tuple[int, str, str, float]]()
    for name, weight in weights.items():
        if name not in WEIGHED:
            patterns += 1
            entries.append((patterns, "", name, weight))
            continue
        components = [component for component in WEIGHED[name] if component in present]
        if not components:
            raise _unused(adapter.name, name, weight, adapter.updates)
        entries += [(patterns, c, _NARROW[c], weight) for c in components if c not in narrow or name == _NARROW[c]]
    return tuple((name, weight) for *_, name, weight in sorted(entries, key=lambda entry: entry[:2]))


def weight_of(adapter: Adapter, weight: float, module: str, *paths: str) -> float:
    """Return the weight of a module, `weight` being the adapter's; a bias has the weight of its module.

    Args:
        paths: the module's paths in the base, which patterns may also match.

    Raises:
        UsageError: the weight is too large for the module's scale, or a pattern is not a regular expression.
    """
    for name, module_weight in reversed(adapter.module_weights):
        if weighed_component(module) in WEIGHED[name] if name in WEIGHED else _names(name, (module, *paths)):
            weight = module_weight
            break
    if not math.isfinite(weight * adapter.updates[module].scale):
        scale = adapter.updates[module].scale
        raise UsageError(f"the weight {weight} times the scale {scale} is too large", culprit=module)
    return weight


def _names(pattern: str, paths: Iterable[str]) -> bool:
    """Return whether a pattern matches one of a module's paths, or the module of a bias."""
    return any(matches_pattern(pattern, each) for path in paths for each in {path, path.removesuffix(".bias")})


def require_patterns_used(adapters: Iterable[tuple[Adapter, Iterable[str]]]) -> None:
    """Raise UsageError for a pattern with a weight that matches no module of its adapter.

    Adapters with the same patterns count as one, because the start of a trained adapter may have fewer modules.

    Args:
        adapters: each with the paths of its modules, the adapter's and the base's.
    """
    by_patterns: dict[tuple[str, ...], tuple[Adapter, set[str]]] = {}
    for adapter, paths in adapters:
        patterns = tuple(name for name, _ in adapter.module_weights if name not in WEIGHED)
        by_patterns.setdefault(patterns, (adapter, set()))[1].update(paths)
    for patterns, (adapter, known) in by_patterns.items():
        weights = dict(adapter.module_weights)
        for pattern in patterns:
            if not _names(pattern, known):
                raise _unused(adapter.name, pattern, weights[pattern], known)


def _unused(adapter: str, name: str, weight: float, paths: Iterable[str]) -> UsageError:
    ends = (path.removesuffix(".bias").rpartition(".")[2] for path in paths)
    return UsageError(
        f"has no module that {name}={weight:g} matches",
        culprit=adapter,
        remedy=f"patterns work as in --target; {similar_modules(name, ends, WEIGHED)}" if name not in WEIGHED else None,
    )


def spell_weight(weight: float, weights: ModuleWeights) -> str:
    """Format a weight as the command line takes it: `0.8`, `0.8,te1=0.4,down_proj=0`."""
    return ",".join([f"{weight:g}", *(f"{name}={module_weight:g}" for name, module_weight in weights)])


def by_component(weights: ModuleWeights) -> dict[str, float]:
    """Return component or pattern -> weight, in order."""
    return {WEIGHED[name][0] if name in WEIGHED else name: weight for name, weight in weights}


def by_name(components: Mapping[str, float]) -> ModuleWeights:
    """Return the weights from which `by_component` returns `components`."""
    return tuple((_NARROW.get(component, component), weight) for component, weight in components.items())


def record_weights(weights: ModuleWeights) -> dict[str, object]:
    """Return the fields for weights in an undo file's adapter: `components` if no pattern has a weight."""
    if all(name in WEIGHED for name, _ in weights):
        return {"components": by_component(weights)} if weights else {}
    return {"module_weights": [list(entry) for entry in weights]}


def recorded_weights(fields: Mapping[str, Any]) -> ModuleWeights:
    """Return the weights from which `record_weights` returns `fields`."""
    return (
        *by_name(fields.get("components", {})),
        *((name, weight) for name, weight in fields.get("module_weights", ())),
    )
