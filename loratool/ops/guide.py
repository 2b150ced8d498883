"""`guide`: list the user's guides, which are Markdown files in the package, and read one of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError

FOLDER = Path(__file__).parent.parent / "guides"


@dataclass(frozen=True)
class GuideTopic:
    """A guide: the name of its file, and the sentence that it opens with."""

    topic: str
    sentence: str


@dataclass(frozen=True)
class GuideReport:
    """All guides, and the text of the one that was asked for."""

    folder: str
    topics: tuple[GuideTopic, ...]
    topic: str | None
    text: str | None  # Markdown


def guide(topic: str | None = None) -> GuideReport:
    """Return the list of guides, with the text of `topic`.

    Raises:
        UsageError: there is no such guide.
    """
    texts = {name: (FOLDER / f"{name}.md").read_text(encoding="utf-8") for name in topics()}
    if topic is not None and topic not in texts:
        raise UsageError(f"there is no guide {topic!r}", remedy=f"the guides are {', '.join(texts)}")
    return GuideReport(
        folder=str(FOLDER),
        topics=tuple(GuideTopic(name, _first_sentence(text)) for name, text in texts.items()),
        topic=topic,
        text=None if topic is None else texts[topic],
    )


def topics() -> list[str]:
    """Return the names of all guides, sorted."""
    return sorted(file.stem for file in FOLDER.glob("*.md"))


def _first_sentence(text: str) -> str:
    """Return the first sentence of the paragraph below the title."""
    return re.split(r"(?<=\.)\s", text.split("\n\n")[1], maxsplit=1)[0].replace("\n", " ")
