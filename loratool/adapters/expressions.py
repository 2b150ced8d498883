"""Match untrusted regular expressions in time bounded by the lengths of expression and text.

`re` backtracks, which takes exponential time for an expression like `(?:[a-z]+)+!`. Here a nondeterministic automaton
is simulated on all its paths at once (Thompson 1968), with the transitions between sets of states cached. `re` itself
parses the expression and decides each single character and anchor, so that the meaning is Python's. Back-references
and atomic groups depend on the path taken and are refused.
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

MAX_LENGTH = 2000  # characters of an expression; unsloth's have 400

MAX_PARTS, MAX_STATES = 5000, 100_000  # parts of an expression with repeats unrolled; states of one automaton

MAX_WORK, WORK_A_TEXT = 20_000_000, 5000  # states visited: in total, and the allowance that each text adds

MAX_KNOWN = 50_000  # transitions cached

REMEDY = "write the modules' names, or a simpler expression, into adapter_config.json"

Parsed = Any  # an expression as `re` parses it: a list of (operation, argument)

# A state: its kind, its argument, and the next states. Kinds: `take` consumes a character that the pattern matches,
# `ask` continues if the predicate holds, `split` always continues, `end` accepts the expression of this number.
State = tuple[str, Any, tuple[int, ...]]


def parse(pattern: str, name: str) -> Parsed:
    """Parse a regular expression; `name` is its name in errors.

    Raises:
        InputError: it is not a regular expression, or it is too long.
    """
    if len(pattern) > MAX_LENGTH:
        raise InputError(f"is an expression of {len(pattern)} characters", culprit=f"{name[:80]}...", remedy=REMEDY)
    try:
        return _parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"is not a regular expression: {error}", culprit=name) from error


def repeats(parsed: Parsed) -> int:
    """Return how many repeats (`*`, `?`, `{2}`) a parsed expression has.

    One inside another counts as 1000, and a reference to a group too: `re` can take exponential time for these.
    """
    count, todo = 0, [(parsed, False)]
    while todo:
        part, is_inside = todo.pop()
        if isinstance(part, tuple) and part and str(part[0]) in REPEATS:
            count += 1000 if is_inside or "GROUPREF" in str(part[0]) else 1
            is_inside = True
        if isinstance(part, tuple | list | type(parsed)):
            todo += [(each, is_inside) for each in part]
    return count


REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT", "GROUPREF", "GROUPREF_EXISTS")


class Expressions:
    """Several expressions, matched from the start of a text by one automaton.

    Args:
        names: the expressions' names in errors.
        to_end: a match must reach the text's end.
        before: an expression that must match before each of them.

    Raises:
        InputError: an expression cannot be matched in bounded time.
    """

    def __init__(self, parsed: Iterable[Parsed], names: Sequence[str], to_end: bool = False, before: str = "") -> None:
        self._states: list[State] = []
        self._to_end, self._left = to_end, MAX_WORK
        self._closed: dict[tuple[frozenset[int], tuple[bool, ...]], tuple[frozenset[int], frozenset[int]]] = {}
        self._asks: dict[frozenset[int], tuple[int, ...]] = {}
        self._transitions: dict[tuple[frozenset[int], str], frozenset[int]] = {}
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
        """Return the indices of the expressions that match."""
        answers: dict[tuple[int, int], bool] = {}
        self._left += WORK_A_TEXT
        return self._run(self._start, text, 0, answers, self._to_end)

    def _run(
        self, states: frozenset[int], text: str, start: int, answers: dict[tuple[int, int], bool], to_end: bool
    ) -> frozenset[int]:
        matches: frozenset[int] = frozenset()
        for position in range(start, len(text) + 1):
            open_, ended = self._close(states, text, position, answers)
            if ended and (position == len(text) or not to_end):
                matches |= ended
            if position == len(text) or not open_:
                break
            states = self._next_states(open_, text[position])
        return matches

    def _spend(self, work: int) -> None:
        self._left -= work
        if self._left < 0:
            raise InputError("takes too long to match against these modules", culprit=self._name, remedy=REMEDY)

    def _close(
        self, states: frozenset[int], text: str, position: int, answers: dict[tuple[int, int], bool]
    ) -> tuple[frozenset[int], frozenset[int]]:
        """Follow all transitions that consume nothing.

        Returns:
            The states that wait for a character, and the indices of the expressions that end here.
        """
        if states not in self._asks:
            everything = self._reach(states, lambda _: True)
            self._asks[states] = tuple(sorted(state for state in everything if self._states[state][0] == "ask"))
        asks = self._asks[states]
        self._spend(1 + len(asks))
        truth = tuple(self._answer(state, text, position, answers) for state in asks)
        key = states, truth
        if key not in self._closed:
            reached = self._reach(states, dict(zip(asks, truth, strict=True)).__getitem__)
            waiting = frozenset(state for state in reached if self._states[state][0] == "take")
            ended = frozenset(self._states[state][1] for state in reached if self._states[state][0] == "end")
            self._closed[key] = waiting, ended
        return self._closed[key]

    def _reach(self, states: Iterable[int], holds: Callable[[int], bool]) -> set[int]:
        """Return all states reachable without consuming a character; `holds` decides states of kind `ask`."""
        reached: set[int] = set()
        waiting = list(states)
        while waiting:
            state = waiting.pop()
            if state not in reached:
                reached.add(state)
                kind, _, further = self._states[state]
                if kind == "split" or (kind == "ask" and holds(state)):
                    waiting += further
        self._spend(len(reached))
        return reached

    def _answer(self, state: int, text: str, position: int, answers: dict[tuple[int, int], bool]) -> bool:
        if (state, position) not in answers:
            answers[state, position] = self._states[state][1](text, position, answers)
        return answers[state, position]

    def _next_states(self, states: frozenset[int], character: str) -> frozenset[int]:
        key = states, character
        if key not in self._transitions:
            if len(self._transitions) + len(self._closed) > MAX_KNOWN:
                for known in (self._transitions, self._closed, self._asks):
                    known.clear()
            self._spend(len(states))
            waiting = (self._states[state] for state in states)
            self._transitions[key] = frozenset(
                further[0] for _, takes, further in waiting if takes.fullmatch(character)
            )
        return self._transitions[key]

    def _add(self, kind: str, by: Any, *further: int) -> int:
        if len(self._states) == MAX_STATES:
            raise self._refuse("is one expression too many")
        self._states.append((kind, by, further))
        return len(self._states) - 1

    def _refuse(self, why: str) -> InputError:
        return InputError(why, culprit=self._name, remedy=REMEDY)

    def _sequence(self, parsed: Parsed, flags: int, after: int) -> int:
        """Add the states of `parsed`, followed by `after`, and return its first state."""
        for operation, argument in reversed(list(parsed)):
            self._parts += 1
            if self._parts > MAX_PARTS:
                raise self._refuse(f"has more than {MAX_PARTS} parts with its repeats written out")
            after = self._part(str(operation), operation, argument, flags, after)
        return after

    def _part(self, name: str, operation: Any, argument: Any, flags: int, after: int) -> int:
        if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            hashable = tuple(argument) if isinstance(argument, list) else argument
            return self._add("take", _alone(operation, hashable, flags), after)
        if name == "AT":
            anchor = _alone(operation, argument, flags)
            return self._add("ask", lambda text, at, _: anchor.match(text, at) is not None, after)
        if name == "BRANCH":
            return self._add("split", None, *(self._sequence(branch, flags, after) for branch in argument[1]))
        if name == "SUBPATTERN":
            _, more, fewer, inner = argument
            inherited = flags & ~_parser.TYPE_FLAGS if more & _parser.TYPE_FLAGS else flags
            return self._sequence(inner, (inherited | more) & ~fewer, after)
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, inner = argument
            return self._repeat(least, most, inner, flags, after)
        if name in ("ASSERT", "ASSERT_NOT"):
            direction, inner = argument
            return self._look(direction, inner, name == "ASSERT", flags, after)
        if name == "FAILURE":
            return self._add("split", None)
        raise self._refuse(f"has a {name.lower().replace('_', ' ')}, which is not supported")

    def _repeat(self, least: int, most: int, inner: Parsed, flags: int, after: int) -> int:
        if most == _parser.MAXREPEAT:
            loop = self._add("split", None)
            self._states[loop] = ("split", None, (self._sequence(inner, flags, loop), after))
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
        self._parts += 1  # repeating nothing also costs work
        return self._sequence(inner, flags, after)

    def _look(self, direction: int, inner: Parsed, wanted: bool, flags: int, after: int) -> int:
        """Add a look-ahead, or a look-behind (direction < 0) of fixed width."""
        least, most = inner.getwidth() if direction < 0 else (0, 0)
        if least != most:
            raise re.error("look-behind requires fixed-width pattern")
        start = frozenset([self._sequence(inner, flags, self._add("end", 0))])

        def look(text: str, at: int, answers: dict[tuple[int, int], bool]) -> bool:
            begin = at - least
            seen = begin >= 0 and bool(self._run(start, text, begin, answers, False))
            return seen is wanted

        return self._add("ask", look, after)


@lru_cache(maxsize=4096)
def _alone(operation: Any, argument: Any, flags: int) -> re.Pattern[str]:
    """Compile one character class or anchor, so that `re` decides whether it matches."""
    state = _parser.State()
    state.flags = flags
    compiled: re.Pattern[str] = _compiler.compile(_parser.SubPattern(state, [(operation, argument)]))
    return compiled
