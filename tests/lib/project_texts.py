"""README and guides by the constants of `loratool.errors`: installs of extras, and the README's links.

`python tests/lib/project_texts.py --write` writes them anew.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from loratool import errors as project  # noqa: E402

GUIDES = ROOT / "loratool" / "guides"
UP = "../../"  # from a guide to the repository

# An install of an extra, in any of the ways of `errors.install_command`
INSTALL = re.compile(r"(?<!-q )pip install '(?:loratool|\.)\[([a-z,]+)\](?: @ git\+[^']+)?'")

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")

FILE = re.compile(r"^https://[^/]+/[^/]+/loratool/(?:blob|raw)/main/")  # what goes before a path of the repository

JOB = re.compile(r"```yaml\n.*?```", re.DOTALL)  # a job of CI, which runs in a clone


def with_installs(text: str) -> str:
    """Return a text with the commands that install an extra as they are now."""
    parts = re.split(f"({JOB.pattern})", text, flags=re.DOTALL)
    return "".join(
        part if part.startswith("```yaml") else INSTALL.sub(lambda found: project.install_command(found[1]), part)
        for part in parts
    )


def link(path: str, is_picture: bool) -> str:
    """Return a link to a file of the repository, or to its guide on the site; by its path if neither is known."""
    guide = path.removeprefix("loratool/guides/")
    if project.SITE and guide != path and ".md" in guide:
        return f"{project.SITE}/{guide.replace('.md', '.html')}"
    return f"{project.REPOSITORY}/{'raw' if is_picture else 'blob'}/main/{path}" if project.REPOSITORY else path


def path_of(link: str) -> str:
    """Return the path in the repository that a link leads to, however it is written and whoever has the repository."""
    link = FILE.sub("", link)
    if project.SITE and link.startswith(f"{project.SITE}/"):
        return "loratool/guides/" + link.removeprefix(f"{project.SITE}/").replace(".html", ".md")
    return link


def with_links(text: str) -> str:
    """Return the README with its links as they are now: a page of the index shows it apart from the repository."""

    def linked(found: re.Match[str]) -> str:
        mark, words, to = found.groups()
        path = path_of(to)
        away = re.match(r"[a-z]+:|#", path)
        return f"{mark}[{words}]({path if away else link(path, bool(mark))})"

    return LINK.sub(linked, text)


def with_pictures(text: str) -> str:
    """Return a guide with the links of its pictures as they are now: neither wheel nor site has the files."""

    def linked(found: re.Match[str]) -> str:
        mark, words, to = found.groups()
        path = path_of(to.removeprefix(UP))
        return f"![{words}]({'' if project.REPOSITORY else UP}{link(path, True)})" if mark else found[0]

    return LINK.sub(linked, text)


def as_now(path: Path, text: str) -> str:
    """Return the text of README or a guide as it has to be."""
    return with_links(with_installs(text)) if path.name == "README.md" else with_pictures(with_installs(text))


def texts() -> dict[Path, str]:
    """Return README and guides as they have to be."""
    return {path: as_now(path, path.read_text()) for path in (ROOT / "README.md", *sorted(GUIDES.glob("*.md")))}


if __name__ == "__main__":
    for path, text in texts().items():
        if path.read_text() != text:
            print(path.relative_to(ROOT))
            if "--write" in sys.argv:
                path.write_text(text)
