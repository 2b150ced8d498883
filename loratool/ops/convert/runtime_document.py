"""Say what a program would make of an adapter as it is: a line a finding, and whether all of it is applied."""

from __future__ import annotations

from collections.abc import Iterator

from ...reports.document import Document, Line, Toned, line, path
from ...reports.numbers import plural
from ...reports.writing import command_line, listed, told
from .inspect_runtime import RuntimeInspection


def runtime_document(report: RuntimeInspection, verbose: bool) -> Document:
    """Make the document of an inspection for a runtime."""
    base = line(", with ", path(report.base)) if report.base else ()
    modules = plural(report.modules, "module")
    with_base = ["--base", report.base] if report.base else []
    convert = command_line("convert", report.path, "--for", report.runtime, *with_base)
    return Document(
        subject=line(path(report.path), f": {modules}, for {report.runtime} {report.version}", *base),
        lists=tuple(_lists(report, verbose)),
        verdict=(_verdict(report),),
        hint=f"{convert} writes what it applies" if report.findings else None,
        verbose=verbose,
    )


def _lists(report: RuntimeInspection, verbose: bool) -> Iterator[Line]:
    for found in report.findings:
        count = f" ({plural(len(found.modules), 'module')})" if found.modules else ""
        yield line(Toned("wrong: ", "bad"), f"{found.says}{count}; {found.remedy}")
        if found.modules:
            yield from listed("  in", found.modules, verbose)
    yield from told("note", report.notes, verbose)


def _verdict(report: RuntimeInspection) -> Line:
    how = "its own functions were run" if report.checked == "run" else "its source was read"
    known = f", by what is known of this version ({how})"
    if report.findings:
        return line(Toned("wrong", "bad"), f": it is not applied as it was trained{known}")
    if report.base is None:
        return line(Toned("ok", "good"), f": nothing speaks against it, its modules' names left aside{known}")
    return line(Toned("ok", "good"), f": it is applied in full{known}")
