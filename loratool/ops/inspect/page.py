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


BITS: Measure[GroupPart] = Measure("bits", lambda part: part.group.bits, measure, drawn=True)


def checkpoint_page(report: CheckpointReport) -> Page:
    """Make the page of a checkpoint."""
    size = Figure("size", nbytes(report.nbytes), f"in {plural(len(report.files), 'file')}")
    figures = [Figure("parameters", quantity(report.parameters), types_of(report.groups))] if report.parameters else []
    figures += [size, Figure("tensors", whole(report.tensors))]
    figures += [] if report.bits is None else [Figure("bits", measure(report.bits), "a weight, scales included")]
    return Page(
        figures=tuple(figures),
        sheets=_sheets(report.groups, (TARGET,)),
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
        sheets=_sheets(report.groups, ()),
        arithmetic=("all of this is from the file's header: no tensor is read",),
    )


def _sheets(groups: Sequence[Group], more: Sequence[Category[GroupPart]]) -> tuple[Sheet[GroupPart], ...]:
    """Return the sheet of groups, coloured by bits, which plain numbers have too."""
    rows = [GroupPart(group.name, group, 1.0) for group in groups]
    columns = (COUNT, *(BITS if column.title == BITS.title else column for column in COLUMNS), *more)
    return (Sheet(rows, lambda part: part.name, columns, layers=_layers),) if rows else ()


def _layers(part: GroupPart) -> list[int]:
    """Return the layers in the range of a group's name; none where the name has one layer or no layers."""
    if find_place(part.name).layer is not None:
        return []
    layers = {find_place(each.name).layer for each in group_parts(part.group, verbose=False)}
    return sorted(layer for layer in layers if layer is not None)
