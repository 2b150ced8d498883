"""The errors that users see, each with its exit code.

The module imports nothing of ours, so that every module can raise them. An error names its culprit (a tensor, a
module, a file) and the remedy if there is one. `cli` prints both and nothing else. If a remedy is a command line, its
names are quoted by `shell_word`, so that it can be pasted. No error has the credentials of a link. Its fields have the
words of the command line; as a text it has those of Python (`commands.respell`).
"""

from __future__ import annotations

import os
import re
import reprlib
import shlex
from contextvars import ContextVar
from importlib import import_module

# A link, also as a Path writes it, with one slash; its authority, and the rest up to a blank or a quote
_LINK = re.compile(
    r"""\b((?:https?|hf):/{1,2}|[a-z][a-z0-9+.-]{0,15}://)([^\s'"<>\\/?#]*)([^\s'"<>\\]*)""", re.IGNORECASE
)

# A key and its value as in a query, outside of links
_SECRET = re.compile(
    r"""([?&#;][\w.%-]{0,40}(?:token|secret|passw|key|credential|sig|auth)[\w.%-]{0,40}=)[^\s'"<>\\&]+""", re.IGNORECASE
)

_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{20,}")  # as the hub makes them


# Options and commands in a text
_COMMAND_LINE = re.compile(r"(?<![\w-])(?:--[a-z]|-o\b)|\bloratool [a-z]")

# Whether the command line runs, which prints errors and the warnings of reports itself
on_terminal: ContextVar[bool] = ContextVar("on_terminal", default=False)

MOST_SHOWN = 100  # other names of paths: those of the last links that a long-lived process has opened

_shown: dict[str, tuple[re.Pattern[str], str]] = {}  # the beginning of a path -> a pattern of it, what texts have


def show_as(beginning: str, shown: str) -> None:
    """Show paths that begin so under another name, in this process."""
    whole = re.compile(re.escape(beginning) + r"(?!\S*\.loratool-)")  # an output in the making is where it is
    while len(_shown) >= MOST_SHOWN:
        del _shown[next(iter(_shown))]
    _shown[beginning] = whole, shown.replace("\\", r"\\")


def with_article(noun: str) -> str:
    """Return a noun after "a" or "an". X counts as a vowel, because names such as XLORA begin with the letter."""
    return f"{'an' if noun[:1].upper() in tuple('AEIOX') else 'a'} {noun}"


def without_credentials(text: str) -> str:
    """Return a text without the users and queries of links, and without tokens of the hub.

    Everything that shows or stores text of an input calls this, as people send on logs and reports. The part before the
    host is removed, and the part after a `?`, as signed links have their credentials there. A path of what stands here
    for an object in a store becomes its link.
    """
    for beginning, (whole, shown) in _shown.items():
        text = whole.sub(shown, text) if beginning in text else text
    if ":/" in text:
        text = _LINK.sub(_link_without_credentials, text)
    if "=" in text:
        text = _SECRET.sub(r"\1***", text)
    return _TOKEN.sub(r"\1_***", text) if "_" in text else text


def _link_without_credentials(link: re.Match[str]) -> str:
    scheme, authority, rest = link.groups()
    user, separator, host = authority.rpartition("@")
    if not separator and re.search(
        r":(?!\d{0,5}$)", authority
    ):  # of a password that has a slash, or of a text that was cut
        host, rest = "***", ""
    elif scheme.lower().startswith("hf:") and ":" not in user:  # a name and its revision
        host = authority
    return scheme + host + re.sub(r"\?.*|#[^/]*=.*", "", rest)


def in_python(text: str, flags: str = "") -> str:
    """Return a text in Python's words, as `commands.respell.respelled`, unless it is for the command line."""
    if on_terminal.get() or not _COMMAND_LINE.search(text):
        return text
    respell = import_module(".commands.respell", __package__)  # it knows all functions
    return str(respell.respelled(text, flags))


class LoratoolError(Exception):
    """Base class of all errors that a user can act on. Only its subclasses are raised."""

    kind = "internal"
    exit_code = 70

    message: str
    culprit: str | None
    remedy: str | None
    flags: str = ""  # options that the remedy adds

    def __init__(self, message: str, *, culprit: str | None = None, remedy: str | None = None) -> None:
        super().__init__(without_credentials(message))
        self.message = message
        self.culprit = culprit
        self.remedy = remedy

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, without_credentials(value) if isinstance(value, str) else value)

    @property
    def what(self) -> list[str]:
        """The culprit with the message, in lines. All but the first are indented by two blanks.

        So a name from a file, which may have line breaks, forges no line of its own.
        """
        first, *others = self.message.split("\n")
        culprit = self.culprit.replace("\n", "\\n") + ": " if self.culprit else ""
        return [culprit + first, *(f"  {line.strip()}" for line in others)]

    def __str__(self) -> str:
        text = "\n".join([*self.what, *([self.remedy.replace("\n", "\\n")] if self.remedy else [])])
        return in_python(text, self.flags)


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
    """The command succeeds if an option is added.

    Args:
        flags: the options to add, as `--base BASE`.
        why: the text after them in the remedy, as `with the model` or `, which holds them`.
        remedy: if it is more than adding the flags.
    """

    kind = "needs-flag"
    exit_code = 4

    why: str

    def __init__(
        self, message: str, *, culprit: str | None = None, remedy: str | None = None, flags: str = "", why: str = ""
    ) -> None:
        self.flags, self.why = flags, why
        super().__init__(message, culprit=culprit, remedy=remedy or self._with_flags("add"))

    def asks_for(self, option: str) -> bool:
        """Return whether this option, as `--base`, is the first that the remedy adds."""
        return self.flags.split()[:1] == [option]

    def elsewhere(self, command: str) -> InputError:
        """Return the error of a command without these options. Another command, run first, has them."""
        remedy = self._with_flags(f"first {command}") or self.remedy
        return InputError(self.message, culprit=self.culprit, remedy=remedy)

    def _with_flags(self, verb: str) -> str | None:
        comma = self.why.startswith(",")
        return f"{verb} {self.flags}{'' if comma or not self.why else ' '}{self.why}" if self.flags else None


class CheckError(LoratoolError):
    """A check said no: raised by a report's `check()`. The command line exits with 1 and prints the report instead."""

    kind = "check"
    exit_code = 1


class MachineError(LoratoolError):
    """The machine failed: its disk, memory or device, or an extra of the package is not installed."""

    kind = "machine"
    exit_code = 5


class Interrupted(LoratoolError):
    """A signal (Ctrl-C or a request to terminate) stopped the command. The exit code is 128 + the signal's number."""

    kind = "interrupted"

    def __init__(self, signal_number: int, left: Exception | None = None, stays: str = "") -> None:
        what = stays or "nothing unfinished is left"
        if left is not None:
            why = f"{left.filename}: {left.strerror}" if isinstance(left, OSError) and left.filename else left
            what = f"the next run removes what is left: {why}"
        super().__init__(f"interrupted; {what}")
        self.exit_code = 128 + signal_number


# Where loratool is. What is empty is not public yet: then an install is one of a clone, and links are relative.
# `python tests/lib/project_texts.py --write` writes README and guides again after a change.
INDEX_NAME = ""  # on Python's package index: loratool, once a release is there
REPOSITORY = ""  # as https://github.com/OWNER/loratool
SITE = ""  # of the guides as pages, as https://OWNER.github.io/loratool


def install_command(extra: str) -> str:
    """Return the command that installs an extra: from the index, from the repository, or in a clone of it."""
    wanted = f"loratool[{extra}] @ git+{REPOSITORY}" if REPOSITORY else f".[{extra}]"
    return f"pip install '{f'{INDEX_NAME}[{extra}]' if INDEX_NAME else wanted}'"


def install_remedy(extra: str) -> str:
    """Return the remedy of an error that an extra would mend."""
    return f"{install_command(extra)}{'' if INDEX_NAME or REPOSITORY else ' in a clone of loratool'}"


DEBUG = "LORATOOL_DEBUG"


def is_debugging() -> bool:
    """Return whether the user wants tracebacks."""
    return os.environ.get(DEBUG) == "1"


def brief(value: object) -> str:
    """Return a value as text for a message, truncated if it is long."""
    try:
        return _Brief().repr(value)
    except ValueError:  # a whole number of thousands of digits, before Python 3.12
        return f"this {type(value).__name__}"


class _Brief(reprlib.Repr):
    """Truncate values. Credentials are removed first, as a part of one could not be recognized."""

    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(without_credentials(x), level)


def shell_word(name: str | os.PathLike[str]) -> str:
    """Return a name quoted for a shell. Unprintable names need bash.

    So a file's name cannot act on the terminal, nor in a command into which it is pasted.
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
