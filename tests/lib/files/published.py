"""Names and shapes of published files, written as templates: `h.{0..3}.{q,k}_proj.weight` stands for eight names."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

Spec = tuple[str, tuple[int, ...]]  # a safetensors dtype (BF16), a shape

BRACES = re.compile(r"\{([^{}]*)\}")
NUMBER = re.compile(r"(?<=[._])(?:0|[1-9]\d*)(?=[._]|$)")


def expand(template: str) -> list[str]:
    """Return the names of a template, the last braces changing first."""
    literals, choices = BRACES.split(template)[::2], BRACES.split(template)[1::2]
    return [
        "".join(itertools.chain(*itertools.zip_longest(literals, picked, fillvalue="")))
        for picked in itertools.product(*map(_choices, choices))
    ]


def _choices(text: str) -> list[str]:
    made = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        made += [str(i) for i in range(int(first), int(last) + 1)] if dots else [part]
    return made


def tensors_of(templates: Mapping[str, tuple[str, list[int]]]) -> dict[str, Spec]:
    """Return all tensors of a row."""
    made: dict[str, Spec] = {}
    for template, (dtype, shape) in templates.items():
        for name in expand(template):
            assert name not in made, f"{name} is in two templates"
            made[name] = (dtype, tuple(shape))
    return made


def shorten(tensors: Mapping[str, Spec]) -> dict[str, Spec]:
    """Return few templates that stand for these tensors: how a row of `fixtures/published` is made."""
    by_spec: dict[Spec, list[str]] = defaultdict(list)
    for name, spec in tensors.items():
        by_spec[spec].append(name)
    return {template: spec for spec, names in by_spec.items() for template in _templates(names)}


def _templates(names: Iterable[str]) -> list[str]:
    """Join names that differ in numbers alone, then those that differ in one part between dots."""
    numbers: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for name in names:
        numbers[NUMBER.sub("\0", name)].append(tuple(map(int, NUMBER.findall(name))))
    joined = [_filled(pattern, ranges) for pattern, every in numbers.items() for ranges in _boxes(every)]
    while True:
        similar: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for template in joined:
            parts = template.split("..")  # the dots of a range are no ends of parts
            parts = "\1".join(parts).split(".")
            for i in range(len(parts)):
                similar[(*parts[:i], "\0", *parts[i + 1 :])].append(parts[i])
        key, parts = max(similar.items(), key=lambda item: len(item[1]))
        if len(parts) < 2:
            return joined
        whole = [".".join(part if each == "\0" else each for each in key).replace("\1", "..") for part in parts]
        bare = [part.removeprefix("{").removesuffix("}") if BRACES.fullmatch(part) else part for part in parts]
        if any("{" in part for part in bare):
            return joined
        both = ",".join(bare)
        joined = [each for each in joined if each not in whole]
        joined.append(".".join(f"{{{both}}}" if each == "\0" else each for each in key).replace("\1", ".."))


def _boxes(every: list[tuple[int, ...]]) -> list[list[list[int]]]:
    """Return products of numbers that together are these tuples."""
    sets = [sorted({each[i] for each in every}) for i in range(len(every[0]))]
    count = 1
    for numbers in sets:
        count *= len(numbers)
    if count == len(every):
        return [sets]
    alike: dict[tuple[tuple[int, ...], ...], list[int]] = defaultdict(list)
    for first in sets[0]:
        alike[tuple(sorted(each[1:] for each in every if each[0] == first))].append(first)
    return [[firsts, *rest] for others, firsts in alike.items() for rest in _boxes([*others])]


def _filled(pattern: str, ranges: list[list[int]]) -> str:
    parts = pattern.split("\0")
    return "".join(itertools.chain(*itertools.zip_longest(parts, map(_range, ranges), fillvalue="")))


def _range(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"
