"""Measure pages, in bytes, seconds and chromium's milliseconds: pytest -m slow -s tests/benchmarks/test_page_speed.py

A page depends on names and numbers, not on how wide matrices are, so that 224 modules are those of a 7B an eighth as
wide, and 9,216 those of 48 layers with 64 experts each. Milliseconds of the browser are the least of five, from the
file's opening to the first paint and to the grid, and from a click or a letter to the end of the next frame.
"""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import factors, weights, write_model, write_peft
from models import make

import loratool

pytestmark = pytest.mark.slow

LIMIT = 1.5e6  # bytes of the page of 224 modules
AGAIN = 5
# when the first cell of a grid is there, looked for at each frame
WHEN_DRAWN = """
const look = () => document.querySelector(".grid [data-row]") ? window.drawn = performance.now()
  : requestAnimationFrame(look);
requestAnimationFrame(look);
"""
USE = """async () => {
  const frame = () => new Promise(done => requestAnimationFrame(() => setTimeout(done)));
  const time = async act => { await frame(); const start = performance.now(); act(); await frame();
    return performance.now() - start; };
  const section = document.querySelector("section.sheet");
  const type = text => () => { const filter = section.querySelector(".filter"); filter.value = text;
    filter.dispatchEvent(new Event("input")); };
  const colour = section.querySelector(".colour");
  return {
    paint: performance.getEntriesByName("first-contentful-paint")[0].startTime,
    grid: window.drawn,
    sort: await time(() => section.querySelector("th[data-number] button").click()),
    filter: await time(type("up_proj")),
    clear: await time(type("")),
    colour: await time(() => { colour.selectedIndex = (colour.selectedIndex + 1) % colour.options.length;
      colour.dispatchEvent(new Event("change")); }),
  };
}"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders with `base`, `adapter` and `other` by their number of modules."""
    folders = {count: tmp_path_factory.mktemp(str(count)) for count in (224, 9216)}
    make(folders[224], "narrow")
    names = [f"model.layers.{i}.mlp.experts.{e}.{kind}_proj" for i in range(48) for e in range(64) for kind in EXPERT]
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 48, "num_experts": 64}
    base = {f"{name}.weight": weights(*EXPERT[kind_of(name)], seed=i) for i, name in enumerate(names)}
    write_model(folders[9216] / "base", base, config)
    write_peft(folders[9216] / "adapter", {n: factors(*EXPERT[kind_of(n)], 16, i) for i, n in enumerate(names)})
    for folder in folders.values():
        loratool.resize(folder / "adapter", folder / "other", rank=8)
    return folders


EXPERT = {"gate": (24, 32), "up": (24, 32), "down": (32, 24)}


def kind_of(name: str) -> str:
    return name.rpartition(".")[2].removesuffix("_proj")


CALLS: dict[str, Callable[[Path], Any]] = {
    "merge": lambda folder: loratool.merge(folder / "base", folder / "adapter", folder / "merged"),
    "inspect --base": lambda folder: loratool.inspect(folder / "adapter", base=folder / "base"),
    "diff": lambda folder: loratool.diff(folder / "adapter", folder / "other"),
}


def use(browser: Any, path: Path) -> Iterator[dict[str, float]]:
    for _ in range(AGAIN):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.add_init_script(WHEN_DRAWN)
        page.goto(path.as_uri())
        page.wait_for_function("window.drawn")
        yield page.evaluate(USE)
        page.close()


@pytest.mark.parametrize("count", [224, 9216])
@pytest.mark.parametrize("name", CALLS)
def test_pages(name: str, count: int, files: dict[int, Path], browser: Any, tmp_path: Path) -> None:
    report = CALLS[name](files[count])
    seconds = []
    path = tmp_path / "page.html"
    for _ in range(AGAIN):
        start = time.perf_counter()
        loratool.write_report(report, path)
        seconds.append(time.perf_counter() - start)
    rounds = list(use(browser, path))
    least = {key: min(each[key] for each in rounds) for key in rounds[0]}
    data = path.read_bytes()
    told = ", ".join(f"{key} {value:.0f} ms" for key, value in least.items())
    print(
        f"\n{name}, {count:,} modules: {len(data) / 1e6:.2f} MB, {len(gzip.compress(data)) / 1e6:.2f} MB compressed, "
        f"{min(seconds):.2f} s to write; {told}"
    )
    assert count > 224 or (len(data) <= LIMIT and least["grid"] < 3000)
