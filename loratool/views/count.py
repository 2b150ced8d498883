"""Reports on the number of parameters that each method of adapting a model would train: one row per method."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from .parts.document import Column, Document, Line, Row, TextTable, line, path
from .parts.numbers import nbytes, plural, quantity, share
from .parts.report import Report
from .parts.writing import labelled


@dataclass(frozen=True)
class MethodCount:
    """One method of the paper, counted for a model.

    Attributes:
        size: its rank, bottleneck, prefix length or number of layers (`measure` says which), None if none is chosen.
        parameters: trainable; 0 if the model has nothing of the kind, which `adds` then says.
        share: of the model's parameters.
        adds: what it adds at inference.
        depth: layers more in sequence.
        positions: of the context that it takes.
        fits: whether it is within `params`, None without; the size is the largest that is, else the least.
    """

    method: str
    title: str
    measure: str
    size: int | None
    parameters: int
    nbytes: int
    share: float
    adds: str
    depth: int
    positions: int
    fits: bool | None


@dataclass(frozen=True)
class CountReport(Report):
    """The result of `count`.

    Attributes:
        source: `config` or `checkpoint`.
        dtype: the model's, of all bytes here.
        layers, width: of the largest stack of blocks, 0 without one.
        targets: what LoRA changes, names that differ in numbers as one.
    """

    document_function: ClassVar[str] = "count_document"
    rows: ClassVar[str] = "methods"

    path: str
    source: str
    model_type: str | None
    parameters: int
    nbytes: int
    dtype: str
    layers: int
    width: int
    tied: bool
    rank: int | None
    params: int | None
    matrices: int
    targets: tuple[str, ...]
    methods: tuple[MethodCount, ...]
    notes: tuple[str, ...] = ()


# method -> what it adds at inference, where neither layers nor positions tell it
ADDS = {
    "full": "a model for each task",
    "top-layers": "layers for each task",
    "bitfit": "biases for each task",
    "lora": "nothing once merged",
}

LAYERS = re.compile(r".*?\.(\{[^}]*\}|\d+)\.(.+)")

RANGE = re.compile(r"\{[^}]*\}")

FITS = {True: "yes", False: "no", None: "-"}


def count_document(report: CountReport, verbose: bool) -> Document:
    """Return the document of a count."""
    marks = [report.model_type or "unknown family"]
    marks += [f"{plural(report.layers, 'layer')} of width {report.width:,}"] if report.layers else []
    marks += [f"{quantity(report.parameters)} parameters", report.dtype, *(["tied head"] if report.tied else [])]
    source = "its config" if report.source == "config" else "its headers"
    return Document(
        subject=line(path(report.path), f": {', '.join(marks)} (from {source})"),
        tables=(_table(report, verbose),),
        lists=tuple(_notes(report, verbose)),
        verdict=tuple(_verdict(report)),
        verbose=verbose,
    )


def _table(report: CountReport, verbose: bool) -> TextTable:
    columns = [Column("method", right=False), Column("size", 3, right=False), Column("trains", 0), Column("share", 1)]
    columns += [Column("bytes", 4)] + [Column("fits", 2, right=False)] * (report.params is not None)
    columns += [Column("at inference", 5, right=False)]
    return TextTable(
        tuple(columns),
        tuple(
            Row(
                (
                    each.title,
                    _size(each),
                    quantity(each.parameters),
                    share(each.share),
                    nbytes(each.nbytes),
                    *([FITS[each.fits]] if report.params is not None else []),
                    each.adds if verbose else _adds(each),
                )
            )
            for each in report.methods
            if each.parameters
        ),
    )


def _size(method: MethodCount) -> str:
    if not method.size:
        return ""
    return plural(method.size, "layer") if method.measure == "layers" else f"{method.measure} {method.size:,}"


def _adds(method: MethodCount) -> str:
    if method.positions:
        return plural(method.positions, "position") + (" a layer" if method.method == "prefix-layer" else "")
    if method.depth:
        return f"{plural(method.depth, 'layer')} deeper"
    return ADDS[method.method]


def _notes(report: CountReport, verbose: bool) -> Iterator[Line]:
    idle = [f"{each.title} trains nothing: {each.adds}" for each in report.methods if not each.parameters]
    yield from labelled("LoRA on", report.targets if verbose else _places(report.targets), verbose)
    yield from labelled("note", [*report.notes, *idle], verbose)


def _places(targets: Iterable[str]) -> list[str]:
    """Return the targets with their layers, as --target and --layers take them."""
    modules: dict[str, dict[str, None]] = {}
    for target in targets:
        layers, pattern = _in_layers(target)
        modules.setdefault(layers, {})[pattern] = None
    where = {layers: f" in layer{'' if layers.isdecimal() else 's'} {layers}" if layers else "" for layers in modules}
    return [", ".join(names) + where[layers] for layers, names in modules.items()]


def _in_layers(target: str) -> tuple[str, str]:
    """Return the layers of a target and the pattern for it there. A target outside the layers has none."""
    match = LAYERS.fullmatch(target)
    layers, path = match.groups() if match else ("", target)
    role = path.endswith("]") and path[path.index("[") + 1 : -1]
    pattern = f"*.{RANGE.sub('*', path)}" if "{" in path else path
    return layers.strip("{}").replace("..", "-"), role or pattern


def _verdict(report: CountReport) -> Iterator[Line]:
    lora = next(each for each in report.methods if each.method == "lora")
    where = f"in {plural(report.matrices, 'matrix', 'matrices')}"
    of = f"of {quantity(report.parameters)} parameters, {share(lora.share)}"
    yield line(f"LoRA of rank {lora.size} {where} trains {quantity(lora.parameters)} {of}")
