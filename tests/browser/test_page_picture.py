"""The picture of a page in README and guides is what fixtures/pictures.py makes of the page that is written now."""

from __future__ import annotations

import os
import struct
from typing import Any

import pytest
from conftest import FIXTURES
from lib.browser.page_files import pictures

pytestmark = [pytest.mark.browser, pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")]

# colours that an image has, of as many pixels as are alike
COUNT = """async data => {
  const image = new Image();
  image.src = `data:image/png;base64,${data}`;
  await image.decode();
  const canvas = new OffscreenCanvas(image.width, image.height).getContext("2d");
  canvas.drawImage(image, 0, 0);
  const pixels = new Uint32Array(canvas.getImageData(0, 0, image.width, image.height).data.buffer);
  const counts = {};
  for (const pixel of pixels) counts[pixel] = (counts[pixel] ?? 0) + 1 / pixels.length;
  return counts;
}"""


def size(png: bytes) -> tuple[int, ...]:
    return struct.unpack(">II", png[16:24])


def test_the_picture_is_of_this_page(browser: Any) -> None:
    """As far as its colours tell, whatever fonts are here: of the grid, the panels and the lines."""
    import base64

    kept, made = (FIXTURES / "pictures" / "page.png").read_bytes(), pictures.photograph(browser)
    assert size(kept) == size(made) == (pictures.WIDTH, pictures.HEIGHT)
    page = browser.new_page()
    shares = [page.evaluate(COUNT, base64.b64encode(png).decode()) for png in (kept, made)]
    page.close()
    apart = sum(abs(shares[0].get(c, 0) - shares[1].get(c, 0)) for c in {*shares[0], *shares[1]}) / 2
    assert apart < 0.05
