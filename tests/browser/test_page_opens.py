"""The page of each command opens from a disk and in viewers of CI, in silence, without a network, nothing hidden."""

from __future__ import annotations

from typing import Any

import pytest
from lib.browser.page_files import PAGES
from lib.browser.sheets import SheetOnPage

pytestmark = pytest.mark.browser

VISIBLE = """() => [...document.querySelectorAll("tbody tr[data-row]")].filter(row => row.checkVisibility()).length"""
ROWS = """() => document.querySelectorAll("tbody tr[data-row]").length"""
TOO_WIDE = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
# a phone; and 1280 px at 400 % (WCAG 1.4.10), on the widest pages
NARROW = [*((name, 360) for name in PAGES), ("diff", 320), ("diff-several", 320), ("inspect-parts", 320)]


WITHOUT_VERDICT = {"inspect-model"}  # which says what is there, and judges nothing


def verdict(page: Any) -> str:
    return "".join(page.locator(".verdict").all_inner_texts())


@pytest.mark.parametrize("name", PAGES)
def test_it_opens_in_silence(name: str, made: Any, watch: Any) -> None:
    """`watch` holds that nothing is said on the console, asked of the network or against the page's policy."""
    page = watch.open(made.page(name))
    assert (verdict(page) or name in WITHOUT_VERDICT) and watch.requests == [made.page(name).as_uri()]
    assert page.evaluate(VISIBLE) == page.evaluate(ROWS)
    assert page.evaluate(TOO_WIDE) <= 0 and page.evaluate("window.shift") < 0.02
    page.screenshot(full_page=True)


@pytest.mark.parametrize(("name", "width"), NARROW)
def test_it_fits_a_narrow_window(name: str, width: int, made: Any, watch: Any) -> None:
    page = watch.open(made.page(name), width=width)
    assert page.evaluate(TOO_WIDE) <= 0 and page.evaluate("window.shift") < 0.02


def test_it_fits_with_letters_twice_as_large(made: Any, watch: Any) -> None:
    page = watch.open(made.page("merge"), width=720)
    before = page.locator(".verdict").bounding_box()["height"]
    page.evaluate("document.documentElement.style.fontSize = '200%'")
    assert page.locator(".verdict").bounding_box()["height"] > 1.5 * before and page.evaluate(TOO_WIDE) <= 0


@pytest.mark.parametrize("name", PAGES)
def test_it_is_whole_without_scripts(name: str, made: Any, watch: Any) -> None:
    """And what is of no use without them is not there."""
    with_scripts = watch.open(made.page(name))
    page = watch.open(made.page(name), java_script_enabled=False)
    assert verdict(page) == verdict(with_scripts)
    for part in (".figures > div", "tbody tr[data-row]"):
        every = page.locator(part)
        assert every.count() == with_scripts.locator(part).count()
        assert every.count() == every.locator("visible=true").count()
    for control in (".colour", ".part", "input.filter", "button.copy", "th button"):
        assert page.locator(control).locator("visible=true").count() == 0


@pytest.mark.parametrize("name", ["merge", "diff", "diff-several"])
def test_it_prints_all_of_it(name: str, made: Any, watch: Any) -> None:
    page = watch.open(made.page(name))
    page.emulate_media(media="print")
    assert page.evaluate(VISIBLE) == page.evaluate(ROWS)
    for control in (".colour", "input.filter", "button.copy"):
        assert page.locator(control).locator("visible=true").count() == 0
    clipped = """() => [...document.querySelectorAll("*")].filter(e => e.querySelector("tr[data-row]") &&
      getComputedStyle(e).overflowY !== "visible" && e.scrollHeight > e.clientHeight + 1).map(e => e.className)"""
    assert page.evaluate(clipped) == []
    assert page.pdf(format="A4").startswith(b"%PDF")


def luminance(page: Any) -> float:
    """Return how light the page's ground is, from 0 to 1."""
    page.screenshot()
    colour = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    red, green, blue = (int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))
    return (red + green + blue) / 765


def test_it_is_dark_where_the_reader_is(made: Any, watch: Any) -> None:
    light, dark = (watch.open(made.page("merge"), color_scheme=scheme) for scheme in ("light", "dark"))
    assert luminance(light) > 0.9 and luminance(dark) < 0.2


def test_nothing_moves_for_those_who_want_it_still(made: Any, watch: Any) -> None:
    page = watch.open(made.page("merge"), reduced_motion="reduce")
    moves = """() => [...document.querySelectorAll("*")].filter(e => {
      const style = getComputedStyle(e);
      return style.transitionDuration !== "0s" || style.animationName !== "none" || style.scrollBehavior === "smooth";
    }).length + document.getAnimations().length"""
    assert page.evaluate(moves) == 0


class TestInViewersOfArtifacts:
    """They show a page in a frame that may do little, from an address that is not a file's."""

    PLACE = "https://artifacts.invalid/"

    def show(self, watch: Any, frame: str, page: bytes, headers: dict[str, str] | None = None) -> Any:
        """Open a page in a frame; both come from playwright, and no network is there."""
        context = watch.browser.new_context()
        watch.contexts.append(context)
        outer = f"<!doctype html><title>artifacts</title>{frame}"
        html = {"content-type": "text/html; charset=utf-8", **(headers or {})}
        context.route("**/*", lambda route: route.abort())
        context.route(self.PLACE, lambda route: route.fulfill(body=outer, headers={"content-type": "text/html"}))
        context.route(f"{self.PLACE}page.html", lambda route: route.fulfill(body=page, headers=html))
        opened = context.new_page()
        opened.goto(self.PLACE)
        return opened.frame_locator("iframe")

    @pytest.mark.parametrize("scripts", [True, False])
    def test_in_a_sandbox(self, scripts: bool, made: Any, watch: Any) -> None:
        allowed = "allow-scripts" if scripts else ""
        frame = f"<iframe src='page.html' sandbox='{allowed}' width=1000 height=700></iframe>"
        inner = self.show(watch, frame, made.page("merge").read_bytes())
        inner.locator("tbody tr[data-row]").last.wait_for(state="visible")
        inner.locator(".verdict").wait_for(state="visible")
        inner.locator(".grid [data-row]").first.wait_for(state="attached" if scripts else "detached")
        if scripts:
            inner.locator("input.filter").fill("q_proj")
            inner.locator("button.copy").click()
            inner.get_by_text("copied 24 rows").wait_for()

    def test_under_a_policy_that_forbids_all_styles_and_scripts(self, made: Any, watch: Any) -> None:
        """As Jenkins sends it with every artifact."""
        policy = "sandbox allow-same-origin; default-src 'none'; img-src 'self'; style-src 'self';"
        frame = "<iframe src='page.html' width=1000 height=700></iframe>"
        inner = self.show(watch, frame, made.page("merge").read_bytes(), {"content-security-policy": policy})
        for part in (".verdict", ".figures > div", "tbody tr[data-row]"):
            inner.locator(part).last.wait_for(state="visible")


FOCUS = """() => {
  const at = document.activeElement, style = getComputedStyle(at);
  return at === document.body ? null
    : {classes: at.getAttribute("class") ?? "",
       outlined: (at.tagName === "rect" ? style.stroke : style.outlineStyle) !== "none"};
}"""


def test_it_reads_in_order_by_the_keyboard_alone(made: Any, watch: Any) -> None:
    """Tab reaches each control once, in the order of the page, and each shows that it has the focus."""
    page = watch.open(made.page("merge"))
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(page.evaluate(FOCUS))
        if not seen[-1]:
            break
    assert seen.pop() is None and all(each["outlined"] for each in seen), seen
    classes = " ".join(each["classes"] for each in seen)
    assert "filter" in classes and "copy" in classes


def test_the_report_in_it_is_what_json_prints(made: Any, watch: Any) -> None:
    import json

    page = watch.open(made.page("merge"))
    report = json.loads(page.locator("script#report").text_content())
    assert (report["verb"], report["ok"]) == ("merge", True)
    sheet = SheetOnPage(page)
    assert len(report["report"]["tensors"]) == len(sheet.rows())
