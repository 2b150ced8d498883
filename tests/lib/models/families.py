"""Count the families' checks that are right, refused and wrong.

    python tests/lib/models/families.py [CASE ...] [--write]

The checks are those of `dit_spellings`, which the tests hold one by one. `--write` puts the tables into the guides
`families` and `image-models`; without it they are printed. It ends with 1 if anything is wrong, which it then names.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[3])]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of matrices this small, threads are waited for
import diffusers
import torch
from conftest import ROOT

from lib import markdown
from lib.models import dit_models
from lib.models.dit_spellings import SPELLINGS, Subject, cells, outcome, telling_widths
from loratool.architectures.families import FAMILIES

FAMILY_GUIDE, SPELLING_GUIDE = (ROOT / "loratool" / "guides" / f"{name}.md" for name in ("families", "image-models"))
MARK = "<!-- from tests/lib/models/families.py -->\n"
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


def tables(rows: Iterable[Row]) -> tuple[str, str]:
    """Return the tables of families and of spellings as Markdown."""
    by_family: dict[str, dict[str, Counter[str]]] = {}
    by_spelling: dict[str, Counter[str]] = {}
    for case, verb, spelling, state, _ in rows:
        by_family.setdefault(dit_models.family_of(case), {}).setdefault(verb, Counter())[state] += 1
        if spelling:
            by_spelling.setdefault(spelling, Counter())[state] += 1
    titled = {family.title: by_family[key] for key, family in FAMILIES.items() if key in by_family}
    return of_families(titled), of_spellings(by_spelling)


def of_families(found: Mapping[str, Mapping[str, Counter[str]]]) -> str:
    """Return the table of families, that of their commands, and the sums.

    Args:
        found: title -> command -> counts of states.
    """
    by_verb = {verb: _sum(counts.get(verb, Counter()) for counts in found.values()) for verb in VERBS}
    lines = []
    for title, counts in found.items():
        total = _sum(counts.values())
        others = [f"{verb} {counts[verb][s]}{' wrong' * (s == 'wrong')}" for s in STATES[1:] for verb in VERBS
                  if counts.get(verb, Counter())[s]]  # fmt: skip
        lines.append((title, f"{total['right']}", ", ".join(others)))
    sums = ", ".join(f"{_sum(by_verb.values())[s]} {s}" for s in STATES)
    verbs = [(verb, *(f"{counts[s]}" for s in STATES)) for verb, counts in by_verb.items()]
    tables = (markdown.table(("family", "right", "refused"), lines), markdown.table(("command", *STATES), verbs))
    return f"{tables[0]}\nBy command, {sums}:\n\n{tables[1]}"


def of_spellings(found: Mapping[str, Counter[str]]) -> str:
    """Return the table of spellings, and that of their checks.

    Args:
        found: spelling -> counts of states.
    """
    lines, checks = [], []
    for name, spelling in SPELLINGS.items():
        prefix = f"`{spelling.prefix}`" if spelling.prefix else "none"
        end = spelling.ends[0].strip(".")
        A = f"`{end.removesuffix('.weight')}`" + ("" if end.endswith(".weight") else " alone")
        lines.append((name, prefix, spelling.naming, A, spelling.alpha or "none"))
        checks.append((name, *(f"{found.get(name, Counter())[state]}" for state in STATES)))
    spellings = markdown.table(("spelling", "prefix", "names", "A", "alpha"), lines)
    return f"{spellings}\nChecks:\n\n{markdown.table(('spelling', *STATES), checks)}"


def _sum(counts: Iterable[Counter[str]]) -> Counter[str]:
    return sum(counts, Counter())


def main(arguments: list[str]) -> int:
    chosen = [each for each in arguments if each != "--write"] or list(dit_models.MODELS)
    rows: list[Row] = []
    start = time.monotonic()
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for found in pool.map(count, chosen):
            rows += found
            states = Counter(state for *_, state, _ in found)
            print(f"{found[0][0]}: {told(states)}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    for guide, text in zip((FAMILY_GUIDE, SPELLING_GUIDE), tables(rows), strict=True):
        if "--write" in arguments:
            markdown.put(guide, MARK, text)
        else:
            print(text)
    for case, verb, _, state, message in rows:
        if state != "right":
            print(f"{state}: {case} {verb} {message}", file=sys.stderr)
    return int(any(state == "wrong" for *_, state, _ in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
