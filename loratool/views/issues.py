"""What the checks find, for programs that collect it: annotations, code scanning, test reports.

Things of one kind, file and reason are one issue, as such programs show few.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .attestation import AttestationReport, deviation_words
from .diff_adapters import AdapterDiff
from .diff_headers import HeadersDiff
from .diff_models import CheckpointDiff, models_issue
from .diff_several import AdaptersDiff
from .inspect_adapter import AdapterInspection
from .inspect_files import FilesReport
from .inspect_model import MethodReport
from .inspect_runtime import RuntimeInspection
from .parts.document import escape
from .parts.numbers import share, spread
from .parts.report import Report
from .parts.writing import one_text, without_numbers
from .verify import VerifyReport

NAMED = 3  # modules or tensors in a message

# kind -> its meaning; the guide `ci` lists them
KINDS = {
    "wrong": "tensors of the merged model are not what the merge writes",
    "missing": "tensors of the base are not in the merged model",
    "extra": "tensors of the merged model are not in the base",
    "inconclusive": "nothing is wrong, but the merge cannot be proven",
    "not-as-stated": "a file, a type or an input is not as the statement says",
    "problem": "an adapter has a problem",
    "other-method": "the file is not a LoRA",
    "not-applied": "a program would not apply a part of the adapter as trained",
    "digest-differs": "a file has another digest than its signature or the hub says",
    "too-far": "modules or tensors are farther apart than the limit",
    "one-sided": "modules or tensors are on one side only",
    "not-comparable": "tensors cannot be compared",
    "warning": "a warning, which never fails a check",
}

Level = Literal["error", "warning"]


@dataclass(frozen=True)
class CheckIssue:
    """One thing that a check found.

    Attributes:
        kind: a key of KINDS.
        level: error if it is why the check failed.
        message: without the names.
        file: the path or name of the input.
        names: modules or tensors; empty if the issue is of the whole file.
    """

    kind: str
    level: Level
    message: str
    file: str
    names: tuple[str, ...]

    @property
    def text(self) -> str:
        """The message with the first names, printable and without credentials."""
        more = f" and {len(self.names) - NAMED:,} more" if len(self.names) > NAMED else ""
        return escape(f"{self.message}: {', '.join(self.names[:NAMED])}{more}" if self.names else self.message)


Found = tuple[str, str, Collection[str]]  # message, file, names


def find_issues(report: Report | None, status: str | None) -> list[CheckIssue]:
    """Return the issues of a report; of None, which an error leaves, none.

    Args:
        status: the word for a failed check. Without one no issue is an error.
    """
    if isinstance(report, HeadersDiff) and not status:  # only `status` says whether there was a limit
        return []
    return [
        CheckIssue(kind, "error" if status and kind != "warning" else "warning", message, file, tuple(names))
        for kind, find in CHECKS.get(type(report), {}).items()
        for message, file, names in find(report)
    ]


def kinds_of(report: Report | None) -> Collection[str]:
    """Return the kinds that were looked for."""
    return CHECKS.get(type(report), {})


def _of(message: str, file: str, names: Collection[str]) -> Iterator[Found]:
    if names:
        yield message, file, names


def _wrong(report: VerifyReport) -> Iterator[Found]:
    alike: dict[str, dict[str, str]] = {}
    for row in report.tensors:
        if row.verdict == "wrong":
            alike.setdefault(without_numbers(row.detail), {})[row.name] = row.detail
    for details in alike.values():
        yield one_text([*details.values()]), report.merged, tuple(details)


def _inconclusive(report: VerifyReport) -> Iterator[Found]:
    if report.status == "inconclusive":
        names = [row.name for row in report.tensors if row.verdict == "requantized"]
        why = "another program chose the codes" if names else "the delta is below half an ulp of every weight"
        yield f"the merge is not proven, {why}", report.merged, names


def _of_proof(find: Callable[[VerifyReport], Iterator[Found]]) -> Callable[[AttestationReport], Iterator[Found]]:
    return lambda report: iter(()) if report.proof is None else find(report.proof)


def _not_as_stated(report: AttestationReport) -> Iterator[Found]:
    for each in report.differences:
        file = each.name if each.what not in ("file", "dtype") else report.merged
        yield deviation_words(each, whole=True), file, [each.name] if each.what == "dtype" else ()


def _too_far(file: str, distances: Iterable[tuple[str, float | None]], limit: float | None) -> Iterator[Found]:
    if limit is not None:
        far = {name: distance for name, distance in distances if distance is not None and distance > limit}
        yield from _of(f"{spread(far.values(), share)} apart, which is above {share(limit)}", file, far)


def _not_comparable(report: CheckpointDiff) -> Iterator[Found]:
    reasons: dict[str, list[str]] = {}
    for row in report.tensors if report.above is not None else ():
        if issue := models_issue(row):
            reasons.setdefault(issue.reason, []).append(row.name)
    for reason, names in reasons.items():
        yield reason, report.b, names


def _one_sided(a: str, only_a: Collection[str], b: str, only_b: Collection[str], is_wrong: bool) -> Iterator[Found]:
    if is_wrong:
        yield from _of(f"not in {b}", a, only_a)
        yield from _of(f"not in {a}", b, only_b)


def _counts_one_sided(limit: float | None) -> bool:
    """Return whether what is on one side only, at a distance of 1, is above a limit."""
    return limit is not None and limit < 1


def _differing_headers(report: HeadersDiff) -> Iterator[Found]:
    yield from _of("another shape or type", report.b, [row.name for row in report.tensors])


PROOF: Mapping[str, Callable[[VerifyReport], Iterator[Found]]] = {
    "wrong": _wrong,
    "missing": lambda report: _of("missing", report.merged, report.missing),
    "extra": lambda report: _of("not in the base", report.merged, report.extra),
    "inconclusive": _inconclusive,
    "warning": lambda report: ((text, report.merged, ()) for text in report.warnings),
}

# class of a report -> the kinds that its command looks for, each with what finds it; others have no check
CHECKS: dict[type[Any], Mapping[str, Callable[[Any], Iterator[Found]]]] = {
    VerifyReport: PROOF,
    AttestationReport: {"not-as-stated": _not_as_stated, **{kind: _of_proof(find) for kind, find in PROOF.items()}},
    AdapterInspection: {"problem": lambda report: ((text, report.path, ()) for text in report.problems)},
    MethodReport: {"other-method": lambda report: iter([(report.verdict, report.path, ())])},
    RuntimeInspection: {
        "not-applied": lambda report: (
            (f"{each.says}; {each.remedy}", report.path, each.modules) for each in report.findings
        )
    },
    FilesReport: {
        "digest-differs": lambda report: _of(
            "another digest than in the signature or on the hub",
            report.path,
            [each.name for each in report.files if each.differs],
        )
    },
    CheckpointDiff: {
        "too-far": lambda report: _too_far(
            report.b, ((row.name, row.relative) for row in report.tensors), report.above
        ),
        "one-sided": lambda report: _one_sided(
            report.a, report.only_a, report.b, report.only_b, _counts_one_sided(report.above)
        ),
        "not-comparable": _not_comparable,
    },
    HeadersDiff: {
        "one-sided": lambda report: _one_sided(report.a, report.only_a, report.b, report.only_b, True),
        "not-comparable": _differing_headers,
    },
    AdapterDiff: {
        "too-far": lambda report: _too_far(
            report.b, ((row.name, row.relative) for row in (*report.modules, *report.values)), report.above
        )
    },
    AdaptersDiff: {
        "too-far": lambda report: _too_far(
            report.adapters[0], ((row.name, row.relative) for row in (*report.modules, *report.values)), report.above
        )
    },
}
