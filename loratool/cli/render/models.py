"""Print reports on models: unmerge, verify, inspect, count."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ...architectures.numbered_names import grouped
from ...files.fileio import size
from .text import grouped_digits, print_lines, print_table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...ops.convert.checkpoint import CheckpointConvertReport
    from ...ops.count.command import CountReport
    from ...ops.inspect.command import CheckpointReport, Group, MethodReport
    from ...ops.unmerge import UnmergeReport
    from ...ops.verify.command import VerifyReport


SHOWN = 10  # lines of one kind
NOTES = 4  # on a checkpoint that are printed


def print_checkpoint_convert(report: CheckpointConvertReport) -> None:
    kinds: dict[tuple[str, str], list[int]] = {}
    for row in report.cast:
        kinds.setdefault((row.source_dtype, row.dtype), []).append(row.flushed or 0)
    lost = [row for row in report.cast if row.flushed]
    if lost:
        rows = [
            [row.name, "x".join(map(str, row.shape)), row.source_dtype, row.dtype, str(row.flushed)] for row in lost
        ]
        titles = ("tensor", "shape", "from", "to", "became 0")
        print_table([(title, title in ("shape", "became 0")) for title in titles], rows)
        print_lines("")
    for (old, new), flushed in kinds.items():
        done = "would be cast" if report.dry_run else "cast"
        zeros = "" if report.dry_run else f"; {sum(flushed):,} numbers became 0"
        print_lines(f"{len(flushed)} tensors {done} from {old} to {new}{zeros}")
    if report.family:
        done = "would be" if report.dry_run else "were"
        print_lines(
            f"{report.renamed} tensors of {report.family} {done} renamed, {report.regrouped} made of rows of others"
        )
    print_lines(f"{report.copied} tensors {'would keep' if report.dry_run else 'keep'} their bytes")
    for modules in grouped(report.left_out):
        print_lines(f"left out: {modules}")
    for name, kept in report.shared.items():
        print_lines(f"one with {kept}: {name}")
    if report.not_copied:
        print_lines(f"not copied: {', '.join(report.not_copied)}")
    files = f", {len(report.files)} files" if len(report.files) > 1 else ""
    print_lines(
        f"{'would write' if report.dry_run else 'wrote'} {report.out} ({report.to}{files}, {size(report.nbytes)})"
    )


def print_unmerge(report: UnmergeReport) -> None:
    done = "would be restored" if report.dry_run else "restored bit for bit"
    if report.approximate:
        done = "subtracted and rounded"
        print_lines(
            f"approximate: {report.doubtful:,} weights can be wrong, by up to {report.farthest} steps or more near zero"
        )
    print_lines(f"{report.restored} tensors {done}, {report.copied} copied as they are")
    for name in report.removed:
        print_lines(f"removed: {name}")
    if not report.exact_files and not report.approximate:
        print_lines("the base was a torch file: its tensors are the same, in a safetensors file")
    if report.not_copied:
        print_lines(f"not copied: {', '.join(report.not_copied)}")
    print_lines(f"{'would write' if report.dry_run else 'wrote'} {report.out} ({size(report.nbytes)})")


def print_verify(report: VerifyReport) -> None:
    """Print the verdict first, which no count contradicts: that nothing is wrong is said only if all is proven."""
    coded = [tensor for tensor in report.tensors if tensor.verdict == "requantized"]
    if report.status == "inconclusive" and coded:
        print_lines(f"not proven: codes that another program chose show the merge only about: {report.merged}")
    elif report.status == "inconclusive":
        print_lines(
            "not proven: the change is below half a step of every weight (--allow inconclusive takes it for proven)"
        )
    else:
        print_lines(f"{report.status}: {report.merged}")
    counts = [f"{report.exact} tensors exact", f"{report.rounded} right with another rounding"]
    counts += [f"{len(coded)} requantized"] if coded else []
    counts += [f"{report.wrong} wrong"] if report.wrong or report.status == "proven" else []
    counts += [f"{len(report.missing)} missing"] if report.missing else []
    counts += [f"{len(report.extra)} extra"] if report.extra else []
    counts += [f"{len(report.not_compared)} not compared"] if report.not_compared else []
    print_lines(f"{', '.join(counts)}; {report.untouched} are the base's")
    for tensor in report.tensors:
        if tensor.verdict == "wrong":
            print_lines(f"wrong: {tensor.name}: {tensor.detail}")
    alike: dict[str, list[str]] = {}
    for tensor in coded:
        alike.setdefault(tensor.detail, []).append(tensor.name)
    details = sorted(alike, key=lambda detail: len(alike[detail]))
    lines = [f"{name}: {detail}" for detail in details for name in grouped(alike[detail])]
    for line in lines[:SHOWN]:
        print_lines(line)
    if lines[SHOWN:]:
        print_lines(f"... and {len(lines) - SHOWN} more, in --json")
    for name in report.missing:
        print_lines(f"missing: {name}")
    for name in report.extra:
        print_lines(f"extra: {name}")
    for way in report.rounding:
        print_lines(f"rounding: {way}")
    for names in grouped(report.not_compared):
        print_lines(f"not compared: {names}")
    for modules in grouped(report.left_out):
        print_lines(f"left out: {modules}")


def _print_groups(groups: Iterable[Group], last: str | None = None) -> None:
    """Print a table of groups; `last` is the title of a column for their roles."""
    groups = list(groups)
    coded = any(g.codec for g in groups)
    rows = [
        [
            g.name,
            "x".join(map(str, g.shape)) or "scalar",
            g.codec or g.dtype,
            str(g.tensors),
            grouped_digits(g.parameters) if g.bits else "-",
            size(g.nbytes),
            *(["-" if g.bits is None else f"{g.bits:.3g}"] if coded else []),
            *([g.role] if last else []),
        ]
        for g in groups
    ]
    sizes = ("count", "parameters", "bytes", *(["bits"] if coded else []))
    titles = ("tensor", "shape", "dtype", *sizes, *([last] if last else []))
    print_table([(title, title in ("shape", *sizes)) for title in titles], rows)


def print_method(report: MethodReport) -> None:
    print_lines(f"{report.path}: {report.title}" + (f", for {report.base_model}" if report.base_model else ""))
    _print_groups(report.groups)
    print_lines(f"\n{report.tensors} tensors, {grouped_digits(report.parameters)} parameters, {size(report.nbytes)}")
    for note in report.notes:
        print_lines(f"note: {note}")
    print_lines(report.verdict)


def print_checkpoint(report: CheckpointReport) -> None:
    marks = [report.model_type or "unknown family", f"{len(report.files)} file{'s' * (len(report.files) != 1)}"]
    marks += ["tied head"] if report.tied else []
    marks += [f"quantized: {report.quantization}"] if report.quantization else []
    print_lines(f"{report.path}: {', '.join(marks)}")
    _print_groups(report.groups, "LoRA target")
    if report.uncounted:
        print_lines(f"\nnot counted: {report.uncounted} quantized weights, whose sizes the headers do not tell")
    kinds: Counter[str] = Counter()
    for group in report.groups:
        kinds[group.codec or group.dtype] += group.parameters
    parameters = ", ".join(f"{kind} {grouped_digits(n)}" for kind, n in kinds.most_common() if n)
    total = f"{grouped_digits(report.parameters)} parameters" + (f" ({parameters})" if parameters else "")
    print_lines(f"\n{report.tensors} tensors, {total}, {size(report.nbytes)}")
    parts: dict[str, list[str]] = {}
    for key, value in report.fields.items():
        first, _, rest = key.partition(".")
        parts.setdefault(first, []).append(f"{rest} {value}")
    for first, told in parts.items():
        print_lines(f"{first}: {', '.join(told)}")
    for note in report.notes[:NOTES]:
        print_lines(f"note: {note}")
    if report.notes[NOTES:]:
        print_lines(f"note: and {len(report.notes) - NOTES} more: --json has them")


def print_count(report: CountReport) -> None:
    marks = [report.model_type or "unknown family", f"from its {'config' if report.source == 'config' else 'headers'}"]
    marks += [f"{report.layers} layers of width {report.width}"] if report.layers else []
    marks += [f"{grouped_digits(report.parameters)} parameters", *(["tied head"] if report.tied else [])]
    print_lines(f"{report.path}: {', '.join(marks)}")
    limit = report.params is not None
    rows = [
        [
            m.title,
            f"{m.measure} {m.size}" if m.size else "-",
            f"{m.parameters:,}",
            size(m.nbytes),
            f"{100 * m.share:.3g} %",
            *([{True: "yes", False: "no", None: "-"}[m.fits]] if limit else []),
            m.adds,
        ]
        for m in report.methods
    ]
    titles = ["method", "size", "trainable", f"bytes ({report.dtype})", "of the model", *(["fits"] if limit else [])]
    print_table([(title, i in (2, 3, 4)) for i, title in enumerate([*titles, "adds at inference"])], rows)
    print_lines(f"\nLoRA on {report.matrices} matrices: {', '.join(report.targets)}")
    for note in report.notes:
        print_lines(f"note: {note}")
