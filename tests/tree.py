"""Print the package as a tree, each module with the first sentence of its docstring: python tests/tree.py

The guide `architecture` has it; `python tests/tree.py --write` puts it there, and a test compares.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "loratool"
GUIDE = PACKAGE / "guides" / "architecture.md"
FENCED = re.compile(r"```text\nloratool/\n.*?```", re.DOTALL)
# In which order the folders stand, which is that of the import rule.
FOLDERS = (
    "durable numerics architectures files adapters binding undo views reports streaming transform ops commands "
    "cli guides"
).split()
SENTENCE = re.compile(r"(?:`[^`]*`|[^`])*?\.(?=\s|$)", re.DOTALL)
COLUMN = 37  # where the sentences begin


def first_sentence(path: Path) -> str:
    """Return the first sentence of a module's docstring, in one line."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    found = SENTENCE.match(text)
    return " ".join((found[0] if found else text).split())


def lines(folder: Path, depth: int) -> Iterator[str]:
    """Give a line to each module and folder below one, files first and in the order of the import rule."""
    files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    if depth == 1:
        files.insert(0, folder / "__init__.py")
    for path in files:
        yield entry(path.name, first_sentence(path), depth)
    folders = [path for path in folder.iterdir() if (path / "__init__.py").is_file()]
    for path in sorted(folders, key=lambda path: (FOLDERS.index(path.name) if depth == 1 else 0, path.name)):
        yield entry(f"{path.name}/", first_sentence(path / "__init__.py"), depth)
        yield from lines(path, depth + 1)


def entry(name: str, sentence: str, depth: int) -> str:
    return f"{'  ' * depth + name:{COLUMN}s}{sentence}".rstrip()


def tree() -> str:
    """Return the whole tree as the guide has it, fences included."""
    rest = [entry("guides/*.md", "User guides, shown by `loratool guide [TOPIC]`.", 1)]
    return "\n".join(["```text", "loratool/", *lines(PACKAGE, 1), *rest, "```"])


if __name__ == "__main__":
    if "--write" in sys.argv:
        GUIDE.write_text(FENCED.sub(lambda _: tree(), GUIDE.read_text()))
    else:
        print(tree())
