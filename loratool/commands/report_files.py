"""Write a report as a page, and read it back from a page or from the output of `--json`.

Reports are named as text, so that commands that only read headers start without torch.
"""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, cast

from ..durable.fileio import file_length, open_for_reading, read_into, size, write_at
from ..durable.partial import partial_file
from ..errors import InputError, MachineError, NeedsFlag, UsageError, brief, install_remedy
from ..files.containers.safetensors_file import MAX_PARSED, parse_json
from ..files.hub.cache import place_named
from ..files.output.output import naming_output
from ..files.output.paths import check_place
from ..views.parts.envelope import BEGIN, REPORT_TAG, SCHEMA_VERSION, envelope
from ..views.parts.rebuilt import OTHER_VERSION, read_at, read_items, rebuild
from ..views.parts.report import Report
from .arguments import ArgumentType, StrPath, checked

# command -> what its report can be, as names in the package
REPORTS = {
    "combine": ("views.combine.CombineReport",),
    "apply": ("views.apply.ApplyReport",),
    "convert": (
        "views.convert.ConvertReport",
        "views.convert_model.CheckpointConvertReport",
        "views.metadata.MetadataReport",
    ),
    "count": ("views.count.CountReport",),
    "demo": ("views.demo.DemoReport",),
    "diff": (
        "views.diff_adapters.AdapterDiff",
        "views.diff_several.AdaptersDiff",
        "views.diff_models.CheckpointDiff",
        "views.diff_spectra.SpectraDiff",
        "views.diff_headers.HeadersDiff",
    ),
    "env": ("views.env.EnvReport",),
    "extract": ("views.extract.ExtractReport",),
    "guide": ("commands.guide.GuideReport",),
    "init": ("views.init.InitReport",),
    "inspect": (
        "views.inspect_model.CheckpointReport",
        "views.inspect_adapter.AdapterInspection",
        "views.inspect_model.MethodReport",
        "views.inspect_patch.PatchInspection",
        "views.inspect_delta.DeltaInspection",
        "views.inspect_files.FilesReport",
        "views.inspect_runtime.RuntimeInspection",
        "views.inspect_spectra.SpectraReport",
    ),
    "merge": ("views.merge.MergeReport",),
    "patch": ("views.patch.PatchReport", "views.foreign_patch.ForeignPatchReport"),
    "recover": ("views.recover.RecoverReport",),
    "resize": ("views.resize.ResizeReport",),
    "run": ("views.run.RunReport",),
    "unmerge": ("views.unmerge.UnmergeReport",),
    "verify": ("views.verify.VerifyReport", "views.attestation.AttestationReport"),
}

PAGES = (".html", ".htm")

OTHER_PAGE = "choose another file with --html"


def report_classes(verb: str) -> tuple[type[Any], ...]:
    """Return the classes of reports of a command, a key of REPORTS."""
    homes = (name.rpartition(".") for name in REPORTS[verb])
    return tuple(getattr(import_module(f"..{module}", __package__), name) for module, _, name in homes)


def _verb_of(kind: type) -> str | None:
    """Return the command that makes reports of a class. None if no command does."""
    name = f"{kind.__module__.partition('.')[2]}.{kind.__name__}"
    return next((verb for verb, names in REPORTS.items() if name in names), None)


def _parse_report(value: object) -> Report:
    """Return a report of a command. Raise UsageError for any other value."""
    if not isinstance(value, Report) or _verb_of(type(value)) is None:
        raise UsageError(f"{brief(value)} is not {REPORT_TAKEN}")
    return value


REPORT_TAKEN = "a report that a command returned"

CommandReport = Annotated[Report, ArgumentType(REPORT_TAKEN, _parse_report)]


@checked
def check_page_path(path: StrPath) -> None:
    """Refuse a path at which no page can be written, before any work.

    Raises:
        UsageError: its name has another ending than .html or .htm, there is no folder around it that takes files, or
            what is there is no page of ours, which alone is replaced.
        MachineError: the package that makes pages is not installed.
    """
    place = Path(path)
    if place.suffix.lower() not in PAGES:
        raise UsageError(
            f"a page must end in .html, not {place.suffix or 'without a suffix'}", culprit=str(path), remedy=NAME_A_PAGE
        )
    if find_spec("jinja2") is None:
        raise MachineError("a page needs Jinja2", culprit="--html", remedy=install_remedy("html"))
    check_place(place, is_file=True, remedy=OTHER_PAGE)
    if os.path.lexists(place):
        with open_for_reading(place) as file:
            begin = file.read(len(BEGIN))
        if begin != BEGIN.encode():
            what = "exists already and is not a page of a report; only these are replaced"
            raise UsageError(what, culprit=str(path), remedy=OTHER_PAGE)


NAME_A_PAGE = "for example report.html"


@checked
def write_report(report: CommandReport, path: StrPath, *, command: str | None = None, status: str | None = None) -> int:
    """Write a report's page as one self-contained file, and return its size in bytes.

    The write is atomic. The same arguments make the same bytes. An existing page is replaced.

    Args:
        path: ends in .html or .htm.
        command: the command line that made the report, to be shown.
        status: what a check found that said no, the `status` of what --json prints, if not the report says it.

    Raises:
        UsageError, MachineError: as `check_page_path`.
    """
    check_page_path(path)
    from ..views.page.render import render

    value = envelope(_verb_of(type(report)), asdict(report), status=status or report.said_no)  # type: ignore[call-overload]
    page, place = render(report, value, command).encode(), Path(path)
    try:
        with naming_output(place), partial_file(place) as file:
            write_at(file, memoryview(page), 0)
    except NeedsFlag as error:  # which a page has none of
        raise UsageError(error.message, culprit=str(path), remedy=OTHER_PAGE) from error
    return len(page)


MAX_FILE = 100_000_000  # bytes of a page, or of JSON

MAX_MEMORY = 2 * MAX_PARSED  # bytes, about, that the JSON may take: a report of 130,000 tensors

END = 4096  # bytes at the begin and the end of a file in which there may be blanks alone

ANOTHER_FILE = "give a page written by --html, or a file with the output of --json"


@checked
def read_report(path: StrPath) -> Report:
    """Read the report of a page that `write_report` or `--html` wrote, or of a file with the output of `--json`.

    It is equal to the one that the command returned. Values are checked against the types of their fields, but not
    against each other: a report that somebody altered may fail when it is shown.

    Raises:
        InputError: the file holds no report, or not all of it; the call that it is of failed; or its report has other
            fields than those of this version of loratool.
    """
    place = place_named(path)
    value = parse_json(_find_json(_read_file(place), place), place, finite=True, most=MAX_MEMORY, halves=True)
    _check_envelope(value, place)
    try:
        return cast(Report, read_at(partial(_read_one, value["verb"]), f"{path}: report", value["report"]))
    except RecursionError as error:
        raise InputError("has reports nested too deeply", culprit=str(path)) from error


def _read_file(path: Path) -> bytearray:
    with open_for_reading(path) as file:
        nbytes = file_length(file)
        if nbytes > MAX_FILE:
            why = f"is {size(nbytes)}; a page of a report has at most {size(MAX_FILE)}"
            raise InputError(why, culprit=str(path), remedy=ANOTHER_FILE)
        data = bytearray(nbytes)
        read_into(file, memoryview(data), 0)
    return data


def _find_json(data: bytearray, path: Path) -> bytes:
    """Return the JSON in a page, or of a JSON file."""
    if data[:END].lstrip(b"\xef\xbb\xbf\r\n\t ").startswith(b"{"):
        return bytes(data)
    tag = REPORT_TAG.encode()
    position = data.find(tag)
    if position < 0:
        raise InputError("holds no report", culprit=str(path), remedy=ANOTHER_FILE)
    start = position + len(tag)
    if data.find(tag, start) >= 0:
        raise InputError("holds more than one report", culprit=str(path), remedy=ANOTHER_FILE)
    end = data.find(b"<", start)  # which the JSON has not
    if data[end : end + 9] != b"</script>" or not data[-END:].rstrip().endswith(b"</html>"):
        raise InputError("is truncated or was edited", culprit=str(path), remedy="fetch it again")
    return bytes(memoryview(data)[start:end])


def _check_envelope(value: dict[str, Any], path: Path) -> None:
    """Refuse an object that is not the output of a call that made a report."""
    schema, verb, status = (value.get(key) for key in ("schema", "verb", "status"))
    if type(schema) is not int:
        raise InputError("holds no report", culprit=str(path), remedy=ANOTHER_FILE)
    if schema != SCHEMA_VERSION:
        why = f"has schema {brief(schema)}, but this loratool reads schema {SCHEMA_VERSION}"
        raise InputError(why, culprit=str(path), remedy=OTHER_VERSION)
    if "error" in value:
        raise InputError("is the output of a call that failed, and holds no report", culprit=str(path))
    if verb == "guide":
        raise InputError("is a guide, not a report", culprit=str(path))
    are_texts = isinstance(verb, str) and isinstance(status, str | None)
    expected = envelope(verb, value.get("report"), status=status) if are_texts else {}
    if value != expected or any(
        type(value[key]) is not type(expected[key]) for key in expected
    ):  # 1 is true, but for that
        raise InputError("has a header that loratool does not write", culprit=str(path), remedy=OTHER_VERSION)


def _read_one(verb: str, value: object) -> Any:
    """Return the report of a command. The reports of a recipe's steps have the classes of their commands."""
    if verb not in REPORTS:
        raise InputError(f"is a report of {brief(verb)}, which is not a command of this loratool", remedy=OTHER_VERSION)
    report = rebuild(report_classes(verb), value)
    if verb != "run":
        return report
    return replace(report, steps=read_at(partial(read_items, _read_step), "steps", list(report.steps)))


def _read_step(step: Any) -> Any:
    if step.report is None:
        return step
    return replace(step, report=read_at(partial(_read_one, step.command), "report", step.report))
