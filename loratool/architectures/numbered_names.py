"""Combine names that differ only in numbers into one name with ranges: `model.layers.{0..31}.mlp.up_proj`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from math import prod

# a number between dots or colons (for kohya also underscores) in a name
_NUMBER = re.compile(r"(?<![^.:])(\d{1,9})(?![^.:])")
_FLAT_NUMBER = re.compile(r"(?<![^._])(\d{1,9})(?![^._])")


def split_numbers(name: str, underscores: bool = False) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Split a name into the texts between its numbers, and the numbers.

    A number is a full part of the name, between dots or colons. With `underscores`, for kohya's flattened names, it may
    also be between underscores.
    """
    number = _FLAT_NUMBER if underscores else _NUMBER
    parts = number.split(name)  # every second part is a number
    return tuple(parts[::2]), tuple(map(int, parts[1::2]))


def last_part(name: str) -> str:
    """Return the last part of a module's or weight's name, which shows its kind: `to_q`.

    For a flattened name, which has no dots, it is the text after the last number.
    """
    flat = "." not in name
    parts = [part.strip("._") for part in split_numbers(name.removesuffix(".weight"), underscores=flat)[0]]
    return next((part for part in reversed(parts) if part), name).rpartition(".")[2]


def with_ranges(parts: tuple[str, ...], numbers: list[tuple[int, ...]]) -> str:
    """Return the name with `parts` and, between them, each column of `numbers` as its one value or as `{0..31}`."""
    texts = [_ranges(sorted(set(column))) for column in zip(*numbers, strict=True)]
    return parts[0] + "".join(text + part for text, part in zip(texts, parts[1:], strict=True))


def grouped(names: Iterable[str], underscores: bool = False) -> Iterator[str]:
    """Yield names with ranges for those that differ only in numbers.

    If a name within the ranges is missing, the names are yielded separately.

    Args:
        underscores: as in `split_numbers`.
    """
    members: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in names:
        parts, numbers = split_numbers(name, underscores)
        members.setdefault(parts, []).append(numbers)
    for parts, numbers_of in members.items():
        is_complete = prod(len(set(column)) for column in zip(*numbers_of, strict=True)) == len(numbers_of)
        yield from (
            [with_ranges(parts, numbers_of)] if is_complete else [with_ranges(parts, [each]) for each in numbers_of]
        )


def _ranges(values: list[int]) -> str:
    """[0, 1, 2, 5] -> {0..2,5}"""
    if len(values) == 1:
        return str(values[0])
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs) + "}"
