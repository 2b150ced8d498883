"""Reports on the content of a checkpoint: the bits of each kind of weight, by layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, product
from math import prod
from typing import ClassVar

from .parts import quantities as q
from .parts.content import Figure, Page, Sheet
from .parts.document import Document, Line, Row, TextTable, line, path
from .parts.numbers import all_digits, dimensions, measure, nbytes, plural, quantity
from .parts.places import find_place
from .parts.report import Report
from .parts.rows import Category, Measure
from .parts.table import GroupColumns, make_table
from .parts.writing import digest_line, labelled


@dataclass(frozen=True)
class Group:
    """Tensors of one dtype and shape whose names differ only in numbers: `model.layers.{0..31}.mlp.up_proj.weight`.

    Attributes:
        dtype: of a quantized weight, that of its codes.
        shape: that of the weights; of those in a format that is not read, that of their codes.
        tensors: how many there are; a quantized weight is one, with the scales and others that belong to it.
        parameters, nbytes: of all of them.
        role: what kind of LoRA target they are, empty for none.
        codec: the format of quantized weights, None for plain tensors.
        bits: in which a number is stored, those of scales included; None where the headers do not tell.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    tensors: int
    parameters: int
    nbytes: int
    role: str
    codec: str | None = None
    bits: float | None = None


@dataclass(frozen=True)
class CheckpointReport(Report):
    """The result of `inspect` of a checkpoint.

    Attributes:
        tensors: how many there are; a quantized weight is one.
        parameters: weights, however they are stored: of a quantized one all numbers that its codes are, scales none.
        dtypes: dtype -> parameters.
        tied: whether the file has no head because it is the embedding.
        quantization: the method's name.
        uncounted: quantized weights of which headers do not tell how many numbers they are.
        fields: of a GGUF file, each in a few words.
        notes: what a merge makes of codes, where the config contradicts the tensors, and what cannot be read.
        bits: in which a number is stored on average, those of scales included; None where the headers do not tell.
        digest: the sha256 of all tensors (`files.digest`); None if it was not asked for.
    """

    document_function: ClassVar[str] = "checkpoint_document"
    page_function: ClassVar[str] = "checkpoint_page"
    rows: ClassVar[str] = "groups"

    path: str
    model_type: str | None
    files: tuple[str, ...]
    groups: tuple[Group, ...]
    tensors: int
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    tied: bool
    quantization: str | None
    uncounted: int
    metadata: Mapping[str, str]
    fields: Mapping[str, str]
    notes: tuple[str, ...] = ()
    kind: str = "checkpoint"
    bits: float | None = None
    digest: str | None = None


@dataclass(frozen=True)
class MethodReport(Report):
    """The result of `inspect` of what another method than LoRA left.

    Attributes:
        method: a key of OTHER_METHODS, or what the config says.
        outcome: a key of OUTCOMES.
        verdict: the outcome as a sentence, with its reason and what to do.
    """

    document_function: ClassVar[str] = "method_document"
    page_function: ClassVar[str] = "method_page"
    rows: ClassVar[str] = "groups"

    path: str
    method: str
    title: str
    outcome: str
    verdict: str
    groups: tuple[Group, ...]
    tensors: int
    parameters: int
    nbytes: int
    base_model: str | None
    notes: tuple[str, ...]
    kind: str = "method"
    metadata: Mapping[str, str] = field(default_factory=dict)
    digest: str | None = None


FIELDS = 5  # of one part of a GGUF file's, that are shown

_RANGE = re.compile(
    r"\{(\d{1,9}(?:\.\.\d{1,9})?(?:,\d{1,9}(?:\.\.\d{1,9})?)*)\}"
)  # numbers as `split_numbers` takes them


@dataclass(frozen=True)
class GroupPart:
    """One name of a group, with its share of the group's tensors, numbers and bytes."""

    name: str
    group: Group
    share: float


COLUMNS: tuple[Category[GroupPart] | Measure[GroupPart], ...] = (
    Category(q.SHAPE, lambda part: dimensions(part.group.shape), priority=5, right=True, always=True),
    Category(q.STORED_AS, lambda part: part.group.codec or part.group.dtype, priority=6),
    Measure(q.SIZE, lambda part: part.group.nbytes * part.share, nbytes, priority=1, summed=True),
    Measure(q.PARAMETERS, lambda part: part.group.parameters * part.share, quantity, priority=8, summed=True),
    Measure(q.BITS, lambda part: part.group.bits if part.group.codec else None, measure, priority=7),
)

# of a model alone: nothing trains LoRA on what another method left
TARGET: Category[GroupPart] = Category(q.LORA_TARGET, lambda part: part.group.role or "-", priority=4, always=True)


def checkpoint_document(report: CheckpointReport, verbose: bool) -> Document:
    """Return the document of a checkpoint."""
    marks = [report.model_type or "unknown family"]
    marks += [report.quantization] if report.quantization else []
    marks += [plural(report.tensors, "tensor")]
    if report.parameters:  # headers do not always tell the shapes behind codes
        marks += [f"{quantity(report.parameters)} parameters", types_of(report.groups)]
    marks += [f"{nbytes(report.nbytes)} in {plural(len(report.files), 'file')}"]
    marks += ["tied head"] if report.tied else []
    return Document(
        subject=line(path(report.path), f": {', '.join(marks)}"),
        tables=_tables(report.groups, verbose, (*COLUMNS, TARGET)),
        lists=tuple(_lists(report, verbose)),
        verbose=verbose,
    )


def method_document(report: MethodReport, verbose: bool) -> Document:
    """Return the document of an output of another method than LoRA."""
    marks = [plural(report.tensors, "tensor"), f"{quantity(report.parameters)} parameters", types_of(report.groups)]
    return Document(
        subject=line(path(report.path), f": {report.title}", f" for {report.base_model}" if report.base_model else ""),
        facts=(line(", ".join([*marks, nbytes(report.nbytes)])),),
        tables=_tables(report.groups, verbose, COLUMNS),
        lists=(*digest_line(report.digest), *labelled("note", report.notes, verbose)),
        verdict=(line(report.verdict),),
        verbose=verbose,
    )


def types_of(groups: Sequence[Group]) -> str:
    """Return the types or codecs. The one with most parameters is first."""
    kinds: Counter[str] = Counter()
    for group in groups:
        kinds[group.codec or group.dtype] += group.parameters
    types = [kind for kind, count in kinds.most_common() if count]
    return " + ".join(types[:3]) + (f" + {len(types) - 3} more" if len(types) > 3 else "")


def _tables(
    groups: Sequence[Group], verbose: bool, columns: Sequence[Category[GroupPart] | Measure[GroupPart]]
) -> tuple[TextTable, ...]:
    """Return the table of matrices, with one row for all vectors of a role. With `verbose` vectors have rows too."""
    vectors = [] if verbose else [group for group in groups if len(group.shape) < 2]
    parts = [part for group in groups if group not in vectors for part in group_parts(group, verbose)]
    table = make_table(
        parts,
        columns,
        GroupColumns(layers=3, count=2),
        modules=lambda part: part.group.tensors * part.share,
        verbose=verbose,
    )
    rows = [_vector_row(title, each, table) for title, each in _by_role(vectors).items()]
    return (replace(table, rows=(*table.rows, *rows)),) if groups else ()


def group_parts(group: Group, verbose: bool) -> Iterator[GroupPart]:
    """Yield the names of a group. Without `verbose`, yield just enough for each number of its ranges.

    If not all pairs of two ranges exist, the ranges do not say which do: the group is then one row, also of `verbose`.
    So is a group that has more numbers than tensors: its range may be part of a tensor's name.
    """
    pieces = _RANGE.split(group.name)
    runs = [[_run(text) for text in piece.split(",")] if i % 2 else [] for i, piece in enumerate(pieces)]
    counts = [sum(map(len, each)) for each in runs[1::2]]
    if not all(0 < count <= group.tensors for count in counts) or (verbose and prod(counts) != group.tensors):
        yield GroupPart(group.name, group, 1.0)
        return
    choices = [[str(n) for run in runs[i] for n in run] if i % 2 else [text] for i, text in enumerate(pieces)]
    longest = max(map(len, choices))
    some = ([each[i % len(each)] for each in choices] for i in range(longest))
    names = ["".join(each) for each in (product(*choices) if verbose else some)]
    for name in names:
        yield GroupPart(name, group, 1 / len(names))


def _run(text: str) -> range:
    """`0..3` -> 0, 1, 2, 3"""
    first, _, last = text.partition("..")
    return range(int(first), int(last or first) + 1)


def _by_role(vectors: Sequence[Group]) -> Mapping[str, list[Group]]:
    groups: dict[str, list[Group]] = {}
    for group in vectors:
        name = group.name.rpartition(".")[2] if "." in group.name else group.name
        role = "biases" if "bias" in name else "norms" if "norm" in group.name or "ln_" in group.name else "vectors"
        groups.setdefault(role, []).append(group)
    return groups


def _vector_row(role: str, groups: Sequence[Group], table: TextTable) -> Row:
    """Return the row of all vectors of a role, for a table's columns."""
    shapes = list(dict.fromkeys(dimensions(group.shape) for group in groups))
    types = list(dict.fromkeys(group.dtype for group in groups))
    cells = {
        q.COUNT.title: f"{sum(group.tensors for group in groups):,}",
        q.SHAPE.title: shapes[0] if len(shapes) == 1 else f"{len(shapes)} shapes",
        q.STORED_AS.title: "+".join(types[:2]),
        q.SIZE.title: nbytes(sum(group.nbytes for group in groups)),
        q.PARAMETERS.title: quantity(sum(group.parameters for group in groups)),
        q.LORA_TARGET.title: "-",
        q.BITS.title: "-",
    }
    name = f"{role} ({len(groups)} kinds)" if len(groups) > 1 else role
    return Row((name, *(cells.get(column.title, "") for column in table.columns[1:])))


def _lists(report: CheckpointReport, verbose: bool) -> Iterator[Line]:
    fields: dict[str, list[str]] = {}
    for key, value in report.fields.items():
        first, _, rest = key.partition(".")
        fields.setdefault(first, []).append(f"{rest} {value}")
    for first, texts in fields.items():
        shown = texts if verbose else list(islice(texts, FIELDS))
        more = [f"{len(texts) - len(shown)} more"] if len(shown) < len(texts) else []
        yield line(f"{first}: {', '.join([*shown, *more])}")
    if report.uncounted:
        number = plural(report.uncounted, "quantized weight")
        yield line(f"note: {number} not counted, since the headers do not show their sizes")
    yield from digest_line(report.digest)
    yield from labelled("note", report.notes, verbose)


COUNT: Measure[GroupPart] = Measure(q.COUNT, lambda part: part.group.tensors, all_digits, summed=True)


def checkpoint_page(report: CheckpointReport) -> Page:
    """Return the page of a checkpoint."""
    size = Figure("size", nbytes(report.nbytes), f"in {plural(len(report.files), 'file')}")
    figures = [Figure("parameters", quantity(report.parameters), types_of(report.groups))] if report.parameters else []
    figures += [size, Figure("tensors", all_digits(report.tensors))]
    figures += [] if report.bits is None else [Figure("bits", measure(report.bits), "a weight, scales included")]
    return Page(
        figures=tuple(figures),
        sheets=(_sheet(report.groups, (TARGET,)),),
        arithmetic=(
            "everything here comes from the headers of the files: no weight is read",
            "a quantized weight counts as one tensor, with its scales and other parts; its parameters are its "
            "dequantized numbers",
            "bits are 8 times the bytes, with those of scales, over the parameters",
        ),
    )


def method_page(report: MethodReport) -> Page:
    """Return the page of an output of another method than LoRA."""
    return Page(
        figures=(
            Figure("parameters", quantity(report.parameters), types_of(report.groups)),
            Figure("size", nbytes(report.nbytes)),
            Figure("tensors", all_digits(report.tensors)),
        ),
        sheets=(_sheet(report.groups, ()),),
        arithmetic=("everything here comes from the header of the file: no tensor is read",),
    )


def _sheet(groups: Sequence[Group], more: Sequence[Category[GroupPart]]) -> Sheet[GroupPart]:
    """Return the sheet of groups, coloured by bits if they differ, else by the size of a tensor."""
    rows = [GroupPart(group.name, group, 1.0) for group in groups]
    differ = len({_bits(row) for row in rows} - {None}) > 1
    size: Measure[GroupPart] = Measure(q.SIZE_EACH, _size_each, nbytes, drawn=not differ)
    bits: Measure[GroupPart] = Measure(q.BITS, _bits, measure, drawn=differ)
    others = [column for column in COLUMNS if column.what != q.BITS]
    columns = (COUNT, *others, size, bits, *more)
    return Sheet(rows, columns, "group", members=_members)


def _bits(part: GroupPart) -> float | None:
    """Return the bits per number of a matrix. None for vectors: their 32 would hide how matrices differ."""
    return part.group.bits if part.group.codec or len(part.group.shape) > 1 else None


def _size_each(part: GroupPart) -> float:
    return part.group.nbytes / part.group.tensors


def _members(part: GroupPart) -> list[str]:
    """Return a name for each layer of a group, or each block of a UNet. Its own name if its ranges are no blocks."""
    some = [each.name for each in group_parts(part.group, verbose=False)]
    if find_place(some[0]).layer is not None:
        return some
    return [each.name for each in group_parts(part.group, verbose=True)]
