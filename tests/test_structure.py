"""Hold the layout of the package: who may import whom, what stays light to start, and how modules speak.

Every rule is a function from a package's folder to the lines that break it, so that each is tried on a package made to
break it. The import rule is in the guide `architecture`.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
from conftest import FIXTURES, ROOT

import loratool

PACKAGE = ROOT / "loratool"
# A folder imports itself and what stands to its left; those of one group do not import each other.
ORDER = (
    ("errors",),
    ("durable", "numerics", "architectures"),
    ("files",),
    ("adapters",),
    ("binding",),
    ("patches",),
    ("undo", "views"),
    ("streaming", "transform"),
    ("commands",),
    ("live", "cli"),
)
# The same inside a room, by its folders and files; "*" are all that are not named
INNER: dict[str, tuple[tuple[str, ...], ...]] = {
    "files": (
        ("dtypes", "layer_numbers"),
        ("weights_file",),
        ("containers", "digest"),
        ("codecs", "folder"),
        ("states", "stores", "tensor_ref"),
        ("hub",),
        ("checkpoint", "imatrix_file"),
        ("relaid", "repeated_layers", "tensor_compare"),
        ("gguf_model", "output"),
    ),
    "binding": (("modules",), ("names",), ("ties",), ("weights",), ("merge",)),
    "views": (("parts",), ("page",), ("*",), ("issues",)),
    "commands": (
        ("arguments", "choices", "machine", "collector", "guide"),
        ("adapter_requests", "calls", "namings"),
        ("digests", "inputs", "report_files", "respell", "statements", "to_store"),
        ("cards", "in_place", "merged_models", "predictions"),
        ("opened",),
        ("merge", "unmerge", "verify", "inspect", "count", "convert", "demo", "env", "patch", "apply"),
        ("diff", "resize", "extract", "init", "recover", "saved"),
        ("combine",),
        ("run",),
        ("attest",),
    ),
}
FACES = ("", "__main__")  # the library's and `python -m`'s: they load commands on first use
MAX_ROOMS, MAX_ARROWS = 15, 82
# What starts without torch, numpy and our numerics: modules and folders, and those in them that may not.
LIGHT = (
    "errors durable numerics.spectrum architectures files binding adapters.adapter adapters.updates "
    "adapters.patterns adapters.expressions adapters.formats transform.rank_rules transform.base commands.arguments "
    "commands.choices commands.namings commands.inputs commands.opened commands.guide commands.count "
    "commands.inspect.command commands.report_files commands.calls commands.adapter_requests "
    "commands.convert.command views cli "
    + " ".join(f"commands.{each}.call" for each in "merge unmerge verify extract init resize combine convert".split())
    + " commands.diff.call commands.inspect.call commands.run.call commands.demo.call commands.env.call"
).split()
HEAVY = (
    "binding.weights.candidates files.tensor_compare files.codecs.packing files.codecs.compressed_quantizer "
    "files.codecs.fp8_fresh files.codecs.gguf_blocks files.codecs.gguf_quantizer files.codecs.gguf_codebooks "
    "files.hub.download files.hub.upload"
).split()
HEAVY_PACKAGES = {"torch", "numpy", "safetensors", "huggingface_hub"}
# They read files of this machine alone: of the package, the cache, journals, models in place
READERS_OF_PATHS = (
    "durable files.hub.snapshots files.stores.outgoing views.page.render commands.guide "
    "commands.demo commands.env commands.in_place commands.unmerge.in_place"
).split()
# Packages that hold more than a docstring: tables and faces.
FULL_PACKAGES = (
    "",
    "adapters.formats",
    "adapters.updates",
    "architectures.families",
    "architectures.gguf",
    "files.codecs",
    "cli",
    "cli.render",
    "cli.schemas",
    "live",
)
# Where files are changed: everywhere else a call to the system for that is a stray
WRITERS = ("durable.disk",)
OS_WRITES = {
    *(f"os.{name}" for name in "replace rename renames remove makedirs ftruncate fsync fdatasync write pwrite".split()),
    *(f"os.{name}" for name in "copy_file_range sendfile utime chmod symlink removedirs posix_fallocate".split()),
    *(f"shutil.{name}" for name in "copy copy2 copyfile copyfileobj copytree move rmtree".split()),
    *(f"tempfile.{name}" for name in "TemporaryFile NamedTemporaryFile TemporaryDirectory mkdtemp mkstemp".split()),
}
PATH_WRITES = set("write_bytes unlink rmdir mkdir touch symlink_to hardlink_to link_to".split())
# What of torch takes the process's default type where none is named.
MAKERS = set("arange as_tensor empty eye full linspace logspace normal ones rand randn tensor zeros".split())


def name_of(path: Path, package: Path) -> str:
    """The dotted name of a module below the package, empty for its face."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules(package: Path) -> dict[str, ast.Module]:
    return {name_of(path, package): ast.parse(path.read_text()) for path in sorted(package.rglob("*.py"))}


@cache
def nodes(tree: ast.AST) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree))


def is_package(package: Path, name: str) -> bool:
    return (package / name.replace(".", "/") / "__init__.py").is_file()


def imports_of(package: Path, name: str, tree: ast.AST) -> Iterator[str]:
    """The modules of ours that one imports anywhere in it, as dotted names below the package."""
    here = [part for part in name.split(".") if part]
    here = here if is_package(package, name) else here[:-1]
    for node in nodes(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*here[: len(here) - node.level + 1], *(node.module or "").split(".")]
            target = ".".join(part for part in base if part)
            for alias in node.names:
                inner = f"{target}.{alias.name}".strip(".")
                yield inner if inner in modules(package) else target


@cache
def arrows(package: Path) -> dict[str, set[str]]:
    """Which module imports which, itself left out."""
    return {name: set(imports_of(package, name, tree)) - {name} for name, tree in modules(package).items()}


def room(name: str) -> str:
    return name.split(".")[0]


def wrong_turns(package: Path, parts: Mapping[str, str], order: tuple[tuple[str, ...], ...]) -> list[str]:
    """Imports that go to the right, or to another of the same group."""
    rank = {each: i for i, group in enumerate(order) for each in group}
    found = []
    for name, targets in arrows(package).items():
        for target in targets:
            mine, theirs = parts.get(name), parts.get(target)
            if name not in FACES and mine and theirs and mine != theirs and not rank[theirs] < rank[mine]:
                found.append(f"{name} imports {target}")
    return found


def folder_breaches(package: Path) -> list[str]:
    known = {each for group in ORDER for each in group}
    strays = [name for name in modules(package) if name not in FACES and room(name) not in known]
    return [f"{name} is in no room" for name in strays] or wrong_turns(
        package, {name: room(name) for name in modules(package)}, ORDER
    )


def inner_breaches(package: Path) -> list[str]:
    found = []
    for place, order in INNER.items():
        known = {each for group in order for each in group}
        parts = {name: name.split(".")[1] for name in modules(package) if name.startswith(f"{place}.")}
        strays = [name for name, part in parts.items() if part not in known and "*" not in known]
        found += [f"{name} has no place in {place}" for name in strays]
        inside = {name: part if part in known else "*" for name, part in parts.items() if name not in strays}
        found += wrong_turns(package, inside, order)
    return found


def circles(package: Path) -> list[str]:
    """Modules that import each other in a circle, inner imports counted; by a depth-first search."""
    graph = {name: targets for name, targets in arrows(package).items() if name not in FACES}
    state: dict[str, int] = {}
    found: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        state[name] = 1
        for target in sorted(graph.get(name, ())):
            if state.get(target) == 1:
                found.append(" -> ".join((*path[path.index(target) :], target)))
            elif target not in state and target in graph:
                visit(target, (*path, target))
        state[name] = 2

    for name in graph:
        if name not in state:
            visit(name, (name,))
    return found


def size_breaches(package: Path) -> list[str]:
    """The rooms at the top and the arrows between them, where they are more than one can have in mind."""
    rooms = {room(name) for name in modules(package) if name not in FACES}
    inside = {a: targets for a, targets in arrows(package).items() if a not in FACES}
    between = {(room(a), room(b)) for a, targets in inside.items() for b in targets if b not in FACES}
    between = {(a, b) for a, b in between if a != b}
    figures = f"{len(rooms)} rooms, {len(between)} arrows between them"
    return [figures] if len(rooms) > MAX_ROOMS or len(between) > MAX_ARROWS else []


def starts_with(name: str, prefixes: tuple[str, ...] | list[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def heavy_starts(package: Path) -> list[str]:
    """Light modules that import torch, numpy or our numerics where they begin."""
    found = []
    for name, tree in modules(package).items():
        if not starts_with(name, LIGHT) or starts_with(name, HEAVY):
            continue
        for node in tree.body:
            names = {alias.name.split(".")[0] for alias in node.names} if isinstance(node, ast.Import) else set()
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = {(node.module or "").split(".")[0]}
            ours = imports_of(package, name, ast.Module([node], []))
            numeric = any(room(target) == "numerics" and not starts_with(target, LIGHT) for target in ours)
            if names & HEAVY_PACKAGES or (numeric and isinstance(node, ast.ImportFrom)):
                found.append(f"{name} starts with {ast.unparse(node)}")
    return found


def terminal_breaches(package: Path) -> list[str]:
    """Modules that know rich outside of cli.render, or click outside of cli."""
    found = []
    for name, tree in modules(package).items():
        for node in nodes(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for library, home in (("rich", "cli.render"), ("click", "cli")):
                if any(each.split(".")[0] == library for each in names) and not starts_with(name, [home]):
                    found.append(f"{name} imports {library}")
    return found


def stray_writes(package: Path) -> list[str]:
    """Calls that change files, outside of durable.disk, where the tests can not make them fail."""
    found = []
    for name, tree in modules(package).items():
        calls = [node for node in nodes(tree) if isinstance(node, ast.Call)]
        if name in WRITERS:
            continue
        for node in calls:
            what, mode = ast.unparse(node.func), [arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)]
            opens = what == "open" and mode and set("wax+") & set(str(mode[0])) and "devnull" not in ast.unparse(node)
            if opens or what in OS_WRITES or (what.rpartition(".")[2] in PATH_WRITES and not what.startswith("disk.")):
                found.append(f"{name}: {ast.unparse(node)}")
    return found


def stray_reads(package: Path) -> list[str]:
    """Calls that read a path as it is, so that they would find nothing in what stands in for an object of a store."""
    return [
        f"{name}: {ast.unparse(node)}"
        for name, tree in modules(package).items()
        for node in nodes(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (node.func.attr in ("read_bytes", "read_text") or ast.unparse(node.func) == "filecmp.cmp")
        and not starts_with(name, READERS_OF_PATHS)
        and not (name == "files.weights_file" or node.args[1:])  # the method of a weights file has arguments
    ]


def full_packages(package: Path) -> list[str]:
    """Packages whose `__init__` is more than a docstring, so that importing a part loads the others."""
    found = []
    for name, tree in modules(package).items():
        if is_package(package, name) and name not in FULL_PACKAGES and len(tree.body) > 1:
            found.append(f"{name}/__init__.py holds more than a docstring")
    return found


def untyped_tensors(package: Path) -> list[str]:
    return [
        f"{name}: {ast.unparse(node)}"
        for name, tree in modules(package).items()
        for node in nodes(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in {f"torch.{maker}" for maker in MAKERS}
        and all(keyword.arg != "dtype" for keyword in node.keywords)
    ]


def silent_modules(package: Path) -> list[str]:
    return [
        f"{name or 'package'} has no docstring"
        for name, tree in modules(package).items()
        if not ast.get_docstring(tree)
    ]


# Verbs that say neither what a function does nor what a class is, where a docstring begins.
FORCED_OPENING = re.compile(r"(Say|Tell|Let|Give|Be|Know)\b")
# Words that a public name does not have, with those that it has instead; the glossary is in CONTRIBUTING.
BANNED_WORDS = {
    "anew": "again",
    "convention": "spelling",
    "crossed": "transposed",
    "dropped": "excluded",
    "flaw": "issue",
    "lacks": "missing",
    "lost": "losses, unsupported or excluded",
    "odd": "extra",
    "remark": "issue",
    "said": "name or path",
    "settled": "resolved",
    "special": "non-additive",
    "subject": "target model",
    "told": "name or path",
    "tone": "style",
    "toned": "text span",
    "turned": "transposed",
    "unwritten": "virtual",
    "wish": "request",
}
# Public names that still have one, and those that a report's class has for good; the list may only shrink.
BANNED_LEFT = set(
    """
    transform.numbers.Settled
    views.diff_adapters.said_no views.diff_models.said_no views.diff_several.said_no
    views.attestation.said_no views.inspect_files.said_no views.inspect_runtime.said_no
    views.parts.report.said_no views.run.said_no views.verify.said_no
    """.split()
)
# References to what is not in the repository.
OUTSIDE = re.compile(r"\bTrap \d+|formats\.md|design\.md|shared/")
# Backquoted `a.b` whose a is none of these is dead: what is not ours is one of EXTERNAL, of ours a module or a class.
REFERENCE = re.compile(r"`([A-Za-z_][\w]*(?:\.[A-Za-z_]\w*)+)(?:\(\))?`")
EXTERNAL = set(
    """torch numpy safetensors peft transformers diffusers click rich os json zipfile pickle loralib lycoris np self gc
    huggingface_hub nn pytorch_utils product mlp""".split()
)
FILE_ENDINGS = (
    ".py",
    ".json",
    ".safetensors",
    ".bin",
    ".md",
    ".pt",
    ".ckpt",
    ".undo",
    ".rs",
    ".c",
    ".cpp",
    ".weight",
    ".bias",
)


def documented(tree: ast.Module) -> Iterator[tuple[str, ast.AST, str]]:
    """Every docstring with the name of what it is of, empty for the module."""
    for node in nodes(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "name", ""), node, text


def forced_openings(package: Path) -> list[str]:
    return [
        f"{name}.{what}: {text[:50]}"
        for name, tree in modules(package).items()
        for what, _, text in documented(tree)
        if FORCED_OPENING.match(text)
    ]


def public_names(tree: ast.AST) -> Iterator[str]:
    """The names of public classes and functions, and of the arguments of these."""
    for node in nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name
            if isinstance(node, ast.FunctionDef):
                every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                yield from (argument.arg for argument in every)


def banned_words(package: Path) -> list[str]:
    """Public names with a word for which the glossary has another."""
    return [
        f"{name}.{public}: {word}, use {BANNED_WORDS[word]}"
        for name, tree in modules(package).items()
        for public in public_names(tree)
        if f"{name}.{public}" not in BANNED_LEFT
        for word in map(str.lower, re.findall(r"[A-Z]?[a-z]+|[A-Z]+", public))
        if word in BANNED_WORDS
    ]


def dead_references(package: Path) -> list[str]:
    """Names in docstrings and comments of what is in no module, or of files that are not in the repository."""
    known: set[str] = set(EXTERNAL)
    for name, tree in modules(package).items():
        parts = name.split(".")
        known |= {".".join(parts[i:]) for i in range(len(parts))} | set(parts)
        known |= {node.name for node in nodes(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    defined = {name: names_in(tree) for name, tree in modules(package).items()}
    found = []
    for name in modules(package):
        path = package / (name.replace(".", "/") + ".py")
        text = (path if path.is_file() else package / name.replace(".", "/") / "__init__.py").read_text()
        found += [f"{name}: {match[0]}" for match in OUTSIDE.finditer(text)]
        for match in REFERENCE.finditer(text):
            head, _, last = match[1].rpartition(".")
            homes = [names for each, names in defined.items() if each == head or each.endswith(f".{head}")]
            if match[1] in known or match[1].endswith(FILE_ENDINGS) or head.split(".")[0] in EXTERNAL:
                continue
            if (homes and not any(last in names for names in homes)) or (not homes and head not in known):
                found.append(f"{name}: `{match[1]}` is nowhere")
    return found


def names_in(tree: ast.Module) -> set[str]:
    """What a module defines or imports at its top, as names."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found |= {alias.asname or alias.name for alias in node.names}
        else:
            found |= {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    return found


MAX_PARAMETERS = 8
# A command's function keeps its keyword arguments, which are its documentation; the others may only shrink.
WIDE = {
    "files.output.plan.plan_output": 10,
    "commands.diff.call.__init__": 11,  # a call that no dataclass can be
    "commands.extract.changes._sort_tensor": 9,
    "live.handle.merge": 12,  # the options of the command
}


def wide_functions(package: Path) -> list[str]:
    found = []
    for name, tree in modules(package).items():
        for node in nodes(tree):
            if isinstance(node, ast.FunctionDef):
                every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = len([each for each in every if each.arg not in ("self", "cls")])
                home = loratool._HOMES.get(node.name)  # of a function of the library, which an option may have
                is_command = name == home
                if count > WIDE.get(f"{name}.{node.name}", MAX_PARAMETERS) and not is_command:
                    found.append(f"{name}.{node.name} takes {count} parameters")
    return found


def shared_names(package: Path) -> list[str]:
    """Public functions and classes of two modules called alike, but for the library's own, and what commands call."""
    homes: dict[str, set[str]] = defaultdict(set)
    for name, tree in modules(package).items():
        for node in tree.body:
            named = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            exempt = (f"cli.{getattr(node, 'name', '')}", "commands.opened", "commands.convert.command")
            if named and name not in exempt and not name.endswith(".call"):
                homes[node.name].add(name)
    return [f"{name} is in {' and '.join(sorted(found))}" for name, found in homes.items() if len(found) > 1]


# Words that are a format's key and stand as a string outside its file, by module; the list may only shrink.
FORMAT_WORDS = {
    "commands.namings": 3,  # the types that editors complete
    "commands.saved": 1,  # a default, which they show
    "architectures.mlx_names": 1,  # a mark in the metadata of models
    "architectures.runtimes.table": 1,  # a runtime of a format's name
    "architectures.runtimes.image_programs": 1,  # a program's key
    "files.codecs.mlx": 1,  # a codec's key
    "files.containers.gguf_file": 1,  # a container's
    "adapters.formats.megatron": 1,  # a section of a run's settings
}


def format_words(package: Path) -> list[str]:
    """Formats' keys as strings outside their files: commands know formats only through the table."""
    homes = {
        node.value.value: name
        for name, tree in modules(package).items()
        if name.startswith("adapters.formats.")
        for each in nodes(tree)
        if isinstance(each, ast.ClassDef)
        for node in each.body
        if isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "key"
        and isinstance(node.value, ast.Constant)
    }
    found: dict[str, Counter[object]] = defaultdict(Counter)
    for name, tree in modules(package).items():
        for node in nodes(tree):
            if isinstance(node, ast.Constant) and name != homes.get(node.value, name):
                found[name][node.value] += 1
    return [
        f"{name} says {word!r}"
        for name, words in found.items()
        for word, count in words.items()
        if count > FORMAT_WORDS.get(name, 0)
    ]


def runtime_words(package: Path) -> list[str]:
    """Runtimes' keys as strings in the rooms that convert: they know runtimes only through their rows."""
    tables = modules(package).get("architectures.runtimes.table")
    keys = {
        word.value.value
        for node in ast.walk(tables or ast.Module([], []))
        for word in (node.keywords if isinstance(node, ast.Call) else ())
        if word.arg == "key" and isinstance(word.value, ast.Constant)
    }
    return [
        f"{name} says {node.value!r}"
        for name, tree in modules(package).items()
        if starts_with(name, ("transform", "commands.convert", "cli"))
        for node in nodes(tree)
        if isinstance(node, ast.Constant) and node.value in keys
    ]


# Where adapters are made: readers of files, and the core of conversions, which cannot forget what a step loses.
ADAPTER_MAKERS = (
    "adapters",
    "transform.lazy",
    "transform.new_factors",
    "transform.from_tensors",
    "files.containers.virtual",
)


def adapters_made(package: Path) -> list[str]:
    """Adapters, and files that compute their tensors, made elsewhere: by hand, or with other updates."""
    found = []
    for name, tree in modules(package).items():
        calls = [node for node in nodes(tree) if isinstance(node, ast.Call)]
        for node in calls if not starts_with(name, ADAPTER_MAKERS) else ():
            what, words = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
            if what in ("VirtualFile", "LazyFile", "Adapter") or (what == "replace" and "updates" in words):
                found.append(f"{name} makes one: {ast.unparse(node)[:60]}")
    return found


TEXT_METHODS = set(
    "startswith endswith replace partition rpartition split removeprefix removesuffix find index".split()
)


def errors_read(package: Path) -> list[str]:
    """Messages and remedies of errors that a place looks into, which breaks once the words are others."""

    def is_text(node: ast.AST) -> bool:
        return any(isinstance(each, ast.Attribute) and each.attr in ("message", "remedy") for each in ast.walk(node))

    found = []
    for name, tree in modules(package).items():
        for node in nodes(tree) if name != "errors" else ():
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            by_method = called and node.func.attr in TEXT_METHODS and is_text(node.func.value)
            by_search = called and ast.unparse(node.func.value) == "re" and any(map(is_text, node.args))
            by_part = isinstance(node, ast.Compare) and any(map(is_text, [node.left, *node.comparators]))
            if by_method or by_search or by_part:
                found.append(f"{name} reads an error: {ast.unparse(node)[:60]}")
    return found


# rule -> files that break it, and what of the message tells that
RULES: dict[Callable[[Path], list[str]], tuple[dict[str, str], str]] = {
    folder_breaches: (
        {"files/a.py": '"""A."""\nfrom ..adapters import b', "adapters/b.py": '"""B."""'},
        "files.a imports",
    ),
    inner_breaches: (
        {"commands/merge/a.py": '"""A."""\ndef f():\n    from ..verify import b', "commands/verify/b.py": '"""B."""'},
        "commands.merge.a imports commands.verify.b",
    ),
    circles: (
        {"files/a.py": '"""A."""\nfrom .b import x', "files/b.py": '"""B."""\ndef f():\n    from . import a'},
        "files.a -> files.b -> files.a",
    ),
    size_breaches: ({f"room{i}.py": '"""A."""' for i in range(MAX_ROOMS + 1)}, "rooms"),
    heavy_starts: ({"files/a.py": '"""A."""\nimport torch.nn'}, "files.a starts with"),
    terminal_breaches: (
        {"commands/a.py": '"""A."""\ndef f():\n    from rich.table import Table'},
        "imports rich",
    ),
    stray_writes: (
        {"commands/a.py": '"""A."""\ndef f(p):\n    p.unlink()\n    open(p, "wb")'},
        ": open(p, 'wb')",
    ),
    stray_reads: ({"files/a.py": '"""A."""\ndef f(p):\n    return p.read_bytes()'}, "files.a: p.read_bytes()"),
    full_packages: ({"undo/__init__.py": '"""U."""\nfrom . import records', "undo/records.py": '"""R."""'}, "undo"),
    untyped_tensors: ({"numerics/a.py": '"""A."""\nimport torch\nx = torch.zeros(3)'}, "torch.zeros(3)"),
    silent_modules: ({"files/a.py": "x = 1"}, "files.a has no docstring"),
    forced_openings: ({"undo/a.py": '"""A."""\ndef f():\n    """Say what."""'}, "undo.a.f: Say what."),
    banned_words: ({"undo/a.py": '"""A."""\ndef f(is_turned): ...'}, "undo.a.is_turned: turned, use transposed"),
    dead_references: ({"files/a.py": '"""Read what `bc.D` is."""', "files/bc.py": '"""B."""'}, "`bc.D` is nowhere"),
    wide_functions: ({"files/a.py": f'"""A."""\ndef f({", ".join("abcdefghi")}): ...'}, "files.a.f takes 9"),
    format_words: (
        {"adapters/formats/b.py": '"""B."""\nclass B:\n    key = "bee"', "commands/a.py": '"""A."""\nx = y == "bee"'},
        "commands.a says 'bee'",
    ),
    runtime_words: (
        {
            "architectures/runtimes/table.py": '"""R."""\nx = [R(key="zed")]',
            "transform/a.py": '"""A."""\nx = y == "zed"',
        },
        "transform.a says 'zed'",
    ),
    adapters_made: ({"commands/a.py": '"""A."""\nb = replace(a, updates={})'}, "commands.a makes one"),
    errors_read: (
        {"commands/a.py": '"""A."""\nif (error.remedy or "").startswith("add --base"):\n    pass'},
        "commands.a reads an error",
    ),
    shared_names: ({"files/a.py": '"""A."""\ndef f(): ...', "commands/b.py": '"""B."""\ndef f(): ...'}, "f is in "),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: Callable[[Path], list[str]]) -> None:
    assert rule(PACKAGE) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_finds_what_breaks_it(rule: Callable[[Path], list[str]], tmp_path: Path) -> None:
    files, told = RULES[rule]
    for place, text in {"__init__.py": '"""P."""', **files}.items():
        path = tmp_path / "package" / place
        for folder in (path.parent, *path.parent.parents):
            if folder == tmp_path:
                break
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "__init__.py").exists():
                (folder / "__init__.py").write_text('"""P."""')
        path.write_text(text)
    assert any(told in line for line in rule(tmp_path / "package"))


def started(*arguments: str) -> set[str]:
    """The modules that a command line has loaded when it ends."""
    code = (
        "import contextlib, io, sys\n"
        "from loratool.cli import _run\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    _run(sys.argv[1:])\n"
        "print(*sys.modules)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LORATOOL_")}
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return set(result.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "slow"),
    {
        ("--help",): {"loratool.cli.options", "loratool.views.parts.document"},
        ("merge", "-h"): {"loratool.adapters.formats", "loratool.files.checkpoint"},
        ("convert", "-h"): {"loratool.binding.modules.resolve"},
        ("guide",): {"loratool.adapters.formats", "loratool.files.checkpoint"},
        ("count", str(FIXTURES / "gpt2" / "base" / "config.json")): set(),
        ("inspect", str(FIXTURES / "llama" / "base")): {"loratool.binding.merge.merge_plan", "logging"},
    }.items(),
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_needs_headers_alone_starts_without_torch(arguments: tuple[str, ...], slow: set[str]) -> None:
    """An import two modules away is what no rule above sees; `slow` are the rooms that such a call has no use for."""
    loaded = started(*arguments)
    assert "loratool.cli" in loaded and not loaded & (HEAVY_PACKAGES | slow)


def test_the_guide_names_every_room() -> None:
    guide = (PACKAGE / "guides" / "architecture.md").read_text()
    rooms = {room(name) for name in modules(PACKAGE) if name not in FACES}
    assert {each for each in rooms if not re.search(rf"^  {each}(/|\.py) ", guide, re.MULTILINE)} == set()


def test_the_guide_has_the_import_rules() -> None:
    guide = (PACKAGE / "guides" / "architecture.md").read_text()
    for place, rule in {"loratool": ORDER, **INNER}.items():
        assert f"\n{place + ':':9s} {' < '.join(', '.join(group) for group in rule)}\n" in guide


def test_the_library_exports_what_it_lists() -> None:
    import loratool

    assert all(getattr(loratool, name) is not None for name in loratool.__all__)
    with pytest.raises(AttributeError):
        _ = loratool.absent  # type: ignore[attr-defined]
