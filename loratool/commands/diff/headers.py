"""Run `diff --headers`: compare names, shapes and types of two models or adapters, and read no weights.

Tensors are compared under the names that their files have. A quantized weight is one tensor where the other model
stores it in another way; where both have the same format, its codes and scales are compared.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack

from ...adapters.formats import holds_adapter
from ...adapters.formats.find import find_adapter_file
from ...errors import InputError, UsageError
from ...files.checkpoint import Checkpoint, open_checkpoint
from ...files.gguf_model import with_names_of_one
from ...files.hub.cache import reading_little, resolve
from ...views.diff_headers import HeaderDiff, HeadersDiff
from ...views.parts.writing import command_line
from .call import DiffHeaders

Header = tuple[str, tuple[int, ...], str | None]  # dtype (of a quantized weight, of its codes), shape, codec


def run_diff_headers(call: DiffHeaders) -> HeadersDiff:
    """Compare the headers of two models, or of two adapters."""
    paths = [os.fspath(path) for path in (call.a, call.b)]
    with reading_little(), ExitStack() as opened:
        adapters, sides = are_adapters(paths), list[Checkpoint]()
        for path in paths:
            sides.append(open_checkpoint(find_adapter_file(resolve(path)) if adapters else path))
            opened.callback(sides[-1].close)
        if not adapters and sides[0].is_gguf != sides[1].is_gguf:
            sides = with_names_of_one(sides)
        a, b = _headers(*sides), _headers(*sides[::-1])
    both = [name for name in a if name in b]
    only_a, only_b = (tuple(name for name in side if name not in other) for side, other in ((a, b), (b, a)))
    rows = tuple(_header_diff(name, a[name], b[name]) for name in both if a[name] != b[name])
    return HeadersDiff(
        a=paths[0],
        b=paths[1],
        tensors=rows,
        equal=len(both) - len(rows),
        only_a=only_a,
        only_b=only_b,
        same=not (rows or only_a or only_b),
    )


def are_adapters(paths: Sequence[str]) -> bool:
    """Return whether all inputs are adapters. False if there are two models.

    Raises:
        InputError: some are adapters and others are not.
        UsageError: there are more models than two.
    """
    kinds = [holds_adapter(path) for path in paths]
    if any(kinds) and not all(kinds):
        large, small = paths[kinds.index(False)], paths[kinds.index(True)]
        raise InputError(
            f"is a model, but {small} is an adapter; diff compares two of a kind",
            culprit=large,
            remedy=f"to check the adapter against the model: {command_line('inspect', small, '--base', large)}",
        )
    if not all(kinds) and len(paths) > 2:
        raise UsageError(f"diff compares two models, not {len(paths)}; adapters can be any number")
    return all(kinds)


def _headers(side: Checkpoint, other: Checkpoint) -> dict[str, Header]:
    kinds = {name: weight.kind for name, weight in other.weights.items()}
    coded = {name: weight for name, weight in side.weights.items() if kinds.get(name) != weight.kind}
    headers: dict[str, Header] = {}
    for name, spec in side.with_decoded(coded).items():
        stored = coded[name].tensors[0] if name in coded else name
        codec = coded[name].kind if name in coded else None
        headers[name] = side.shard_of[stored].stored_type(stored), spec.shape, codec
    return headers


def _header_diff(name: str, a: Header, b: Header) -> HeaderDiff:
    (dtype_a, shape_a, codec_a), (dtype_b, shape_b, codec_b) = a, b
    return HeaderDiff(name, dtype_a, dtype_b, shape_a, shape_b, codec_a, codec_b)
