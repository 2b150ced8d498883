"""Count the families' checks that are right, refused and wrong.

    python tests/lib/models/families.py [CASE ...] [--write]

The checks are those of `dit_spellings`, which the tests hold one by one. `--write` puts the tables into the guide
`image-models`; without it they are printed. It ends with 1 if anything is wrong, which it then names.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[3])]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of matrices this small, threads are waited for
import diffusers
import torch
from conftest import ROOT

from lib.models import dit_models
from lib.models.dit_spellings import SPELLINGS, Subject, cells, outcome, telling_widths
from loratool.architectures.families import FAMILIES

GUIDE = ROOT / "loratool" / "guides" / "image-models.md"
MARKS = ("<!-- from tests/lib/models/families.py -->\n", "<!-- until here -->\n")
VERBS = (
    "merge",
    "unmerge",
    "verify",
    "inspect",
    "diff",
    "convert",
    "convert a base",
    "extract",
    "init",
    "combine",
    "resize",
)
STATES = ("right", "refused", "wrong")
Row = tuple[str, str, str, str, str]  # case, verb, spelling, state, message with the arguments


def count(case: str) -> list[Row]:
    """Run every check of a case."""
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    rows = []
    with telling_widths(), tempfile.TemporaryDirectory() as folder:
        subject = Subject(case, Path(folder))
        for cell in cells(subject):
            state, message = outcome(subject, cell)
            rows.append((case, cell.verb, cell.spelling, state, f"{cell.args}: {message.replace(folder, '')}"))
    return rows


def told(states: Counter[str]) -> str:
    """Return what a cell says: how many are right, and what of the others there is."""
    return ", ".join(f"{states[s]}" if s == "right" else f"{states[s]} {s}" for s in STATES if states[s])


def tables(rows: Iterable[Row]) -> str:
    """Return the tables of families and of spellings, and the sums, as Markdown."""
    by_verb: dict[tuple[str, str], Counter[str]] = {}
    by_spelling: dict[str, Counter[str]] = {}
    sums: Counter[str] = Counter()
    for case, verb, spelling, state, _ in rows:
        by_verb.setdefault((dit_models.family_of(case), verb), Counter())[state] += 1
        sums[state] += 1
        if spelling:
            by_spelling.setdefault(spelling, Counter())[state] += 1
    lines = ["| family | " + " | ".join(VERBS) + " |", "|---" * (len(VERBS) + 1) + "|"]
    for key, family in FAMILIES.items():
        if any(dit_models.family_of(case) == key for case in dit_models.MODELS):
            counts = " | ".join(told(by_verb.get((key, verb), Counter())) for verb in VERBS)
            lines.append(f"| {family.title} | {counts} |")
    lines += ["", "| spelling | prefix | names | A and B | alpha | checks |", "|---" * 6 + "|"]
    for name, spelling in SPELLINGS.items():
        prefix = f"`{spelling.prefix}`" if spelling.prefix else "none"
        ends = ", ".join(f"`{end}`" for end in spelling.ends)
        checks = told(by_spelling.get(name, Counter()))
        lines.append(f"| {name} | {prefix} | {spelling.naming} | {ends} | {spelling.alpha or 'none'} | {checks} |")
    return "\n".join([*lines, "", f"{sums['right']} right, {sums['refused']} refused, {sums['wrong']} wrong.", ""])


def write(text: str) -> None:
    """Put the tables between the guide's marks."""
    before, _, rest = GUIDE.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    GUIDE.write_text(f"{before}{MARKS[0]}{text}{MARKS[1]}{after}")


def main(arguments: list[str]) -> int:
    chosen = [each for each in arguments if each != "--write"] or list(dit_models.MODELS)
    rows: list[Row] = []
    start = time.monotonic()
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for found in pool.map(count, chosen):
            rows += found
            states = Counter(state for *_, state, _ in found)
            print(f"{found[0][0]}: {told(states)}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    if "--write" in arguments:
        write(tables(rows))
    else:
        print(tables(rows))
    for case, verb, _, state, message in rows:
        if state != "right":
            print(f"{state}: {case} {verb} {message}", file=sys.stderr)
    return int(any(state == "wrong" for *_, state, _ in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
