"""Tables of the guides that the code has too.

    python tests/lib/guide_tables.py [--write]

It names the guides whose tables are not what the code says; `--write` writes these tables. Each stands below a mark
with its name. The tables of tests that take minutes have scripts of their own: `models/families.py` and
`models/language_families.py`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
import click
from conftest import ROOT

from lib import markdown
from lib.oracles import matrix
from loratool.architectures.gguf.config_table import CONFIGS
from loratool.architectures.runtimes.runtime import OUTCOMES
from loratool.cli import COMMANDS, cli, schemas
from loratool.cli.messages import variables_of
from loratool.cli.output_formats import COMMANDS as CHECKING
from loratool.commands.report_files import REPORTS, report_classes
from loratool.files.folder.side_files import SIDE_FILES
from loratool.views.issues import CHECKS, KINDS

GUIDES = ROOT / "loratool" / "guides"


def conversions() -> str:
    with tempfile.TemporaryDirectory() as folder:
        return matrix.matrix(Path(folder))


def outcomes() -> str:
    return "".join(markdown.bullet(f"{outcome}: {meaning}") for outcome, meaning in OUTCOMES.items())


def side_files() -> str:
    """Return each kind in the order in which they are tried, with its fate and its names."""
    copied = {None: "copied", 10_000_000: "copied up to 10 MB"}
    items = []
    for row in SIDE_FILES:
        fate = f"not copied, {row.left}" if row.left else copied[row.limit]
        items.append(markdown.bullet(f"{row.kind} ({fate}): " + " ".join(f"`{name}`" for name in row.patterns)))
    return "".join(items)


def gguf_models() -> str:
    rows = [(f"`{key}`", ", ".join(row.architecture for row in rows)) for key, rows in CONFIGS.items()]
    return markdown.table(("general.architecture", "becomes"), rows)


def exit_codes() -> str:
    """Return each exit code with the `kind` that an error has in the JSON."""
    rows = [("0", "true", "no error"), ("1", "false", "no error, but `status`")]
    rows += [(f"{code}", "false", f"`{kind.kind}`") for kind, codes in schemas.ERRORS.items() for code in codes]
    return markdown.table(("exit code", "`ok`", "`error.kind`"), sorted(rows, key=lambda row: int(row[0])))


def statuses() -> str:
    """Return the words of `status` of each command that can end with 1."""
    rows = [(f"`{command}`", ", ".join(f"`{word}`" for word in words)) for command, words in schemas.STATUSES.items()]
    return markdown.table(("command", "`status`"), rows)


def envelope() -> str:
    """Return the keys of the object that `--json` prints, and what each is for each way to end."""
    ends = schemas.make("verify")["$defs"]
    ways = [ends[way]["properties"] for way in ("done", "no", "error")]
    rows = [
        (f"`{key}`", *(_value(key, way[key]) if key in way else "-" for way in ways)) for key in {**ways[1], **ways[2]}
    ]
    return markdown.table(("key", "done", "a check failed", "error"), rows)


def _value(key: str, schema: dict[str, Any]) -> str:
    """Return what a key of the envelope holds, in a word or two."""
    if key == "verb":
        return "the command or null" if None in schema.get("enum", []) else "the command"
    if "const" in schema:
        return json.dumps(schema["const"])
    return {"status": "a word", "exit_code": "a number"}.get(key, "an object")


def error_keys() -> str:
    """Return the keys of an error with their types."""
    properties = schemas.make("verify")["$defs"]["error"]["properties"]["error"]["properties"]
    types = {name: each.get("type", "string") for name, each in properties.items()}
    rows = [
        (f"`{name}`", " or ".join([kind] if isinstance(kind, str) else kind), ERROR_KEYS[name])
        for name, kind in types.items()
    ]
    return markdown.table(("key", "type", "meaning"), rows)


ERROR_KEYS = {
    "kind": "which kind of error, see exit-codes",
    "message": "what is wrong",
    "tensor": "where: a tensor, a module, a file or an option",
    "remedy": "what to do",
}


def reports() -> str:
    """Return the classes of reports of each command."""
    rows = (
        (command, ", ".join(f"`{name.rpartition('.')[2]}`" for name in names)) for command, names in REPORTS.items()
    )
    return "".join(markdown.bullet(f"`{command}`: {names}") for command, names in rows)


def issue_kinds() -> str:
    """Return each kind of issue with the commands that look for it."""
    found_by = {
        command: {kind for each in report_classes(command) for kind in CHECKS.get(each, {})} for command in CHECKING
    }
    rows = [
        (f"`{kind}`", ", ".join(f"`{command}`" for command, kinds in found_by.items() if kind in kinds), meaning)
        for kind, meaning in KINDS.items()
    ]
    return markdown.table(("kind", "command", "meaning"), rows)


def option_variables() -> str:
    """Return for each command the variables that set its options."""
    items = []
    for command in COMMANDS:
        options = cli.get_command(click.Context(cli), command)
        assert options
        prefix = f"LORATOOL_{command.upper()}_"
        names = [name for option in options.params for name in variables_of(command, option)]
        assert all(name.startswith(prefix) for name in names)
        ends = ", ".join(f"`{name.removeprefix(prefix)}`" for name in sorted(names))
        items.append(markdown.bullet(f"`{prefix}`: {ends}"))
    return "".join(items)


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "ci": {"kinds": issue_kinds},
    "environment": {"options": option_variables},
    "exit-codes": {"codes": exit_codes, "statuses": statuses},
    "families": {"models of GGUF files": gguf_models},
    "formats": {
        "what each format can store": matrix.held,
        "models": matrix.models,
        "checked": matrix.checked,
        "conversions": conversions,
    },
    "json": {"envelope": envelope, "error": error_keys, "reports": reports},
    "merging": {"side files": side_files},
    "runtimes": {
        "applied": matrix.applied,
        "outcomes": outcomes,
        "programs": matrix.runtimes,
        "image programs": matrix.image_programs,
        "image families": matrix.image_families,
    },
}


def mark(name: str) -> str:
    return f"<!-- from tests/lib/guide_tables.py: {name} -->\n"


def written(guide: str) -> str:
    """Return the text of a guide with its tables as the code has them."""
    text = (GUIDES / f"{guide}.md").read_text()
    for name, make in TABLES[guide].items():
        text = markdown.replaced(text, mark(name), make())
    return text


if __name__ == "__main__":
    for guide in TABLES:
        path = GUIDES / f"{guide}.md"
        if path.read_text() != (text := written(guide)):
            print(path.relative_to(ROOT))
            if "--write" in sys.argv:
                path.write_text(text)
