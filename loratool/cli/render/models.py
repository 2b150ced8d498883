"""Print the report on a checkpoint that was converted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...architectures.numbered_names import grouped
from ...files.fileio import size
from .text import print_lines, print_table

if TYPE_CHECKING:
    from ...ops.convert.checkpoint import CheckpointConvertReport


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
