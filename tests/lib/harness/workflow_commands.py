"""Find workflow commands in a log, as the runner of GitHub Actions does: `ActionCommand.cs` in actions/runner."""

from __future__ import annotations

import re
from typing import NamedTuple

# those of `ActionCommandManager.cs` there
REGISTERED = set(
    "set-env set-output save-state add-path add-mask add-matcher remove-matcher warning error notice debug group "
    "endgroup echo internal-set-repo-path stop-commands".split()
)


class WorkflowCommand(NamedTuple):
    name: str
    properties: dict[str, str]
    message: str


def commands_in(log: str) -> list[WorkflowCommand]:
    """Return the commands of a log, in both forms: `::name key=value::text`, and `##[name key=value]text` anywhere."""
    found = (_in_line(line) for line in re.split(r"\r\n|\r|\n", log))
    return [each for each in found if each is not None]


def _in_line(line: str) -> WorkflowCommand | None:
    match = re.match(r"\s*::(.*?)::(.*)", line)
    if match and match[1].partition(" ")[0] in REGISTERED:
        name, _, words = match[1].partition(" ")
        pairs = (word.split("=", 1) for word in words.strip().split(",") if "=" in word)
        return WorkflowCommand(name, {key: _unescaped(value, ":,") for key, value in pairs}, _unescaped(match[2], ""))
    older = re.search(r"##\[([^\]]*)\](.*)", line)
    if older and older[1].partition(" ")[0] in REGISTERED:
        return WorkflowCommand(older[1].partition(" ")[0], {}, older[2])
    return None


def _unescaped(text: str, more: str) -> str:
    for character in f"\r\n{more}%":
        text = text.replace(f"%{ord(character):02X}", character)
    return text
