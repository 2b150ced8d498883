"""Write a model card: the README.md of a folder, with metadata for the Hugging Face hub.

Names and licences come from files and command lines that anybody can have written. So they are only in code spans and
quoted scalars, and a licence is copied only if it looks like one. The metadata keys are those of huggingface_hub's
`ModelCardData` and of the hub's page on model cards.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...durable.fileio import open_for_reading
from ...durable.partial import set_aside
from ...errors import InputError
from ..folder.side_files import CARD
from ..hub.names import cached_name, parse_hub_name, shareable

READ = 1 << 16  # bytes of a card that are searched for its metadata

# Patterns of a licence's fields: an identifier, a name, a link or a file's name
LICENCE = {
    "license": re.compile(r"(?!(?:null|true|false|yes|no|\d+)$)[A-Za-z0-9][\w.+-]{0,63}", re.ASCII | re.IGNORECASE),
    "license_name": re.compile(r"[A-Za-z0-9][\w .+()-]{0,99}", re.ASCII),
    "license_link": re.compile(r"[A-Za-z0-9][\w.+~:/?=%#-]{0,199}", re.ASCII),
}

_FIELD = re.compile(r"(license(?:_name|_link)?):[ \t]+(['\"]?)(.+?)\2[ \t]*")


@dataclass(frozen=True)
class ModelCard:
    """A model card; all of its text is Markdown."""

    title: str
    facts: Sequence[str]  # the entries of a list
    commands: Sequence[str]  # lines of a shell
    metadata: Mapping[str, str | Sequence[str]] = field(default_factory=dict)  # for the hub; empty values are omitted

    def encode(self) -> bytes:
        """Return the file's bytes."""
        lines = ["---"]
        for key, value in self.metadata.items():
            if isinstance(value, str):
                lines += [f"{key}: {_scalar(value)}"] if value else []
            else:
                lines += [f"{key}:", *(f"- {_scalar(each)}" for each in value)] if value else []
        lines += ["---", "", f"# {self.title}", "", *(f"- {fact}" for fact in self.facts)]
        data = "\n".join([*lines, "", "```sh", *self.commands, "```", "", ""]).encode()
        return data + _mark(data)


def _mark(data: bytes) -> bytes:
    """Return a card's last line, which readers do not show."""
    return f"<!-- loratool {hashlib.sha256(data).hexdigest()[:16]} -->\n".encode()


def is_unedited(data: bytes) -> bool:
    """Return whether a card is unchanged since a command wrote it, so that it can be replaced."""
    position = data.rfind(b"<!-- ")
    return position > 0 and data[position:] == _mark(data[:position])


def _scalar(text: str) -> str:
    """Return a string as YAML's double-quoted scalar."""
    return '"' + "".join(c if " " <= c <= "~" and c not in '"\\' else f"\\U{ord(c):08x}" for c in text) + '"'


def code(text: str) -> str:
    """Return a text as a Markdown code span, without markup and with unprintable characters escaped."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    padding = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{padding}{shown}{padding}{fence}"


def name_on_hub(given: str | os.PathLike[str]) -> str:
    """Return the repo id that was given for an input, `owner/name` or `name`; empty for a path.

    A path into the hub's cache counts as its repo id.
    """
    return _split(given)[0]


def shown_name(given: str | os.PathLike[str]) -> str:
    """Return an input's name for a card: its repo id, else the last part of its path, as text."""
    name, rest = _split(given)
    shown = name + rest if name else (Path(shareable(os.fspath(given))).name or Path(given).resolve().name)
    return os.fsencode(shown).decode(errors="backslashreplace")  # a file's name may be any bytes


def _split(given: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the repo id of an input and the path in the repository; both are empty for a path."""
    text = os.fspath(given)
    is_here = os.path.lexists(text) or set_aside(Path(text))
    name = cached_name(Path(text)) if is_here else parse_hub_name(text)
    return (name.repo, str(replace(name, is_link=False)).removeprefix("hf://")[len(name.repo) :]) if name else ("", "")


def read_licence(folder: Path | None) -> dict[str, str]:
    """Return the licence fields in the metadata of a folder's card; empty without a readable licence.

    Only lines `license: NAME` are read; the other two fields count only with such a line.
    """
    if folder is None or not (folder / CARD).is_file():
        return {}
    try:
        with open_for_reading(folder / CARD) as file:
            text = file.read(READ).decode("utf-8", "replace")
    except (OSError, InputError):
        return {}  # an unreadable card is not a reason to reject the model
    lines = text.removeprefix("\ufeff").splitlines()
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return {}
    matches = (_FIELD.fullmatch(line) for line in lines[1 : lines.index("---", 1)])
    fields = {match[1]: match[3] for match in matches if match and LICENCE[match[1]].fullmatch(match[3])}
    return fields if "license" in fields else {}
