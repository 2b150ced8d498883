"""The design's table of who may import whom, read off the imports; and the sizes that keep files readable."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "loratool"

# Top to bottom: a module may import any above it. A folder stands for its files.
ORDER = [
    "errors", "denormals", "collector", "expressions", "patterns", "choices", "naming", "fileio", "tensorfile",
    "torchpickle", "torchfile", "torcharchive", "source", "hub", "checkpoint", "sidefiles", "undo_checks", "undo_file",
    "undo_places", "output", "layout", "numerics", "updates", "adapter", "architectures", "formats", "unwritten",
    "placing", "targets", "tied", "wrapping", "heads", "sharing", "inputs", "counting", "outline", "plan", "undo",
    "undo_records", "processes", "runtime", "rewrite", "special", "apply", "pairing", "ranks", "factoring", "draft",
    "joining", "comparing", "converting", "carrying", "relayout", "extraction", "inits", "combining", "initialization",
    "hypotheses", "replaying", "judging", "ops", "pictures", "render", "schemas", "cli", "__main__",
]  # fmt: skip
# `architectures` are literal tables without imports of ours, so whoever needs a table may read it.
EVERYWHERE = {"architectures"}
LAZY_TORCH = [
    "denormals",
    "collector",
    "expressions",
    "patterns",
    "choices",
    "tensorfile",
    "torchpickle",
    "torchfile",
    "torcharchive",
    "source",
    "checkpoint",
    "updates",
    "adapter",
    "architectures",
    "formats",
    "placing",
    "targets",
    "tied",
    "wrapping",
    "heads",
    "sharing",
    "inputs",
    "counting",
    "outline",
    "plan",
    "sidefiles",
    "hub",
    "output",
    "layout",
    "converting",
    "ranks",
    "cli",
]
# What of torch takes the process's default type where none is named.
MAKERS = set("arange as_tensor empty eye full linspace logspace normal ones rand randn tensor zeros".split())
FILES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """The first names of ours that a file imports, anywhere in it."""
    depth = len(path.relative_to(ROOT).parts) - 1
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth + 1:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", [f for f in FILES if room(f) != "__init__"], ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_what_stands_above_it(path: Path) -> None:
    mine = ORDER.index(room(path))
    for name in imports(path) - EVERYWHERE - {room(path)}:
        if path.parts[-2:] != ("cli", "__init__.py"):
            assert ORDER.index(name) < mine, f"{path.name} imports {name}"


@pytest.mark.parametrize(
    "path",
    [f for f in FILES if room(f) in LAZY_TORCH or f.name in ("inspect.py", "count.py")],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_torch_is_imported_only_inside_functions(path: Path) -> None:
    for node in ast.parse(path.read_text()).body:
        names = {alias.name.split(".")[0] for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) else set()
        assert not names & {"torch", "numpy", "safetensors", "numerics"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_tensor_that_is_made_names_its_type(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in MAKERS}:
            assert any(keyword.arg == "dtype" for keyword in node.keywords), ast.unparse(node)


def test_only_render_knows_rich() -> None:
    assert {room(f) for f in FILES if "from rich" in f.read_text()} == {"render"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 900  # a file is as long as its subject, and a subject is no novel
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert length <= 50, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_the_library_exports_what_it_lists() -> None:
    import loratool

    assert all(getattr(loratool, name) is not None for name in loratool.__all__)
    with pytest.raises(AttributeError):
        _ = loratool.absent  # type: ignore[attr-defined]
