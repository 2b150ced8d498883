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
from shlex import quote

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
        except (re.error, OverflowError, RecursionError) as error:
            raise UsageError(f"is not a regular expression: {error}", culprit=pattern) from error
    if "*" in pattern or "?" in pattern:
        return fnmatchcase(path, pattern)
    return path == pattern or path.endswith("." + pattern)


def _layer(path: str) -> int | None:
    """The first number among the path's parts, dotted or flattened: `model.layers.3.mlp` -> 3."""
    found = re.search(r"(?:^|[._])(\d+)(?=[._]|$)", path)
    return int(found[1]) if found else None


def parse_patterns(values: Sequence[str]) -> tuple[str, ...]:
    """Comma lists to patterns; `re:` takes the rest of its value, commas included. UsageError for an empty value."""
    patterns: list[str] = []
    for value in values:
        head, mark, expression = value.partition("re:")
        found = [part.strip() for part in head.split(",") if part.strip()] + ([mark + expression] if mark else [])
        if not found:
            raise UsageError(f"the pattern {value!r} names nothing")
        patterns += found
    return tuple(patterns)


def parse_layers(text: str | None) -> frozenset[int] | None:
    """`0-3,7` -> {0, 1, 2, 3, 7}. Raises UsageError for anything else."""
    if text is None:
        return None
    if not re.fullmatch(r"\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*", text):
        raise UsageError(f"--layers {text[:40]!r} is not a list like 0-3,7")
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if last and int(last) < int(first):
            raise UsageError(f"--layers {part}: the range ends before it starts")
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
    resolved = [(adapter, weight, *resolve_modules(specs, adapter)) for adapter, weight in adapters]
    chosen = [
        {m: base for m, base in found.items() if selection.selects(m, base.removesuffix(".weight"))}
        for _, _, found, _ in resolved
    ]
    missing = [[m for m in absent if selection.selects(m)] for _, _, _, absent in resolved]
    if any(missing):
        raise _unbound([adapter for adapter, _ in adapters], missing, chosen, specs)
    placements: dict[str, tuple[Placement, ...]] = {}
    for (adapter, weight, _, _), bound in zip(resolved, chosen, strict=True):
        holders: dict[str, str] = {}
        for module, base in bound.items():
            if base in holders:
                raise InputError(f"{holders[base]} and {module} of {adapter.name} both bind to it", culprit=base)
            holders[base] = module
            transposed = _orientation(adapter, adapter.updates[module], base, specs, model_type, bound)
            placement = Placement(adapter, adapter.updates[module], weight, transposed)
            placements[base] = (*placements.get(base, ()), placement)
    if not placements:
        raise InputError(
            "no module of any adapter is selected, so there is nothing to do", remedy="loosen the selection"
        )
    left_out = [m for (a, _), bound in zip(adapters, chosen, strict=True) for m in a.updates if m not in bound]
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
    adapters: Sequence[Adapter],
    missing: Sequence[Sequence[str]],
    chosen: Sequence[Mapping[str, str]],
    specs: Mapping[str, TensorSpec],
) -> NeedsFlag | InputError:
    """The error for modules that the base lacks, with the --exclude that leaves out those and nothing that binds."""
    absent = [(adapter, module) for adapter, modules in zip(adapters, missing, strict=True) for module in modules]
    lines = []
    for adapter, module in absent[:SHOWN]:
        near = nearest(module, specs)
        lines.append(f"  {module} ({adapter.name})" + (f"   nearest in the base: {', '.join(near)}" if near else ""))
    if len(absent) > SHOWN:
        lines.append(f"  and {len(absent) - SHOWN} more")
    total = sum(len(adapter.updates) for adapter in adapters)
    message = f"{len(absent)} of {total} modules are not in the base:\n" + "\n".join(lines)
    if not any(chosen):
        return InputError(message, remedy="nothing binds: is this the adapter's base?")
    kept = [path for bound in chosen for m, base in bound.items() for path in (m, base.removesuffix(".weight"))]
    return NeedsFlag(message, remedy=f"to leave them out: {exclude_options([m for _, m in absent], kept)}")


def exclude_options(modules: Sequence[str], kept: Sequence[str]) -> str:
    """--exclude options for all of `modules` and nothing of `kept`: kohya's prefixes or last names where they can."""
    patterns: list[str] = []
    for module in modules:
        if any(matches(pattern, module) for pattern in patterns):
            continue
        candidates = [f"{prefix}*" for prefix in KOHYA_PREFIXES if module.startswith(prefix)]
        candidates += [name for name in (module.rpartition(".")[2], module) if re.fullmatch(r"[\w./-]+", name)]
        candidates.append(f"re:^{re.escape(module)}$")
        free = (p for p in candidates if not any(matches(p, path) for path in kept))
        patterns.append(next(free, candidates[-1]))
    lists = [",".join(p for p in patterns if not p.startswith("re:"))] + [p for p in patterns if p.startswith("re:")]
    return " ".join(f"--exclude {quote(each)}" for each in lists if each)


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
    known = False if adapter.linear_only else stores_transposed(model_type, base.removesuffix(".weight"))
    fitting = [transposed for transposed in (False, True) if shape == (plain[::-1] if transposed else plain)]
    if not fitting or (known is not None and known not in fitting):
        A, B = update.specs["A"].shape, update.specs["B"].shape
        layout = {None: "", False: " as (out, in)", True: " as (in, out)"}[known]
        raise InputError(
            f"A is {A} and B is {B} in {adapter.name}, but the base weight is {shape}{layout}", culprit=base
        )
    if known is not None:
        return known
    return fitting[0] if len(fitting) == 1 else _square_orientation(adapter, update.module, specs, bound)


def _square_orientation(
    adapter: Adapter, module: str, specs: Mapping[str, TensorSpec], bound: Mapping[str, str]
) -> bool:
    """Of a square matrix of an unknown family: as the adapter's other matrices, else as the config's flag says."""
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
        remedy="say so with fan_in_fan_out in adapter_config.json, or a known model_type in the base's config.json",
    )
