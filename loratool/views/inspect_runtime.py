"""Reports on how a runtime would apply an unconverted adapter: a line for each finding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ..architectures.runtimes.image_programs import IMAGE_RUNTIMES
from .parts.document import Document, Line, TextSpan, line, path
from .parts.numbers import plural
from .parts.report import CheckReport
from .parts.writing import command_line, labelled, listed


@dataclass(frozen=True)
class Finding:
    """What a runtime does with a part of the unconverted adapter.

    Attributes:
        what: one of FINDINGS.
        outcome: a key of OUTCOMES.
        says: a sentence.
        remedy: the output of `convert --for` instead, or the reason why there is none.
        modules: the modules concerned, by the adapter's names; empty for all.
    """

    what: str
    outcome: str
    says: str
    remedy: str
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class RuntimeInspection(CheckReport):
    """The result of `inspect --for`: what a runtime does with an unconverted adapter.

    Attributes:
        version: of the runtime, whose facts these are.
        checked: whether its functions were run or its source was read.
        modules: how many the adapter has.
        findings: parts that would not be applied as trained; empty if the runtime applies the full adapter.
        notes: facts that were not compared.
    """

    document_function: ClassVar[str] = "runtime_document"
    rows: ClassVar[str] = "findings"

    path: str
    runtime: str
    version: str
    checked: str
    base: str | None
    modules: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    kind: str = "runtime"

    @property
    def said_no(self) -> str | None:
        return "not applied" if self.findings else None


def runtime_document(report: RuntimeInspection, verbose: bool) -> Document:
    """Return the document of an inspection for a runtime."""
    base = line(", with ", path(report.base)) if report.base else ()
    modules = plural(report.modules, "module")
    with_base = ["--base", report.base] if report.base else []
    convert = command_line("convert", report.path, "--for", report.runtime, *with_base)
    return Document(
        subject=line(path(report.path), f": {modules}, for {report.runtime} {report.version}", *base),
        lists=tuple(_lists(report, verbose)),
        verdict=(_verdict(report),),
        hint=f"{convert} writes an adapter that it applies" if report.findings else None,
        verbose=verbose,
    )


def _lists(report: RuntimeInspection, verbose: bool) -> Iterator[Line]:
    for finding in report.findings:
        count = f" ({plural(len(finding.modules), 'module')})" if finding.modules else ""
        yield line(TextSpan("wrong: ", "bad"), f"{finding.says}{count}; {finding.remedy}")
        if finding.modules:
            yield from listed("  in", finding.modules, verbose)
    yield from labelled("note", report.notes, verbose)


def _verdict(report: RuntimeInspection) -> Line:
    how = "we ran its functions" if report.checked == "run" else "we read its source"
    known = f", as far as this version is known ({how})"
    if report.findings:
        return line(TextSpan("wrong", "bad"), f": it is not applied as trained{known}")
    if report.base is None and report.runtime not in IMAGE_RUNTIMES:  # whose names the families' tables have
        return line(TextSpan("ok", "good"), f": no problem found, but module names are not checked{known}")
    return line(TextSpan("ok", "good"), f": it is applied in full{known}")
