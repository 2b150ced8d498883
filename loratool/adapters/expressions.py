"""Match regular expressions that a stranger wrote, in a time that is bounded by their length and the text's.

`re` tries one way through an expression after the other, and there can be more ways than anybody has time for:
`(?:[a-z]+)+!`. Here all ways are walked at once (Thompson 1968), and each set of places is remembered with where a
character leads from it, as it is met. `re` itself parses the expression and decides every single character and
anchor, so that the meaning is Python's; what depends on the way that was taken (back-references, atomic groups)
is refused.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

from ..errors import InputError

_WITHIN = "re._" if sys.version_info >= (3, 11) else "sre_"


_parser: Any = import_module(f"{_WITHIN}parse{'r' if sys.version_info >= (3, 11) else ''}")


_compiler: Any = import_module(f"{_WITHIN}compile{'r' if sys.version_info >= (3, 11) else ''}")


MAX_LENGTH = 2000  # characters of an expression; of one of unsloth's 400


MAX_PARTS, MAX_PLACES = 5000, 100_000  # of one expression, its repeats written out, and of all of a set


MAX_WORK, WORK_A_TEXT = 20_000_000, 5000  # places looked at: at the most, and besides for each text


MAX_KNOWN = 50_000  # steps remembered


REMEDY = "write the modules' names, or a simpler expression, into adapter_config.json"


Parsed = Any  # what `re` makes of an expression: a list of (operation, argument)


Way = tuple[str, Any, tuple[int, ...]]  # what a place asks for, by what it is decided, and where it leads


def parse(pattern: str, name: str) -> Parsed:
    """name: what it is called in an error. Raises InputError for what is no regular expression, or too long a one."""
    if len(pattern) > MAX_LENGTH:
        raise InputError(f"is an expression of {len(pattern)} characters", culprit=f"{name[:80]}...", remedy=REMEDY)
    try:
        return _parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"is not a regular expression: {error}", culprit=name) from error


class Expressions:
    """Several expressions that are matched from a text's start on as one. whole: they must reach its end. before: an
    expression that stands before each.

    names: what the expressions are called in an error. Raises InputError for one that cannot be matched so.
    """

    def __init__(self, parsed: Iterable[Parsed], names: Sequence[str], whole: bool = False, before: str = "") -> None:
        self._ways: list[Way] = []
        self._whole, self._left = whole, MAX_WORK
        self._closed: dict[tuple[frozenset[int], tuple[bool, ...]], tuple[frozenset[int], frozenset[int]]] = {}
        self._asks: dict[frozenset[int], tuple[int, ...]] = {}
        self._steps: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        starts = []
        for number, (expression, name) in enumerate(zip(parsed, names, strict=True)):
            self._name, self._parts = name, 0
            try:
                starts.append(self._sequence(expression, expression.state.flags, self._add("end", number)))
            except (re.error, RecursionError) as error:
                raise InputError(f"is not a regular expression: {error}", culprit=name) from error
        prefix = parse(before, before)
        self._start = frozenset([self._sequence(prefix, prefix.state.flags, self._add("split", None, *starts))])

    def matching(self, text: str) -> frozenset[int]:
        """The numbers of the expressions that match."""
        answers: dict[tuple[int, int], bool] = {}
        self._left += WORK_A_TEXT
        return self._run(self._start, text, 0, answers, self._whole)

    def _run(
        self, places: frozenset[int], text: str, at: int, answers: dict[tuple[int, int], bool], whole: bool
    ) -> frozenset[int]:
        found: frozenset[int] = frozenset()
        for position in range(at, len(text) + 1):
            open_, ended = self._close(places, text, position, answers)
            if ended and (position == len(text) or not whole):
                found |= ended
            if position == len(text) or not open_:
                break
            places = self._step(open_, text[position])
        return found

    def _spend(self, work: int) -> None:
        self._left -= work
        if self._left < 0:
            raise InputError("takes too long to match against these modules", culprit=self._name, remedy=REMEDY)

    def _close(
        self, places: frozenset[int], text: str, at: int, answers: dict[tuple[int, int], bool]
    ) -> tuple[frozenset[int], frozenset[int]]:
        """The places that wait for a character, and the expressions that end here."""
        if places not in self._asks:
            everything = self._reach(places, lambda _: True)
            self._asks[places] = tuple(sorted(place for place in everything if self._ways[place][0] == "ask"))
        asks = self._asks[places]
        self._spend(1 + len(asks))
        truth = tuple(self._answer(place, text, at, answers) for place in asks)
        key = places, truth
        if key not in self._closed:
            reached = self._reach(places, dict(zip(asks, truth, strict=True)).__getitem__)
            waiting = frozenset(place for place in reached if self._ways[place][0] == "take")
            ended = frozenset(self._ways[place][1] for place in reached if self._ways[place][0] == "end")
            self._closed[key] = waiting, ended
        return self._closed[key]

    def _reach(self, places: Iterable[int], holds: Callable[[int], bool]) -> set[int]:
        """All places that can be reached without a character. holds: whether a question is answered with yes."""
        reached: set[int] = set()
        waiting = list(places)
        while waiting:
            place = waiting.pop()
            if place not in reached:
                reached.add(place)
                kind, _, further = self._ways[place]
                if kind == "split" or (kind == "ask" and holds(place)):
                    waiting += further
        self._spend(len(reached))
        return reached

    def _answer(self, place: int, text: str, at: int, answers: dict[tuple[int, int], bool]) -> bool:
        if (place, at) not in answers:
            answers[place, at] = self._ways[place][1](text, at, answers)
        return answers[place, at]

    def _step(self, places: frozenset[int], character: str) -> frozenset[int]:
        key = places, character
        if key not in self._steps:
            if len(self._steps) + len(self._closed) > MAX_KNOWN:
                for known in (self._steps, self._closed, self._asks):
                    known.clear()
            self._spend(len(places))
            ways = (self._ways[place] for place in places)
            self._steps[key] = frozenset(further[0] for _, takes, further in ways if takes.fullmatch(character))
        return self._steps[key]

    def _add(self, kind: str, by: Any, *further: int) -> int:
        if len(self._ways) == MAX_PLACES:
            raise self._refuse("is one expression too many")
        self._ways.append((kind, by, further))
        return len(self._ways) - 1

    def _refuse(self, why: str) -> InputError:
        return InputError(why, culprit=self._name, remedy=REMEDY)

    def _sequence(self, parsed: Parsed, flags: int, after: int) -> int:
        """The place from which `parsed` leads to `after`."""
        for operation, argument in reversed(list(parsed)):
            self._parts += 1
            if self._parts > MAX_PARTS:
                raise self._refuse(f"has more than {MAX_PARTS} parts with its repeats written out")
            after = self._part(str(operation), operation, argument, flags, after)
        return after

    def _part(self, name: str, operation: Any, argument: Any, flags: int, after: int) -> int:
        if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return self._add("take", _alone(operation, _hashable(argument), flags), after)
        if name == "AT":
            anchor = _alone(operation, argument, flags)
            return self._add("ask", lambda text, at, _: anchor.match(text, at) is not None, after)
        if name == "BRANCH":
            return self._add("split", None, *(self._sequence(branch, flags, after) for branch in argument[1]))
        if name == "SUBPATTERN":
            _, more, fewer, inner = argument
            kept = flags & ~_parser.TYPE_FLAGS if more & _parser.TYPE_FLAGS else flags
            return self._sequence(inner, (kept | more) & ~fewer, after)
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, inner = argument
            return self._repeat(least, most, inner, flags, after)
        if name in ("ASSERT", "ASSERT_NOT"):
            direction, inner = argument
            return self._look(direction, inner, name == "ASSERT", flags, after)
        if name == "FAILURE":
            return self._add("split", None)
        raise self._refuse(f"has a {name.lower().replace('_', ' ')}, which is not matched here")

    def _repeat(self, least: int, most: int, inner: Parsed, flags: int, after: int) -> int:
        if most == _parser.MAXREPEAT:
            loop = self._add("split", None)
            self._ways[loop] = ("split", None, (self._sequence(inner, flags, loop), after))
            end = loop
        else:
            end = after
        if max(least, 0 if most == _parser.MAXREPEAT else most) > MAX_PARTS:
            raise self._refuse(f"repeats a part more than {MAX_PARTS} times")
        for _ in range(0 if most == _parser.MAXREPEAT else most - least):
            end = self._add("split", None, self._counted(inner, flags, end), after)
        for _ in range(least):
            end = self._counted(inner, flags, end)
        return end

    def _counted(self, inner: Parsed, flags: int, after: int) -> int:
        self._parts += 1  # a repeat of nothing is work too
        return self._sequence(inner, flags, after)

    def _look(self, direction: int, inner: Parsed, wanted: bool, flags: int, after: int) -> int:
        """A look at what comes, or at what came before, which is of one length."""
        least, most = inner.getwidth() if direction < 0 else (0, 0)
        if least != most:
            raise re.error("look-behind requires fixed-width pattern")
        start = frozenset([self._sequence(inner, flags, self._add("end", 0))])

        def look(text: str, at: int, answers: dict[tuple[int, int], bool]) -> bool:
            begin = at - least
            seen = begin >= 0 and bool(self._run(start, text, begin, answers, False))
            return seen is wanted

        return self._add("ask", look, after)


def _hashable(argument: Any) -> Any:
    return tuple(argument) if isinstance(argument, list) else argument


@lru_cache(maxsize=4096)
def _alone(operation: Any, argument: Any, flags: int) -> re.Pattern[str]:
    """One character class or anchor, as `re` decides it."""
    state = _parser.State()
    state.flags = flags
    compiled: re.Pattern[str] = _compiler.compile(_parser.SubPattern(state, [(operation, argument)]))
    return compiled
