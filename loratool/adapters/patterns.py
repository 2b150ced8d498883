"""Match a config's patterns with module paths, as PEFT does, in time bounded by their lengths.

PEFT's rule is `re.match(rf"(.*\\.)?({pattern})$", module)` (`peft/utils/other.py:get_pattern_key`). Nearly all patterns
are paths or suffixes of paths. These are looked up, with a dot matching any character, as in PEFT. Any other pattern is
matched as an expression.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from operator import itemgetter
from typing import Any

from ..errors import InputError
from .expressions import Expressions, parse

MAX_MODULE = 1000  # characters of a module's path

_PATH = re.compile(r"(\^?)((?:[\w/.-]|\\[.-])*)\$?")

_DOT = re.compile(r"(?<!\\)\.")

Spans = tuple[tuple[int, int], ...]  # (start, stop) of a pattern's literal texts, between the dots

Cut = Callable[[str], Any]  # a path -> its texts at some spans

Paths = dict[int, dict[Spans, tuple[Cut, dict[Any, list[str]]]]]  # length -> spans -> literal texts -> patterns


class Patterns:
    """Patterns that map module paths to values.

    Raises:
        InputError: a pattern is not an expression or cannot be matched, or a module's path is too long. The error can
            come as late as the first match.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values, self._order = values, {pattern: number for number, pattern in enumerate(values)}
        self._full_paths: Paths = {}
        self._suffixes: Paths = {}
        self._others: list[str] = []
        for pattern in values:
            path = _PATH.fullmatch(pattern)
            if path is None:
                self._others.append(pattern)
                continue
            spans: list[tuple[int, int]] = []
            text, end = "", -1
            for part in _DOT.split(path[2]):
                text += "." * bool(spans) + part.replace("\\", "")
                spans.append((end + 1, end := len(text)))
            of_length = (self._full_paths if path[1] else self._suffixes).setdefault(end, {})
            cut, paths = of_length.setdefault(tuple(spans), (itemgetter(*(slice(*span) for span in spans)), {}))
            paths.setdefault(cut(text), []).append(pattern)

    def value(self, module: str, default: Any) -> Any:
        """Return the value of the first pattern that matches, or `default`."""
        if not self._values:
            return default
        first = min(self.matching(module), key=self._order.__getitem__, default=None)
        return default if first is None else self._values[first]

    def matching(self, module: str) -> Iterator[str]:
        """Yield all patterns that match, in no order."""
        if not self._values:
            return
        if len(module) > MAX_MODULE or "\n" in module:
            raise InputError(
                "is not a module path, so the config's patterns cannot match it",
                culprit=module[:80],
                remedy="rename its tensors",
            )
        for end in endings(module):
            for cut, paths in self._suffixes.get(len(end), {}).values():
                yield from paths.get(cut(end), ())
        for cut, paths in self._full_paths.get(len(module), {}).values():
            yield from paths.get(cut(module), ())
        if self._others:
            yield from (self._others[number] for number in self._expressions.matching(module))

    @cached_property
    def _expressions(self) -> Expressions:
        for pattern in self._others:
            parse(pattern, pattern)  # parsed alone first, because the brackets below could balance one of the pattern's
        parsed = [parse(f"()({pattern})$", pattern) for pattern in self._others]
        return Expressions(parsed, self._others, before=r"(.*\.)?")


class Targets:
    """PEFT's `target_modules` (`peft/tuners/tuners_utils.py:check_target_module_exists`), without its layer numbers.

    They are suffixes of paths, or one expression for a full path. Raises InputError as Patterns does.
    """

    def __init__(self, targets: Any) -> None:
        listed = targets if isinstance(targets, list) else []
        self._suffixes = frozenset(each for each in listed if isinstance(each, str))
        self._expression = targets if isinstance(targets, str) and targets != "all-linear" else None

    def has(self, module: str) -> bool:
        if self._expression is None:
            return any(end in self._suffixes for end in endings(module))
        return bool(self._matcher.matching(module))

    @cached_property
    def _matcher(self) -> Expressions:
        assert self._expression is not None
        return Expressions([parse(self._expression, self._expression)], [self._expression], to_end=True)


def endings(module: str) -> Iterator[str]:
    """Yield a path and its suffix after each dot, longest first."""
    yield module
    start = 0
    while start := module.find(".", start) + 1:
        yield module[start:]
