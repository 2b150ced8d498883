"""Take a page of a report apart: its elements with their attributes, and the texts in them."""

from __future__ import annotations

from html.parser import HTMLParser


class PageElements(HTMLParser):
    """What a parser makes of a page.

    Attributes:
        elements: begins with attributes and ends of elements, comments and declarations, in their order.
        texts: (the element that it stands in, text).
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[object, ...]] = []
        self.texts: list[tuple[tuple[object, ...], str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, *attrs))

    def handle_endtag(self, tag: str) -> None:
        self.elements.append((f"/{tag}",))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.elements[-1], data))

    def handle_comment(self, data: str) -> None:
        self.elements.append(("comment", data))

    def handle_decl(self, decl: str) -> None:
        self.elements.append(("declaration", decl))

    def handle_pi(self, data: str) -> None:
        self.elements.append(("instruction", data))

    def unknown_decl(self, data: str) -> None:
        self.elements.append(("unknown", data))
