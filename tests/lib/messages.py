"""The texts that the package can print: every string of its code, with the places that are filled in when it runs.

The page `troubleshooting` quotes how messages begin. `says` holds such a quote against a text.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from conftest import ROOT

LEAST = 12  # characters of one run of a quote that stand in the code, so that no quote is met by chance

OTHERS = frozenset(("help", "remedy", "flags", "why", "culprit"))  # keywords of texts that open no message

Text = tuple[str, ...]  # the literal parts of a string; between two of them is what is filled in


@cache
def texts() -> frozenset[Text]:
    """Return all strings of the package but docstrings."""
    files = sorted((ROOT / "loratool").rglob("*.py"))
    return frozenset(text for file in files for text in texts_of(file))


def texts_of(file: Path) -> Iterator[Text]:
    """Yield the strings of a module, but docstrings and what is given by a keyword of OTHERS."""
    waiting: list[ast.AST] = [ast.parse(file.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.keyword) and node.arg in OTHERS:
            continue
        if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp) and (parts := _parts(node)) != [""]:
            yield tuple(parts)
        waiting += ast.iter_child_nodes(node)


def _parts(node: ast.AST) -> list[str]:
    """Return the literal parts of an expression; two empty ones, with nothing between them known, of any other."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else ["", ""]
    if isinstance(node, ast.JoinedStr):
        return _joined(map(_parts, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _joined(map(_parts, (node.left, node.right)))
    return ["", ""]


def _joined(pieces: Iterator[list[str]]) -> list[str]:
    parts = [""]
    for first, *others in pieces:
        parts = [*parts[:-1], parts[-1] + first, *others]
    return parts


def is_said(quote: str) -> bool:
    """Return whether a message of the package begins with a quote. "is a ..." may get its "is" elsewhere."""
    return any(says(text, words) for text in texts() for words in (quote, quote.removeprefix("is ")))


def says(text: Text, quote: str) -> bool:
    """Return whether a text begins with a quote: LEAST characters in a run, and half of it, have to be literal.

    A word, as `...`, stands for what is filled in.
    """
    runs = _runs(text, quote)
    return bool(runs) and max(runs) >= LEAST and 2 * sum(runs) >= len(quote.replace("...", ""))


def _runs(text: Text, quote: str) -> list[int]:
    """Return how many characters of each literal part a quote has; none if the text does not begin with it."""
    first, *others = text
    if first.startswith(quote):
        return [len(quote)]
    if not quote.startswith(first):
        return []
    rest = quote[len(first) :]
    ends = range(len(rest.partition(" ")[0]), -1, -1) if others else ()
    later = (_runs(tuple(others), rest[end:]) for end in ends)
    return next(([len(first), *runs] for runs in later if runs), [])
