"""Say what adapters share: a letter and a line for each, the heat map of their cosines, and which of them fight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from string import ascii_uppercase
from textwrap import shorten
from typing import Any

from ...reports.columns import text_width
from ...reports.document import Line, Toned, line, path
from ...reports.numbers import correlation, measure, plural, rank, share, spread
from ...reports.pictures import triangle
from .configs import PEFT_DEFAULTS
from .shared import FIGHTING, MEANINGS, AdapterPair, Shared

NAMED = 6  # pairs of one word


def letters(count: int) -> list[str]:
    """Return what adapters are called: A, B, ... Z, AA, AB, ..."""
    found = list(ascii_uppercase)
    for one in found:
        if len(found) >= count:
            break
        found += [one + two for two in ascii_uppercase]
    return found[:count]


def sides(names: Sequence[str], said: Sequence[str]) -> list[Line]:
    """Return a line an adapter: its letter, its name, and what is said of it."""
    width, label = max(map(text_width, names)), len(letters(len(names))[-1])
    return [
        line(f"{letter:<{label}}  ", path(name), f"{' ' * (width + 2 - text_width(name))}{text}")
        for letter, name, text in zip(letters(len(names)), names, said, strict=True)
    ]


def legend(names: Sequence[str]) -> list[Line]:
    """Return a line an adapter: the letter that it has where something is said of each two; none if there are two."""
    said = letters(len(names)) if len(names) > 2 else []
    return [line(f"{letter}  ", path(name)) for letter, name in zip(said, names, strict=False)]


def holds(ranks: Mapping[int, int], norm: float, norms: Sequence[float | None]) -> str:
    """Say an adapter's ranks and delta, of which it has none without factors; `norms` are of its other tensors."""
    if not ranks:
        return plural(len(norms) - norms.count(None), "tensor")
    return f"rank {spread(ranks, rank)}, delta {measure(norm)}, {plural(sum(ranks.values()), 'module')}"


def field_lines(fields: Mapping[str, Sequence[Any]]) -> Iterator[Line]:
    """Yield a line a field of the configs that means something else in one adapter than in another."""
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
    """Draw the cosines of each two of three or more adapters, and with `verbose` their interference."""
    names = letters(len(shared.cosines))
    if len(names) < 3:
        return []
    drawn = triangle("cosine of each two", names, shared.cosines)
    if not verbose:
        return drawn
    pairs = {(pair.second, pair.first): pair.interference for pair in shared.pairs}
    values = [[pairs.get((i, j), 0.0) for j in range(len(names))] for i in range(len(names))]
    return [*drawn, *triangle("interference of each two, 1 as of equal ones", names, values)]


def relations(shared: Shared, verbose: bool) -> Iterator[Line]:
    """Yield a line a word: the pairs that it is said of, their numbers, and what it means; those that fight first."""
    for word in sorted(MEANINGS, key=lambda word: word not in FIGHTING):
        pairs = [pair for pair in shared.pairs if pair.relation == word]
        if pairs:
            cosines = f"cosine {spread([pair.cosine for pair in pairs], correlation)}"
            said = ", ".join([*_named(pairs, shared, verbose), cosines, overlap_words(pairs)])
            yield line(Toned(word, "attention" if word in FIGHTING else ""), f": {said}: {MEANINGS[word]}")


def _named(pairs: Sequence[AdapterPair], shared: Shared, verbose: bool) -> list[str]:
    """Return the names of pairs as one text, and nothing for the only one."""
    names = letters(len(shared.cosines))
    if len(pairs) == len(shared.pairs):
        return [f"all {len(pairs)} pairs"] if len(pairs) > 1 else []
    shown = pairs if verbose or len(pairs) <= NAMED else pairs[: NAMED - 1]
    more = f" and {len(pairs) - len(shown)} more" if len(shown) < len(pairs) else ""
    return [" ".join(f"{names[pair.first]}-{names[pair.second]}" for pair in shown) + more]


def overlap_words(pairs: Sequence[AdapterPair]) -> str:
    """Write what pairs share beside their cosines."""
    found, random = (
        spread([getattr(pair, name) for pair in pairs], correlation) for name in ("interference", "random_interference")
    )
    inputs, outputs = (spread([getattr(pair, side) for pair in pairs], share) for side in ("inputs", "outputs"))
    return f"interference {found} (random {random}), shared inputs {inputs}, outputs {outputs}"


def fight(shared: Shared) -> tuple[str, str]:
    """Return whether three or more adapters fight, and why."""
    count, of = len(shared.fighting), plural(len(shared.pairs), "pair")
    word, so_many = "they fight" if count else "no fight", f"{count or 'none'} of {of} {'is' if count == 1 else 'are'}"
    found, random = map(correlation, (shared.interference, shared.random_interference))
    return word, f"{so_many} {' or '.join(FIGHTING)}, interference {found} (random {random}) in all"


def shared_lines(shared: Shared, verbose: bool) -> Iterator[Line]:
    """Yield the lines of `relations`, and of three or more adapters whether they fight."""
    yield from relations(shared, verbose)
    if len(shared.cosines) > 2:
        word, why = fight(shared)
        yield line(Toned(word, "attention" if shared.fighting else ""), f": {why}")
