"""Print reports on adapters: extract, init, resize, combine, convert, inspect."""

from __future__ import annotations

import math
import sys
from collections import Counter
from typing import TYPE_CHECKING

from ...architectures.numbered_names import grouped, split_numbers
from ...binding.module_weights import by_name, spell_weight
from ...files.fileio import size
from .pictures import is_ascii_terminal, strips
from .text import grouped_digits, print_lines, print_picture, print_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ...ops.combine.command import CombineReport
    from ...ops.convert.command import ConvertReport
    from ...ops.convert.inspect_runtime import RuntimeInspection
    from ...ops.extract.command import ExtractReport
    from ...ops.init.command import InitReport
    from ...ops.inspect.adapter import AdapterInspection
    from ...ops.resize.command import ResizeReport


def print_extract(report: ExtractReport) -> None:
    print_lines(f"change = {report.tuned} - {report.base}")
    stored = any(m.stored for m in report.modules)
    titles = ["tensor", "shape", "rank", "|D|/|W|", "energy", "residual", "gap", "eff. rank", "over noise"]
    rows = [
        [
            m.name,
            "x".join(map(str, m.shape)),
            str(m.rank),
            "-" if m.relative is None else f"{m.relative:.2e}",
            f"{m.kept:.2%}",
            f"{m.residual:.2e}",
            {"exact": "0", "certified": f"<{m.gap:.0e}"}.get(m.how, f"~{m.gap:.0e}"),
            f"{m.effective_rank:.1f}",
            str(m.above_noise),
            *([f"{m.stored:.1e}"] if stored else []),
        ]
        for m in report.modules
    ]
    print_table([(title, title != "tensor") for title in titles + ["stored"] * stored], rows)
    plain = is_ascii_terminal(sys.stdout.encoding)
    sizes = {m.name: m.relative for m in report.modules if m.relative is not None}
    print_picture(strips(sizes, "relative change", "{:.1e}".format, plain=plain))
    print_picture(
        strips({m.name: m.kept for m in report.modules}, "energy kept", "{:.0%}".format, low=None, plain=plain)
    )
    kept = "" if report.kept is None else f"; {report.kept:.2%} of their change's energy is kept"
    relative = "" if report.relative is None else f"; |D|/|W| is {report.relative:.2e} in all"
    print_lines(f"\n{len(rows)} matrices{kept}{relative}")
    if report.exact:
        print_lines(f"kept exactly: {len(report.exact)} tensors (biases, norms): {report.exact[0]}, ...")
    print_lines(f"unchanged: {report.unchanged} tensors")
    _print_left_out(report.left_out)
    for name in report.only_base:
        print_lines(f"only in the base: {name}")
    for name in report.only_tuned:
        print_lines(f"only in the tuned model: {name}")
    wrote = "would write" if report.dry_run else "wrote"
    print_lines(f"{wrote} {report.out}: {grouped_digits(report.parameters)} parameters, {size(report.nbytes)}")


def _print_left_out(norms: Mapping[str, float | None]) -> None:
    """Print what changed and is left out, names that differ only in numbers on one line, with their norm in all."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name in norms:
        alike.setdefault(split_numbers(name)[0], []).append(name)
    for names in alike.values():
        titles = list(grouped(names))
        for title, members in [(titles[0], names)] if len(titles) == 1 else [(name, [name]) for name in names]:
            known = [norm for name in members if (norm := norms[name]) is not None]
            print_lines(f"left out: {title}" + (f" (|D| = {math.hypot(*known):.3g})" if known else ""))


def print_init(report: InitReport) -> None:
    marks = [report.method, *["DoRA"] * report.dora, *["rsLoRA"] * report.rslora]
    print_lines(f"an adapter for {report.base}, by {' + '.join(marks)}")
    gaps = any(m.gap is not None for m in report.modules)
    errors = any(m.error is not None for m in report.modules)
    rows = [
        [
            m.name,
            "x".join(map(str, m.shape)),
            m.kind,
            str(m.rank),
            f"{m.scale:g}",
            grouped_digits(m.parameters),
            *(["0" if m.gap == 0 else f"~{m.gap or 0:.0e}"] if gaps else []),
            *([f"{m.error or 0:.1e}"] if errors else []),
        ]
        for m in report.modules
    ]
    titles = ["tensor", "shape", "kind", "rank", "scale", "parameters", *["gap"] * gaps, *["error"] * errors]
    print_table([(title, title not in ("tensor", "kind")) for title in titles], rows)
    wrote = "would write" if report.dry_run else "wrote"
    residual = report.residual
    if residual:
        undo = f", undo file {size(residual.undo_bytes)}" if residual.undo and residual.undo_bytes else ""
        error = "" if residual.error is None else f"; with the adapter {residual.error:.1e} of its norm from the base"
        print_lines(f"\n{wrote} {residual.out}: the residual base, {size(residual.nbytes)}{undo}{error}")
    _print_untargeted(report.left_out.values())
    print_lines(f"{wrote} {report.out}: {grouped_digits(report.parameters)} parameters, {size(report.nbytes)}")


def _print_untargeted(groups: Iterable[str]) -> None:
    """Print how many weights of each group `init` leaves out, those that a pattern takes and the others."""
    from ...binding.candidates import NEVER_TARGETED

    counts = Counter(groups).most_common()
    nameable = ", ".join(f"{what} ({count})" for what, count in counts if what not in NEVER_TARGETED)
    never = ", ".join(f"{what} ({count})" for what, count in counts if what in NEVER_TARGETED)
    if nameable:
        print_lines(f"left out: {nameable}; --target takes them by name")
    if never:
        print_lines(f"left out, whatever --target names: {never}")


def print_resize(report: ResizeReport) -> None:
    titles = ["module", "rank", "new", "|D|", "energy", "error", "eff. rank"]
    rows = [
        [
            m.name,
            str(m.rank),
            str(m.new_rank),
            f"{m.norm:.3g}",
            f"{m.kept:.2%}",
            f"{m.error:.1e}",
            f"{m.effective_rank:.1f}",
        ]
        for m in report.modules
    ]
    print_table([(title, title != "module") for title in titles], rows)
    plain = is_ascii_terminal(sys.stdout.encoding)
    if len({m.new_rank for m in report.modules}) > 1:
        print_picture(strips({m.name: float(m.new_rank) for m in report.modules}, "rank", "{:.0f}".format, plain=plain))
    print_picture(
        strips({m.name: m.kept for m in report.modules}, "energy kept", "{:.0%}".format, low=None, plain=plain)
    )
    print_lines(
        f"\n{len(rows)} modules; {report.kept:.2%} of the change's energy is kept; the error is {report.error:.1e}"
    )
    if report.carried:
        print_lines(f"carried along: {len(report.carried)} tensors: {report.carried[0]}, ...")
    for modules in grouped(report.left_out):
        print_lines(f"left out: {modules}")
    wrote = "would write" if report.dry_run else "wrote"
    print_lines(f"{wrote} {report.out}: {grouped_digits(report.parameters)} parameters, {size(report.nbytes)}")


def print_combine(report: CombineReport) -> None:
    density = "" if report.density is None else f", density {report.density:g}"
    weights = map(spell_weight, report.weights, map(by_name, report.components))
    terms = (f"{weight} {name}" for weight, name in zip(weights, report.adapters, strict=True))
    print_lines(f"{report.method}{density} of {' + '.join(terms)}")
    rows = [
        [m.name, " + ".join(map(str, m.ranks)), str(m.rank), f"{m.norm:.3g}", f"{m.kept:.2%}", f"{m.error:.1e}"]
        for m in report.modules
    ]
    titles = ["module", "ranks", "rank", "|D|", "energy", "error"]
    print_table([(title, title != "module") for title in titles], rows)
    if report.kept < 0.9999:
        plain = is_ascii_terminal(sys.stdout.encoding)
        print_picture(strips({m.name: m.kept for m in report.modules}, "energy kept", "{:.0%}".format, plain=plain))
    print_lines(
        f"\n{len(rows)} modules; {report.kept:.2%} of the change's energy is kept; the error is {report.error:.1e}"
    )
    if report.carried:
        print_lines(f"beside the factors: {len(report.carried)} tensors: {report.carried[0]}, ...")
    for modules in grouped(report.left_out):
        print_lines(f"left out: {modules}")
    wrote = "would write" if report.dry_run else "wrote"
    print_lines(f"{wrote} {report.out}: {grouped_digits(report.parameters)} parameters, {size(report.nbytes)}")


def print_convert(report: ConvertReport) -> None:
    what = ", ".join(filter(None, (report.source_format, report.family)))
    print_lines(f"{report.adapter}: {what}, to {report.to}" + (f" for {report.runtime}" if report.runtime else ""))
    errors = [m.error for m in report.modules if m.error]
    rows = [
        [
            m.name,
            ", ".join(m.sources),
            m.how,
            str(m.rank),
            f"{m.alpha:g}",
            *[f"{m.error:.1e}" if m.error else "0"] * bool(errors),
        ]
        for m in report.modules
    ]
    titles = ["module", "from", "how", "rank", "alpha", *["error"] * bool(errors)]
    print_table([(title, title in ("rank", "alpha", "error")) for title in titles], rows)
    for modules in grouped(report.dropped):
        print_lines(f"dropped: {modules}")
    for note in report.notes:
        print_lines(f"note: {note}")
    wrote = "would write" if report.dry_run else "wrote"
    lost = f"{len(errors)} of them not to the bit; the largest error is {max(errors):.1e}" if errors else ""
    print_lines(f"\n{len(rows)} modules, {lost or 'their changes the same to the bit'}")
    print_lines(f"{wrote} {report.out}: {grouped_digits(report.parameters)} parameters, {size(report.nbytes)}")


def print_runtime(report: RuntimeInspection) -> None:
    base = f", with {report.base}" if report.base else ""
    print_lines(f"{report.path}: {report.modules} modules, for {report.runtime} {report.version}{base}")
    for found in report.findings:
        count = f" ({len(found.modules)} modules)" if found.modules else ""
        print_lines(f"{found.outcome}: {found.says}{count}; {found.remedy}")
        for modules in grouped(found.modules):
            print_lines(f"    {modules}")
    for note in report.notes:
        print_lines(f"note: {note}")
    how = "its own functions were run" if report.checked == "run" else "its source was read"
    verdict = "is not applied as it was trained" if report.findings else "is applied in full"
    if report.base is None and not report.findings:
        verdict = "nothing speaks against it, its modules' names left aside"
    print_lines(f"\n{verdict}, by what is known of this version ({how})")


def print_adapter(report: AdapterInspection) -> None:
    rank = "mixed ranks" if report.rank is None else f"rank {report.rank}"
    alpha = "mixed alphas" if report.alpha is None else f"alpha {report.alpha:g}"
    marks = [f"{report.format} adapter", rank, alpha + (", rsLoRA" if report.use_rslora else "")]
    print_lines(f"{report.path}: {', '.join(marks)}" + (f", for {report.base_model}" if report.base_model else ""))
    rows = [
        [
            g.name,
            g.kind,
            "x".join(map(str, g.shape)) or "scalar",
            g.dtype,
            str(g.rank) if g.rank else "-",
            "-" if g.alpha is None else f"{g.alpha:g}",
            f"{g.scale:g}" if g.rank else "-",
            "-" if g.norm is None else f"{g.norm:.3g}",
            "-" if g.effective_rank is None else f"{g.effective_rank:.1f}",
            *(["-" if g.relative is None else f"{g.relative:.2e}"] if report.coverage else []),
            str(g.modules),
            grouped_digits(g.parameters),
        ]
        for g in report.groups
    ]
    relative = ["|D|/|W|"] if report.coverage else []
    titles = ["module", "update", "out x in", "dtype", "rank", "alpha", "scale", "|D|", "eff. rank", *relative]
    titles += ["count", "parameters"]
    print_table([(title, title not in ("module", "update", "dtype")) for title in titles], rows)
    plain = is_ascii_terminal(sys.stdout.encoding)
    sizes = {m.name: m.norm for m in report.details if m.norm is not None and m.rank}
    shares = {m.name: m.relative for m in report.details if m.relative is not None and m.rank}
    print_picture(strips(shares or sizes, "|D|/|W|" if shares else "|D|", "{:.2g}".format, plain=plain))
    effective = {m.name: m.effective_rank for m in report.details if m.effective_rank is not None}
    print_picture(strips(effective, "effective rank", "{:.1f}".format, plain=plain))
    print_lines(f"\n{report.modules} modules, {grouped_digits(report.parameters)} parameters, {size(report.nbytes)}")
    if report.coverage:
        print_lines(f"{report.coverage.bound} of {report.modules} modules bind to {report.coverage.base}")
        for module, names in report.coverage.unbound.items():
            print_lines(f"not in the base: {module}" + (f" (nearest: {', '.join(names)})" if names else ""))
    if report.extras:
        listed = ", ".join(grouped(report.extras))
        print_lines(f"extras: {len(report.extras)} tensors that no weight could hold (--drop extras): {listed}")
    for note in report.notes:
        print_lines(f"note: {note}")
    for problem in report.problems:
        print_lines(f"problem: {problem}")
