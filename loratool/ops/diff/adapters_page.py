"""Show how two adapters differ: module by module, the angles between their spans, and the LoRA paper's phi."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ...numerics.spectrum import curve_places
from ...reports.numbers import correlation, measure, share, spread, whole
from ...reports.page.content import Axis, Curve, Figure, Heatmap, Page, Points, Sheet
from .adapters import AdapterDiff, ModuleDiff, Phi
from .adapters_document import VALUE_COLUMNS, adapters_columns, adapters_flaw

WHAT_IS_COMPARED = (
    "what is compared is the delta s B A of each module, of DoRA before it is normed: the same delta in other factors "
    "is the same",
    "norms are Frobenius', and the cosine of two deltas is <A, B> / (|A| |B|), all from QRs of the factors in float64",
    "interference is |(U'U - I) S (V'V - I)| over the sum of S, of the singular vectors side by side, added up over "
    "all entries (Gargiulo et al., arXiv 2412.00081): 0 without a shared direction, 1 for two equal deltas",
)


def adapters_page(report: AdapterDiff) -> Page:
    """Make the page of a comparison of two adapters."""
    rows, values = report.modules, report.values
    columns = adapters_columns(rows)
    curves = [ANGLES] if any(column.title == "angle" for column in columns) else []
    modules = Sheet(rows, lambda row: row.name, columns, find_flaw=adapters_flaw, curves=curves)
    tensors = Sheet(values, lambda row: row.name, VALUE_COLUMNS, "tensor")
    return Page(
        figures=tuple(_figures(report)),
        sheets=(modules, tensors),
        heatmaps=tuple(_heatmaps(report.phi)) if report.phi else (),
        arithmetic=(
            *WHAT_IS_COMPARED,
            "phi(i, j) is |U_i' W_j|^2 / min(i, j), of the first i singular vectors of A's delta and the first j of "
            "B's (Hu et al., ICLR 2022, equation 4), here the mean of the modules that have the commonest ranks",
        ),
        hashes=report.sha256,
    )


def _figures(report: AdapterDiff) -> Iterator[Figure]:
    if report.pair:
        found, random = (measure(x) for x in (report.pair.interference, report.pair.random_interference))
        yield Figure("cosine", correlation(report.cosine), f"over all modules: {report.pair.relation}")
        yield Figure("apart", share(report.relative), "over all modules")
        yield Figure("interference", found, f"{random} if directions were random")
        yield Figure("delta", f"{measure(report.norm_a)}, {measure(report.norm_b)}", "the norms of A and B")
        yield Figure("rank", f"{spread(report.ranks_a, whole)}, {spread(report.ranks_b, whole)}", "of A and B")
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


ANGLES: Curve[ModuleDiff] = Curve("principal angles", Axis("number"), Axis("angle", "°", ends=(0, 90)), _angles)


def _heatmaps(phi: Phi) -> Iterator[Heatmap]:
    for side, values, random in (("input", phi.right, phi.random_right), ("output", phi.left, phi.random_left)):
        yield Heatmap(
            title=f"phi on the {side} side; {phi.i[-1]} and {phi.j[-1]} random directions have {random[-1][-1]:.3f}",
            x="B's first",
            y="A's first",
            cell="phi",
            columns=tuple(map(str, phi.j)),
            rows=tuple(map(str, phi.i)),
            values=values,
            write=correlation,
        )
