"""Say what is in an adapter: its modules with the sizes of their deltas, and what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from ...architectures.families import FAMILIES
from ...reports.document import Document, Line, Toned, line, path
from ...reports.numbers import dimensions, measure, nbytes, plural, quantity, rank, scaling, share, spread
from ...reports.rows import WORST, Category, Flaw, Measure
from ...reports.table import make_table
from ...reports.writing import command_line, listed, told
from .adapter import AdapterInspection, ModuleReport

PRIORITY = (
    "delta/W",
    "eff. rank",
    "layers",
    "by layer",
    "count",
    "rank",
    "alpha",
    "shape",
    "parameters",
    "kind",
    "scale",
    "dtype",
)


LONGEST = 60  # characters of a text from a file


def inspection_document(report: AdapterInspection, verbose: bool) -> Document:
    """Make the document of an adapter."""
    rows = [row for row in report.details if verbose or not _is_told(row, report.problems)]
    held = is_held(report)
    priority = PRIORITY if held else ("delta", *PRIORITY)
    columns = inspection_columns(held)
    table = make_table(rows, lambda row: row.name, columns, priority, find_flaw=inspection_flaw, verbose=verbose)
    fits = report.coverage is None or report.coverage.bound > 0
    return Document(
        subject=_subject(report),
        facts=(line(", ".join(_facts(report))), *map(line, training_lines(report))),
        tables=(table,) if rows and (fits or verbose) else (),
        lists=tuple(_lists(report, verbose)),
        verdict=(_verdict(report),),
        next=_next(report),
        verbose=verbose,
    )


def is_held(report: AdapterInspection) -> bool:
    """Return whether the adapter was held against a base in which some of its weights are."""
    return any(row.relative is not None for row in report.details)


def inspection_columns(held: bool) -> list[Category[ModuleReport] | Measure[ModuleReport]]:
    """Return the columns; held against a base, the delta beside the weight says more than the delta."""
    delta: list[Category[ModuleReport] | Measure[ModuleReport]] = [
        Measure("delta", lambda row: row.norm, measure, watched=not held, drawn=not held)
    ]
    if held:
        delta.append(Measure("delta/W", lambda row: row.relative, share, watched=True, drawn=True))
    return [
        Category("kind", lambda row: row.kind),
        Category("shape", lambda row: dimensions(row.shape), right=True, always=True),
        Category("dtype", lambda row: row.dtype),
        Category("rank", lambda row: str(row.rank) if row.rank else "-", right=True, alone=True),
        Category("alpha", lambda row: "-" if row.alpha is None else f"{row.alpha:g}", right=True),
        Category("scale", lambda row: scaling(row.scale) if row.rank else "-", right=True, alone=True),
        Measure("parameters", lambda row: row.parameters, quantity, summed=True),
        *delta,
        Measure("eff. rank", lambda row: row.effective_rank, rank),
    ]


def _is_dead(row: ModuleReport) -> bool:
    """Return whether the delta is 0 or no number; a module without an alpha has no norm, but directions."""
    return bool(row.rank) and not row.norm and (row.norm == 0 or row.effective_rank is None)


def _is_told(row: ModuleReport, problems: Sequence[str]) -> bool:
    """Return whether a problem's line names a module whose delta is 0 or no number."""
    return _is_dead(row) and any(row.name in problem for problem in problems)


def inspection_flaw(row: ModuleReport) -> Flaw | None:
    """Return why a module needs attention: its delta is 0 or no number."""
    if not _is_dead(row):
        return None
    return Flaw(WORST, "nan or inf") if row.norm is None else Flaw(1, "delta is 0")


def _subject(report: AdapterInspection) -> Line:
    factored = [row for row in report.details if row.rank]
    kinds = " and ".join(dict.fromkeys(row.kind for row in factored or report.details)) or "adapter"
    model = report.base_model or (FAMILIES[report.family].title if report.family else "")
    base = f" for {model}" if model else ""
    return line(path(report.path), f": {report.format} {kinds}{base}")


def _facts(report: AdapterInspection) -> Iterator[str]:
    factored = [row for row in report.details if row.rank]
    if factored:
        yield f"rank {spread([row.rank for row in factored], rank)}"
        yield alpha_words(report)
    yield ", ".join(dict.fromkeys(row.dtype for row in report.details))
    yield plural(report.modules, "module")
    yield f"{quantity(report.parameters)} parameters"
    yield nbytes(report.nbytes)


def alpha_words(report: AdapterInspection) -> str:
    """Write the alphas of what has factors, and the scales that they mean."""
    factored = [row for row in report.details if row.rank]
    alphas = [row.alpha for row in factored if row.alpha is not None]
    means = f"scale {spread([row.scale for row in factored], scaling)}{', rsLoRA' if report.use_rslora else ''}"
    return f"alpha {spread(alphas, '{:g}'.format)} ({means})" if alphas else "no alpha"


def training_lines(report: AdapterInspection) -> Iterator[str]:
    """Yield what the file says of its training, a line where it says it."""
    if report.trigger_words:
        yield f"trigger words: {shorten(', '.join(report.trigger_words))}"
    said = report.training
    if said is None:
        return
    parts = [plural(said.images, "image") if said.images is not None else ""]
    parts += [plural(said.epochs, "epoch") if said.epochs is not None else ""]
    parts += [plural(said.steps, "step") if said.steps is not None else ""]
    parts += [said.resolution or "", shorten(said.optimizer or "")]
    parts += [f"lr {said.learning_rate:g}" if said.learning_rate is not None else ""]
    on = f"on {shorten(said.base_model)}" if said.base_model else ""
    if on or any(parts):
        yield "trained: " + ", ".join(filter(None, (on, *parts)))
    if said.tags:
        yield "frequent tags: " + ", ".join(f"{shorten(tag)} {count:,}" for tag, count in said.tags)
    if said.thumbnail_nbytes is not None:
        yield f"thumbnail: {nbytes(said.thumbnail_nbytes)}"


def shorten(text: str) -> str:
    """Return a text from a file, cut at a word if it is long."""
    return text if len(text) <= LONGEST else text[:LONGEST].rpartition(" ")[0].rstrip(", ") + " ..."


def _lists(report: AdapterInspection, verbose: bool) -> Iterator[Line]:
    if report.coverage and verbose:
        for module, names in report.coverage.unbound.items():
            yield line(f"not in the base: {module}" + (f" (nearest: {', '.join(names)})" if names else ""))
    yield from listed("beside the weights (--drop extras)", report.extras, verbose)
    yield from told("note", report.notes, verbose)
    yield from told("problem", report.problems, verbose, "bad")


def _verdict(report: AdapterInspection) -> Line:
    coverage = report.coverage
    bound = f"{coverage.bound:,} of {plural(report.modules, 'module')} are in " if coverage else ""
    fits = line(bound, path(coverage.base)) if coverage else ()
    if report.problems:
        return line(Toned(plural(len(report.problems), "problem"), "bad"), *((Toned("; "), *fits) if fits else ()))
    if fits:
        return line(Toned("ok", "good"), ": ", *fits, ", no problem found")
    return line(Toned("ok", "good"), ": no problem found; --base BASE checks it against the model")


def _next(report: AdapterInspection) -> str | None:
    """Return the call that merges an adapter which fits, or that holds it against its own base if that is here."""
    if report.problems:
        return None
    if report.coverage:
        return command_line("merge", report.coverage.base, report.path, "-o", "merged")
    if report.base_model and os.path.exists(report.base_model):
        return command_line("inspect", report.path, "--base", report.base_model)
    return None
