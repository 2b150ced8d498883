"""Reports on the differences between two adapters, module by module, and on modules that only one has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..numerics.spectrum import curve_places
from .diff_shared import MEANINGS, AdapterPair, field_lines, holds, overlap_words, sides
from .parts import quantities as q
from .parts.content import Axis, Curve, Figure, Heatmap, Page, Points, Sheet
from .parts.document import Document, Line, TextSpan, line
from .parts.numbers import all_digits, correlation, degrees, measure, plural, share, spread
from .parts.pictures import grid, side_by_side
from .parts.report import DiffReport
from .parts.rows import WORST, Category, Issue, Measure
from .parts.table import GroupColumns, make_table
from .parts.writing import listed


@dataclass(frozen=True)
class ValueDiff:
    """A tensor other than a factor: a trained bias, a replaced weight, trained rows, DoRA's magnitudes.

    Attributes:
        norm_a, norm_b: None on a side without it.
        relative: as of modules; 1 if it is on one side only or of another shape.
    """

    name: str
    kind: str
    norm_a: float | None
    norm_b: float | None
    relative: float


@dataclass(frozen=True)
class Phi:
    """phi(i, j) of the first i singular directions of A's delta and the first j of B's, to 6 digits.

    It is equation 4 of Hu et al., ICLR 2022.

    Attributes:
        i, j: powers of 2 and the ranks.
        left, right: on the output and on the input side, i rows and j columns each.
        random_left, random_right: the means of random subspaces.
    """

    i: tuple[int, ...]
    j: tuple[int, ...]
    left: tuple[tuple[float, ...], ...]
    right: tuple[tuple[float, ...], ...]
    random_left: tuple[tuple[float, ...], ...]
    random_right: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class ModuleDiff:
    """One module of A and B; D is its delta on a side (of DoRA before the norm).

    Attributes:
        rank_a, rank_b, norm_a, norm_b: the rank and ||D||, 0 on a side without the module.
        distance: ||D_B - D_A||.
        relative: ||D_B - D_A|| / max(||D_A||, ||D_B||); 1 if it is on one side only.
        same: whether that is 0 up to float32's rounding.
        angles_left, angles_right: between the spans of the deltas on the output and the input side, in radians, rising,
            to 6 digits; None for stacks of experts and where a delta is 0.
        phi: None where the angles are.
        interference: of both (`numerics.overlaps`) over the sum of their singular values: 0 if they share no direction,
            1 if they are equal; None if it is on one side only.
        size_a, size_b: ||D|| / ||W|| with a base W.
        amplification_a, amplification_b: ||D|| / ||U^T W V|| (section 7.3) with a base W.
    """

    name: str
    kind: str
    rank_a: int
    rank_b: int
    norm_a: float
    norm_b: float
    distance: float
    relative: float
    cosine: float
    same: bool
    angles_left: tuple[float, ...] | None = None
    angles_right: tuple[float, ...] | None = None
    phi: Phi | None = None
    interference: float | None = None
    size_a: float | None = None
    size_b: float | None = None
    amplification_a: float | None = None
    amplification_b: float | None = None


@dataclass(frozen=True)
class AdapterDiff(DiffReport):
    """Two adapters, module by module and as a whole.

    Attributes:
        only_a, only_b: modules of one side only.
        ranks_a, ranks_b: rank -> how many modules have it.
        fields: a field of the configs that differs -> the two values.
        norm_a, norm_b, distance, cosine: of all factors together.
        relative: the distance over the larger norm.
        pair: the overlaps of both, over all modules; None without factors.
        phi: the mean over the modules with the commonest ranks.
        worst: the largest relative distance of any module or tensor, 1 if it is on one side only.
        left_out: modules that --drop excluded from both.
        above: the limit of --fail-above, if `worst` is above it.
        sha256: an adapter -> the hash of its weights file.
    """

    document_function: ClassVar[str] = "adapters_document"
    page_function: ClassVar[str] = "adapters_page"
    rows: ClassVar[str] = "modules"

    a: str
    b: str
    base: str | None
    modules: tuple[ModuleDiff, ...]
    values: tuple[ValueDiff, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    ranks_a: Mapping[int, int]
    ranks_b: Mapping[int, int]
    fields: Mapping[str, tuple[Any, ...]]
    norm_a: float
    norm_b: float
    distance: float
    relative: float
    cosine: float
    pair: AdapterPair | None
    phi: Phi | None
    worst: float
    same: bool
    left_out: tuple[str, ...] = ()
    kind: str = "adapters"
    above: float | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)

    def is_above(self, limit: float) -> bool:
        """Return whether a distance is above a limit."""
        return self.worst > limit


COLUMNS: tuple[Category[ModuleDiff] | Measure[ModuleDiff], ...] = (
    Category(q.KIND, lambda row: row.kind, priority=15),
    Category(q.RANKS, lambda row: f"{row.rank_a}/{row.rank_b}", priority=11, right=True),
    Measure(q.COSINE, lambda row: _cosine(row), correlation, priority=1, drawn=True, from_least=True),
    Measure(q.APART, lambda row: row.relative, share, priority=2, watched=True),
    Measure(q.INTERFERENCE, lambda row: row.interference, measure, priority=4),
    Measure(q.B_OVER_A, lambda row: row.norm_b / row.norm_a if row.norm_a else None, measure, priority=7, watched=True),
    Measure(q.A_DELTA_OVER_W, lambda row: row.size_a, share, priority=5),
    Measure(q.B_DELTA_OVER_W, lambda row: row.size_b, share, priority=6),
    Measure(q.A_AMPLIFIED, lambda row: row.amplification_a, measure, priority=13),
    Measure(q.B_AMPLIFIED, lambda row: row.amplification_b, measure, priority=14),
    Measure(q.ANGLE, lambda row: max(row.angles_right) if row.angles_right else None, degrees, priority=9),
    Measure(q.PHI, lambda row: row.phi.right[-1][-1] if row.phi else None, correlation, priority=10),
)

# what a measure is of one subspace on both sides: a column of it alone is none
OF_ONE_SUBSPACE = {q.ANGLE: degrees(0), q.PHI: correlation(1)}

VALUE_COLUMNS: tuple[Category[ValueDiff] | Measure[ValueDiff], ...] = (
    Category(q.KIND, lambda row: row.kind, priority=6, always=True),
    Measure(q.norm_in("A"), lambda row: row.norm_a, measure, priority=4),
    Measure(q.norm_in("B"), lambda row: row.norm_b, measure, priority=5),
    Measure(q.APART, lambda row: row.relative, share, priority=1),
)


def adapters_document(report: AdapterDiff, verbose: bool) -> Document:
    """Return the document of a comparison of two adapters."""
    both = [row for row in report.modules if _is_in_both(row)]
    columns = adapters_columns(both)
    table = make_table(
        both, columns, GroupColumns(layers=3, by_layer=12, count=8), find_issue=adapters_issue, verbose=verbose
    )
    values = make_table(report.values, VALUE_COLUMNS, GroupColumns(layers=3, count=2), title="tensor", verbose=verbose)
    contents = [
        holds(report.ranks_a, report.norm_a, [row.norm_a for row in report.values]),
        holds(report.ranks_b, report.norm_b, [row.norm_b for row in report.values]),
    ]
    subject, *facts = sides((report.a, report.b), contents)
    return Document(
        subject=subject,
        facts=tuple(facts),
        tables=(*((table,) if both else ()), *((values,) if report.values else ())),
        pictures=tuple(_pictures(report.phi)) if verbose and report.phi else (),
        lists=tuple(_lists(report, verbose)),
        verdict=(_verdict(report),),
        verbose=verbose,
    )


def _is_in_both(row: ModuleDiff) -> bool:
    return bool(row.rank_a and row.rank_b)


def _cosine(row: ModuleDiff) -> float | None:
    return row.cosine if _is_in_both(row) else None


def adapters_columns(rows: Sequence[ModuleDiff]) -> list[Category[ModuleDiff] | Measure[ModuleDiff]]:
    """Return the columns, without measures that say of every row that both have the same subspace."""

    def is_shown(column: Category[ModuleDiff] | Measure[ModuleDiff]) -> bool:
        if isinstance(column, Category) or column.what not in OF_ONE_SUBSPACE:
            return True
        values = [value for row in rows if (value := column.of(row)) is not None]
        return any(column.write(value) != OF_ONE_SUBSPACE[column.what] for value in values)

    return [column for column in COLUMNS if is_shown(column)]


def adapters_issue(row: ModuleDiff) -> Issue | None:
    """Return the issue of a module, if any: only one adapter has it, or an adapter changes nothing there."""
    if not _is_in_both(row):
        return Issue(WORST, f"only in {'A' if row.rank_a else 'B'}")
    zero = [letter for letter, norm in (("A", row.norm_a), ("B", row.norm_b)) if norm == 0]
    return Issue(1, f"delta is 0 in {' and '.join(zero)}") if zero else None


def _lists(report: AdapterDiff, verbose: bool) -> Iterator[Line]:
    if report.pair and not report.same:
        yield line(f"{overlap_words([report.pair])}: {MEANINGS[report.pair.relation]}")
    yield from field_lines(report.fields)
    yield from listed("only in A", report.only_a, verbose)
    yield from listed("only in B", report.only_b, verbose)
    yield from listed("excluded", report.left_out, verbose)


def _pictures(phi: Phi) -> list[Line]:
    """Draw phi of both sides, with the mean of random subspaces in the title."""
    drawn = [
        grid(f"phi(i, j), {side} (random {random[-1][-1]:.3f})", phi.i, phi.j, values)
        for side, values, random in (("input", phi.right, phi.random_right), ("output", phi.left, phi.random_left))
    ]
    return side_by_side(*drawn)


def _verdict(report: AdapterDiff) -> Line:
    above = "" if report.above is None else f", which is above {share(report.above)}"
    if report.same:
        deltas = f"the same delta in {plural(len(report.modules), 'module')}" if report.modules else ""
        values = f"the same values in {plural(len(report.values), 'tensor')}" if report.values else ""
        return line(TextSpan("same", "good"), f": {' and '.join(filter(None, (deltas, values)))}{above}")
    if not report.pair:
        apart = sum(row.relative > 0 for row in report.values)
        distances = f"{apart:,} of {plural(len(report.values), 'tensor')} apart, at most {share(report.worst)}{above}"
        return line(TextSpan("different", "bad" if above else ""), f": {distances}")
    distances = (
        f"cosine {correlation(report.cosine)}, {share(report.relative)} apart, at most {share(report.worst)}{above}"
    )
    return line(TextSpan(report.pair.relation, "bad" if above else ""), f": {distances}")


WHAT_IS_COMPARED = (
    "the deltas s B A of the modules are compared (for DoRA before the norm), so equal deltas in other factors are "
    "equal",
    "norms are Frobenius norms, and the cosine of two deltas is <A, B> / (|A| |B|), from QRs of the factors in float64",
    "interference is the sum of all entries of |(U'U - I) S (V'V - I)| over the sum of S, with the singular vectors "
    "side by side (Gargiulo et al., arXiv 2412.00081): 0 without a shared direction, 1 for two equal deltas",
)


def adapters_page(report: AdapterDiff) -> Page:
    """Return the page of a comparison of two adapters."""
    rows, values = report.modules, report.values
    columns = adapters_columns(rows)
    curves = [ANGLES] if any(column.what == q.ANGLE for column in columns) else []
    modules = Sheet(rows, columns, find_issue=adapters_issue, curves=curves)
    tensors = Sheet(values, VALUE_COLUMNS, "tensor")
    return Page(
        figures=tuple(_figures(report)),
        sheets=(modules, tensors),
        heatmaps=tuple(_heatmaps(report.phi)) if report.phi else (),
        arithmetic=(
            *WHAT_IS_COMPARED,
            "phi(i, j) is |U_i' W_j|^2 / min(i, j), for the first i singular vectors of A's delta and the first j of "
            "B's (Hu et al., ICLR 2022, equation 4); the mean is over the modules with the most common ranks",
        ),
        hashes=report.sha256,
    )


def _figures(report: AdapterDiff) -> Iterator[Figure]:
    if report.pair:
        interference, random = (measure(x) for x in (report.pair.interference, report.pair.random_interference))
        yield Figure("cosine", correlation(report.cosine), f"over all modules: {report.pair.relation}")
        yield Figure("apart", share(report.relative), "over all modules")
        yield Figure("interference", interference, f"{random} for random directions")
        yield Figure("delta", f"{measure(report.norm_a)}, {measure(report.norm_b)}", "the norms of A and B")
        yield Figure(
            "rank", f"{spread(report.ranks_a, all_digits)}, {spread(report.ranks_b, all_digits)}", "of A and B"
        )
    yield Figure("at most", share(report.worst), "apart in any module or tensor")
    if report.only_a or report.only_b:
        yield Figure("alone", f"{len(report.only_a):,}, {len(report.only_b):,}", "modules only in A, only in B")


def _angles(row: ModuleDiff) -> dict[str, Points]:
    sides = {"output side": row.angles_left, "input side": row.angles_right}
    return {
        side: [(place, math.degrees(angles[place - 1])) for place in curve_places(len(angles))]
        for side, angles in sides.items()
        if angles
    }


ANGLES: Curve[ModuleDiff] = Curve("principal angles", Axis(q.PLACE), Axis(q.PRINCIPAL_ANGLE, ends=(0, 90)), _angles)


def _heatmaps(phi: Phi) -> Iterator[Heatmap]:
    for side, values, random in (("input", phi.right, phi.random_right), ("output", phi.left, phi.random_left)):
        yield Heatmap(
            title=f"phi on the {side} side ({random[-1][-1]:.3f} for {phi.i[-1]} and {phi.j[-1]} random directions)",
            x="B's first",
            y="A's first",
            cell=q.PHI,
            columns=tuple(map(str, phi.j)),
            rows=tuple(map(str, phi.i)),
            values=values,
            write=correlation,
        )
