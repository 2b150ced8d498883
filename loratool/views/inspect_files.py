"""Report on the hashes of whole files, beside those in a signature and those that the hub lists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from .parts.document import Document, Line, TextSpan, line, path
from .parts.numbers import nbytes, plural
from .parts.report import CheckReport
from .parts.writing import digest_line

SHOWN = 12  # files without --verbose; those that differ come first


@dataclass(frozen=True)
class FileHash:
    """A file of a model or an adapter.

    Attributes:
        nbytes, sha256: of the whole file; None if it is signed and missing.
        signature: same or differs, beside the digest in the signature; None if that does not have the file.
        hub: the same beside the digest that the hub lists; None if it lists none, as for small files.
    """

    name: str
    nbytes: int | None
    sha256: str | None
    signature: str | None
    hub: str | None

    @property
    def differs(self) -> bool:
        return "differs" in (self.signature, self.hub)


@dataclass(frozen=True)
class FilesReport(CheckReport):
    """The result of `inspect --digest --files`.

    Attributes:
        digest: the sha256 of all tensors (`files.digest`).
        signature: the file of a signature by OpenSSF model-signing that is beside; it is not verified.
        hub: the name on the hub, with its commit, of files in the hub's cache.
    """

    document_function: ClassVar[str] = "files_document"
    rows: ClassVar[str] = "files"

    path: str
    digest: str
    files: tuple[FileHash, ...]
    signature: str | None
    hub: str | None
    kind: str = "files"

    @property
    def said_no(self) -> str | None:
        return "differs" if any(each.differs for each in self.files) else None


def files_document(report: FilesReport, verbose: bool) -> Document:
    """Return the document of hashed files."""
    total = sum(each.nbytes or 0 for each in report.files)
    return Document(
        subject=line(path(report.path), f": {plural(len(report.files), 'file')}, {nbytes(total)}"),
        lists=tuple(_lists(report, verbose)),
        verdict=tuple(_verdict(report)),
        verbose=verbose,
    )


def _lists(report: FilesReport, verbose: bool) -> Iterator[Line]:
    rows = sorted(report.files, key=lambda each: not each.differs)
    for each in rows if verbose else rows[:SHOWN]:
        where = (("signature", each.signature, "signed"), ("hub", each.hub, "on the hub"))
        words = [f"as {said}" if value == "same" else f"not as {said}" for _, value, said in where if value]
        if report.signature and not each.signature:
            words.append("not signed")
        style = "bad" if each.differs else ""
        told = TextSpan(f"  {', '.join(words)}" if words else "", style)
        yield line(f"{each.sha256 or 'missing'.ljust(64)}  {each.name}", told)
    if len(rows) > SHOWN and not verbose:
        yield line(f"and {len(rows) - SHOWN:,} more: -v shows them")
    yield from digest_line(report.digest)


def _verdict(report: FilesReport) -> Iterator[Line]:
    """Yield a line for the signature and one for the hub. To compare digests is not to verify a signature."""
    beside = (
        ("signature", report.signature, "as signed", "model_signing verifies whose signature it is"),
        ("hub", report.hub, "as on the hub", ""),
    )
    for name, source, good, remark in beside:
        if source is None:
            continue
        said = [(each.name, getattr(each, name)) for each in report.files]
        same, wrong = (sum(value == word for _, value in said) for word in ("same", "differs"))
        first = next((each for each, value in said if value == "differs"), "")
        if wrong:
            more = f" and {wrong - 1} more" if wrong > 1 else ""
            yield line(TextSpan(f"not {good}:", "bad"), f" {first}{more}, beside ", path(source))
        elif same:
            after = f"; {remark}" if remark else ""
            yield line(TextSpan(f"{good}:", "good"), f" {plural(same, 'file')}, by digests in ", path(source), after)
    if report.signature is None and report.hub is None:
        yield line(
            f"hashed: {plural(len(report.files), 'file')}; no signature is beside, and the hub's digest is unknown"
        )
