"""Rename an adapter's modules, for names that no table has.

A pattern is one of `Selection`: the end of a path, which is replaced; a glob of the full path, whose wildcards stand
for the same text in the new path; or `re:` and an expression, whose groups are `\\1`, `\\2`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from ..adapters.formats import FORMATS
from ..adapters.formats.peft import Peft
from ..errors import InputError, UsageError
from .lazy import Transformed
from .to_class import with_paths

_PATH = re.compile(r"[^\s.=]+(?:\.[^\s.=]+)*")

# Parts of PEFT's keys beside a module's path; a path must not contain one
_OF_KEYS = frozenset(
    """base_layer bias lora_A lora_B lora_bias lora_embedding_A lora_embedding_B lora_magnitude_vector modules_to_save
    original_module token_adapter trainable_tokens_delta trainable_tokens_original_model weight""".split()
)


def rename_modules(state: Transformed, renames: Sequence[str]) -> Transformed:
    """Return the adapter with other paths, in PEFT's format.

    Args:
        renames: `PATTERN=PATH`, applied to all paths in order.

    Raises:
        UsageError: a rename has another form, matches no module, maps two modules to one path, or changes the last name
            of a stack.
        InputError: the adapter is of another kind than LoRA.
    """
    updates = state.adapter.updates
    other = next((m for m, u in updates.items() if u.cls not in FORMATS[Peft.key].can.kinds), None)
    if other:
        message = f"is {updates[other].kind}, and --rename is for LoRA"
        first = "convert it with --to peft first" if updates[other].rank else None
        raise InputError(message, culprit=other, remedy=first)
    paths = new_paths(updates, renames)
    for module, path in paths.items():
        if updates[module].cls.stack and module.rpartition(".")[2] != path.rpartition(".")[2]:
            raise UsageError(
                f"is a stack of experts, and would become {path}, which has another last name", culprit=module
            )
    return with_paths(state, paths)


def new_paths(modules: Iterable[str], renames: Sequence[str]) -> dict[str, str]:
    """Return the new path of each module.

    Raises:
        UsageError: as `rename_modules`.
    """
    paths = {module: module for module in modules}
    for rename in renames:
        change = _parsed(rename)
        changed = {module: new for module, path in paths.items() if (new := _of_module(path, change)) is not None}
        if not changed:
            like = f"its modules are like {next(iter(paths.values()))}" if paths else None
            raise UsageError("names no module", culprit=f"--rename {rename}", remedy=like)
        bad = next((new for module, new in changed.items() if not _is_path(new, module)), None)
        if bad is not None:
            raise UsageError(f"gives {bad!r}, which is not the path of a module", culprit=f"--rename {rename}")
        paths |= changed
    owners: dict[str, str] = {}
    for module, path in paths.items():
        if owners.setdefault(path, module) != module:
            raise UsageError(f"{owners[path]} and {module} would both become this module", culprit=path)
    return paths


def _is_path(new: str, module: str) -> bool:
    """Return whether a module, or a module's bias, can have this path."""
    path = new.removesuffix(".bias") if module.endswith(".bias") else new
    return _PATH.fullmatch(path) is not None and _OF_KEYS.isdisjoint(path.split("."))


def _of_module(path: str, change: Callable[[str], str | None]) -> str | None:
    """Return the new path of a module, or of a module's bias; None if the pattern does not match."""
    bias = ".bias" * path.endswith(".bias")
    new = change(path.removesuffix(bias))
    return None if new is None else new + bias


def _parsed(rename: str) -> Callable[[str], str | None]:
    """Return a function from a path to the new path, or to None if the pattern does not match."""
    pattern, mark, replacement = rename.rpartition("=")
    if not mark or not pattern or not replacement:
        raise UsageError("is not PATTERN=PATH", culprit=f"--rename {rename}")
    if pattern.startswith("re:"):
        return _by_expression(rename, pattern.removeprefix("re:"), replacement)
    if "*" in pattern or "?" in pattern:
        wild = re.split(r"([*?])", pattern)
        expression = "".join({"*": "(.*)", "?": "(.)"}.get(part) or re.escape(part) for part in wild)
        count = iter(range(1, len(wild)))
        named = re.sub(r"[*?]", lambda _: rf"\g<{next(count)}>", replacement.replace("\\", r"\\"))
        return _by_expression(rename, rf"\A{expression}\Z", named)

    def change(path: str) -> str | None:
        if path == pattern or path.endswith(f".{pattern}"):
            return path.removesuffix(pattern) + replacement
        return None

    return change


def _by_expression(rename: str, expression: str, replacement: str) -> Callable[[str], str | None]:
    try:
        compiled = re.compile(expression)
        compiled.sub(replacement, "")
        re.sub(rf"(?:{expression})|\A", replacement, "")  # a match checks that the groups exist
    except (re.error, IndexError, OverflowError, RecursionError) as error:
        raise UsageError(f"is not an expression and its replacement: {error}", culprit=f"--rename {rename}") from error
    return lambda path: compiled.sub(replacement, path) if compiled.search(path) else None
