"""Change the values of a JSON so that they lie: of another type or size, missing, twice, or in each other's place."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

# In the place of any value
WRONG: tuple[Any, ...] = (
    None, "x", "", 5, 0, 1, -1, 1 << 31, 1 << 62, 1 << 63, 1 << 70, 10**400, math.nan, math.inf, 0.5, -0.0, 1e300, True,
    False, [], {}, [[]], [None], {"": None}, [0] * 50, "x" * 300, "../x", "/etc/passwd", "a\0b", "\x1b[31m", "\ud800",
)  # fmt: skip
NAMES = ("x", "", ".", "..", "../x", "/tmp/x", "a/b", "a\\b", "a\0b", "\x1b[31m", "\ud800", "x" * 300, "CON", "é" * 200)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """List every field of a JSON value, as the keys that lead to it."""
    if path:
        yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from places(inner, (*path, key))


def find(value: Any, path: Sequence[Any]) -> Any:
    for key in path:
        value = value[key]
    return value


def lie(value: Any, rng: random.Random, wrong: Sequence[Any] = WRONG) -> Any:
    """Return a copy of a JSON value with one field missing, of another type or size, another field's, twice, renamed.

    Args:
        wrong: values in the place of any.
    """
    found, every = copy.deepcopy(value), [*places(value)]
    *above, key = rng.choice(every)
    owner = find(found, above)
    match rng.randrange(8):
        case 0:
            del owner[key]
        case 1 if type(owner[key]) in (int, float):
            owner[key] += rng.choice((1, -1, 8, -8, 1 << 20, 1 << 40, -owner[key], -owner[key] - 1))
        case 2:
            owner[key] = copy.deepcopy(find(value, rng.choice(every)))
        case 3 if isinstance(owner, list):
            owner.insert(key, copy.deepcopy(owner[key]))
        case 3:
            owner[str(key) + rng.choice(NAMES)] = copy.deepcopy(owner[key])
        case 4 if isinstance(owner[key], str):
            text = owner[key]
            owner[key] = rng.choice((text.upper(), text[:-1], f"{text}\n", f"../{text}", text * 50, f" {text}"))
        case 5 if isinstance(owner[key], list):
            owner[key] = owner[key] * rng.choice((2, 50)) or [1]
        case 6:
            owner[key] = rng.choice(NAMES)
        case _:
            owner[key] = copy.deepcopy(rng.choice(wrong))
    return found
