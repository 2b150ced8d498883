"""Say whether a model is a merge, which of its tensors are not, and in which call they would be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...architectures.numbered_names import last_part
from ...errors import shell_word
from ...reports.document import Document, Line, TextTable, Toned, line, path
from ...reports.numbers import plural
from ...reports.rows import Category
from ...reports.table import make_table
from ...reports.writing import command_line, listed, one_text, told, without_numbers
from .command import TensorVerdict, VerifyReport

SIGNS = {"proven": "=", "wrong": "!=", "inconclusive": "?="}  # between what was asked for and the merged model


TONES = {"proven": "good", "wrong": "bad", "inconclusive": "attention"}


# A fault of all that is wrong -> by how much the weight is another in the call that would be right
FACTORS = {
    "the delta is applied twice, or its scale doubled": 2.0,
    "the delta is applied with half its scale": 0.5,
    "the delta is negated: subtracted": -1.0,
}


NOT_APPLIED = "the delta is not applied"


ANOTHER = "it is not this base with this adapter"


def verify_document(report: VerifyReport, verbose: bool) -> Document:
    """Make the document of a verification."""
    wrong = [each for each in report.tensors if each.verdict == "wrong"]
    coded = [each for each in report.tensors if each.verdict == "requantized"]
    kinds = {without_numbers(each.detail) for each in wrong}
    is_one = not verbose and len(wrong) == len(report.tensors) and len(kinds) == 1
    tables = [_table(rows, title, verbose) for rows, title in ((wrong, "wrong"), (coded, "requantized")) if rows]
    asked = [path(report.base)]
    for adapter in report.adapters:
        asked += [*line(" + "), path(adapter)]
    return Document(
        subject=line(*asked, f" {SIGNS[report.status]} ", path(report.merged)),
        facts=(line(Toned("wrong", "bad"), f"  {_all_of(wrong)}: {one_text([each.detail for each in wrong])}"),)
        if is_one
        else (),
        tables=tuple(tables[is_one:]),
        lists=tuple(_lists(report, verbose)),
        warnings=report.warnings,
        verdict=(_verdict(report, [] if is_one else wrong, coded, tuple(asked)),),
        hint=_hint(report, wrong, bool(coded)),
        verbose=verbose,
    )


def _all_of(tensors: Sequence[TensorVerdict]) -> str:
    return f"{len(tensors):,} of {plural(len(tensors), 'tensor')}"


def _table(rows: Sequence[TensorVerdict], title: str, verbose: bool) -> TextTable:
    alike: dict[str, list[str]] = {}
    for row in rows:
        alike.setdefault(without_numbers(row.detail), []).append(row.detail)
    texts = {key: one_text(details) for key, details in alike.items()}
    what: Category[TensorVerdict] = Category(
        "what", lambda row: row.detail if verbose else texts[without_numbers(row.detail)], always=True
    )
    return make_table(rows, lambda row: row.name, [what], ("what", "layers", "count"), title=title, verbose=verbose)


def _lists(report: VerifyReport, verbose: bool) -> Iterator[Line]:
    for way in report.rounding:
        count = sum(each.verdict == "rounding" and each.detail == way for each in report.tensors)
        yield line(f"{count:,} of {plural(len(report.tensors), 'tensor')} rounded otherwise: {way}")
    yield from listed("missing", report.missing, verbose)
    yield from listed("extra", report.extra, verbose)
    yield from listed("not compared", report.not_compared, verbose)
    yield from listed("left out", report.left_out, verbose)
    yield from told("note", report.notes, verbose)


def _verdict(report: VerifyReport, wrong: Sequence[TensorVerdict], coded: Sequence[TensorVerdict], asked: Line) -> Line:
    """Return the last line; of what is `wrong`, the counts that no line above tells yet."""
    word = Toned(f"{report.status}:", TONES[report.status])
    total = len(report.tensors)
    counts = [f"{len(wrong):,} of {plural(total, 'tensor')}"] if wrong else []
    counts += [f"{report.exact:,} exact"] if report.exact else []
    counts += [f"{report.rounded:,} rounded otherwise"] if report.rounded else []
    counts += [f"{len(coded):,} requantized"] if coded else []
    counts += [f"{len(report.missing):,} missing"] if report.missing else []
    counts += [f"{len(report.extra):,} extra"] if report.extra else []
    counts += [f"{report.untouched:,} are the base's"] if report.untouched else []
    rest = ", ".join(counts)
    if report.status == "wrong" and not wrong and report.wrong:
        return line(word, " ", path(report.merged), " is not ", *asked, f", {rest}" if rest else "")
    if report.status == "wrong":
        return line(word, f" {rest}")
    if report.status == "inconclusive" and coded:
        return line(word, f" codes that another program chose show the merge only about; {rest}")
    if report.status == "inconclusive":
        return line(word, f" the delta is below half an ulp of every weight; {rest}")
    right = f"{report.exact:,} of {plural(total, 'tensor')} exact"
    right += f", {report.rounded:,} right with another rounding" if report.rounded else ""
    return line(word, f" {right}, {report.untouched:,} others are the base's")


def _hint(report: VerifyReport, wrong: Sequence[TensorVerdict], is_coded: bool) -> str | None:
    """Return the call that would be right, where the faults tell one."""
    if report.status == "inconclusive":
        return None if is_coded else "--allow inconclusive takes that for proven"
    if not wrong:
        return None
    faults = {each.detail for each in wrong}
    fault = faults.pop() if len(faults) == 1 else ""
    if fault == ANOTHER:
        return f"{command_line('diff', report.base, report.merged)} shows what was changed"
    if fault in FACTORS and len(wrong) == len(report.tensors) and len(report.adapters) == 1:
        right = _weighed(report.adapters[0], FACTORS[fault])
        return command_line("verify", report.base, right, report.merged) if right else None
    kinds = {last_part(each.name) for each in wrong}
    applied = {last_part(each.name) for each in report.tensors if each.verdict != "wrong"}
    if fault == NOT_APPLIED and applied and not kinds & applied and len(kinds) <= 4:
        return f"--exclude {shell_word(','.join(sorted(kinds)))}, if they were left out on purpose"
    return None


def _weighed(adapter: str, factor: float) -> str | None:
    """Return an adapter with its weight times a factor; None where modules have weights of their own."""
    name, colon, weight = adapter.rpartition(":")
    if not colon:
        return f"{adapter}:{factor:g}"
    try:
        product = float(weight) * factor
    except ValueError:
        return None
    return name if product == 1 else f"{name}:{product:g}"
