"""Hold a config's patterns against module paths, as PEFT does, in a time that grows with their lengths alone.

PEFT's rule is `re.match(rf"(.*\\.)?({pattern})$", module)` (`peft/utils/other.py:get_pattern_key`), and nearly all
patterns are paths or the ends of paths: these are looked up, a dot in one being any character, as it is in PEFT. What
is more than that is an expression.
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


Spans = tuple[tuple[int, int], ...]  # of a path's parts between the dots that are any character


Cut = Callable[[str], Any]  # a path to those parts


Paths = dict[int, dict[Spans, tuple[Cut, dict[Any, list[str]]]]]  # length -> the parts' places -> parts -> patterns


class Patterns:
    """Patterns with a value each. Raises InputError, here or when asked, for one that is no expression or cannot be
    matched, and for a module whose path is none.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values, self._order = values, {pattern: number for number, pattern in enumerate(values)}
        self._whole: Paths = {}
        self._ends: Paths = {}
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
            of_length = (self._whole if path[1] else self._ends).setdefault(end, {})
            cut, paths = of_length.setdefault(tuple(spans), (itemgetter(*(slice(*span) for span in spans)), {}))
            paths.setdefault(cut(text), []).append(pattern)

    def value(self, module: str, default: Any) -> Any:
        """That of the first pattern that matches."""
        if not self._values:
            return default
        first = min(self.matching(module), key=self._order.__getitem__, default=None)
        return default if first is None else self._values[first]

    def matching(self, module: str) -> Iterator[str]:
        """All patterns that match."""
        if not self._values:
            return
        if len(module) > MAX_MODULE or "\n" in module:
            raise InputError(
                "is no path of a module, which the config's patterns could be for",
                culprit=module[:80],
                remedy="rename its tensors",
            )
        for end in endings(module):
            for cut, paths in self._ends.get(len(end), {}).values():
                yield from paths.get(cut(end), ())
        for cut, paths in self._whole.get(len(module), {}).values():
            yield from paths.get(cut(module), ())
        if self._others:
            yield from (self._others[number] for number in self._expressions.matching(module))

    @cached_property
    def _expressions(self) -> Expressions:
        for each in self._others:
            parse(each, each)  # by itself, so that the brackets around it are its own
        return Expressions([parse(f"()({each})$", each) for each in self._others], self._others, before=r"(.*\.)?")


class Targets:
    """PEFT's `target_modules` (`peft/tuners/tuners_utils.py:check_target_module_exists`), without its layer numbers.

    They are ends of paths, or one expression for all of a path. Raises InputError as Patterns does.
    """

    def __init__(self, targets: Any) -> None:
        self._ends = frozenset(each for each in targets if isinstance(each, str)) if isinstance(targets, list) else ()
        self._expression = targets if isinstance(targets, str) and targets != "all-linear" else None

    def has(self, module: str) -> bool:
        if self._expression is None:
            return any(end in self._ends for end in endings(module))
        return bool(self._matcher.matching(module))

    @cached_property
    def _matcher(self) -> Expressions:
        assert self._expression is not None
        return Expressions([parse(self._expression, self._expression)], [self._expression], whole=True)


def endings(module: str) -> Iterator[str]:
    """A path, and what of it is left behind each dot."""
    yield module
    start = 0
    while start := module.find(".", start) + 1:
        yield module[start:]
