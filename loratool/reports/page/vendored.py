"""Name the software of others that a page carries, unmodified, so that it needs no network.

Observable Plot draws from data, as Vega-Lite and plotly do, in half and a third of their size. It needs d3. It makes no
code from text, so that a page can forbid that.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Vendored:
    """A file of an npm package.

    Attributes:
        file: its name in `vendor/`; the licence's is beside it.
        source: its path in the package.
    """

    package: str
    version: str
    source: str
    file: str
    licence_file: str
    licence: str
    sha256: str


# in the order in which they are loaded
VENDORED = (
    Vendored(
        "d3",
        "7.9.2",
        "dist/d3.min.js",
        "d3.min.js",
        "d3.LICENSE",
        "ISC",
        "912111098ea99503a6f4967361d2bbdc9dbf58cf9c678c8e27e5b02d1a07f0c1",
    ),
    Vendored(
        "@observablehq/plot",
        "0.6.17",
        "dist/plot.umd.min.js",
        "plot.umd.min.js",
        "plot.LICENSE",
        "ISC",
        "4358086467740777dd788d6b27a95cebdbaefdd50c730a3060117073bd7134cb",
    ),
)
