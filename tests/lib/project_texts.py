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

# An install of an extra, in any of the ways of `errors.install_command`
INSTALL = re.compile(r"(?<!-q )pip install '(?:loratool|\.)\[([a-z,]+)\](?: @ git\+[^']+)?'")

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")

JOB = re.compile(r"```yaml\n.*?```", re.DOTALL)  # a job of CI, which runs in a clone


def with_installs(text: str) -> str:
    """Return a text with the commands that install an extra as they are now."""
    parts = re.split(f"({JOB.pattern})", text, flags=re.DOTALL)
    return "".join(
        part if part.startswith("```yaml") else INSTALL.sub(lambda found: project.install_command(found[1]), part)
        for part in parts
    )


def link(path: str, is_picture: bool) -> str:
    """Return a link from the README to a file of the repository, or to its guide on the site."""
    guide = path.removeprefix("loratool/guides/")
    if project.SITE and guide != path and ".md" in guide:
        return f"{project.SITE}/{guide.replace('.md', '.html')}"
    return f"{project.REPOSITORY}/{'raw' if is_picture else 'blob'}/main/{path}" if project.REPOSITORY else path


def path_of(link: str) -> str:
    """Return the path in the repository that a link of the README leads to, however it is written."""
    for begin in (f"{project.REPOSITORY}/blob/main/", f"{project.REPOSITORY}/raw/main/"):
        if project.REPOSITORY and link.startswith(begin):
            return link.removeprefix(begin)
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


def texts() -> dict[Path, str]:
    """Return README and guides as they have to be."""
    guides = {path: with_installs(path.read_text()) for path in sorted(GUIDES.glob("*.md"))}
    readme = ROOT / "README.md"
    return {readme: with_links(with_installs(readme.read_text())), **guides}


if __name__ == "__main__":
    for path, text in texts().items():
        if path.read_text() != text:
            print(path.relative_to(ROOT))
            if "--write" in sys.argv:
                path.write_text(text)
