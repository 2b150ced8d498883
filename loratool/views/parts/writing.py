"""Lines that many documents have: short lists of modules, and command lines that can be pasted."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from ...binding.modules.module_weights import by_name, spell_weight
from ...errors import shell_word, without_credentials
from ...files.folder.side_files import LeftBehind
from .document import Line, TextSpan, line, path
from .numbers import nbytes, number_ranges, quantity
from .places import natural_order
from .rows import RowGroup, group_items, make_items

LISTED = 4  # lines of one list


class Written(Protocol):
    """The fields that a report on a written output has."""

    @property
    def out(self) -> str: ...

    @property
    def dry_run(self) -> bool: ...

    @property
    def exists(self) -> bool: ...


class WrittenAdapter(Written, Protocol):
    """The fields that a report on a written adapter has."""

    @property
    def parameters(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


def listed(label: str, names: Collection[str], verbose: bool = False) -> Iterator[Line]:
    """Yield a line for each group of modules or tensors, at most LISTED, or with `verbose` a line for each name."""
    if verbose:
        yield from (line(f"{label}: {name}") for name in sorted(names, key=natural_order))
        return
    rows, together = list(names), dict[str, list[RowGroup[str]]]()  # by their layers
    for group in group_items(make_items(rows, rows, (), lambda _: None)):
        layers = number_ranges(each.place.layer for each in group.members if each.place.layer is not None)
        together.setdefault(layers or group.name, []).append(group)
    counts = {layers: sum(len(group.members) for group in groups) for layers, groups in together.items()}
    shown = list(together)[: LISTED if len(together) <= LISTED else LISTED - 1]
    for layers in shown:
        groups, count = together[layers], counts[layers]
        if count == 1:
            yield line(f"{label}: {groups[0].members[0].name}")
            continue
        where = f", layers {layers}" if layers != groups[0].name else ""
        yield line(f"{label}: {', '.join(group.name for group in groups)}{where} ({count:,})")
    if len(shown) < len(together):
        rest = sum(counts[layers] for layers in together if layers not in shown)
        yield line(f"{label}: and {rest:,} more: -v shows them")


def labelled(label: str, texts: Collection[str], verbose: bool = False, style: str = "") -> Iterator[Line]:
    """Yield a line for each text, at most LISTED. `style` is that of the label."""
    few = list(texts) if verbose or len(texts) <= LISTED else list(texts)[: LISTED - 1]
    yield from (line(TextSpan(f"{label}: ", style), text) for text in few)
    if len(few) < len(texts):
        yield line(TextSpan(f"{label}: ", style), f"and {len(texts) - len(few):,} more: -v shows them")


def command_line(*words: str | os.PathLike[str] | Iterable[str]) -> str:
    """Return a full command line of loratool, quoted for a shell, on one line."""
    flat = [each for word in words for each in ([os.fspath(word)] if isinstance(word, (str, os.PathLike)) else word)]
    return " ".join(shell_word(without_credentials(word)) for word in ("loratool", *flat))


def not_copied(left: Collection[LeftBehind], verbose: bool) -> Iterator[Line]:
    """Yield the files that were not copied, the largest first. Files with the same reason share a line."""
    reasons: dict[str, list[LeftBehind]] = {}
    for file in sorted(left, key=lambda file: -(file.nbytes or 0)):
        reasons.setdefault("" if verbose else file.reason, []).append(file)
    texts = []
    for file, *more in reasons.values():
        if verbose:
            texts += [f"{_named(each)}: {each.reason}" for each in (file, *more)]
        else:
            texts.append(f"{_named(file)}{f' and {len(more):,} more' if more else ''}: {file.reason}")
    yield from labelled("not copied", texts, verbose)


def _named(left: LeftBehind) -> str:
    return left.name + ("" if left.nbytes is None else f" ({nbytes(left.nbytes)})")


def weighted(name: str, weight: float, components: Mapping[str, float]) -> Line:
    """Return an adapter after its sign and weight: ` + 0.7 style`, ` - style`, ` + 0.8,te=0.4 style`."""
    sign = " - " if weight < 0 and not components else " + "
    spelled = spell_weight(abs(weight) if sign == " - " else weight, by_name(components))
    return line(sign, "" if spelled == "1" else f"{spelled} ", path(name))


def dry_run_mark(report: Written) -> str:
    """Return the end of a subject in a dry run."""
    exists = f"; {report.out} exists: --force replaces it" if report.exists else ""
    return f" (dry run, nothing is written{exists})" if report.dry_run else ""


def outcome(out: str, dry_run: bool, size: str) -> Line:
    """Return the line on the output that was written, or would be."""
    return line("would write " if dry_run else "wrote ", path(out), f"  {size}")


_COUNTED = re.compile(r"# (weight|ulp)s\b")
_RANGE = re.compile(r"(\.\.\S+ (?:weight|ulp))\b")
_NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:e[-+]?\d+)?")  # as `numbers` writes them: 174,001


def without_numbers(text: str) -> str:
    """Return a text with # for its numbers, and with counted nouns in the singular."""
    return _COUNTED.sub(r"# \1", _NUMBER.sub("#", text))


def one_text(texts: Collection[str]) -> str:
    """Return texts that differ only in numbers as one, with ranges: `1..3 weights altered, by up to 64..656 ulps`."""
    numbers = [_NUMBER.findall(text) for text in texts]
    ranges = iter([spread_words(column) for column in zip(*numbers, strict=True)])
    return _RANGE.sub(r"\1s", _NUMBER.sub(lambda _: next(ranges), next(iter(texts))))


def spread_words(numbers: Sequence[str]) -> str:
    """Return the range of numbers, with the spelling that they have."""
    low, high = (end(numbers, key=lambda number: float(number.replace(",", ""))) for end in (min, max))
    return low if low == high else f"{low}..{high}"


def digest_line(digest: str | None) -> Iterator[Line]:
    """Yield the line with a digest, if there is one."""
    if digest is not None:
        yield line(f"digest: sha256:{digest}")


def wrote_adapter(report: WrittenAdapter, former: int | None = None) -> Line:
    """Return the line on the adapter that was written, or would be. `former` is the size of its source."""
    was = f" (was {nbytes(former)})" if former else ""
    return outcome(
        report.out, report.dry_run, f"{quantity(report.parameters)} parameters, {nbytes(report.nbytes)}{was}"
    )
