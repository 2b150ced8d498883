"""Compare the base in an adapter's config with the given base, if both are repo ids.

Shapes decide whether adapter and base fit. The result here is only a note, which says that it is based on names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator

from ...adapters.adapter import Adapter
from ...adapters.config import named_base
from ...files.checkpoint import Checkpoint
from ...files.hub.names import cached_name, named_repo

# Words of a model's name on how its weights are stored, and words on its last training
STORAGE = frozenset(
    """4bit 8bit awq bf16 bnb dynamic exl2 fp16 fp4 fp8 gguf gptq hf int4 int8 mlx mxfp4 nf4 nvfp4 quantized unsloth
    w4a16 w8a16 w8a8""".split()
)

TUNED = frozenset(("chat", "instruct", "it"))


def notes_on_base(base: Checkpoint, adapters: Iterable[Adapter]) -> Iterator[str]:
    """Yield a note for each adapter whose config names another repository than the base's."""
    given = _given_name(base)
    for adapter in adapters:
        named = _absent_name(adapter.config.base_model)
        if given and named and named.lower() != given.lower():
            yield f"{adapter.name} was trained on {named}, {_relation(named, given)}"


def _given_name(base: Checkpoint) -> str:
    """Return the repo id of a model in the hub's cache, else the one in its config; empty without one."""
    cached = cached_name(base.path)
    return cached.repo if cached else _absent_name(base.config.get("_name_or_path"))


def _absent_name(value: object) -> str:
    """Return a config's value if it is a repo id; empty for other values and for existing paths."""
    name = named_repo(named_base(value))
    return "" if os.path.lexists(name) else name


def _relation(named: str, given: str) -> str:
    """Return a clause on the given base, from the words of both names."""
    named_words, given_words = (
        frozenset(re.split(r"[-_]", each.rpartition("/")[2].lower())) for each in (named, given)
    )
    if named_words == given_words:
        return f"and the base is {given}, of the same name"
    if named_words - STORAGE == given_words - STORAGE:
        return f"and the base is {given}, the same model by its name in another storage format"
    if named_words - STORAGE - TUNED == given_words - STORAGE - TUNED:
        which = "tuned to follow instructions" if given_words & TUNED else "not tuned to follow instructions"
        return f"and the base is {given}, which is {which} by its name"
    return f"and the base is {given}"
