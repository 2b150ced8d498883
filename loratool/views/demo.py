"""Report on the files of `demo`, with commands to try on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from .parts.document import Document, Line, line, path
from .parts.numbers import nbytes
from .parts.report import WritingReport
from .parts.writing import command_line, dry_run_mark, outcome


@dataclass(frozen=True)
class DemoPart:
    """A model or an adapter of the demo.

    Attributes:
        path: in the folder.
        what: what it is, in a few words.
    """

    path: str
    what: str
    nbytes: int


@dataclass(frozen=True)
class DemoReport(WritingReport):
    """The result of `demo`."""

    document_function: ClassVar[str] = "demo_document"
    rows: ClassVar[str] = "parts"

    out: str
    dry_run: bool
    nbytes: int
    parts: tuple[DemoPart, ...]


def demo_document(report: DemoReport, verbose: bool) -> Document:
    """Return the document of a demo."""
    return Document(
        subject=line("small models and adapters -> ", path(report.out), dry_run_mark(report)),
        lists=(*_parts(report), *_commands(report)),
        verdict=(outcome(report.out, report.dry_run, nbytes(report.nbytes)),),
        verbose=verbose,
    )


def _parts(report: DemoReport) -> Iterator[Line]:
    width = max(len(each.path) for each in report.parts)
    for each in report.parts:
        yield line(path(each.path), " " * (width - len(each.path)), f"  {each.what}")


def _commands(report: DemoReport) -> Iterator[Line]:
    """Yield three commands to try."""
    base, adapter = (f"{report.out.rstrip('/')}/{name}" for name in ("base", "adapter"))
    yield line("try  ", command_line("inspect", adapter, "--base", base))
    yield line("     ", command_line("merge", base, adapter, "-o", "merged"))
    yield line("     ", command_line("verify", base, adapter, "merged"))
