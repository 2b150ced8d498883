"""Print reports of numbers over modules: diff of two adapters or two checkpoints, and spectra."""

from __future__ import annotations

import math
import sys
from textwrap import shorten
from typing import TYPE_CHECKING

from ...architectures.numbered_names import grouped, last_part
from .pictures import bars, grid, is_ascii_terminal, side_by_side, strips
from .text import print_lines, print_picture, print_table

if TYPE_CHECKING:
    from ...ops.diff.adapters import ModuleDiff, Phi
    from ...ops.diff.command import AdapterDiff, CheckpointDiff
    from ...ops.inspect.spectra import SpectraReport


def print_adapter_diff(report: AdapterDiff) -> None:
    print_lines(f"A = {report.a}\nB = {report.b}")
    with_base = report.base is not None
    sizes = ["A/|W|", "B/|W|", "amplified"] if with_base else ["|A|", "|B|", "|B-A|"]  # both are too wide
    titles = ["module", "rank", *sizes, "relative", "cosine", "angle", "phi"]
    if report.modules:
        print_table(
            [(title, title != "module") for title in titles], [_module_cells(m, with_base) for m in report.modules]
        )
    if report.values:
        print_lines("")
        rows = [[v.name, v.kind, _number(v.norm_a), _number(v.norm_b), f"{v.relative:.2e}"] for v in report.values]
        print_table(
            [(title, title in ("|A|", "|B|", "relative")) for title in ("tensor", "kind", "|A|", "|B|", "relative")],
            rows,
        )
    _draw(report)
    ranks = [
        ", ".join(f"{n} of rank {rank}" for rank, n in side.items()) or "no factors"
        for side in (report.ranks_a, report.ranks_b)
    ]
    print_lines(f"\nA: {ranks[0]}; |A| = {report.norm_a:.4g}\nB: {ranks[1]}; |B| = {report.norm_b:.4g}")
    for name, values in report.fields.items():
        one, two = ("nothing" if value is None else shorten(str(value), 40, placeholder=" ...") for value in values)
        print_lines(f"{name}: {one} in A, {two} in B")
    for letter, names in (("A", report.only_a), ("B", report.only_b)):
        if names:
            print_lines(f"only in {letter}: {len(names)} modules: {', '.join(names[:4])}{', ...' * (len(names) > 4)}")
    for modules in grouped(report.left_out):
        print_lines(f"left out: {modules}")
    if report.same:
        print_lines("the same change")
        return
    print_lines(
        f"|B-A| = {report.distance:.4g}, {report.relative:.2e} of the larger; cosine {report.cosine:.4f}; "
        f"worst {report.worst:.2e}"
    )


def _module_cells(m: ModuleDiff, with_base: bool) -> list[str]:
    angle = max(m.angles_right) if m.angles_right else None
    return [
        m.name,
        f"{m.rank_a}" if m.rank_a == m.rank_b else f"{m.rank_a or '-'} {m.rank_b or '-'}",
        *(
            [
                _number(m.size_a, ".2e"),
                _number(m.size_b, ".2e"),
                f"{_number(m.amplification_a)} {_number(m.amplification_b)}",
            ]
            if with_base
            else [f"{m.norm_a:.3g}", f"{m.norm_b:.3g}", f"{m.distance:.2e}"]
        ),
        "same" if m.same else f"{m.relative:.2e}",
        f"{m.cosine:.4f}",
        "-" if angle is None else f"{math.degrees(angle):.1f}",
        "-" if m.phi is None else f"{m.phi.right[-1][-1]:.3f}",
    ]


def _number(value: float | None, spec: str = ".3g") -> str:
    return "-" if value is None else format(value, spec)


def _draw(report: AdapterDiff) -> None:
    plain = is_ascii_terminal(sys.stdout.encoding)
    both = [m for m in report.modules if m.rank_a and m.rank_b]
    print_picture(strips({m.name: m.relative for m in both}, "relative distance", "{:.1e}".format, plain=plain))
    if not report.same:
        cosines = {m.name: m.cosine for m in both}
        print_picture(strips(cosines, "cosine", "{:.2f}".format, low=min([0.0, *cosines.values()]), plain=plain))
    if report.phi:
        _draw_phi(report.phi, plain)


def _draw_phi(phi: Phi, plain: bool) -> None:
    """Print phi of both sides, with the random subspaces' mean at the end of the title."""
    pictures = [
        grid(f"phi(i, j), {side} (random {random[-1][-1]:.3f})", phi.i, phi.j, values, plain)
        for side, values, random in (("input", phi.right, phi.random_right), ("output", phi.left, phi.random_left))
    ]
    print_picture(side_by_side(*pictures))


def print_checkpoint_diff(report: CheckpointDiff) -> None:
    print_lines(f"A = {report.a}\nB = {report.b}")
    if report.tensors:
        titles = ["tensor", "dtype", "shape", "relative", "largest", "steps", "changed"]
        rows = [
            [
                t.name,
                " ".join(dict.fromkeys((t.codec_a or t.dtype_a, t.codec_b or t.dtype_b))),
                " ".join(dict.fromkeys("x".join(map(str, shape)) for shape in (t.shape_a, t.shape_b))),
                f"{t.relative:.2e}",
                _number(t.largest, ".2e"),
                "-" if t.steps is None else str(t.steps),
                f"{t.changed:,}" + (f" ({t.odd} nan or inf)" if t.odd else ""),
            ]
            for t in report.tensors
        ]
        print_table([(title, title not in ("tensor", "dtype", "shape")) for title in titles], rows)
        plain = is_ascii_terminal(sys.stdout.encoding)
        matrices = {t.name: t.relative for t in report.tensors if len(t.shape_a) > 1}
        print_picture(strips(matrices, "relative change", "{:.1e}".format, plain=plain))
    print_lines(
        f"\n{report.equal} tensors are equal, {len(report.tensors)} are not; {report.relative:.2e} apart in all"
    )
    for letter, names in (("A", report.only_a), ("B", report.only_b)):
        for name in names:
            print_lines(f"only in {letter}: {name}")


def print_spectra(report: SpectraReport) -> None:
    print_lines(f"{report.path}: singular values of {'the changes' if report.what == 'adapter' else 'the weights'}")
    titles = ["module", "shape", "norm", "eff. rank", "stable", "50 %", "90 %", "99 %", "of", "largest"]
    rows = [
        [
            m.name,
            "x".join(map(str, m.shape)),
            f"{m.norm:.3g}",
            f"{m.effective_rank:.1f}",
            f"{m.stable_rank:.1f}",
            *(str(rank) for rank in (m.rank_50, m.rank_90, m.rank_99)),
            str(m.full),
            " ".join(f"{sigma:.2g}" for sigma in m.top[:2]),
        ]
        for m in report.modules
    ]
    print_table([(title, title not in ("module", "largest")) for title in titles], rows)
    plain = is_ascii_terminal(sys.stdout.encoding)
    print_picture(
        strips({m.name: m.effective_rank for m in report.modules}, "effective rank", "{:.1f}".format, plain=plain)
    )
    print_picture(
        strips({m.name: float(m.rank_90) for m in report.modules}, "rank at 90 %", "{:.0f}".format, plain=plain)
    )
    kinds: dict[str, list[float]] = {}
    for m in report.modules:
        kinds.setdefault(last_part(m.name), []).append(m.effective_rank)
    means = {kind: sum(values) / len(values) for kind, values in kinds.items()}
    print_picture(bars(means, "effective rank by kind, mean", "{:.1f}".format, plain=plain))
