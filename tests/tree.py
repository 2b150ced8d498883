"""Print the package as a tree, each module with the first sentence of its docstring: python tests/tree.py"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "loratool"
SENTENCE = re.compile(r"(?:`[^`]*`|[^`])*?\.(?=\s|$)", re.DOTALL)
COLUMN = 37  # where the sentences begin


def first_sentence(path: Path) -> str:
    """Return the first sentence of a module's docstring, in one line."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    found = SENTENCE.match(text)
    return " ".join((found[0] if found else text).split())


def lines(folder: Path, depth: int = 0) -> Iterator[str]:
    """Give a line to a folder, to each module in it and to all below, modules first."""
    yield entry(f"{folder.name}/", folder / "__init__.py", depth)
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            yield entry(path.name, path, depth + 1)
    for path in sorted(folder.glob("*/__init__.py")):
        yield from lines(path.parent, depth + 1)


def entry(name: str, module: Path, depth: int) -> str:
    return f"{'  ' * depth + name:{COLUMN}s}{first_sentence(module)}".rstrip()


if __name__ == "__main__":
    print("\n".join(lines(PACKAGE)))
