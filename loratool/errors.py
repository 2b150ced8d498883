"""Define the errors that a user can meet, each with its exit code.

The module imports nothing of ours, so that every module may raise them. An error names its culprit (a tensor, a
module, a file) and the remedy if there is one; `cli` prints both and nothing else. In a remedy that is a command line,
names are quoted by `shell_word`, so that it can be pasted.
"""

from __future__ import annotations

import os
import reprlib
import shlex


class LoratoolError(Exception):
    """The base class of all errors that a user can act on; only its subclasses are raised."""

    kind = "internal"
    exit_code = 70

    def __init__(self, message: str, *, culprit: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.culprit = culprit
        self.remedy = remedy

    @property
    def what(self) -> list[str]:
        """The culprit with the message, in lines; all but the first have two blanks before them.

        So a name from a file, which may have line breaks, forges no line of its own.
        """
        first, *others = self.message.split("\n")
        culprit = self.culprit.replace("\n", "\\n") + ": " if self.culprit else ""
        return [culprit + first, *(f"  {line.strip()}" for line in others)]

    def __str__(self) -> str:
        return "\n".join([*self.what, *([self.remedy.replace("\n", "\\n")] if self.remedy else [])])


class UsageError(LoratoolError):
    """The call itself is wrong, for example an option's value, or an output equal to an input."""

    kind = "usage"
    exit_code = 2
    argument: str | None = None  # of the library's function, if it is the culprit: options have other spellings


class InputError(LoratoolError):
    """An input is unreadable, unsupported, or does not belong with the others."""

    kind = "input"
    exit_code = 3


class NeedsFlag(LoratoolError):
    """The command succeeds if the option that the remedy names is added."""

    kind = "needs-flag"
    exit_code = 4


class MachineError(LoratoolError):
    """The machine failed: its disk, memory or device, or an extra of the package is not installed."""

    kind = "machine"
    exit_code = 5


class Interrupted(LoratoolError):
    """A signal (Ctrl-C or a request to terminate) stopped the work; the exit code is 128 + the signal's number."""

    kind = "interrupted"

    def __init__(self, signal_number: int, left: Exception | None = None, stays: str = "") -> None:
        what = stays or "nothing unfinished is left"
        if left is not None:
            why = f"{left.filename}: {left.strerror}" if isinstance(left, OSError) and left.filename else left
            what = f"the next run removes what is left: {why}"
        super().__init__(f"interrupted; {what}")
        self.exit_code = 128 + signal_number


def brief(value: object) -> str:
    """Return a value as a message shows it: cut, if it is long."""
    try:
        return reprlib.repr(value)
    except ValueError:  # a whole number of thousands of digits, before Python 3.12
        return f"this {type(value).__name__}"


def shell_word(name: str | os.PathLike[str]) -> str:
    """Return a name as a shell reads it back; one that does not print needs bash.

    So what a file calls itself cannot act on the terminal, nor in the command that it is pasted into.
    """
    text = os.fspath(name)
    return shlex.quote(text) if text.isprintable() else "$'" + "".join(map(_in_ansi_quotes, text)) + "'"


def _in_ansi_quotes(c: str) -> str:
    if c.isprintable():
        return f"\\{c}" if c in "'\\" else c
    return "".join(f"\\x{byte:02x}" for byte in _bytes_of(c))


def _bytes_of(c: str) -> bytes:
    try:
        return os.fsencode(c)
    except UnicodeEncodeError:  # half a character, as only JSON has it, in no name of a file
        return c.encode(errors="surrogatepass")
