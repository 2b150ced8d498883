"""Open pages in chromium and watch them: what they say on the console, what they ask for, what their policy forbids."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync"""  # root has no sandbox; the others keep the browser off the network
# runs in each frame before the page's own scripts
LISTEN = """
window.violations = []; window.shift = 0;
document.addEventListener("securitypolicyviolation",
  e => window.violations.push(`${e.violatedDirective} ${e.blockedURI}`));
new PerformanceObserver(list => { for (const e of list.getEntries()) if (!e.hadRecentInput) window.shift += e.value; })
  .observe({type: "layout-shift", buffered: true});
"""


def chromium() -> dict[str, Any]:
    """Return how playwright launches the machine's own chromium; else skip."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("needs chromium: apt-get install chromium")
    return {"executable_path": path, "args": QUIET.split()}


class Watch:
    """Open pages without a network, and note what they do that they must not.

    Attributes:
        faults: messages on the console, errors, dialogs, and violations of the page's own policy.
        requests: all addresses that were asked for.
    """

    def __init__(self, browser: Any) -> None:
        self.browser = browser
        self.contexts: list[Any] = []
        self.pages: list[Any] = []
        self.faults: list[str] = []
        self.requests: list[str] = []

    def open(self, path: Path | str, *, width: int = 1280, height: int = 800, **options: Any) -> Any:
        """Open a file, in a context of its own; `options` are playwright's of a context."""
        context = self.browser.new_context(viewport={"width": width, "height": height}, **options)
        self.contexts.append(context)
        context.add_init_script(LISTEN)
        address = path if isinstance(path, str) else path.as_uri()
        context.route("**/*", lambda route: route.continue_() if route.request.url == address else route.abort())
        context.on("request", lambda request: self.requests.append(request.url))
        context.on("console", lambda message: self.faults.append(f"console {message.type}: {message.text}"))
        context.on("weberror", lambda error: self.faults.append(f"error: {error.error}"))
        context.on("dialog", lambda dialog: (self.faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page = context.new_page()
        page.set_default_timeout(5_000)
        self.pages.append(page)
        page.goto(address)
        return page

    def close(self) -> None:
        """Close all pages, and hold that nothing was noted."""
        for page in self.pages:
            self.faults += [f"policy: {each}" for each in page.evaluate("window.violations ?? []")]
        for context in self.contexts:
            context.close()
        assert self.faults == []
        assert [each for each in self.requests if not each.startswith("file:") or not each.endswith(".html")] == []
