"""Select modules by the patterns and presets of `--target`, `--exclude` and `--layers`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from numbers import Integral

from ...architectures.roles import weight_role
from ...errors import InputError, UsageError, brief

# Names for the parts of a block in any family. Two more presets are not sets of names: `all-linear` is peft's (every
# linear layer except the head), and `experts` is all experts of a layer, stacked or separate.
PRESETS = {
    "attention": frozenset(
        """q_proj k_proj v_proj o_proj out_proj qkv_proj qkv query key value query_key_value c_attn q_attn attn_out
        to_q to_k to_v Wqkv q_lin k_lin v_lin out_lin wq wk wv wo""".split()
    ),
    "mlp": frozenset(
        """gate_proj up_proj down_proj gate_up_proj fc1 fc2 fc_in fc_out c_fc dense_h_to_4h dense_4h_to_h lin1 lin2
        wi wi_0 wi_1 w1 w2 w3 up_gate_proj""".split()
    ),
}

MOST_LAYERS = 100_000  # more than any model has

NAMES_SHOWN = 8  # names listed in an error before the number of all


@dataclass(frozen=True)
class Selection:
    """A choice of modules by patterns of their paths.

    A pattern is a preset, a dotted suffix (peft's rule), a glob (`*`, `?`) for the full path, or `re:` and an
    expression that is searched in the path.
    """

    target: tuple[str, ...] = ()  # empty for all
    exclude: tuple[str, ...] = ()
    layers: frozenset[int] | None = None  # None for all

    @classmethod
    def parse(
        cls, target: str | Sequence[str], exclude: str | Sequence[str], layers: str | Iterable[int] | None
    ) -> Selection:
        """Return the selection for a call's arguments, parsed by `parse_patterns` and `parse_layers`."""
        return cls(parse_patterns(target), parse_patterns(exclude), parse_layers(layers))

    def selects(self, *paths: str) -> bool:
        """Return whether a module is selected; `paths` are all its paths (the adapter's and the base's)."""
        if self.layers is not None and not any(_layer(path) in self.layers for path in paths):
            return False
        if any(matches_pattern(pattern, path) for pattern in self.exclude for path in paths):
            return False
        return not self.target or any(matches_pattern(pattern, path) for pattern in self.target for path in paths)

    def require_used(self, paths: Collection[str], where: str, target: str = "--target") -> None:
        """Raise InputError for a pattern or layers that match none of `paths`: a typo would select all or nothing.

        Args:
            where: the owner of the paths, for the message.
            target: the option that sets `self.target`, for the message.
        """
        for option, pattern in [*((target, p) for p in self.target), *(("--exclude", p) for p in self.exclude)]:
            if not any(matches_pattern(pattern, path) for path in paths):
                raise InputError(
                    f"names no module of {where}",
                    culprit=f"{option} {pattern}",
                    remedy=similar_modules(pattern, (path.rpartition(".")[2] for path in paths)),
                )
        if self.layers is None:
            return
        present = sorted({number for path in paths if (number := _layer(path)) is not None})
        if present and self.layers.isdisjoint(present):
            raise InputError(
                f"names no layer of {where}", culprit="--layers", remedy=f"there are {present[0]}-{present[-1]}"
            )


def similar_modules(pattern: str, names: Iterable[str], words: Iterable[str] = ()) -> str:
    """Return a remedy for a pattern that matches nothing: the nearest name or word, and all names if they are few."""
    kinds = sorted({*names})
    near = difflib.get_close_matches(pattern, [*words, *kinds], 1, 0.4)
    more = f", ..., {len(kinds):,} kinds" if len(kinds) > NAMES_SHOWN else ""
    meant = f"did you mean {near[0]}? " if near else ""
    return f"{meant}modules: {', '.join(kinds[:NAMES_SHOWN])}{more}"


def matches_pattern(pattern: str, path: str) -> bool:
    """Return whether a pattern, as in `Selection`, matches a module path.

    Raises:
        UsageError: it is not a regular expression.
    """
    if pattern == "all-linear":
        return weight_role(path, 2, True) == "linear"
    if pattern == "experts":
        return ".experts." in f"{path}."
    if pattern in PRESETS:
        return path.rpartition(".")[2] in PRESETS[pattern]
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], path) is not None
        except (re.error, OverflowError, RecursionError) as error:
            raise UsageError(f"is not a regular expression: {error}", culprit=pattern) from error
    if "*" in pattern or "?" in pattern:
        return fnmatchcase(path, pattern)
    return path == pattern or path.endswith("." + pattern)


def _layer(path: str) -> int | None:
    """Return the first number among the path's parts, dotted or flattened: `model.layers.3.mlp` -> 3."""
    match = re.search(r"(?:^|[._])(\d{1,9})(?=[._]|$)", path)
    return int(match[1]) if match else None


def parse_patterns(values: str | Sequence[str]) -> tuple[str, ...]:
    """Split one or several comma-separated lists into patterns; `re:` includes the rest of its value with commas.

    Raises:
        UsageError: a value has no pattern, or is not text.
    """
    if not isinstance(values, Sequence) or isinstance(values, bytes | bytearray | memoryview):
        raise UsageError(f"{brief(values)} is not a pattern or a list of patterns")
    patterns: list[str] = []
    for value in [values] if isinstance(values, str) else values:
        if not isinstance(value, str):
            raise UsageError(f"{brief(value)} is not a pattern, like q_proj or *.mlp.*")
        head, mark, expression = value.partition("re:")
        split = [part.strip() for part in head.split(",") if part.strip()] + ([mark + expression] if mark else [])
        if not split:
            raise UsageError(f"the pattern {value!r} names nothing")
        patterns += split
    return tuple(patterns)


def parse_layers(layers: str | Iterable[int] | None) -> frozenset[int] | None:
    """Return layer numbers: {0, 1, 2, 3, 7} for `0-3,7`, numbers unchanged, None for all.

    Raises:
        UsageError: the value is not such a list, is empty, or has an impossible number.
    """
    if layers is None:
        return None
    if isinstance(layers, str):
        return _parse_ranges(layers)
    try:
        known = not isinstance(layers, bytes | bytearray | memoryview | Mapping)
        values: Iterable[object] = islice(layers, MOST_LAYERS + 1 if known else 0)
    except TypeError:  # no numbers, or a tensor's only one
        known = False
    if not known:
        raise UsageError(f"{brief(layers)} is not a list like 0-3,7, a range or a list of numbers")
    numbers = [
        int(number) if not isinstance(number, bool) and isinstance(number, Integral) else -1 for number in values
    ]
    for number in numbers:
        if not 0 <= number < MOST_LAYERS:
            raise UsageError(f"{brief(layers)} has something that is not a layer number")
    if not 1 <= len(numbers) <= MOST_LAYERS:
        raise UsageError(f"{brief(layers)} has {'too many numbers' if numbers else 'no number'}")
    return frozenset(numbers)


def _parse_ranges(text: str) -> frozenset[int]:
    if not re.fullmatch(r"\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*", text, re.ASCII):
        raise UsageError(f"{brief(text)} is not a list like 0-3,7")
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if last and int(last) < int(first):
            raise UsageError(f"{part}: the range ends before it starts")
        numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)
