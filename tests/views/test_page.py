"""A page is one file without network: its scripts are the vendored packages' and ours, its numbers the report's."""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64encode
from dataclasses import asdict, dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import ROOT

from loratool.views import page as page_package
from loratool.views.page.render import SCRIPTS, VENDORED, render
from loratool.views.parts import quantities as q
from loratool.views.parts.content import Axis, Curve, Figure, Heatmap, Page, Sheet
from loratool.views.parts.document import Document, TextSpan, line
from loratool.views.parts.numbers import correlation, share
from loratool.views.parts.report import Report
from loratool.views.parts.rows import WORST, Category, Issue, Measure

VENDOR = Path(page_package.__file__).parent / "vendor"
VOID = {"meta", "input"}


class Parsed(HTMLParser):
    """A page as elements: their text by tag and class, their attributes, and that all that opens is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.elements: list[tuple[str, dict[str, str | None], str]] = []
        self._texts: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in VOID:
            self.elements.append((tag, dict(attrs), ""))
            return
        self.open.append((tag, dict(attrs)))
        self._texts.append([])

    def handle_endtag(self, tag: str) -> None:
        opened, attributes = self.open.pop()
        assert opened == tag
        text = "".join(self._texts.pop())
        if self._texts:
            self._texts[-1].append(text)
        self.elements.append((tag, attributes, text))

    def handle_data(self, data: str) -> None:
        if self._texts:
            self._texts[-1].append(data)

    def of(self, tag: str, **attributes: str) -> list[str]:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [text for t, found, text in self.elements if t == tag and wanted.items() <= found.items()]


@dataclass(frozen=True)
class Row:
    name: str
    kind: str
    relative: float | None
    cosine: float
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Shown(Report):
    document_function: ClassVar[str] = ""

    rows_: tuple[Row, ...]

    def document(self, verbose: bool = False) -> Document:
        return make_document()

    def page(self) -> Page:
        return make_page(self.rows_)


@dataclass(frozen=True)
class Plain(Report):
    """A report whose page is its document alone."""

    document_function: ClassVar[str] = ""

    rows_: tuple[Row, ...] = ()

    def document(self, verbose: bool = False) -> Document:
        return make_document()


ROWS = (
    Row("model.layers.0.q_proj", "lora", 0.0895123456789, -0.25, (3.0, 4e-12)),
    Row("model.layers.1.q_proj", "lora", None, 1.0),
    Row("model.layers.2.q_proj", "lora", 0.09, 0.5),
    Row("model.layers.3.q_proj", "lora", 0.09, 0.5),
    Row("model.layers.4.q_proj", "dora", 0.09, 0.5),
)


def make_document() -> Document:
    return Document(
        subject=line("a ", TextSpan("p<a>th", "path")),
        lists=tuple(line(f"left out: tensor{i}") for i in range(9)) + (line("note: one"), line("no label")),
        warnings=("a & b",),
        verdict=(line(TextSpan("proven:", "good"), " yes"),),
        hint="loratool verify 'a b'",
    )


ISSUES = {1.0: Issue(1, "odd"), -1.0: Issue(WORST, "wrong")}  # by cosine


def make_page(rows: tuple[Row, ...]) -> Page:
    columns = (
        Category[Row](q.KIND, lambda row: row.kind),
        Measure[Row](q.DELTA_OVER_W, lambda row: row.relative, share, drawn=True),
        Measure[Row](q.COSINE, lambda row: row.cosine, correlation),
    )
    number, value = Axis(q.PLACE), Axis(q.SINGULAR_VALUE, log=True)
    curve = Curve[Row](
        "singular values", number, value, lambda row: {"D": [*enumerate(row.values, 1)]} if row.values else {}
    )
    return Page(
        figures=(Figure("kept", "100%", "of it"),),
        sheets=(
            Sheet(
                rows,
                columns,
                "module",
                lambda row: ISSUES.get(row.cosine),
                curves=(curve,),
            ),
        ),
        heatmaps=(
            Heatmap("Cosines", "adapter", "adapter", q.COSINE, "AB", "AB", ((1.0, None), (-0.5, 1.0)), correlation),
        ),
        arithmetic=("exact",),
        hashes={"a": "ff"},
    )


def page(report: Report, command: str | None = "loratool x --html r.html") -> str:
    return render(report, {"schema": 2, "verb": "x", "ok": True, "exit_code": 0, "report": asdict(report)}, command)  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def shown() -> Parsed:
    return Parsed(page(Shown(ROWS)))


@pytest.mark.parametrize("each", VENDORED, ids=lambda each: each.package)
def test_what_is_vendored_is_what_npm_has(each: Any) -> None:
    data = (VENDOR / each.file).read_bytes()
    assert hashlib.sha256(data).hexdigest() == each.sha256
    assert each.version in data[:80].decode()
    assert "Permission to use, copy, modify" in (VENDOR / each.licence_file).read_text()
    assert not re.search(rb"</script|<!--", data, re.IGNORECASE)


def test_the_policy_allows_the_scripts_of_the_page_and_no_other(shown: Parsed) -> None:
    scripts = [text for tag, attributes, text in shown.elements if tag == "script" and "type" not in attributes]
    assert len(scripts) == 1 + len(VENDORED) + len(SCRIPTS)
    (policy,) = [a["content"] or "" for tag, a, _ in shown.elements if a.get("http-equiv") == "Content-Security-Policy"]
    hashes = [f"'sha256-{b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in scripts]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["script-src"].split() == hashes
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"


def test_nothing_in_a_page_names_another_file(shown: Parsed) -> None:
    linking = {"src", "href", "action", "data", "srcset", "background", "poster", "formaction", "onclick", "onload"}
    assert not [(tag, found) for tag, found, _ in shown.elements if linking & found.keys()]
    assert "@import" not in "".join(shown.of("style")) and "url(" not in "".join(shown.of("style"))


def test_the_table_has_what_is_written_and_the_numbers_behind_it(shown: Parsed) -> None:
    heads = [
        (text.strip(), a.get("data-unit")) for tag, a, text in shown.elements if tag == "th" and a.get("scope") == "col"
    ]
    assert heads[-4:] == [("module", None), ("kind", ""), ("delta/W", "%"), ("cosine", "")]
    cells = [(text, a.get("data-v")) for tag, a, text in shown.elements if tag == "td" and "class" not in a][4:10]
    assert cells == [
        ("lora", None),
        ("8.95%", "8.951235"),
        ("-0.25", "-0.25"),
        ("lora", None),
        ("-", ""),
        ("1.00", "1"),
    ]
    assert shown.of("span", class_="reason") == ["odd"]


def test_rows_stand_by_their_numbers() -> None:
    rows = tuple(Row(f"model.layers.{i}.{kind}", "lora", 0.1, 0.5) for i in (10, 2) for kind in "vq")
    names = [each for each in Parsed(page(Shown(rows))).of("bdi") if each.startswith("model.")]
    assert names == [f"model.layers.{i}.{kind}" for i in (2, 10) for kind in "qv"]


@pytest.mark.parametrize(("cosine", "odd", "told"), [(1.0, 1, 1), (1.0, 9, 0), (-1.0, 9, 9)])
def test_what_many_have_is_told_of_none_unless_it_is_the_worst(cosine: float, odd: int, told: int) -> None:
    rows = tuple(Row(f"model.layers.{i}.q", "lora", 0.1, cosine if i < odd else 0.5) for i in range(12))
    reasons = Parsed(page(Shown(rows))).of("span", class_="reason")
    assert reasons == [ISSUES[cosine].reason] * told


def test_whole_numbers_have_all_their_digits() -> None:
    """Sizes of groups are floats, and copied as they stand in `data-v`."""
    rows = tuple(
        Row(f"layers.{i}.q", "lora", None, value) for i, value in enumerate((123456789.0, 123456789, 1e20, 0.1))
    )
    cells = [a.get("data-v") for tag, a, _ in Parsed(page(Shown(rows))).elements if tag == "td" and a.get("data-v")]
    assert cells[-4:] == ["123456789", "123456789", "1e+20", "0.1"]


def test_what_scripts_draw_is_in_the_page(shown: Parsed) -> None:
    (text,) = shown.of("script", class_="drawn")
    drawn = json.loads(text)
    assert "selected" in next(a for tag, a, text in shown.elements if tag == "option" and text == "delta/W")
    (grid,) = drawn["grids"]
    assert (grid["columns"], grid["rows"], grid["cells"]) == (
        ["0", "1", "2", "3", "4"],
        ["q_proj"],
        [[i, i, 0] for i in range(5)],
    )
    (curve,) = drawn["curves"]
    assert curve["rows"] == {"0": {"D": [[1, 3], [2, 4e-12]]}}
    assert curve["y"] == {"title": "singular value", "unit": "", "log": True, "ends": None}


def test_verdict_figures_warnings_lists_and_origin_are_read_without_scripts(shown: Parsed) -> None:
    (verdict,) = shown.of("section", **{"aria-label": "verdict"})
    assert "proven: yes" in verdict and "loratool verify 'a b'" in verdict
    assert "verdict good" in [a.get("class") for tag, a, _ in shown.elements if tag == "section"]
    assert shown.of("h1") == ["a p<a>th"]
    body = shown.of("body")[0]
    for text in (
        "100%",
        "a & b",
        "exact",
        "ff",
        "loratool x --html r.html",
        "Cosines",
        "left out (9)",
        "note: one",
        "no label",
    ):
        assert text in body
    assert "-0.50" in shown.of("section", class_="heatmap")[0]


def test_a_report_without_a_page_of_its_own_has_its_document() -> None:
    parsed = Parsed(page(Plain(), command=None))
    assert "proven: yes" in parsed.of("body")[0]
    assert not parsed.of("section", class_="sheet")


def test_a_page_is_the_same_twice_and_holds_no_date_or_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = page(Shown(ROWS))
    monkeypatch.chdir(tmp_path)
    assert page(Shown(ROWS)) == first
    assert str(Path.home()) not in first


def test_each_quantity_has_a_meaning_and_a_unit_and_some_view_shows_it() -> None:
    views = "".join(path.read_text() for path in (ROOT / "loratool" / "views").rglob("*.py"))
    for name, each in vars(q).items():
        if isinstance(each, q.Quantity):
            assert each.meaning and not each.meaning.endswith(".") and each.unit in q.UNITS, name
            assert len(re.findall(rf"\b{name}\b", views)) > 1, name
