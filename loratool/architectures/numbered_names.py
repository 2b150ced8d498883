"""Names that differ only in numbers, as one: `model.layers.{0..31}.mlp.up_proj`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from math import prod

# a part of a name, between dots or colons (kohya's: underscores too), that is a number
_NUMBER = re.compile(r"(?<![^.:])\d{1,9}(?![^.:])")


_FLAT_NUMBER = re.compile(r"(?<![^._])\d{1,9}(?![^._])")


def split_numbers(name: str, underscores: bool = False) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The parts between a name's numbers, and the numbers."""
    number = _FLAT_NUMBER if underscores else _NUMBER
    return tuple(number.split(name)), tuple(int(part) for part in number.findall(name))


def last_part(name: str) -> str:
    """The end of a name that tells its kind: `to_q`; of a flattened one, what stands behind its last number."""
    flat = "." not in name
    parts = [part.strip("._") for part in split_numbers(name.removesuffix(".weight"), underscores=flat)[0]]
    return next((part for part in reversed(parts) if part), name).rpartition(".")[2]


def with_ranges(parts: tuple[str, ...], numbers: list[tuple[int, ...]]) -> str:
    """Between the parts of a name its only number, or `{0..31}` and the like."""
    texts = [_ranges(sorted(set(column))) for column in zip(*numbers, strict=True)]
    return parts[0] + "".join(text + part for text, part in zip(texts, parts[1:], strict=True))


def grouped(names: Iterable[str]) -> Iterator[str]:
    """Those that differ only in numbers as one, where all that the ranges say are there."""
    members: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in names:
        parts, numbers = split_numbers(name)
        members.setdefault(parts, []).append(numbers)
    for parts, found in members.items():
        whole = prod(len(set(column)) for column in zip(*found, strict=True)) == len(found)
        yield from [with_ranges(parts, found)] if whole else [with_ranges(parts, [each]) for each in found]


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
