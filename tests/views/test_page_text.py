"""A page's text is text: whatever a name is made of, it adds no element and no attribute, and comes back as it was."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lib.harness.page_elements import PageElements

from loratool.views.merge import AdapterReport, MergeReport, TensorReport
from loratool.views.page.render import render
from loratool.views.parts.document import escape
from loratool.views.parts.envelope import REPORT_TAG, envelope

PIECES = (
    *("<script>alert(1)</script>", "</script>", "<!--", "-->", "<![CDATA[", "]]>", "</title>", "</bdi>", REPORT_TAG),
    *('"', "'", "`", " onclick=x ", '" autofocus onfocus="x', "<svg onload=x>", "javascript:x", "\\", "\\u003c"),
    *("&", "&lt;", "&#60;", "&#x3c", "&amp;lt;", "{{ 7 * 7 }}", "{% raw %}", "${x}"),
    *("\0", "\x1b[31m", "\r\n", "\t", "\x85", "\u2028", "\u202e", "\u2066", "\u200b", "\ufeff", "\ufffe"),
    *("\ud800", "\udcff", "\u05e9\u05dc\u05d5\u05dd", "\U0001f600"),
)


def as_name(pieces: list[str]) -> str:
    """Return a name that makes no part of a path of its own."""
    return "n" + "".join(pieces).replace(".", "")


names = st.lists(st.sampled_from(PIECES) | st.text(st.characters(), max_size=8), max_size=8).map(as_name)


def merge_of(name: str) -> MergeReport:
    """Return a report with a name in each text that comes from a file or from a command line."""
    rows = tuple(
        TensorReport(f"model.layers.{i}.self_attn.{name}q_proj.weight", (8, 6), "BF16", "lora", 2, (1.0,), 0.1 + i, 0.5)
        for i in range(3)
    )
    return MergeReport(
        base=name,
        out=name,
        dry_run=False,
        nbytes=10**6,
        adapters=(AdapterReport(name, "peft", 1.0, 3, "00" * 32, {name: 0.5}),),
        tensors=rows,
        changed=3,
        kept=0.99,
        copied=1,
        undo=name,
        undo_bytes=7,
        left_out=(name,),
        files=(name,),
        not_copied=(name,),
        warnings=(f"{name}: has no effect",),
    )


def page_of(report: MergeReport, name: str) -> str:
    return render(report, envelope("merge", asdict(report)), f"loratool merge {name}")


@pytest.fixture(scope="module")
def harmless() -> list[tuple[object, ...]]:
    return PageElements(page_of(merge_of("name"), "name")).elements


@settings(max_examples=20, deadline=None, derandomize=True)
@given(names)
@example("".join(PIECES))
@example("<b>" * 1365)
def test_no_name_is_markup(harmless: list[tuple[object, ...]], name: str) -> None:
    report = merge_of(name)
    page = page_of(report, name)
    found = PageElements(page)
    assert found.elements == harmless
    texts = ["".join(text for place, text in found.texts if place == each) for each in (("title",), ("bdi",))]
    seen = escape(name)
    assert texts[0] == f"{seen} + 1,{seen}=0.5 {seen} -> {seen}"
    assert f"model.layers.2.self_attn.{seen}q_proj.weight" in texts[1]
    (held,) = [text for place, text in found.texts if ("id", "report") in place]
    assert json.loads(held)["report"] == report.to_dict() and not {*held} & {*"<>&"} and held.isascii()
    page.encode()


def test_what_a_reader_would_not_see_is_written_out() -> None:
    """Control characters, marks of direction and what has no width stand in no text, but as escapes."""
    hidden = [piece for piece in PIECES if not piece.isprintable()]
    page = PageElements(page_of(merge_of("".join(hidden)), "".join(hidden)))
    texts = "".join(text for place, text in page.texts if place[0] not in ("script", "style"))
    assert all(c.isprintable() or c == "\n" for c in texts) and "\\u202e" in texts and "\\x00" in texts
