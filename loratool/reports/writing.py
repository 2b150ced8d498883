"""Write what many documents have: lists of modules in few lines, and command lines that can be pasted."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Iterable, Iterator

from .document import Line, line
from .numbers import number_ranges
from .rows import RowGroup, group_items, make_items

LISTED = 4  # lines of one list


def listed(label: str, names: Collection[str], verbose: bool = False) -> Iterator[Line]:
    """Yield a line a group of modules or tensors, LISTED at most, or with `verbose` a line each."""
    if verbose:
        yield from (line(f"{label}: {name}") for name in names)
        return
    together: dict[str, list[RowGroup[str]]] = {}  # on the same layers
    for group in group_items(make_items(list(names), str, (), lambda _: None)):
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


def told(label: str, texts: Collection[str], verbose: bool = False) -> Iterator[Line]:
    """Yield a line a text, LISTED at most."""
    few = list(texts) if verbose or len(texts) <= LISTED else list(texts)[: LISTED - 1]
    yield from (line(f"{label}: {text}") for text in few)
    if len(few) < len(texts):
        yield line(f"{label}: and {len(texts) - len(few):,} more: -v shows them")


def command_line(*words: str | os.PathLike[str] | Iterable[str]) -> str:
    """Return a whole command line of ours, quoted for a shell."""
    flat = [each for word in words for each in ([os.fspath(word)] if isinstance(word, (str, os.PathLike)) else word)]
    return shlex.join(["loratool", *flat])
