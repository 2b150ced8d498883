"""The part that reports on several adapters share: the cosines and the interference of each pair."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from textwrap import shorten
from typing import Any

from .parts import quantities as q
from .parts.columns import text_width
from .parts.content import Figure, Heatmap
from .parts.document import Line, TextSpan, line, path
from .parts.numbers import Formatter, correlation, measure, plural, rank, share, spread
from .parts.pictures import triangle
from .parts.quantities import Quantity

Matrix = tuple[tuple[float, ...], ...]

# The least cosine -> what two changes are. From 0.9 on, four fifths of either (0.81 of its energy) is along the other,
# from 0.3 a tenth (0.09); random directions of usual sizes have less than 0.01.
COSINES = {0.9: "alike", 0.3: "related", -0.3: "unrelated", -math.inf: "opposed"}

# Of "unrelated" changes, those that cross: a tenth of the interference of two equal ones (as 0.3 is a tenth of the
# energy), and twice that of random directions, which small matrices and high ranks have without any reason.
CROSSING, LEAST, TIMES_RANDOM = "crossing", 0.1, 2.0

# word -> what it means for a sum
MEANINGS = {
    "alike": "the same delta at two scales; a sum has it twice",
    "related": "they pull the same way; a sum has the shared part twice",
    "opposed": "they pull against each other; a sum has less of both",
    CROSSING: "they use the same directions for different things; a sum mixes them",
    "unrelated": "each has directions of its own; a sum has both deltas unchanged",
}

FIGHTING = ("opposed", CROSSING)


def relation(cosine: float, interference: float, random: float) -> str:
    """Return the word, a key of MEANINGS, for two changes. `random` is the interference of random directions."""
    word = next(word for least, word in COSINES.items() if cosine >= least)
    crosses = word == "unrelated" and interference >= max(LEAST, TIMES_RANDOM * random)
    return CROSSING if crosses else word


@dataclass(frozen=True)
class AdapterPair:
    """Two of several adapters, over all modules; one that an adapter lacks is 0 there.

    Attributes:
        first, second: the adapters, counted from 0 in their order.
        interference: of both (`numerics.overlaps`) over the sum of their singular values: 0 if they share no direction,
            1 if they are equal.
        random_interference: about what it would be if their directions were random.
        relation: a key of MEANINGS.
        inputs, outputs: the share of their energy that reads what the other reads, and that writes what it writes.
    """

    first: int
    second: int
    cosine: float
    interference: float
    random_interference: float
    relation: str
    inputs: float
    outputs: float


@dataclass(frozen=True)
class Shared:
    """The cosines and the interference of T adapters over all modules.

    Attributes:
        cosines: T rows of T; 0 with an adapter without a change.
        interference: of all together; 0 if no two share a direction, 1 for two equal ones, (T - 1)^2 for T.
        random_interference: about what it would be if their directions were random.
    """

    cosines: Matrix
    interference: float
    random_interference: float
    pairs: tuple[AdapterPair, ...]

    @property
    def fighting(self) -> tuple[AdapterPair, ...]:
        return tuple(pair for pair in self.pairs if pair.relation in FIGHTING)


# the fields of PEFT's LoraConfig whose defaults are neither false nor empty
PEFT_DEFAULTS = {
    "bias": "none",
    "init_lora_weights": True,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
}

NAMED = 6  # pairs of one word


def letters(count: int) -> list[str]:
    """Return short names of adapters: A, B, ... Z, AA, AB, ..."""
    names = list(ascii_uppercase)
    for name in names:
        if len(names) >= count:
            break
        names += [name + letter for letter in ascii_uppercase]
    return names[:count]


def sides(names: Sequence[str], texts: Sequence[str]) -> list[Line]:
    """Return a line for each adapter: its letter, its name and its text."""
    width, label = max(map(text_width, names)), len(letters(len(names))[-1])
    return [
        line(f"{letter:<{label}}  ", path(name), f"{' ' * (width + 2 - text_width(name))}{text}")
        for letter, name, text in zip(letters(len(names)), names, texts, strict=True)
    ]


def legend(names: Sequence[str]) -> list[Line]:
    """Return a line for each adapter with its letter. Two adapters need none."""
    short_names = letters(len(names)) if len(names) > 2 else []
    return [line(f"{letter}  ", path(name)) for letter, name in zip(short_names, names, strict=False)]


def holds(ranks: Mapping[int, int], norm: float, norms: Sequence[float | None]) -> str:
    """Return in words an adapter's ranks and delta, or without factors the norms of its other tensors."""
    if not ranks:
        return plural(len(norms) - norms.count(None), "tensor")
    return f"rank {spread(ranks, rank)}, delta {measure(norm)}, {plural(sum(ranks.values()), 'module')}"


def field_lines(fields: Mapping[str, Sequence[Any]]) -> Iterator[Line]:
    """Yield a line for each field of the configs that differs in meaning."""
    for name, values in fields.items():
        meant = [PEFT_DEFAULTS.get(name) if value is None else value for value in values]
        if all(value == meant[0] for value in meant):
            continue
        having: dict[str, list[str]] = {}
        for letter, value in zip(letters(len(values)), values, strict=True):
            text = "nothing" if value is None else shorten(str(value), 40, placeholder=" ...")
            having.setdefault(text, []).append(letter)
        yield line(f"{name}: ", ", ".join(f"{text} in {' '.join(of)}" for text, of in having.items()))


def shared_picture(shared: Shared, verbose: bool) -> list[Line]:
    """Draw the cosines of each pair of three or more adapters, and with `verbose` their interference."""
    names = letters(len(shared.cosines))
    if len(names) < 3:
        return []
    drawn = triangle("cosine of each pair", names, shared.cosines)
    if not verbose:
        return drawn
    pairs = {(pair.second, pair.first): pair.interference for pair in shared.pairs}
    values = [[pairs.get((i, j), 0.0) for j in range(len(names))] for i in range(len(names))]
    return [*drawn, *triangle("interference of each pair, 1 for equal ones", names, values)]


def relations(shared: Shared, verbose: bool) -> Iterator[Line]:
    """Yield a line for each relation: its pairs, their numbers and the meaning. Pairs that fight come first."""
    for word in sorted(MEANINGS, key=lambda word: word not in FIGHTING):
        pairs = [pair for pair in shared.pairs if pair.relation == word]
        if pairs:
            cosines = f"cosine {spread([pair.cosine for pair in pairs], correlation)}"
            numbers = ", ".join([*_named(pairs, shared, verbose), cosines, overlap_words(pairs)])
            yield line(TextSpan(word, "attention" if word in FIGHTING else ""), f": {numbers}: {MEANINGS[word]}")


def _named(pairs: Sequence[AdapterPair], shared: Shared, verbose: bool) -> list[str]:
    """Return the names of pairs as one text. Nothing if there is only one pair."""
    names = letters(len(shared.cosines))
    if len(pairs) == len(shared.pairs):
        return [f"all {len(pairs)} pairs"] if len(pairs) > 1 else []
    shown = pairs if verbose or len(pairs) <= NAMED else pairs[: NAMED - 1]
    more = f" and {len(pairs) - len(shown)} more" if len(shown) < len(pairs) else ""
    return [" ".join(f"{names[pair.first]}-{names[pair.second]}" for pair in shown) + more]


def overlap_words(pairs: Sequence[AdapterPair]) -> str:
    """Return in words what pairs share besides their cosines."""
    interference, random = (
        spread([getattr(pair, name) for pair in pairs], correlation) for name in ("interference", "random_interference")
    )
    inputs, outputs = (spread([getattr(pair, side) for pair in pairs], share) for side in ("inputs", "outputs"))
    return f"interference {interference} (random {random}), shared inputs {inputs}, outputs {outputs}"


def fight(shared: Shared) -> tuple[str, str]:
    """Return whether three or more adapters fight, with the reason."""
    count, of = len(shared.fighting), plural(len(shared.pairs), "pair")
    word, so_many = "they fight" if count else "no fight", f"{count or 'none'} of {of} {'is' if count == 1 else 'are'}"
    interference, random = map(correlation, (shared.interference, shared.random_interference))
    return word, f"{so_many} {' or '.join(FIGHTING)}, interference {interference} (random {random}) in all"


def shared_lines(shared: Shared, verbose: bool) -> Iterator[Line]:
    """Yield the lines of `relations`. For three or more adapters, add whether they fight."""
    yield from relations(shared, verbose)
    if len(shared.cosines) > 2:
        word, why = fight(shared)
        yield line(TextSpan(word, "attention" if shared.fighting else ""), f": {why}")


def shared_heatmaps(shared: Shared) -> tuple[Heatmap, ...]:
    """Return heat maps of the cosines and the interference. Two adapters need none."""
    names = letters(len(shared.cosines))
    if len(names) < 3:
        return ()
    pairs = {(pair.first, pair.second): pair.interference for pair in shared.pairs}
    both = [[pairs.get((min(i, j), max(i, j))) for j in range(len(names))] for i in range(len(names))]
    return (
        of_each_two("cosine of each pair", q.COSINE, shared.cosines, correlation),
        of_each_two("interference of each pair", q.INTERFERENCE, both, measure),
    )


def of_each_two(title: str, cell: Quantity, values: Sequence[Sequence[float | None]], write: Formatter) -> Heatmap:
    """Return the heat map of a number for each pair of adapters."""
    names = letters(len(values))
    return Heatmap(title, "adapter", "adapter", cell, names, names, values, write)


def shared_figures(shared: Shared) -> tuple[Figure, ...]:
    """Return figures: how many pairs fight, and the interference of all."""
    random = measure(shared.random_interference)
    return (
        Figure("fighting", f"{len(shared.fighting):,}", f"of {len(shared.pairs):,} pairs are {' or '.join(FIGHTING)}"),
        Figure("interference", measure(shared.interference), f"in all, {random} for random directions"),
    )
