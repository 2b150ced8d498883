"""Say what is in a checkpoint, a row a kind of weight: which names LoRA could target, how large, in which type."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from math import prod

from ...reports.document import Document, Line, Row, TextTable, line, path
from ...reports.numbers import dimensions, measure, nbytes, plural, quantity
from ...reports.rows import Category, Measure
from ...reports.table import make_table
from ...reports.writing import told
from .command import CheckpointReport, Group, MethodReport

PRIORITY = ("size", "count", "layers", "LoRA target", "shape", "stored as", "bits", "parameters")


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
    Category("shape", lambda part: dimensions(part.group.shape), right=True, always=True),
    Category("stored as", lambda part: part.group.codec or part.group.dtype),
    Measure("size", lambda part: part.group.nbytes * part.share, nbytes, summed=True),
    Measure("parameters", lambda part: part.group.parameters * part.share, quantity, summed=True),
    Measure("bits", lambda part: part.group.bits if part.group.codec else None, measure),
)


# of a model alone: nothing trains LoRA on what another method left
TARGET: Category[GroupPart] = Category("LoRA target", lambda part: part.group.role or "-", always=True)


def checkpoint_document(report: CheckpointReport, verbose: bool) -> Document:
    """Make the document of a checkpoint."""
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
    """Make the document of what another method than LoRA left."""
    marks = [plural(report.tensors, "tensor"), f"{quantity(report.parameters)} parameters", types_of(report.groups)]
    return Document(
        subject=line(path(report.path), f": {report.title}", f" for {report.base_model}" if report.base_model else ""),
        facts=(line(", ".join([*marks, nbytes(report.nbytes)])),),
        tables=_tables(report.groups, verbose, COLUMNS),
        lists=tuple(told("note", report.notes, verbose)),
        verdict=(line(report.verdict),),
        verbose=verbose,
    )


def types_of(groups: Sequence[Group]) -> str:
    """Return the types or codecs, that of most parameters first."""
    kinds: Counter[str] = Counter()
    for group in groups:
        kinds[group.codec or group.dtype] += group.parameters
    found = [kind for kind, count in kinds.most_common() if count]
    return " + ".join(found[:3]) + (f" + {len(found) - 3} more" if len(found) > 3 else "")


def _tables(
    groups: Sequence[Group], verbose: bool, columns: Sequence[Category[GroupPart] | Measure[GroupPart]]
) -> tuple[TextTable, ...]:
    """Return the table of matrices, with a row for all vectors of a role; with `verbose` these have rows too."""
    vectors = [] if verbose else [group for group in groups if len(group.shape) < 2]
    parts = [part for group in groups if group not in vectors for part in group_parts(group, verbose)]
    table = make_table(
        parts,
        lambda part: part.name,
        columns,
        PRIORITY,
        title="module",
        count=lambda part: part.group.tensors * part.share,
        verbose=verbose,
    )
    rows = [_vector_row(title, each, table) for title, each in _by_role(vectors).items()]
    return (replace(table, rows=(*table.rows, *rows)),) if groups else ()


def group_parts(group: Group, verbose: bool) -> Iterator[GroupPart]:
    """Yield the names of a group, or without `verbose` as many as have each number of its ranges.

    Two ranges do not tell which of their pairs there are, if these are not all: the group is then one row of `verbose`.
    Nor is a range that of a group which has more numbers than tensors: a tensor may be called so.
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
    found: dict[str, list[Group]] = {}
    for group in vectors:
        name = group.name.rpartition(".")[2] if "." in group.name else group.name
        role = "biases" if "bias" in name else "norms" if "norm" in group.name or "ln_" in group.name else "vectors"
        found.setdefault(role, []).append(group)
    return found


def _vector_row(role: str, groups: Sequence[Group], table: TextTable) -> Row:
    """Return the row of all vectors of a role under a table's columns."""
    shapes = list(dict.fromkeys(dimensions(group.shape) for group in groups))
    types = list(dict.fromkeys(group.dtype for group in groups))
    cells = {
        "count": f"{sum(group.tensors for group in groups):,}",
        "shape": shapes[0] if len(shapes) == 1 else f"{len(shapes)} shapes",
        "stored as": "+".join(types[:2]),
        "size": nbytes(sum(group.nbytes for group in groups)),
        "parameters": quantity(sum(group.parameters for group in groups)),
        "LoRA target": "-",
        "bits": "-",
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
        yield line(f"note: {number} not counted, whose sizes the headers do not tell")
    yield from told("note", report.notes, verbose)
