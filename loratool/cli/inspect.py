"""Define the command `loratool inspect`."""

from __future__ import annotations

from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any

import click

from ..commands.inspect import call
from .from_call import library_arguments, make_command, options_for
from .help import Option
from .options import CHECK, HTML, chosen_format

if TYPE_CHECKING:
    from .progress import ProgressBar

TEXT = """\
Matrices are grouped over layers. For a checkpoint, only headers are read. You see shapes, dtypes, sizes, tied and
quantized weights with bits per weight, and which weights LoRA can target. For an adapter, you see format, rank, alpha,
scale, the norm and effective rank of its delta, and problems: factors that are zero, nan or inf, or a config that does
not match them. With --base, you also see modules and shapes that do not match the model.

With --for and --base, you get a line for each part of an adapter that a server or another program would not apply as
trained. `loratool convert --for` writes an adapter that it applies.

With --spectra, you see the singular values of the modules that --target, --exclude and --layers select: the largest,
effective and stable rank, and the ranks that hold 50, 90 and 99 % of the energy. With --base, you also see intruder
dimensions: leading left singular vectors of a merged weight that match none of the base's. new: their number.
first new: the place of the first one by its singular value, from 1.

\b
  loratool inspect base/
  loratool inspect adapter/ --base base/ --strict
  loratool inspect adapter/ --for vllm --base base/
  loratool inspect base/ --spectra --target q_proj,v_proj
  loratool inspect adapter/ --base base/ --spectra --html spectra.html
"""

PARAMETERS = [
    *options_for(call.inspect, "path", "base"),
    Option(
        ["--strict"],
        title="Checks",
        is_flag=True,
        help="Exit with 1 if an adapter has a problem or is not a LoRA.",
    ),
    *options_for(call.inspect_for, "runtime"),
    Option(
        ["--spectra"],
        title="Checks",
        is_flag=True,
        help="Show singular values of a model's linear layers or an adapter's deltas; with --base, also those new to "
        "the model.",
    ),
    *options_for(call.spectra, "top", "threshold"),
    Option(
        ["--metadata"],
        title="Output",
        is_flag=True,
        help="Show all metadata of the file. By default you see the most useful keys of an image adapter.",
    ),
    HTML,
    *options_for(call.inspect, "digest"),
    Option(
        ["--files"],
        title="Output",
        is_flag=True,
        help="With --digest, show the sha256 of each whole file too, and compare them with model.sig (of "
        "model-signing) and the hub's, if these are beside. Exit with 1 if one differs.",
    ),
    *options_for(call.spectra, "target", "exclude", "layers", "alpha", "device"),
    *CHECK,
]


def _inspect(
    context: click.Context,
    /,
    strict: bool,
    runtime: str | None,
    spectra: bool,
    metadata: bool,
    digest: bool,
    path: str,
    base: str | None,
    **options: Any,
) -> None:
    form = chosen_format(options.pop("json"), options.pop("output_format"))
    shown = {"form": form, **{name: options.pop(name) for name in ("quiet", "verbose", "html")}}
    files = options.pop("files")
    intruders = {name: options.pop(name) for name in ("top", "threshold")}
    if spectra and (strict or runtime):
        raise click.UsageError("--strict and --for do not go with --spectra")
    if metadata and (spectra or runtime):
        raise click.UsageError("--metadata does not go with --spectra or --for")
    if digest and (spectra or runtime):
        raise click.UsageError("--digest does not go with --spectra or --for")
    if files and (not digest or strict or metadata or base or options["alpha"] is not None):
        raise click.UsageError(
            "--files needs --digest, and goes with no other option but --html, --json and --output-format"
        )
    if runtime and strict:
        raise click.UsageError("--strict does not go with --for, which exits with 1 anyway")
    if spectra:
        _spectra(shown, path=path, base=base, **intruders, **options)
        return
    if any(value is not None for value in intruders.values()):
        raise click.UsageError("--top and --threshold need --spectra")
    if options["target"] or options["exclude"] or options["layers"]:
        raise click.UsageError("--target, --exclude and --layers need --spectra")
    if options["device"] != "auto":
        raise click.UsageError("--device needs --spectra")
    if runtime:
        context.exit(_for_runtime(shown, path=path, runtime=runtime, base=base, alpha=options["alpha"]))
    if files:
        context.exit(_files(shown, path))
    from ..views.inspect_delta import DeltaInspection
    from ..views.inspect_model import CheckpointReport, MethodReport
    from ..views.inspect_patch import PatchInspection
    from .render import print_report

    with _hashing(shown) if digest else nullcontext() as bar:
        report = call.inspect(path, base=base, alpha=options["alpha"], digest=digest, progress=bar)
    status = None
    if isinstance(report, MethodReport):
        status = "other method" if strict else None
    elif not isinstance(report, CheckpointReport | PatchInspection | DeltaInspection):
        status = "problems" if strict and report.problems else None
    print_report("inspect", report, **shown, status=status, extra=getattr(report, "metadata", {}) if metadata else {})
    if status:
        context.exit(1)


def _hashing(shown: dict[str, Any]) -> closing[ProgressBar]:
    from .progress import ProgressBar

    return closing(ProgressBar("hashing", shown["quiet"] or shown["form"] != "text"))


def _files(shown: dict[str, Any], path: str) -> int:
    from .render import print_report

    with _hashing(shown) as bar:
        report = call.inspect_files(path, progress=bar)
    print_report("inspect", report, **shown, status=report.said_no)
    return 1 if report.said_no else 0


def _for_runtime(shown: dict[str, Any], **options: Any) -> int:
    from .render import print_report

    report = call.inspect_for(**options)
    print_report("inspect", report, **shown, status=report.said_no)
    return 1 if report.said_no else 0


def _spectra(shown: dict[str, Any], **options: Any) -> None:
    from .progress import ProgressBar
    from .render import print_report

    with closing(ProgressBar("decomposing", shown["quiet"] or shown["form"] != "text", "matrices")) as bar:
        report = call.spectra(**library_arguments(options), progress=bar)
    print_report("inspect", report, **shown, status=None)


inspect = make_command("inspect", call.inspect, TEXT, PARAMETERS, click.pass_context(_inspect))
