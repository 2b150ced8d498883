"""Reports on the content of an adapter: its modules with the sizes of their deltas, and its problems."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ..adapters.image_metadata import Training
from ..architectures.families import FAMILIES
from .parts import quantities as q
from .parts.content import Figure, Page, Sheet
from .parts.document import Document, Line, TextSpan, line, path
from .parts.numbers import all_digits, dimensions, measure, nbytes, plural, quantity, rank, scaling, share, spread
from .parts.report import Report
from .parts.rows import LAST, WORST, Category, Issue, Measure
from .parts.table import GroupColumns, make_table
from .parts.writing import command_line, digest_line, labelled, listed


@dataclass(frozen=True)
class ModuleReport:
    """One update; D is its delta (of DoRA: the direction's, before it is normed).

    Attributes:
        norm: ||D||; None for what only a base tells (new values, (IA)3, VeRA), without one.
        effective_rank: that of the singular values of D (of a stack: the experts' mean); None if there are no factors.
        relative: ||D|| / ||W||; None without a base.
        alpha, scale, shape, dtype, parameters: as of a group.
    """

    name: str
    kind: str
    rank: int
    norm: float | None
    effective_rank: float | None
    relative: float | None
    alpha: float | None = None
    scale: float = 1.0
    shape: tuple[int, ...] = ()
    dtype: str = ""
    parameters: int = 0


@dataclass(frozen=True)
class AdapterGroup:
    """Updates of one kind whose names differ only in numbers.

    Attributes:
        kind: a key of UPDATES, or Unpaired.
        modules: how many there are.
        scale: 1 if the alpha is not known.
        shape: that of what they change; of a factor without its partner its own.
        norm: that of all deltas together.
        effective_rank, relative: means over the modules.
    """

    name: str
    kind: str
    modules: int
    rank: int
    alpha: float | None
    scale: float
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    norm: float | None
    effective_rank: float | None
    relative: float | None


@dataclass(frozen=True)
class Coverage:
    """The modules of an adapter that are in a base, and those that are not.

    Attributes:
        bound: how many modules bind.
        unbound: a module that does not -> the base's nearest names.
    """

    base: str
    bound: int
    unbound: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class AdapterInspection(Report):
    """The result of `inspect` of an adapter.

    Attributes:
        rank, alpha: None if the modules' differ.
        coverage: None without a base.
        problems: what is wrong.
        notes: what one should know.
        extras: tensors in its file that no weight could hold.
        metadata: of its file, all of it.
        trigger_words: of an image adapter, by its metadata; empty if that does not say any.
        training: what its metadata says of that; None if nothing.
        family: a key of FAMILIES, by the names and sizes of its modules; None for a language model.
        sha256: the adapter -> the hash of its weights file.
        digest: the sha256 of all its tensors (`files.digest`); None if it was not asked for.
    """

    document_function: ClassVar[str] = "inspection_document"
    page_function: ClassVar[str] = "inspection_page"
    rows: ClassVar[str] = "details"

    path: str
    format: str
    groups: tuple[AdapterGroup, ...]
    details: tuple[ModuleReport, ...]
    modules: int
    parameters: int
    nbytes: int
    rank: int | None
    alpha: float | None
    use_rslora: bool
    base_model: str | None
    coverage: Coverage | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    extras: tuple[str, ...] = ()
    kind: str = "adapter"
    metadata: Mapping[str, str] = field(default_factory=dict)
    trigger_words: tuple[str, ...] = ()
    training: Training | None = None
    family: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)
    digest: str | None = None


LONGEST = 60  # characters of a text from a file


def inspection_document(report: AdapterInspection, verbose: bool) -> Document:
    """Return the document of an adapter."""
    rows = [row for row in report.details if verbose or not _has_problem_line(row, report.problems)]
    held = is_held(report)
    columns = inspection_columns(held)
    table = make_table(
        rows, columns, GroupColumns(layers=3, by_layer=4, count=5), find_issue=inspection_issue, verbose=verbose
    )
    fits = report.coverage is None or report.coverage.bound > 0
    return Document(
        subject=_subject(report),
        facts=(line(", ".join(_facts(report))), *map(line, training_lines(report))),
        tables=(table,) if rows and (fits or verbose) else (),
        lists=(*digest_line(report.digest), *_lists(report, verbose)),
        verdict=(_verdict(report),),
        next=_next(report),
        verbose=verbose,
    )


def is_held(report: AdapterInspection) -> bool:
    """Return whether the adapter was compared with a base that has some of its modules."""
    return any(row.relative is not None for row in report.details)


def inspection_columns(held: bool) -> list[Category[ModuleReport] | Measure[ModuleReport]]:
    """Return the columns. With a base, the relative delta replaces the delta."""
    delta: list[Category[ModuleReport] | Measure[ModuleReport]] = [
        Measure(q.DELTA, lambda row: row.norm, measure, priority=LAST if held else 1, watched=not held, drawn=not held)
    ]
    if held:
        delta.append(Measure(q.DELTA_OVER_W, lambda row: row.relative, share, priority=1, watched=True, drawn=True))
    return [
        Category(q.KIND, lambda row: row.kind, priority=10),
        Category(q.SHAPE, lambda row: dimensions(row.shape), priority=8, right=True, always=True),
        Category(q.DTYPE, lambda row: row.dtype, priority=12),
        Category(q.RANK, lambda row: str(row.rank) if row.rank else "-", priority=6, right=True, alone=True),
        Category(q.ALPHA, lambda row: "-" if row.alpha is None else f"{row.alpha:g}", priority=7, right=True),
        Category(q.SCALE, lambda row: scaling(row.scale) if row.rank else "-", priority=11, right=True, alone=True),
        Measure(q.PARAMETERS, lambda row: row.parameters, quantity, priority=9, summed=True),
        *delta,
        Measure(q.EFFECTIVE_RANK, lambda row: row.effective_rank, rank, priority=2),
    ]


def _is_dead(row: ModuleReport) -> bool:
    """Return whether the delta is 0 or not finite. A module without an alpha has no norm, but has directions."""
    return bool(row.rank) and not row.norm and (row.norm == 0 or row.effective_rank is None)


def _has_problem_line(row: ModuleReport, problems: Sequence[str]) -> bool:
    """Return whether a module's delta is 0 or not finite, and a line on problems names it."""
    return _is_dead(row) and any(row.name in problem for problem in problems)


def inspection_issue(row: ModuleReport) -> Issue | None:
    """Return the issue of a module, if any: its delta is 0 or not finite."""
    if not _is_dead(row):
        return None
    return Issue(WORST, "nan or inf") if row.norm is None else Issue(1, "delta is 0")


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
    """Return in words the alphas of modules with factors, and their scales."""
    factored = [row for row in report.details if row.rank]
    alphas = [row.alpha for row in factored if row.alpha is not None]
    means = f"scale {spread([row.scale for row in factored], scaling)}{', rsLoRA' if report.use_rslora else ''}"
    return f"alpha {spread(alphas, '{:g}'.format)} ({means})" if alphas else "no alpha"


def training_lines(report: AdapterInspection) -> Iterator[str]:
    """Yield a line on the training, if the metadata has something on it."""
    if report.trigger_words:
        yield f"trigger words: {shorten(', '.join(report.trigger_words))}"
    training = report.training
    if training is None:
        return
    parts = [plural(training.images, "image") if training.images is not None else ""]
    parts += [plural(training.epochs, "epoch") if training.epochs is not None else ""]
    parts += [plural(training.steps, "step") if training.steps is not None else ""]
    parts += [training.resolution or "", shorten(training.optimizer or "")]
    parts += [f"lr {training.learning_rate:g}" if training.learning_rate is not None else ""]
    on = f"on {shorten(training.base_model)}" if training.base_model else ""
    if on or any(parts):
        yield "trained: " + ", ".join(filter(None, (on, *parts)))
    if training.tags:
        yield "frequent tags: " + ", ".join(f"{shorten(tag)} {count:,}" for tag, count in training.tags)
    if training.thumbnail_nbytes is not None:
        yield f"thumbnail: {nbytes(training.thumbnail_nbytes)}"


def shorten(text: str) -> str:
    """Return a text from a file, truncated at a word if it is long."""
    return text if len(text) <= LONGEST else text[:LONGEST].rpartition(" ")[0].rstrip(", ") + " ..."


def _lists(report: AdapterInspection, verbose: bool) -> Iterator[Line]:
    if report.coverage and verbose:
        for module, names in report.coverage.unbound.items():
            yield line(f"not in the base: {module}" + (f" (nearest: {', '.join(names)})" if names else ""))
    yield from listed("beside the weights (--drop extras)", report.extras, verbose)
    yield from labelled("note", report.notes, verbose)
    yield from labelled("problem", report.problems, verbose, "bad")


def _verdict(report: AdapterInspection) -> Line:
    coverage = report.coverage
    bound = f"{coverage.bound:,} of {plural(report.modules, 'module')} are in " if coverage else ""
    fits = line(bound, path(coverage.base)) if coverage else ()
    if report.problems:
        return line(
            TextSpan(plural(len(report.problems), "problem"), "bad"), *((TextSpan("; "), *fits) if fits else ())
        )
    if fits:
        return line(TextSpan("ok", "good"), ": ", *fits, ", no problem found")
    return line(TextSpan("ok", "good"), ": no problem found; --base BASE checks it against the model")


def _next(report: AdapterInspection) -> str | None:
    """Return the next command: a merge if the adapter fits, or `inspect` with its own base if that is here."""
    if report.problems:
        return None
    if report.coverage:
        return command_line("merge", report.coverage.base, report.path, "-o", "merged")
    if report.base_model and os.path.exists(report.base_model):
        return command_line("inspect", report.path, "--base", report.base_model)
    return None


def inspection_page(report: AdapterInspection) -> Page:
    """Return the page of an adapter."""
    rows, columns = report.details, inspection_columns(is_held(report))
    return Page(
        figures=tuple(_figures(report)),
        sheets=(Sheet(rows, columns, find_issue=inspection_issue),),
        arithmetic=(
            "the delta of a module is s B A (for DoRA before the norm); its norm is the Frobenius norm, the root of "
            "the sum of squares of its numbers",
            "for a module with factors, the norm and the effective rank come from the singular values of s B A, "
            "computed from the factors in float64",
            "the effective rank is exp of the entropy of the singular values' shares: r for r equal singular values",
        ),
        hashes=report.sha256,
    )


def _figures(report: AdapterInspection) -> Iterator[Figure]:
    rows = report.details
    ranks = [row.rank for row in rows if row.rank]
    if ranks:
        yield Figure("rank", spread(ranks, rank), alpha_words(report))
    yield Figure("modules", all_digits(report.modules), ", ".join(dict.fromkeys(row.kind for row in rows)))
    yield Figure("parameters", quantity(report.parameters), ", ".join(dict.fromkeys(row.dtype for row in rows)))
    yield Figure("size", nbytes(report.nbytes))
    if report.coverage:
        yield Figure("in the base", all_digits(report.coverage.bound), f"of {plural(report.modules, 'module')}")
    yield Figure("problems", all_digits(len(report.problems)))
