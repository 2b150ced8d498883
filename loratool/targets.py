"""Which weights: selection patterns, and binding an adapter's module paths to the base's tensors.

Binding is a pure function of names and shapes. All naming trouble ends here: an adapter was trained on a
model class whose paths need not be those of the file, so one side may have a prefix that the other lacks.
A prefix is never guessed: the base's own names must resolve every path of the adapter in one way.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .adapter import Adapter, UpdateSpec
from .architectures.conv1d import stores_transposed
from .architectures.wrappers import CONTAINERS, KOHYA_PREFIXES, PEFT_PREFIX, WRAPPERS
from .errors import InputError, NeedsFlag, UsageError
from .tensorfile import TORCH_FLOATS, TensorSpec

SHOWN = 8  # names listed in an error before "and N more"


@dataclass(frozen=True)
class Selection:
    """Module paths by pattern. A pattern is a dotted suffix (peft's rule), a glob (`*`, `?`) of the whole path, or
    `re:` and an expression searched in it. No target means all; `layers` are layer numbers."""

    target: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: frozenset[int] | None = None

    def selects(self, *paths: str) -> bool:
        """Whether a module known under all of `paths` (the adapter's and the base's) is selected."""
        if self.layers is not None and not any(_layer(path) in self.layers for path in paths):
            return False
        if any(matches(pattern, path) for pattern in self.exclude for path in paths):
            return False
        return not self.target or any(matches(pattern, path) for pattern in self.target for path in paths)


def matches(pattern: str, path: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], path) is not None
        except re.error as error:
            raise UsageError(f"is not a regular expression: {error}", culprit=pattern) from error
    if "*" in pattern or "?" in pattern:
        return fnmatchcase(path, pattern)
    return path == pattern or path.endswith("." + pattern)


def _layer(path: str) -> int | None:
    """The first number among the path's parts, dotted or flattened: `model.layers.3.mlp` -> 3."""
    found = re.search(r"(?:^|[._])(\d+)(?=[._]|$)", path)
    return int(found[1]) if found else None


def parse_patterns(values: Sequence[str]) -> tuple[str, ...]:
    """Comma lists to patterns; `re:` takes the rest of its value, commas included."""
    patterns: list[str] = []
    for value in values:
        head, mark, expression = value.partition("re:")
        patterns += [part.strip() for part in head.split(",") if part.strip()]
        patterns += [mark + expression] if mark else []
    return tuple(patterns)


def parse_layers(text: str | None) -> frozenset[int] | None:
    """`0-3,7` -> {0, 1, 2, 3, 7}. Raises UsageError for anything else."""
    if text is None:
        return None
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise UsageError(f"--layers {text!r} is not a list like 0-3,7")
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


@dataclass(frozen=True)
class Placement:
    """One adapter's update on one base tensor. `transposed`: the base stores (in, out)."""

    adapter: Adapter
    update: UpdateSpec
    weight: float
    transposed: bool


@dataclass(frozen=True)
class Binding:
    """The placements of each base tensor, and the adapters' module paths that a selection left out."""

    placements: Mapping[str, tuple[Placement, ...]]
    left_out: tuple[str, ...]


def bind(
    specs: Mapping[str, TensorSpec],
    model_type: str | None,
    adapters: Sequence[tuple[Adapter, float]],
    selection: Selection,
) -> Binding:
    """Find the base tensor of every update.

    Raises NeedsFlag for paths that do not bind (naming the --exclude that would let the rest pass), and
    InputError where nothing binds, a path is ambiguous, or the shapes contradict each other.
    """
    placements: dict[str, tuple[Placement, ...]] = {}
    left_out: list[str] = []
    for adapter, weight in adapters:
        found, missing = resolve_modules(specs, adapter)
        chosen = {m: base for m, base in found.items() if selection.selects(m, base.removesuffix(".weight"))}
        missing_chosen = [m for m in missing if selection.selects(m)]
        left_out += [m for m in adapter.updates if m not in chosen and m not in missing_chosen]
        if missing_chosen:
            raise _unbound(adapter, missing_chosen, chosen, specs)
        holders: dict[str, str] = {}
        for module, base in chosen.items():
            if base in holders:
                raise InputError(f"{holders[base]} and {module} of {adapter.name} both bind to it", culprit=base)
            holders[base] = module
        for module, base in chosen.items():
            transposed = _orientation(adapter, adapter.updates[module], base, specs, model_type, chosen)
            placement = Placement(adapter, adapter.updates[module], weight, transposed)
            placements[base] = (*placements.get(base, ()), placement)
    if not placements:
        raise InputError(
            "no module of any adapter is selected, so there is nothing to do", remedy="loosen the selection"
        )
    return Binding({name: placements[name] for name in specs if name in placements}, tuple(left_out))


def resolve_modules(specs: Mapping[str, TensorSpec], adapter: Adapter) -> tuple[dict[str, str], list[str]]:
    """The base tensor of each module path that has one, and the paths that have none.

    The plain paths are tried, and every way of adding or dropping one container prefix, on all paths at once.
    The way that resolves most of them counts, the plain one first; two others that tie are an InputError.
    """
    separator = "_" if adapter.flattened else "."
    index: dict[str, list[str]] = {}
    for name in specs:
        if name.endswith(".weight"):
            path = _unwrapped(name.removesuffix(".weight")).removeprefix(PEFT_PREFIX)
            index.setdefault(path.replace(".", separator), []).append(name)
    plain = {module: _normalized(module, adapter.flattened) for module in adapter.updates}
    ways = [plain]
    for container in CONTAINERS:
        prefix = container.replace(".", separator) + separator
        ways.append({m: path if path in index else prefix + path for m, path in plain.items()})
        ways.append({m: path if path in index else path.removeprefix(prefix) for m, path in plain.items()})
    resolved = [{m: index[path] for m, path in way.items() if path in index} for way in ways]
    most = max(len(way) for way in resolved)
    best = [way for way in resolved if len(way) == most]
    if len(best[0]) == len(resolved[0]):
        best = best[:1]
    for module in best[0]:
        names = sorted({name for way in best for name in way.get(module, [])})
        if len(names) > 1:
            raise InputError(f"of {adapter.name} could be any of {', '.join(names)}", culprit=module)
    return {module: names[0] for module, names in best[0].items()}, [m for m in plain if m not in best[0]]


def _unwrapped(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def _normalized(module: str, flattened: bool) -> str:
    if not flattened:
        return _unwrapped(module)
    return next((module.removeprefix(p) for p in KOHYA_PREFIXES if module.startswith(p)), module)


def _unbound(
    adapter: Adapter, missing: Sequence[str], bound: Mapping[str, str], specs: Mapping[str, TensorSpec]
) -> NeedsFlag | InputError:
    lines = []
    for module in missing[:SHOWN]:
        near = nearest(module, specs)
        lines.append(f"  {module}" + (f"   nearest in the base: {', '.join(near)}" if near else ""))
    if len(missing) > SHOWN:
        lines.append(f"  and {len(missing) - SHOWN} more")
    message = f"{len(missing)} of {len(adapter.updates)} modules are not in the base:\n" + "\n".join(lines)
    if not bound:
        return InputError(message, culprit=adapter.name, remedy="nothing binds: is this the adapter's base?")
    patterns = ",".join(_covering(missing, bound))
    return NeedsFlag(message, culprit=adapter.name, remedy=f"to leave them out: --exclude '{patterns}'")


def _covering(missing: Sequence[str], bound: Mapping[str, str]) -> list[str]:
    """Few patterns for all of `missing` and nothing of `bound`: kohya prefixes, last names, else whole paths."""
    kept = [path for module, base in bound.items() for path in (module, base.removesuffix(".weight"))]
    patterns: list[str] = []
    for module in missing:
        if any(matches(pattern, module) for pattern in patterns):
            continue
        short = [f"{prefix}*" for prefix in KOHYA_PREFIXES if module.startswith(prefix)] or [module.rpartition(".")[2]]
        patterns.append(module if any(matches(short[0], path) for path in kept) else short[0])
    return patterns


def nearest(module: str, specs: Mapping[str, TensorSpec]) -> list[str]:
    """Up to two names of the base that look like `module`: of those with the same last part, if there are any."""
    last = re.split(r"[._]", module)[-1]
    names = [name for name in specs if name.endswith(".weight")]
    pool = [name for name in names if name.removesuffix(".weight").endswith(last)] or names
    return difflib.get_close_matches(module + ".weight", pool[:2000], 2, 0.5)


def _orientation(
    adapter: Adapter,
    update: UpdateSpec,
    base: str,
    specs: Mapping[str, TensorSpec],
    model_type: str | None,
    bound: Mapping[str, str],
) -> bool:
    """Whether the base stores this weight as (in, out): by shape, and where it is square by evidence."""
    spec = specs[base]
    if spec.dtype not in TORCH_FLOATS:
        raise InputError(
            f"is {spec.dtype}, which cannot be added to",
            culprit=base,
            remedy="pass the original model in 16 or 32 bits",
        )
    shape, plain = spec.shape, update.out_in
    if shape not in (plain, plain[::-1]):
        A, B = update.specs["A"].shape, update.specs["B"].shape
        raise InputError(f"A is {A} and B is {B} in {adapter.name}, but the base weight is {shape}", culprit=base)
    if shape[0] != shape[1]:
        return shape != plain
    known = stores_transposed(model_type, base.removesuffix(".weight"))
    if known is not None:
        return known
    return _square_orientation(adapter, update.module, specs, bound)


def _square_orientation(
    adapter: Adapter, module: str, specs: Mapping[str, TensorSpec], bound: Mapping[str, str]
) -> bool:
    """Of a square matrix of an unknown family: as the adapter's other matrices, else as the config's flag says."""
    if adapter.linear_only:
        return False
    siblings = {
        other: specs[name].shape != adapter.updates[other].out_in
        for other, name in bound.items()
        if len(specs[name].shape) == 2 and specs[name].shape[0] != specs[name].shape[1]
    }
    last = module.rpartition(".")[2]
    of_same_name = {transposed for other, transposed in siblings.items() if other.rpartition(".")[2] == last}
    for evidence in (of_same_name, set(siblings.values())):
        if len(evidence) == 1:
            return evidence.pop()
    if adapter.config.fan_in_fan_out is not None and not siblings:
        return adapter.config.fan_in_fan_out
    raise InputError(
        f"is square, and nothing tells whether the base stores it as (out, in) or (in, out) ({adapter.name})",
        culprit=module,
        remedy="put the model's config.json beside the base, or the adapter's adapter_config.json beside the adapter",
    )
