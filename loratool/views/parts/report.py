"""Base class of all reports: data that shows itself in a terminal, a notebook or a pandas table."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import CheckError, MachineError
from .document import Document, Line, escape, line, path, text_of

if TYPE_CHECKING:
    from pandas import DataFrame

    from .content import Page


class Report:
    """Base class of the frozen dataclasses that commands return. --json prints their fields.

    Attributes:
        document_function: name of the function (report, verbose) -> Document, in the module of the class.
        page_function: name of the function (report) -> Page there; empty if the page is the document alone.
        rows: the field with one row per tensor, module or method; empty if there is none.
    """

    document_function: ClassVar[str]
    page_function: ClassVar[str] = ""
    rows: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        """Set the short `Report.__repr__`, which `dataclass` would replace by one with every row."""
        cls.__repr__ = Report.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        shown = self.document()
        return escape(f"<{type(self).__name__} {': '.join(map(text_of, (shown.subject, *shown.verdict[:1])))}>")

    def document(self, verbose: bool = False) -> Document:
        """Return the report as a document to read. With `verbose` it has one row per module."""
        document: Document = self._maker(self.document_function)(self, verbose)
        return replace(document, lists=(*document.lists, *self.digest_lines())) if verbose else document

    def digest_lines(self) -> Iterator[Line]:
        """Yield a line for each digest of what was read and written."""
        for name, digest in getattr(self, "digests", {}).items():
            yield line("digest of ", path(name), f": sha256:{digest}")

    def page(self) -> Page:
        """Return what the report's page shows beside its document."""
        from .content import Page

        page: Page = self._maker(self.page_function)(self) if self.page_function else Page()
        return page

    def _maker(self, name: str) -> Callable[..., Any]:
        maker: Callable[..., Any] = getattr(sys.modules[type(self).__module__], name)
        return maker

    @property
    def said_no(self) -> str | None:
        """The word for a failed check. None if it passed, or if the report is of no check."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as --json prints it, in plain types."""
        printed = json.dumps(asdict(self), allow_nan=False)  # type: ignore[call-overload]  # all are dataclasses
        plain: dict[str, Any] = json.loads(printed)
        return plain

    def to_dataframe(self) -> DataFrame:
        """Return the report's rows as a pandas DataFrame. A report without rows is one row.

        Raises:
            MachineError: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError:
            raise MachineError("needs pandas", culprit="to_dataframe", remedy="pip install pandas") from None
        report = self.to_dict()
        return DataFrame(report[self.rows] if self.rows else [report])

    def _repr_html_(self) -> str:
        """Return the report as HTML for a notebook."""
        from .html import to_html

        return to_html(self.document())


@dataclass(frozen=True)
class CheckReport(Report):
    """Base class of the reports of checks, which can say no.

    They are neither true nor false: `if verify(...)` would pass whatever was found.

    Attributes:
        digests: of what was read (`files.digest`), by the names that the call has; of models only if they were asked
            for.
    """

    digests: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    @property
    def ok(self) -> bool:
        """Whether the check passed."""
        return self.said_no is None

    def check(self) -> None:
        """Raise CheckError, with the report's last line, unless the check passed."""
        if not self.ok:
            shown = self.document()
            raise CheckError(" ".join(map(text_of, shown.verdict)), remedy=shown.hint)

    def __bool__(self) -> bool:
        name = type(self).__name__
        raise TypeError(f"is neither true nor false: use .ok of this {name}, or .check(), which raises")


class DiffReport(CheckReport):
    """Base class of the reports of `diff`, which say no if `--fail-above` is given and something is above it.

    Attributes:
        above: that limit; None if nothing is above one.
    """

    above: float | None

    @property
    def said_no(self) -> str | None:
        return None if self.above is None else "different"


@dataclass(frozen=True)
class WritingReport(Report):
    """Base class of reports on written output, each with `out` and `dry_run` (`writing.Written`).

    Attributes:
        exists: whether a dry run found an output that only --force replaces.
        digests: of what was read and written (`files.digest`), by the names that the call has; of models only if they
            were asked for, or are in an undo file; empty in a dry run.
    """

    exists: bool = field(default=False, kw_only=True)
    digests: Mapping[str, str] = field(default_factory=dict, kw_only=True)
