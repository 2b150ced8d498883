"""The errors a user can meet, each with its exit code.

They stand alone so that every module may raise them. An error names its culprit (a tensor, a module, a
file) and, where there is one, the remedy; `cli` prints both and nothing else.
"""

from __future__ import annotations


class LoratoolError(Exception):
    """Something a user can act on. Only its children are raised."""

    kind = "internal"
    exit_code = 70

    def __init__(self, message: str, *, culprit: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.culprit = culprit
        self.remedy = remedy

    def __str__(self) -> str:
        head = f"{self.culprit}: {self.message}" if self.culprit else self.message
        return f"{head}\n{self.remedy}" if self.remedy else head


class UsageError(LoratoolError):
    """The call itself is wrong: an option's value, an output equal to an input."""

    kind = "usage"
    exit_code = 2


class InputError(LoratoolError):
    """An input is unreadable, unsupported, or does not belong with the others."""

    kind = "input"
    exit_code = 3


class NeedsFlag(LoratoolError):
    """Adding the option that the remedy names makes the command succeed."""

    kind = "needs-flag"
    exit_code = 4


class MachineError(LoratoolError):
    """The machine failed: disk, memory, device, a missing extra."""

    kind = "machine"
    exit_code = 5


class Interrupted(LoratoolError):
    """A signal stopped the work: Ctrl-C, or a request to terminate. The exit code is 128 + the signal's number."""

    kind = "interrupted"

    def __init__(self, signal_number: int) -> None:
        super().__init__("interrupted; nothing unfinished is left")
        self.exit_code = 128 + signal_number
