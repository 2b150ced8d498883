"""Write a report as a page, and read it back from a page or from what `--json` printed.

Reports are named as text, so that what needs headers alone stays without torch.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from ..errors import MachineError, NeedsFlag, UsageError, brief
from ..files.fileio import open_for_reading, write_at
from ..files.output import naming_output
from ..files.output_paths import check_place
from ..files.partial import partial_file
from ..reports.envelope import BEGIN, envelope
from ..reports.report import Report
from .arguments import ArgumentType, StrPath, checked

# command -> what its report can be, as names in this folder
REPORTS = {
    "combine": ("combine.command.CombineReport",),
    "convert": (
        "convert.command.ConvertReport",
        "convert.checkpoint.CheckpointConvertReport",
        "convert.metadata.MetadataReport",
    ),
    "count": ("count.command.CountReport",),
    "diff": (
        "diff.adapters.AdapterDiff",
        "diff.several.AdaptersDiff",
        "diff.models.CheckpointDiff",
        "diff.spectra.SpectraDiff",
    ),
    "extract": ("extract.command.ExtractReport",),
    "guide": ("guide.GuideReport",),
    "init": ("init.command.InitReport",),
    "inspect": (
        "inspect.command.CheckpointReport",
        "inspect.adapter.AdapterInspection",
        "inspect.command.MethodReport",
        "convert.inspect_runtime.RuntimeInspection",
        "inspect.spectra.SpectraReport",
    ),
    "merge": ("merge.report.MergeReport",),
    "resize": ("resize.command.ResizeReport",),
    "run": ("run.command.RunReport",),
    "unmerge": ("unmerge.command.UnmergeReport",),
    "verify": ("verify.command.VerifyReport",),
}


PAGES = (".html", ".htm")


OTHER_PAGE = "name another page with --html"


def report_classes(verb: str) -> tuple[type[Any], ...]:
    """Return what the report of a command, a key of REPORTS, can be."""
    homes = (name.rpartition(".") for name in REPORTS[verb])
    return tuple(getattr(import_module(f".{module}", __package__), name) for module, _, name in homes)


def _verb_of(kind: type) -> str | None:
    """Return the command that makes reports of a class; None if none does."""
    name = f"{kind.__module__.removeprefix(f'{__package__}.')}.{kind.__name__}"
    return next((verb for verb, names in REPORTS.items() if name in names), None)


def _parse_report(value: object) -> Report:
    """Return a report that a command makes; any other value raises UsageError."""
    if not isinstance(value, Report) or _verb_of(type(value)) is None:
        raise UsageError(f"{brief(value)} is not {REPORT_TAKEN}")
    return value


REPORT_TAKEN = "a report that a command returned"


CommandReport = Annotated[Report, ArgumentType(REPORT_TAKEN, _parse_report)]


@checked
def check_page_path(path: StrPath) -> None:
    """Refuse a path at which no page can be written, before anything is computed for it.

    Raises:
        UsageError: its name has another ending than .html or .htm, there is no folder around it that takes files, or
            what is there is no page of ours, which alone is replaced.
        MachineError: the package that makes pages is not installed.
    """
    place = Path(path)
    if place.suffix.lower() not in PAGES:
        raise UsageError(f"{place.suffix or 'no ending'} is no name for a page", culprit=str(path), remedy=NAME_A_PAGE)
    if find_spec("jinja2") is None:
        raise MachineError("a page needs Jinja2", culprit="--html", remedy="pip install 'loratool[html]'")
    check_place(place, is_file=True, remedy=OTHER_PAGE)
    if os.path.lexists(place):
        with open_for_reading(place) as file:
            begin = file.read(len(BEGIN))
        if begin != BEGIN.encode():
            what = "exists already and is no page of a report, which alone is replaced"
            raise UsageError(what, culprit=str(path), remedy=OTHER_PAGE)


NAME_A_PAGE = "name it as report.html"


@checked
def write_report(report: CommandReport, path: StrPath, *, command: str | None = None, status: str | None = None) -> int:
    """Write a report's page, one file that needs no other; return its bytes.

    The file is there whole or not at all, and the same for the same arguments. A page that is there is replaced.

    Args:
        path: ends in .html or .htm.
        command: the command line that made the report, to be shown.
        status: what a check found that said no, the `status` of what --json prints.

    Raises:
        UsageError, MachineError: as `check_page_path`.
    """
    check_page_path(path)
    from ..reports.page.render import render

    value = envelope(_verb_of(type(report)), asdict(report), status=status)  # type: ignore[call-overload]
    page, place = render(report, value, command).encode(), Path(path)
    try:
        with naming_output(place), partial_file(place) as file:
            write_at(file, memoryview(page), 0)
    except NeedsFlag as error:  # which a page has none of
        raise UsageError(error.message, culprit=str(path), remedy=OTHER_PAGE) from error
    return len(page)
