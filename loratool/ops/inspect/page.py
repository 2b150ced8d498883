"""Show what is in a checkpoint: in which layers which kind of weight is stored with how many bits."""

from __future__ import annotations

from collections.abc import Sequence

from ...reports.numbers import measure, nbytes, plural, quantity, whole
from ...reports.page.content import Figure, Page, Sheet
from ...reports.places import find_place
from ...reports.rows import Category, Measure
from .command import CheckpointReport, Group, MethodReport
from .document import COLUMNS, TARGET, GroupPart, group_parts, types_of

COUNT: Measure[GroupPart] = Measure("count", lambda part: part.group.tensors, whole, summed=True)


def checkpoint_page(report: CheckpointReport) -> Page:
    """Make the page of a checkpoint."""
    size = Figure("size", nbytes(report.nbytes), f"in {plural(len(report.files), 'file')}")
    figures = [Figure("parameters", quantity(report.parameters), types_of(report.groups))] if report.parameters else []
    figures += [size, Figure("tensors", whole(report.tensors))]
    figures += [] if report.bits is None else [Figure("bits", measure(report.bits), "a weight, scales included")]
    return Page(
        figures=tuple(figures),
        sheets=(_sheet(report.groups, (TARGET,)),),
        arithmetic=(
            "all of this is from the files' headers: no weight is read",
            "a quantized weight is one tensor, with its scales and what else belongs to it; its parameters are the "
            "numbers that its codes mean",
            "bits are 8 times the bytes, those of scales included, over the parameters",
        ),
    )


def method_page(report: MethodReport) -> Page:
    """Make the page of what another method than LoRA left."""
    return Page(
        figures=(
            Figure("parameters", quantity(report.parameters), types_of(report.groups)),
            Figure("size", nbytes(report.nbytes)),
            Figure("tensors", whole(report.tensors)),
        ),
        sheets=(_sheet(report.groups, ()),),
        arithmetic=("all of this is from the file's header: no tensor is read",),
    )


def _sheet(groups: Sequence[Group], more: Sequence[Category[GroupPart]]) -> Sheet[GroupPart]:
    """Return the sheet of groups, coloured by bits where some have others, else by the size of a tensor."""
    rows = [GroupPart(group.name, group, 1.0) for group in groups]
    differ = len({_bits(row) for row in rows} - {None}) > 1
    each: Measure[GroupPart] = Measure("size each", _size_each, nbytes, drawn=not differ)
    bits: Measure[GroupPart] = Measure("bits", _bits, measure, drawn=differ)
    others = [column for column in COLUMNS if column.title != bits.title]
    columns = (COUNT, *others, each, bits, *more)
    return Sheet(rows, lambda part: part.name, columns, "group", members=_members)


def _bits(part: GroupPart) -> float | None:
    """Return the bits of a number of a matrix; the 32 of vectors would hide how matrices differ."""
    return part.group.bits if part.group.codec or len(part.group.shape) > 1 else None


def _size_each(part: GroupPart) -> float:
    return part.group.nbytes / part.group.tensors


def _members(part: GroupPart) -> list[str]:
    """Return names of a group with each layer, or each block of a UNet; its own where its ranges tell no blocks."""
    some = [each.name for each in group_parts(part.group, verbose=False)]
    if find_place(some[0]).layer is not None:
        return some
    return [each.name for each in group_parts(part.group, verbose=True)]
