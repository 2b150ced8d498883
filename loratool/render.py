"""Reports as tables for a terminal and as JSON for a program. The only file that imports rich.

`to_json` is the stable, versioned schema: the report's own field names under a header that every verb shares.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from .errors import LoratoolError
    from .ops.count import CountReport
    from .ops.extract import ExtractReport
    from .ops.inspect import CheckpointReport
    from .ops.inspect_adapter import AdapterInspection
    from .ops.merge_report import MergeReport
    from .ops.unmerge import UnmergeReport
    from .ops.verify import VerifyReport

SCHEMA_VERSION = 1
UNBOUNDED = 1 << 16  # columns: a pipe gets each row on one line


def to_json(verb: str, report: Any = None, error: LoratoolError | None = None, status: str | None = None) -> str:
    """One object: `schema`, `verb`, `ok`, `exit_code`, and either `report` or `error`.

    `status` is there where a check said no (exit code 1), and says what it found.
    """
    value: dict[str, Any] = {"schema": SCHEMA_VERSION, "verb": verb, "ok": error is None and status is None}
    value["exit_code"] = 0 if status is None else 1
    if status is not None:
        value["status"] = status
    if error is not None:
        value["exit_code"] = error.exit_code
        value["error"] = {
            "kind": error.kind,
            "message": error.message,
            "tensor": error.culprit,
            "remedy": error.remedy,
        }
    else:
        value["report"] = asdict(report)
    return json.dumps(value, allow_nan=False)  # ASCII, so that any terminal or pipe takes it


def size(nbytes: float) -> str:
    """Decimal units: MB is 10**6."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    raise AssertionError("unreachable")


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M" if n >= 1e6 else f"{n:,}"


def _share(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if value >= 0.001 or value <= 0 else f"{value:.1e}"


def _print_table(columns: list[tuple[str, bool]], rows: list[list[str]]) -> None:
    """Columns as (title, right-aligned); lines are never cut or wrapped where stdout is not a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = UNBOUNDED
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, right in columns:
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(escape(cell)) for cell in row))
    with console.capture() as text:  # rich would turn a closed pipe into exit 1
        console.print(table)
    print(text.get(), end="")


def escape(text: str) -> str:
    """Names come from files: no control character in them reaches the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def say(text: str, file: TextIO | None = None) -> None:
    """One or more lines for a person."""
    print("\n".join(escape(line) for line in text.split("\n")), file=file or sys.stdout)


def print_merge(report: MergeReport) -> None:
    rows = [
        [
            row.name,
            "x".join(map(str, row.shape)),
            row.dtype,
            row.update,
            str(row.rank) if row.rank else "-",
            ", ".join(f"{scale:g}" for scale in row.scales),
            "-" if row.relative is None else f"{row.relative:.2e}",
            _share(row.changed),
            _share(row.kept),
        ]
        for row in report.tensors
    ]
    titles = ("tensor", "shape", "dtype", "update", "rank", "scale", "|D|/|W|", "changed", "kept")
    _print_table([(title, title not in ("tensor", "dtype", "update")) for title in titles], rows)
    verb = "would be changed" if report.dry_run else "changed"
    say(f"\n{len(rows)} tensors {verb}, {report.copied} copied as they are; kept {_share(report.kept)} of the change")
    for module in report.left_out:
        say(f"left out: {module}")
    if report.not_copied:
        say(f"not copied: {', '.join(report.not_copied)}")
    say(f"{'would write' if report.dry_run else 'wrote'} {report.out} ({size(report.nbytes)})")
    if report.undo and report.undo_bytes is not None:
        bound = "at most " if report.dry_run else ""
        say(f"undo: {report.undo} ({bound}{size(report.undo_bytes)})")


def print_unmerge(report: UnmergeReport) -> None:
    verb = "would be restored" if report.dry_run else "restored bit for bit"
    if report.approximate:
        verb = "subtracted and rounded"
        say(
            f"approximate: {report.doubtful:,} weights can be wrong, by up to {report.farthest} steps or more near zero"
        )
    say(f"{report.restored} tensors {verb}, {report.copied} copied as they are")
    for name in report.removed:
        say(f"removed: {name}")
    if not report.exact_files and not report.approximate:
        say("the base was a torch file: its tensors are the same, in a safetensors file")
    if report.not_copied:
        say(f"not copied: {', '.join(report.not_copied)}")
    say(f"{'would write' if report.dry_run else 'wrote'} {report.out} ({size(report.nbytes)})")


def print_verify(report: VerifyReport) -> None:
    for tensor in report.tensors:
        if tensor.verdict == "wrong":
            say(f"wrong: {tensor.name}: {tensor.detail}")
    for name in report.missing:
        say(f"missing: {name}")
    for name in report.extra:
        say(f"extra: {name}")
    for way in report.rounding:
        say(f"rounding: {way}")
    counts = f"{report.exact} tensors exact, {report.rounded} right with another rounding, {report.wrong} wrong"
    say(f"{counts}; {report.untouched} are the base's")
    if report.status == "inconclusive":
        say("inconclusive: the change is below half a step of every weight (--allow inconclusive takes it for proven)")
    else:
        say(f"{report.status}: {report.merged}")


def print_extract(report: ExtractReport) -> None:
    say(f"change = {report.tuned} - {report.base}")
    stored = any(m.stored for m in report.modules)
    titles = ["tensor", "shape", "rank", "|D|/|W|", "energy", "residual", "gap", "effective", "over noise"]
    rows = [
        [
            m.name,
            "x".join(map(str, m.shape)),
            str(m.rank),
            f"{m.relative:.2e}",
            f"{m.kept:.2%}",
            f"{m.residual:.2e}",
            {"exact": "0", "certified": f"<{m.gap:.0e}"}.get(m.how, f"~{m.gap:.0e}"),
            f"{m.effective_rank:.1f}",
            str(m.above_noise),
            *([f"{m.stored:.1e}"] if stored else []),
        ]
        for m in report.modules
    ]
    _print_table([(title, title != "tensor") for title in titles + ["stored"] * stored], rows)
    kept = "" if report.kept is None else f"; {report.kept:.2%} of their change's energy is kept"
    say(f"\n{len(rows)} matrices{kept}; |D|/|W| is {report.relative:.2e} in all")
    if report.exact:
        say(f"kept exactly: {len(report.exact)} tensors (biases, norms): {report.exact[0]}, ...")
    say(f"unchanged: {report.unchanged} tensors")
    for name, norm in report.left_out.items():
        say(f"left out: {name} (|D| = {norm:.3g})")
    for name in report.only_base:
        say(f"only in the base: {name}")
    for name in report.only_tuned:
        say(f"only in the tuned model: {name}")
    for warning in report.warnings:
        say(f"warning: {warning}", sys.stderr)
    verb = "would write" if report.dry_run else "wrote"
    say(f"{verb} {report.out}: {_count(report.parameters)} parameters, {size(report.nbytes)}")


def print_count(report: CountReport) -> None:
    marks = [report.model_type or "unknown family", f"from its {'config' if report.source == 'config' else 'headers'}"]
    marks += [f"{report.layers} layers of width {report.width}"] if report.layers else []
    marks += [f"{_count(report.parameters)} parameters", *(["tied head"] if report.tied else [])]
    say(f"{report.path}: {', '.join(marks)}")
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
    _print_table([(title, i in (2, 3, 4)) for i, title in enumerate([*titles, "adds at inference"])], rows)
    say(f"\nLoRA on {report.matrices} matrices: {', '.join(report.targets)}")
    for note in report.notes:
        say(f"note: {note}")


def print_checkpoint(report: CheckpointReport) -> None:
    marks = [report.model_type or "unknown family", f"{len(report.files)} file{'s' * (len(report.files) != 1)}"]
    marks += ["tied head"] if report.tied else []
    marks += [f"quantized: {report.quantization}"] if report.quantization else []
    say(f"{report.path}: {', '.join(marks)}")
    rows = [
        [
            g.name,
            "x".join(map(str, g.shape)) or "scalar",
            g.dtype,
            str(g.tensors),
            _count(g.parameters),
            size(g.nbytes),
            g.role,
        ]
        for g in report.groups
    ]
    titles = ("tensor", "shape", "dtype", "count", "parameters", "bytes", "LoRA target")
    _print_table([(title, title in ("shape", "count", "parameters", "bytes")) for title in titles], rows)
    dtypes = ", ".join(f"{dtype} {_count(n)}" for dtype, n in report.dtypes.items())
    say(f"\n{report.tensors} tensors, {_count(report.parameters)} parameters ({dtypes}), {size(report.nbytes)}")


def print_adapter(report: AdapterInspection) -> None:
    rank = "mixed ranks" if report.rank is None else f"rank {report.rank}"
    alpha = "mixed alphas" if report.alpha is None else f"alpha {report.alpha:g}"
    marks = [f"{report.format} adapter", rank, alpha + (", rsLoRA" if report.use_rslora else "")]
    say(f"{report.path}: {', '.join(marks)}" + (f", for {report.base_model}" if report.base_model else ""))
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
            _count(g.parameters),
        ]
        for g in report.groups
    ]
    relative = ["|D|/|W|"] if report.coverage else []
    titles = ["module", "update", "out x in", "dtype", "rank", "alpha", "scale", "|D|", "eff. rank", *relative]
    titles += ["count", "parameters"]
    _print_table([(title, title not in ("module", "update", "dtype")) for title in titles], rows)
    say(f"\n{report.modules} modules, {_count(report.parameters)} parameters, {size(report.nbytes)}")
    if report.coverage:
        say(f"{report.coverage.bound} of {report.modules} modules bind to {report.coverage.base}")
        for module, near in report.coverage.unbound.items():
            say(f"not in the base: {module}" + (f" (nearest: {', '.join(near)})" if near else ""))
    for note in report.notes:
        say(f"note: {note}")
    for problem in report.problems:
        say(f"problem: {problem}")


class ProgressBar:
    """Progress on stderr: a bar on a terminal, a line every 10 s elsewhere, nothing when quiet."""

    def __init__(self, label: str, quiet: bool, unit: str = "") -> None:
        self._label, self._quiet, self._unit = label, quiet, unit
        self._start = self._last = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __call__(self, done: int, total: int) -> None:
        if self._quiet:
            return
        if sys.stderr.isatty():
            self._show_bar(done, total)
            return
        now = time.monotonic()
        if now - self._last >= 10:
            self._last = now
            if self._unit:
                print(f"{self._label}: {done} of {total} {self._unit}", file=sys.stderr, flush=True)
                return
            rate = done / (now - self._start)
            print(
                f"{self._label}: {size(done)} of {size(total)}, {size(rate)}/s, {(total - done) / rate:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def _show_bar(self, done: int, total: int) -> None:
        if self._bar is None:
            from rich import progress
            from rich.console import Console

            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn() if self._unit else progress.DownloadColumn(),
                *([] if self._unit else [progress.TransferSpeedColumn()]),
                progress.TimeRemainingColumn(),
            )
            self._bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=total)
        self._bar.update(self._task, completed=done)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
