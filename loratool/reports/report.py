"""Be the base of all reports: data that can show itself, in a terminal, in a notebook, as a table of pandas."""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import MachineError
from .document import Document

if TYPE_CHECKING:
    from pandas import DataFrame


class Report:
    """The base of the frozen dataclasses that commands return; their fields are what --json prints.

    Attributes:
        shown_by: the function (report, verbose) -> Document, a module beside the class's own and the name in it; it is
            loaded when the report is to be read.
        rows: the field with a row a tensor, module or method.
    """

    shown_by: ClassVar[str]
    rows: ClassVar[str]

    def document(self, verbose: bool = False) -> Document:
        """Return what is to be read of the report; with `verbose`, a row a module."""
        module, _, function = self.shown_by.rpartition(".")
        home = import_module(f".{module}", type(self).__module__.rpartition(".")[0])
        document: Document = getattr(home, function)(self, verbose)
        return document

    def to_dict(self) -> dict[str, Any]:
        """Return the report as --json prints it."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]  # every report is a dataclass

    def to_dataframe(self) -> DataFrame:
        """Return the report's rows as a pandas DataFrame.

        Raises:
            MachineError: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError:
            raise MachineError("needs pandas", culprit="to_dataframe", remedy="pip install pandas") from None
        return DataFrame([asdict(row) for row in getattr(self, self.rows)])

    def _repr_html_(self) -> str:
        """Return the report for a notebook."""
        from .html import to_html

        return to_html(self.document())
