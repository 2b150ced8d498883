"""Reports on verified models: whether a model is a merge, the wrong tensors, and a call that would be right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ..architectures.numbered_names import last_part
from ..errors import shell_word
from .parts import quantities as q
from .parts.content import Figure, Page, Sheet
from .parts.document import Document, Line, TextSpan, TextTable, line, path
from .parts.numbers import all_digits, correlation, plural, scaling, share, spread
from .parts.report import CheckReport
from .parts.rows import WORST, Category, Issue
from .parts.table import GroupColumns, make_table
from .parts.writing import command_line, labelled, listed, one_text, without_numbers


@dataclass(frozen=True)
class Misfit:
    """What was found in a wrong tensor, E = W' - W, beside the requested delta D; of many tensors from a sample.

    Attributes:
        scale: the s that makes |E - s D| least.
        cosine: of E and D.
        distance: |E - D| / |D|.
        differing: the share of the weights that differ from our merge.
        steps: how many numbers of the dtype the farthest of these is off; None if it is, or should be, not finite.
    """

    scale: float
    cosine: float
    distance: float
    differing: float
    steps: int | None


@dataclass(frozen=True)
class TensorVerdict:
    """The verdict on one tensor.

    Attributes:
        verdict: exact, rounding, wrong, or requantized for codes that no merge of ours writes, which prove nothing.
        detail: the rounding, the fault, or the origin of the codes and the share of the delta that they keep.
        misfit: of a wrong tensor under an adapter.
    """

    name: str
    verdict: str
    detail: str
    misfit: Misfit | None = None


@dataclass(frozen=True)
class VerifyReport(CheckReport):
    """The result of `verify`.

    Attributes:
        status: proven, wrong or inconclusive.
        tensors: those that the adapters change, and all that are wrong.
        untouched: how many tensors equal the base's, and should.
        rounding: the ways of rounding that were found.
        not_compared: optional buffers and pretraining heads that one of the models does not have, and companions of
            quantized weights.
        left_out: modules that --drop excluded from the adapters.
        adapters: with their weights, as words of the command line.
        notes: facts that are no warnings.
        sha256: an adapter -> the hash of its weights file.
    """

    document_function: ClassVar[str] = "verify_document"
    page_function: ClassVar[str] = "verify_page"
    rows: ClassVar[str] = "tensors"

    base: str
    merged: str
    status: str
    tensors: tuple[TensorVerdict, ...]
    exact: int
    rounded: int
    wrong: int
    untouched: int
    rounding: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    not_compared: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)

    @property
    def said_no(self) -> str | None:
        return None if self.status == "proven" else self.status


STATUS_STYLES = {"proven": "good", "wrong": "bad", "inconclusive": "attention"}

# A fault of all that is wrong -> by how much the weight is another in the call that would be right
FACTORS = {
    "the delta is applied twice, or its scale doubled": 2.0,
    "the delta is applied with half its scale": 0.5,
    "the delta is negated: subtracted": -1.0,
}

NOT_APPLIED = "the delta is not applied"

ANOTHER = "it is not this base with this adapter"


def verify_document(report: VerifyReport, verbose: bool) -> Document:
    """Return the document of a verification."""
    wrong = [each for each in report.tensors if each.verdict == "wrong"]
    coded = [each for each in report.tensors if each.verdict == "requantized"]
    kinds = {without_numbers(each.detail) for each in wrong}
    is_one = not verbose and len(wrong) == len(report.tensors) and len(kinds) == 1
    tables = [_table(rows, title, verbose) for rows, title in ((wrong, "wrong"), (coded, "requantized")) if rows]
    all_of_them = f"{len(wrong):,} of {plural(len(wrong), 'tensor')}"
    asked = [path(report.base)]
    for adapter in report.adapters:
        asked += [*line(" + "), path(adapter)]
    return Document(
        subject=_subject(report, tuple(asked)),
        facts=(line(TextSpan("wrong", "bad"), f"  {all_of_them}: {one_text([each.detail for each in wrong])}"),)
        if is_one
        else (),
        tables=tuple(tables[is_one:]),
        lists=tuple(_lists(report, verbose)),
        warnings=report.warnings,
        verdict=(_verdict(report, [] if is_one else wrong, coded, tuple(asked)),),
        hint=_hint(report, wrong, bool(coded)),
        verbose=verbose,
    )


def _subject(report: VerifyReport, asked: Line) -> Line:
    """Return the first line: an equation only once it is proven."""
    merged = path(report.merged)
    if report.status == "proven":
        return line(*asked, " = ", merged)
    return line(merged, " is not ", *asked) if report.status == "wrong" else line("is ", merged, " = ", *asked, "?")


def _table(rows: Sequence[TensorVerdict], title: str, verbose: bool) -> TextTable:
    alike: dict[str, list[str]] = {}
    for row in rows:
        alike.setdefault(without_numbers(row.detail), []).append(row.detail)
    texts = {key: one_text(details) for key, details in alike.items()}
    what: Category[TensorVerdict] = Category(
        q.WHAT, lambda row: row.detail if verbose else texts[without_numbers(row.detail)], priority=1, always=True
    )
    return make_table(rows, [what], GroupColumns(layers=2, count=3), title=title, verbose=verbose)


def _found(rows: Sequence[TensorVerdict]) -> Iterator[Line]:
    """Yield a line on what wrong tensors have instead of the delta."""
    if misfits := [row.misfit for row in rows if row.misfit]:
        scale, cosine = (
            spread([each.scale for each in misfits], scaling),
            spread([m.cosine for m in misfits], correlation),
        )
        apart = spread([each.distance for each in misfits], share)
        differing = spread([each.differing for each in misfits], share)
        steps = [each.steps for each in misfits if each.steps is not None]
        farthest = f", by up to {plural(max(steps), 'ulp')}" if steps else ""
        yield line(
            f"found: {scale} times the delta with cosine {cosine}, {apart} of its size apart; "
            f"{differing} of the weights differ{farthest}"
        )


def _lists(report: VerifyReport, verbose: bool) -> Iterator[Line]:
    yield from _found(report.tensors)
    for way in report.rounding:
        count = sum(each.verdict == "rounding" and each.detail == way for each in report.tensors)
        yield line(f"{count:,} of {plural(len(report.tensors), 'tensor')} rounded differently: {way}")
    yield from listed("missing", report.missing, verbose)
    yield from listed("extra", report.extra, verbose)
    yield from listed("not compared", report.not_compared, verbose)
    yield from listed("excluded", report.left_out, verbose)
    yield from labelled("note", report.notes, verbose)


def _verdict(report: VerifyReport, wrong: Sequence[TensorVerdict], coded: Sequence[TensorVerdict], asked: Line) -> Line:
    """Return the last line. If tensors are wrong, it has the counts that no line above has."""
    word = TextSpan(f"{report.status}:", STATUS_STYLES[report.status])
    total = len(report.tensors)
    counts = [f"{len(wrong):,} of {plural(total, 'tensor')}"] if wrong else []
    counts += [f"{report.exact:,} exact"] if report.exact else []
    counts += [f"{report.rounded:,} rounded differently"] if report.rounded else []
    counts += [f"{len(coded):,} requantized"] if coded else []
    counts += [f"{len(report.missing):,} missing"] if report.missing else []
    counts += [f"{len(report.extra):,} extra"] if report.extra else []
    counts += [f"{report.untouched:,} unchanged"] if report.untouched else []
    rest = ", ".join(counts)
    if report.status == "wrong" and not wrong and report.wrong:
        return line(word, " ", path(report.merged), " is not ", *asked, f", {rest}" if rest else "")
    if report.status == "wrong":
        return line(word, f" {rest}")
    if report.status == "inconclusive" and coded:
        return line(word, f" another program chose the codes, which prove nothing; {rest}")
    if report.status == "inconclusive":
        return line(word, f" the delta is below half an ulp of every weight; {rest}")
    right = f"{report.exact:,} of {plural(total, 'tensor')} exact"
    right += f", {report.rounded:,} right with another rounding" if report.rounded else ""
    return line(word, f" {right}, {report.untouched:,} others unchanged")


def _hint(report: VerifyReport, wrong: Sequence[TensorVerdict], is_coded: bool) -> str | None:
    """Return the call that would be right, if the faults name one."""
    if report.status == "inconclusive":
        return None if is_coded else "--allow inconclusive accepts this as proven"
    if not wrong:
        return None
    faults = {each.detail for each in wrong}
    fault = faults.pop() if len(faults) == 1 else ""
    if fault == ANOTHER:
        return f"{command_line('diff', report.base, report.merged)} shows what has changed"
    if fault in FACTORS and len(wrong) == len(report.tensors) and len(report.adapters) == 1:
        right = _weighed(report.adapters[0], FACTORS[fault])
        return command_line("verify", report.base, right, report.merged) if right else None
    kinds = {last_part(each.name) for each in wrong}
    applied = {last_part(each.name) for each in report.tensors if each.verdict != "wrong"}
    if fault == NOT_APPLIED and applied and not kinds & applied and len(kinds) <= 4:
        return f"--exclude {shell_word(','.join(sorted(kinds)))}, if you excluded them on purpose"
    return None


def _weighed(adapter: str, factor: float) -> str | None:
    """Return an adapter with its weight times a factor. None if some modules have other weights."""
    name, colon, weight = adapter.rpartition(":")
    if not colon:
        return f"{adapter}:{factor:g}"
    try:
        product = float(weight) * factor
    except ValueError:
        return None
    return name if product == 1 else f"{name}:{product:g}"


VERDICT: Category[TensorVerdict] = Category(q.VERDICT, lambda row: row.verdict, always=True)

WHAT: Category[TensorVerdict] = Category(q.WHAT, lambda row: row.detail or "-", always=True)


def verify_page(report: VerifyReport) -> Page:
    """Return the page of a verification."""
    rows = report.tensors
    columns = (VERDICT, WHAT) if any(row.detail for row in rows) else (VERDICT,)
    return Page(
        figures=tuple(_figures(report)),
        sheets=(Sheet(rows, columns, "weight", _find_issue),),
        arithmetic=(
            "exact: the bits that merge writes, for each weight the number of its dtype (or the code) nearest to the "
            "exact result of its update (W + s B A for LoRA)",
            "rounding: one known way of rounding explains all weights of the tensor",
            "requantized: another program chose the codes, so they only approximate the merge",
        ),
        hashes=report.sha256,
    )


def _find_issue(row: TensorVerdict) -> Issue | None:
    return Issue(WORST, row.detail or row.verdict) if row.verdict == "wrong" else None


def _figures(report: VerifyReport) -> Iterator[Figure]:
    coded = sum(each.verdict == "requantized" for each in report.tensors)
    yield Figure("the merge is", report.status)
    yield Figure("exact", all_digits(report.exact), f"of {plural(len(report.tensors), 'tensor')}")
    yield Figure("rounded differently", all_digits(report.rounded), "and right")
    yield Figure("wrong", all_digits(report.wrong))
    if coded:
        yield Figure("requantized", all_digits(coded))
    yield Figure("untouched", all_digits(report.untouched), "equal to the base's")
    if report.missing:
        yield Figure("missing", all_digits(len(report.missing)), "in the merged model")
    if report.extra:
        yield Figure("extra", all_digits(len(report.extra)), "in the merged model")
