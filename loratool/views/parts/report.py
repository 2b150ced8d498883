"""Be the base of all reports: data that can show itself, in a terminal, in a notebook, as a table of pandas."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import MachineError
from .document import Document, escape, text_of

if TYPE_CHECKING:
    from pandas import DataFrame

    from .content import Page


class Report:
    """The base of the frozen dataclasses that commands return; their fields are what --json prints.

    Attributes:
        shown_by: the function (report, verbose) -> Document, a name of the class's own module.
        paged_by: as `shown_by`, the function (report) -> Page of what its page shows besides; empty for no more.
        rows: the field with a row a tensor, module or method; empty where there is none.
    """

    shown_by: ClassVar[str]
    paged_by: ClassVar[str] = ""
    rows: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        """Give a report the short text of `Report`, before the dataclass makes one with every row."""
        cls.__repr__ = Report.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        shown = self.document()
        return escape(f"<{type(self).__name__} {': '.join(map(text_of, (shown.subject, *shown.verdict[:1])))}>")

    def document(self, verbose: bool = False) -> Document:
        """Return what is to be read of the report; with `verbose`, a row a module."""
        document: Document = self._maker(self.shown_by)(self, verbose)
        return document

    def page(self) -> Page:
        """Return what the report's page shows beside its document."""
        from .content import Page

        page: Page = self._maker(self.paged_by)(self) if self.paged_by else Page()
        return page

    def _maker(self, name: str) -> Callable[..., Any]:
        maker: Callable[..., Any] = getattr(sys.modules[type(self).__module__], name)
        return maker

    @property
    def said_no(self) -> str | None:
        """Return what a check found that said no, in a word; None where it said yes, and of what is no check."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as --json prints it, of plain types alone."""
        printed = json.dumps(asdict(self), allow_nan=False)  # type: ignore[call-overload]  # all are dataclasses
        found: dict[str, Any] = json.loads(printed)
        return found

    def to_dataframe(self) -> DataFrame:
        """Return the report's rows as a pandas DataFrame, or all of a report without rows as one.

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
        """Return the report for a notebook."""
        from .html import to_html

        return to_html(self.document())


@dataclass(frozen=True)
class WritingReport(Report):
    """The base of reports on what was written, each with `out` and `dry_run` (`writing.Written`).

    Attributes:
        exists: whether a dry run found an output that only --force replaces.
    """

    exists: bool = field(default=False, kw_only=True)
