"""Rename a denoiser's tensors to its maker's names or to diffusers', and find the rows that make up each new tensor.

All tensors get diffusers' names first, because the tables define every other naming by these. Rows only move: matrices
are split or fused and halves are swapped, but no number is computed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

from ..errors import InputError
from .families.lookup import Span, locate, parts_of
from .families.table import ModelFamily, Naming
from .families.unet import sgm_to_diffusers
from .image import ModuleRows, Shape

# suffix of a tensor in any naming -> suffix in diffusers'
LEAVES = {"weight": "weight", "bias": "bias", "scale": "weight"}

NAMES_SHOWN = 5  # of unknown tensors in a message

# Columns of the embedding that SDXL and its refiner add to the time embedding. unCLIP of SD 2 has an embedding of the
# same name in sgm's naming, and of another name in diffusers'.
ADDED_EMBEDDING = (2816, 2560)


@dataclass(frozen=True)
class RenamedTensor:
    """A tensor under its new name."""

    shape: Shape
    rows: tuple[ModuleRows, ...]  # of the former tensors, in the order of its rows


def rename_tensors(
    family: ModelFamily, shapes: Mapping[str, Shape], to: Naming, prefix: str = ""
) -> tuple[dict[str, RenamedTensor], tuple[str, ...]]:
    """Return the tensors of a denoiser under the names of another naming, and those that have no name in it.

    Args:
        shapes: tensor -> shape, in any naming or in several.
        to: the maker's naming or diffusers'.
        prefix: the prefix of all old names; the new ones have none.

    Raises:
        InputError: a tensor is in no table, two get the same name, rows are missing, or rows do not add up.
    """
    unknown = unknown_tensors(family, shapes, prefix)
    if unknown:
        names = ", ".join(unknown[:NAMES_SHOWN]) + (", ..." if unknown[NAMES_SHOWN:] else "")
        more = f" (nor are others, {len(unknown)} in all: {names})" if unknown[1:] else ""
        raise InputError(f"is not in the tables of {family.title}{more}: its other name is unknown", culprit=unknown[0])
    empty = next((name for name, shape in shapes.items() if 0 in shape), None)
    if empty is not None:
        raise InputError("has no numbers", culprit=empty)
    unprefixed = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    if family.up_attention:
        family = _as_unet(family, unprefixed, prefix)
    naming = _naming_of(family, unprefixed)
    unused = [path for path in unprefixed if _is_unused(family, path)]
    pieces: dict[str, list[ModuleRows]] = {}
    for path in (path for path in unprefixed if path not in unused):
        for span in _spans(family, path, naming, unprefixed, prefix):
            rows = ModuleRows(prefix + path, span.start, span.stop, span.skip, span.module_rows)
            pieces.setdefault(span.module, []).append(rows)
    by_diffusers = {name: _joined(name, rows, shapes) for name, rows in pieces.items()}
    if to is Naming.DIFFUSERS:
        renamed = {
            name: replace(tensor, shape=_reshaped(family, name, tensor.shape)) for name, tensor in by_diffusers.items()
        }
        return renamed, tuple(prefix + path for path in unused)
    unchanged = {path: _joined(path, [_all_rows(prefix + path, unprefixed[path])], shapes) for path in unused}
    return {**_in_maker_names(family, by_diffusers, shapes), **unchanged}, ()


def unknown_tensors(family: ModelFamily, names: Iterable[str], prefix: str = "") -> list[str]:
    """Return the tensors that are not in a family's table under any name."""
    paths = [name.removeprefix(prefix) for name in names]
    naming = _naming_of(family, paths)
    return [prefix + path for path in paths if not _is_known(family, path, naming)]


def count_missing(family: ModelFamily, names: Iterable[str], prefix: str = "") -> int:
    """Return how many of the modules and tensors that a family's table lists outside of the blocks are missing.

    Only some variants have all of them, so a base can lack some.
    """
    paths = {name.removeprefix(prefix) for name in names}
    located = filter(None, (locate(family, path.rpartition(".")[0]) for path in paths))
    present = {module for each in located for module in each.diffusers}
    outside = filter(None, (locate(family, name, Naming.MAKER) for name in (*family.outside, *family.alike)))
    listed = {module for each in outside for module in each.diffusers}
    return len(listed - present) + sum(paths.isdisjoint(names) for names in family.outside_tensors.items())


def _is_known(family: ModelFamily, path: str, naming: Naming | None) -> bool:
    if _is_unused(family, path) or _both_names(family, path):
        return True
    stem, _, leaf = path.rpartition(".")
    return leaf in LEAVES and locate(family, stem, naming) is not None


def _is_unused(family: ModelFamily, path: str) -> bool:
    return any(_number_in(each, path) is not None for each in family.unused)


def _as_unet(family: ModelFamily, shapes: Mapping[str, Shape], prefix: str) -> ModelFamily:
    """Return a UNet's family with attention in the blocks that have it; sgm's numbering depends on it.

    Raises:
        InputError: sgm's and diffusers' names do not determine each other for such a UNet.
    """
    former = {sgm_to_diffusers(path.rpartition(".")[0]): path for path in shapes}
    for path, name in former.items():
        second = path.replace(".resnets.0.", ".resnets.1.")
        if path.endswith(".resnets.0.conv1") and second not in former:
            message = f"has no {second} beside it, and blocks of one layer are not numbered as those of two"
            raise InputError(message, culprit=prefix + name)
    label = shapes.get("label_emb.0.0.weight", ())
    if label and label[-1] not in ADDED_EMBEDDING:
        message = f"has {label[-1]} columns and not {' or '.join(map(str, ADDED_EMBEDDING))} as in SDXL"
        raise InputError(f"{message}: its name in diffusers is not known", culprit=f"{prefix}label_emb.0.0.weight")
    up = [path.split(".") for path in former if path.startswith("up_blocks.")]
    attends = {int(level) for _, level, kind, *_ in up if kind == "attentions"}
    levels = max((int(level) + 1 for _, level, *_ in up), default=0)
    return replace(family, up_attention=tuple(level in attends for level in range(levels)) or family.up_attention)


def _naming_of(family: ModelFamily, paths: Iterable[str]) -> Naming | None:
    """Return the naming of most tensors, for names that mean different modules in two namings; None for a tie.

    Hunyuan-DiT has such names: norms 2 and 3 of its blocks are swapped.
    """
    located = filter(None, (locate(family, path.rpartition(".")[0]) for path in paths))
    more = sum((each.path in each.diffusers) - (each.path in each.maker) for each in located)
    return Naming.DIFFUSERS if more > 0 else Naming.MAKER if more else None


def _spans(
    family: ModelFamily, path: str, naming: Naming | None, shapes: Mapping[str, Shape], prefix: str
) -> tuple[Span, ...]:
    """Return the rows of diffusers' tensors that make up a tensor."""
    shape = shapes[path]
    rows = shape[0] if shape else 1
    names = _both_names(family, path)
    if names:
        return (Span(0, rows, names[1], 0, rows),)
    stem, _, leaf = path.rpartition(".")
    located = locate(family, stem, naming)
    assert located
    matrix = shapes.get(f"{stem}.weight", shape)
    columns = matrix[1] if len(matrix) > 1 else 1
    spans = parts_of(located, columns, rows)
    if spans is None:
        parts = " and ".join(located.diffusers)
        raise InputError(f"has {rows} rows, which are not those of {parts} of {columns} columns", culprit=prefix + path)
    return tuple(replace(span, module=f"{span.module}.{LEAVES[leaf]}") for span in spans)


def _all_rows(tensor: str, shape: Shape) -> ModuleRows:
    rows = shape[0] if shape else 1
    return ModuleRows(tensor, 0, rows, 0, rows)


def _joined(name: str, rows: Iterable[ModuleRows], shapes: Mapping[str, Shape]) -> RenamedTensor:
    """Return a tensor made of all its rows.

    Raises:
        InputError: rows are missing or overlap, or their columns differ.
    """
    pieces = sorted(rows, key=lambda piece: piece.skip)
    first, done = pieces[0], 0
    shape = shapes[first.tensor]
    for before, piece in zip([first, *pieces], pieces, strict=False):
        if piece.skip < done or piece.module_rows != first.module_rows:
            raise InputError(f"is {name}, and so is {before.tensor}", culprit=piece.tensor)
        if piece.skip > done:
            break
        if (len(shapes[piece.tensor]), shapes[piece.tensor][1:]) != (len(shape), shape[1:]):
            message = f"is {shapes[piece.tensor]} and {first.tensor} is {shape}, and both are rows of {name}"
            raise InputError(message, culprit=piece.tensor)
        done += piece.stop - piece.start
    if done != first.module_rows:
        message = f"has {done} of the {first.module_rows} rows of {name}, and no tensor has the others"
        raise InputError(message, culprit=first.tensor)
    return RenamedTensor((done, *shape[1:]) if shape else (), tuple(pieces))


def _in_maker_names(
    family: ModelFamily, tensors: Mapping[str, RenamedTensor], shapes: Mapping[str, Shape]
) -> dict[str, RenamedTensor]:
    """Return the maker's tensors, made of diffusers'."""
    parts: dict[str, tuple[Span, ...]] = {}
    for name, tensor in tensors.items():
        names = _both_names(family, name)
        if names:
            parts[names[0]] = (Span(0, _rows(tensor), name, 0, _rows(tensor)),)
            continue
        stem, _, leaf = name.rpartition(".")
        located = locate(family, stem, Naming.DIFFUSERS)
        for maker in located.maker if located else ():
            new = f"{maker}.{leaf}"
            if new not in parts and (spans := _parts_of_maker(family, maker, leaf, tensors)):
                parts[new] = spans
    used: Counter[str] = Counter()
    for spans in parts.values():
        for span in spans:
            used[span.module] += span.stop - span.start
    for name, tensor in tensors.items():
        if used[name] != _rows(tensor):
            message = f"is {name}, but the maker's tensors have {used[name]} of its rows and not {_rows(tensor)}"
            raise InputError(message, culprit=tensor.rows[0].tensor)
    renamed = {new: _joined(new, _cut(spans, tensors), shapes) for new, spans in parts.items()}
    flat = {new: parts[new][0].module for new in renamed if _shape_in_diffusers(family, parts[new][0].module)}
    return {new: replace(each, shape=(prod(each.shape),)) if new in flat else each for new, each in renamed.items()}


def _parts_of_maker(
    family: ModelFamily, module: str, leaf: str, tensors: Mapping[str, RenamedTensor]
) -> tuple[Span, ...]:
    """Return the rows of diffusers' tensors that make up a module's weight or bias.

    Raises:
        InputError: some of these tensors are missing, or their rows do not add up.
    """
    located = locate(family, module, Naming.MAKER)
    assert located
    present = {each: tensors[f"{each}.{leaf}"] for each in located.diffusers if f"{each}.{leaf}" in tensors}
    matrix = next(tensors.get(f"{each}.weight", tensor).shape for each, tensor in present.items())
    columns = matrix[1] if len(matrix) > 1 else 1
    spans = parts_of(located, columns, known={each: _rows(tensor) for each, tensor in present.items()})
    first = next(iter(present.values())).rows[0].tensor
    if spans is None:
        sizes = ", ".join(f"{each} {_rows(tensor)}" for each, tensor in present.items())
        raise InputError(f"cannot become {module}, of {columns} columns and these rows: {sizes}", culprit=first)
    missing = next((span.module for span in spans if span.module not in present), None)
    if missing is not None:
        raise InputError(f"is a part of {module}.{leaf}, but {missing}.{leaf} is missing", culprit=first)
    return tuple(replace(span, module=f"{span.module}.{leaf}") for span in spans)


def _cut(spans: Sequence[Span], tensors: Mapping[str, RenamedTensor]) -> list[ModuleRows]:
    """Return the rows of the former tensors for rows of diffusers' tensors."""
    rows = []
    for span in spans:
        last = span.skip + span.stop - span.start
        for piece in tensors[span.module].rows:
            low, high = max(span.skip, piece.skip), min(last, piece.skip + piece.stop - piece.start)
            if low < high:
                start, skip = piece.start + low - piece.skip, span.start + low - span.skip
                rows.append(ModuleRows(piece.tensor, start, start + high - low, skip, spans[-1].stop))
    return rows


def _rows(tensor: RenamedTensor) -> int:
    return tensor.shape[0] if tensor.shape else 1


def _reshaped(family: ModelFamily, name: str, shape: Shape) -> Shape:
    """Return the shape of diffusers' tensor; the maker may store the same numbers in another shape."""
    sizes = _shape_in_diffusers(family, name)
    if not sizes:
        return shape
    rest = prod(size for size in sizes if size > 0)
    if prod(shape) % rest:
        raise InputError(f"has {prod(shape)} numbers, which do not make rows of {rest}", culprit=name)
    return tuple(prod(shape) // rest if size < 0 else size for size in sizes)


def _shape_in_diffusers(family: ModelFamily, name: str) -> tuple[int, ...]:
    """Return diffusers' shape of a tensor that the maker stores flat (-1 is any size); empty for all others."""
    return next((sizes for each, sizes in family.reshaped.items() if _number_in(each, name) is not None), ())


def _both_names(family: ModelFamily, path: str) -> tuple[str, str] | None:
    """Return (maker's name, diffusers' name) of a tensor that a table lists separately, given either; else None."""
    for names in _listed(family):
        number = next((n for each in reversed(names) if (n := _number_in(each, path)) is not None), None)
        if number is not None:
            maker, diffusers = (each.replace("{i}", number) for each in names)
            return maker, diffusers
    return None


@lru_cache(maxsize=256)
def _listed(family: ModelFamily) -> tuple[tuple[str, str], ...]:
    """Return (maker's name, diffusers' name) of tensors that a table lists separately, with `{i}` in blocks."""
    return (
        *(
            (f"{block.maker}.{maker}", f"{block.diffusers}.{diffusers}")
            for block in family.blocks
            for maker, diffusers in block.tensors.items()
        ),
        *family.outside_tensors.items(),
    )


def _number_in(template: str, path: str) -> str | None:
    """Return the number at `{i}` in a path, empty for a template without it; None if the path does not match."""
    match = _pattern(template).fullmatch(path)
    return "".join(match.groups()) if match else None


@lru_cache(maxsize=4096)
def _pattern(template: str) -> re.Pattern[str]:
    start, *rest = map(re.escape, template.split("{i}"))
    return re.compile(
        "".join([start, *(f"(0|[1-9][0-9]{{0,8}}){each}" for each in rest[:1]), *(rf"\1{x}" for x in rest[1:])])
    )
