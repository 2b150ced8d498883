"""Pages of the site beside the guides: the command line as click knows it, the Python API, and what guides link to."""

import inspect
import re
from pathlib import Path

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import loratool
from loratool.cli import COMMANDS, SETTINGS, cli

ROOT = Path(__file__).parents[1]


def on_config(config: MkDocsConfig) -> None:
    """Arrange the pages as the first of them, the table of what users want, does."""
    sections: dict[str, list[str]] = {"Begin": []}
    for line in Path(config.docs_dir, "index.md").read_text().splitlines():
        if title := re.match(r"\| \*\*(.+)\*\*", line):
            sections[title[1]] = []
        link = re.search(r"\]\((\S+\.md)\) \|$", line)
        if link and not any(link[1] in pages for pages in sections.values()):
            [*sections.values()][-1].append(link[1])
    sections["Reference"] = ["commands.md", "api.md", "security.md"]
    config.nav = ["index.md", *({title: pages} for title, pages in sections.items())]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "commands.md", content=commands()))
    files.append(File.generated(config, "api.md", content=api()))
    files.append(File.generated(config, "security.md", content=(ROOT / ".github" / "SECURITY.md").read_text()))
    for picture in (ROOT / "fixtures" / "pictures").iterdir():
        files.append(File.generated(config, f"pictures/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Link to what lies outside of the guides by its place in the site."""
    return markdown.replace("../../fixtures/pictures/", "pictures/").replace("../../.github/SECURITY.md", "security.md")


def commands() -> str:
    """Return the page of all commands, each with all of its options."""
    context = click.Context(cli, info_name="loratool", **SETTINGS)
    parts = ["# Commands", _fenced(cli.get_help(context))]
    for name in COMMANDS:
        command = cli.get_command(context, name)
        text = command.get_help(click.Context(command, info_name=name, parent=context))
        parts += [f"## {name}", _fenced(text)]
    return "\n\n".join(parts)


def _fenced(text: str) -> str:
    return f"```text\n{text}\n```"


def api() -> str:
    """Return the page of all public names."""
    public = {name: getattr(loratool, name) for name in loratool.__all__}
    functions = [name for name, each in public.items() if inspect.isfunction(each)]
    classes = [name for name, each in public.items() if inspect.isclass(each)]
    return "\n\n".join(["# Python API", *(f"::: loratool.{name}" for name in functions + classes)])
