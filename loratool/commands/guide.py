"""The command `guide`: list the user's guides, which are Markdown files in the package, or read one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from ..errors import UsageError

FOLDER = Path(__file__).parent.parent / "guides"

# kind of page -> its pages, in the order in which they are listed
PAGES = {
    "Start": ("index", "tutorial"),
    "How-to": (
        "healthy",
        "undo",
        "in-place",
        "swap",
        "live",
        "patches",
        "deltas",
        "qwen3",
        "merge-quantized",
        "two-styles",
        "combine-two",
        "extract-adapter",
        "shrink",
        "kohya-to-diffusers",
        "vllm",
        "ollama",
        "prove",
        "provenance",
        "github-actions",
        "check-adapters",
        "resume",
        "many-machines",
        "slurm",
        "kubernetes",
        "before-training",
    ),
    "Reference": (
        "troubleshooting",
        "switching",
        "glossary",
        "merging",
        "extract",
        "init-and-resize",
        "combine",
        "formats",
        "families",
        "image-models",
        "quantized",
        "runtimes",
        "recipes",
        "ci",
        "exit-codes",
        "environment",
        "json",
        "hub",
        "stores",
        "python",
        "undo-format",
        "patch-format",
        "digest",
        "numerics",
        "parameter-counts",
        "benchmarks",
    ),
    "Explanation": ("rounding", "which-method", "spectra", "scale", "architecture"),
}


@dataclass(frozen=True)
class GuideTopic:
    """A guide: the name of its file, the sentence that it opens with, and whether it only explains."""

    topic: str
    sentence: str
    background: bool = False


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
        near = get_close_matches(topic, texts, 1)
        raise UsageError(f"no guide {topic!r}", remedy=f"loratool guide {near[0]}" if near else "loratool guide")
    return GuideReport(
        folder=str(FOLDER),
        topics=tuple(
            GuideTopic(name, _first_sentence(text), name in PAGES["Explanation"]) for name, text in texts.items()
        ),
        topic=topic,
        text=None if topic is None else texts[topic],
    )


def topics() -> list[str]:
    """Return the names of all guides, sorted."""
    return sorted(file.stem for file in FOLDER.glob("*.md"))


def _first_sentence(text: str) -> str:
    """Return the first sentence of the paragraph below the title."""
    return re.split(r"(?<=\.)\s", text.split("\n\n")[1], maxsplit=1)[0].replace("\n", " ")
