"""Report on a statement that was held against its files: what differs from it, and the proof of its merge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from .parts.document import Document, Line, TextSpan, line, path
from .parts.numbers import plural
from .parts.report import CheckReport
from .parts.writing import labelled
from .verify import VerifyReport


@dataclass(frozen=True)
class Deviation:
    """What is not as a statement says.

    Attributes:
        what: file for one of the merged model, dtype for one of its weights, else the input: base, adapter, initial, or
            the config of one of the last two.
        name: the file, the weight, or the path of the input.
        stated: the digest or dtype in the statement; None for a file of weights that it does not name.
        found: that of the files; None for a file that is missing.
    """

    what: str
    name: str
    stated: str | None
    found: str | None


@dataclass(frozen=True)
class AttestationReport(CheckReport):
    """The result of `verify --attestation`.

    Attributes:
        files: how many files of the merged model the statement names.
        inputs: how many inputs it names.
        differences: between statement and files; empty if all is as stated.
        proof: the verification of the merge that it states; None if the files already differ.
    """

    document_function: ClassVar[str] = "attestation_document"
    rows: ClassVar[str] = "differences"

    attestation: str
    base: str
    adapters: tuple[str, ...]
    merged: str
    files: int
    inputs: int
    differences: tuple[Deviation, ...]
    proof: VerifyReport | None

    @property
    def said_no(self) -> str | None:
        if self.differences:
            return "not as stated"
        return None if self.proof is None else self.proof.said_no


def attestation_document(report: AttestationReport, verbose: bool) -> Document:
    """Return the document of a statement held against its files."""
    if report.differences or report.proof is None:
        first, *others = report.differences
        return Document(
            subject=line(path(report.merged), ", stated by ", path(report.attestation)),
            lists=tuple(_lists(report, verbose)),
            verdict=(
                line(
                    TextSpan("not as stated:", "bad"),
                    f" {deviation_words(first)}",
                    f", and {len(others)} more" if others else "",
                ),
            ),
            verbose=verbose,
        )
    proof = report.proof.document(verbose)
    held = f" {plural(report.files, 'file')} and {plural(report.inputs, 'input')} have the digests of "
    mark = TextSpan("as stated:", "good")
    return replace(proof, verdict=(line(mark, held, path(report.attestation)), *proof.verdict))


def _lists(report: AttestationReport, verbose: bool) -> Iterator[Line]:
    if report.differences[1:] or verbose:
        yield from labelled("differs", [deviation_words(each, whole=verbose) for each in report.differences], verbose)


def deviation_words(each: Deviation, whole: bool = False) -> str:
    """Return a difference in words; digests in full or by their first digits."""
    if each.stated is None:
        return f"{each.name} is of weights or an adapter, and the statement does not name it"
    if each.what == "dtype":
        return f"{each.name} is {each.found}, and {each.stated} is stated"
    where = each.name if each.what == "file" else f"{each.what} {each.name}"
    if each.found is None:
        return f"{where} is missing" if each.what == "file" else f"{where} has no digest of the stated kind"
    stated, found = (digest if whole else f"{digest[:12]}.." for digest in (each.stated, each.found))
    return f"{where} has sha256 {found}, and {stated} is stated"
