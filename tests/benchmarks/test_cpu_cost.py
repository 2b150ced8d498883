"""Measure the CPU seconds of whole commands against peft's merge and against an import of numpy, in turns.

    pytest -m slow -s tests/benchmarks/test_cpu_cost.py
    python tests/benchmarks/test_cpu_cost.py

The second writes the charts of the guide `benchmarks` again.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
sys.path.insert(0, str(Path(__file__).parent))
from conftest import FIXTURES, ROOT
from lib import markdown
from models import make
from test_merge_speed import cpu_of_children, peak
from test_resize_speed import write

pytestmark = pytest.mark.slow
COMMAND = [sys.executable, "-c", "from loratool.cli import main; main()"]
MOST_MB = 150
BAR = 24  # characters of the longest bar


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("models")
    make(root / "small", "small")
    yield root
    shutil.rmtree(root)


def cpu_of(command: list[object], made: Path | None = None) -> float:
    """Return the CPU seconds of a process and its workers. made: its output, which is removed before."""

    if made:
        shutil.rmtree(made, ignore_errors=True)
    before = cpu_of_children()
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    subprocess.run([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    return cpu_of_children() - before


@dataclass(frozen=True)
class Row:
    """One command's CPU seconds, and what it may cost at most, as a multiple of the other side's."""

    name: str
    seconds: float
    most: float | None = None


def against_peft(models: Path) -> list[Row]:
    """Measure 0.6 GB in bf16, rank 16; unmerge and verify are compared with peft's merge."""
    base, adapter = models / "small" / "base", models / "small" / "adapter"
    out, back, plain, theirs = (models / name for name in ("out", "back", "plain", "theirs"))
    calls: dict[str, tuple[float, list[object], Path | None]] = {
        "merge": (0.22, ["merge", base, adapter, "-o", out], out),
        "unmerge": (0.25, ["unmerge", out, adapter, "-o", back], back),
        "verify": (0.22, ["verify", base, adapter, out], None),
        "merge --no-undo": (0.14, ["merge", base, adapter, "-o", plain, "--no-undo"], plain),
    }
    rival: list[object] = [sys.executable, Path(__file__).parent / "peft_merge.py", base, adapter, theirs]
    found: dict[str, list[float]] = {name: [] for name in ("peft's merge", *calls)}
    for _ in range(3):
        found["peft's merge"].append(cpu_of(rival, theirs))
        for name, (_, call, made) in calls.items():
            found[name].append(cpu_of([*COMMAND, *call, "-q"], made))
    return _rows(found, {name: most for name, (most, *_) in calls.items()})


def against_numpy(folder: Path) -> list[Row]:
    """Measure the README's merge and small commands, whose cost is their start; diff and resize are of 7B adapters."""
    base, adapter = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"
    first, second = (write(folder / name, 16, seed) for seed, name in enumerate(("first", "second")))
    calls: dict[str, tuple[float, list[object]]] = {
        "merge, the README's": (4.0, ["merge", base, adapter, "-o", folder / "merged", "--force"]),
        "inspect of an adapter": (3.5, ["inspect", adapter]),
        "diff of two 7B adapters": (14.0, ["diff", first, second]),
        "resize of one": (11.0, ["resize", first, "--rank", "8", "-o", folder / "resized", "--force"]),
    }
    found: dict[str, list[float]] = {name: [] for name in ("import numpy", *calls)}
    for _ in range(9):
        found["import numpy"].append(cpu_of([sys.executable, "-c", "import numpy"]))
        for name, (_, call) in calls.items():
            found[name].append(cpu_of([*COMMAND, *call, "-q"]))
    return _rows(found, {name: most for name, (most, _) in calls.items()})


def _rows(found: Mapping[str, Sequence[float]], most: Mapping[str, float]) -> list[Row]:
    rows = [Row(name, statistics.median(seconds), most.get(name)) for name, seconds in found.items()]
    print("\n" + chart(rows))
    return rows


def chart(rows: Sequence[Row]) -> str:
    """Return a bar for each row, with how many times the first row it is, and the bound of that."""
    longest, widest = max(row.seconds for row in rows), max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        bound = f", {row.seconds / rows[0].seconds:.2g} times (at most {row.most:g})" if row.most else ""
        bar = "#" * max(1, round(BAR * row.seconds / longest))
        lines.append(f"{row.name:{widest}} {bar} {row.seconds:.2f} s{bound}\n")
    return "".join(lines)


def _is_within(rows: Sequence[Row]) -> bool:
    return all(row.seconds <= row.most * rows[0].seconds for row in rows if row.most)


def test_against_peft(models: Path) -> None:
    rows = against_peft(models)
    merge: list[object] = ["merge", models / "small" / "base", models / "small" / "adapter", "-o", models / "again"]
    most = peak([*COMMAND, *merge, "-q"])
    print(f"merge: {most:.0f} MB of all processes (at most {MOST_MB})")
    assert _is_within(rows) and most <= MOST_MB


def test_against_an_import_of_numpy(tmp_path: Path) -> None:
    assert _is_within(against_numpy(tmp_path))


def write_page() -> None:
    """Measure both, and write the charts into the guide."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "small", "small")
        charts = [chart(against_peft(Path(folder))), chart(against_numpy(Path(folder)))]
    guide = ROOT / "loratool" / "guides" / "benchmarks.md"
    text = guide.read_text()
    for number, each in enumerate(charts, 1):
        mark = f"<!-- from tests/benchmarks/test_cpu_cost.py: {number} -->\n"
        text = markdown.replaced(text, mark, f"```text\n{each}```\n")
    guide.write_text(text)


if __name__ == "__main__":
    write_page()
