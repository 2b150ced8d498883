"""loratool merges, converts, combines and inspects LoRA adapters and checkpoints: exact, streaming, on files only.

    import loratool

    report = loratool.merge("base.safetensors", ["adapter.safetensors"], "merged.safetensors")
    print(report.kept)

Every command of the command line except `guide` is a function here with the same name and meaning. Each returns a
frozen report, and raises subclasses of `LoratoolError`; `write_report` makes a page of it, and `read_report` reads it
back. `open_adapter` and `open_checkpoint` look into files: lazy mappings from names to modules and tensors. The guide
`python` shows all of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import InputError, LoratoolError, MachineError, NeedsFlag, UsageError

if TYPE_CHECKING:
    from .ops.combine.command import CombineReport, combine
    from .ops.convert.adapter import ConvertReport, convert
    from .ops.convert.checkpoint import CheckpointConvertReport, convert_model
    from .ops.convert.inspect_runtime import RuntimeInspection, inspect_for
    from .ops.convert.metadata import MetadataReport, edit_metadata
    from .ops.count.command import CountReport, count
    from .ops.diff.adapters import AdapterDiff
    from .ops.diff.command import diff
    from .ops.diff.models import CheckpointDiff
    from .ops.diff.several import AdaptersDiff
    from .ops.diff.spectra import SpectraDiff, diff_spectra
    from .ops.extract.command import ExtractReport, extract
    from .ops.init.command import InitReport, init
    from .ops.inputs import AdapterPath, Adapters
    from .ops.inspect.adapter import AdapterInspection
    from .ops.inspect.command import CheckpointReport, MethodReport, inspect
    from .ops.inspect.spectra import SpectraReport, spectra
    from .ops.merge.command import merge
    from .ops.merge.report import MergeReport
    from .ops.opened import AdapterModule, OpenAdapter, OpenCheckpoint, open_adapter, open_checkpoint
    from .ops.report_files import read_report, write_report
    from .ops.resize.command import ResizeReport, resize
    from .ops.run.command import RunReport, run
    from .ops.unmerge.command import UnmergeReport, unmerge
    from .ops.verify.command import VerifyReport, verify

# name -> its module, loaded on first use so that `import loratool` starts without torch
_HOMES = {
    "AdapterPath": "ops.inputs",
    "Adapters": "ops.inputs",
    "AdapterInspection": "ops.inspect.adapter",
    "AdapterDiff": "ops.diff.adapters",
    "AdaptersDiff": "ops.diff.several",
    "CheckpointDiff": "ops.diff.models",
    "diff": "ops.diff.command",
    "SpectraDiff": "ops.diff.spectra",
    "diff_spectra": "ops.diff.spectra",
    "CheckpointReport": "ops.inspect.command",
    "CheckpointConvertReport": "ops.convert.checkpoint",
    "CombineReport": "ops.combine.command",
    "combine": "ops.combine.command",
    "ConvertReport": "ops.convert.adapter",
    "convert": "ops.convert.adapter",
    "convert_model": "ops.convert.checkpoint",
    "CountReport": "ops.count.command",
    "count": "ops.count.command",
    "MergeReport": "ops.merge.report",
    "MetadataReport": "ops.convert.metadata",
    "edit_metadata": "ops.convert.metadata",
    "MethodReport": "ops.inspect.command",
    "ExtractReport": "ops.extract.command",
    "extract": "ops.extract.command",
    "InitReport": "ops.init.command",
    "init": "ops.init.command",
    "inspect": "ops.inspect.command",
    "inspect_for": "ops.convert.inspect_runtime",
    "merge": "ops.merge.command",
    "AdapterModule": "ops.opened",
    "OpenAdapter": "ops.opened",
    "OpenCheckpoint": "ops.opened",
    "open_adapter": "ops.opened",
    "open_checkpoint": "ops.opened",
    "read_report": "ops.report_files",
    "write_report": "ops.report_files",
    "ResizeReport": "ops.resize.command",
    "resize": "ops.resize.command",
    "RuntimeInspection": "ops.convert.inspect_runtime",
    "SpectraReport": "ops.inspect.spectra",
    "RunReport": "ops.run.command",
    "run": "ops.run.command",
    "spectra": "ops.inspect.spectra",
    "UnmergeReport": "ops.unmerge.command",
    "unmerge": "ops.unmerge.command",
    "VerifyReport": "ops.verify.command",
    "verify": "ops.verify.command",
}


__all__ = [
    "AdapterDiff",
    "AdapterInspection",
    "AdapterModule",
    "AdapterPath",
    "Adapters",
    "AdaptersDiff",
    "CheckpointConvertReport",
    "CheckpointDiff",
    "CheckpointReport",
    "CombineReport",
    "ConvertReport",
    "CountReport",
    "ExtractReport",
    "InitReport",
    "InputError",
    "LoratoolError",
    "MachineError",
    "MergeReport",
    "MetadataReport",
    "MethodReport",
    "NeedsFlag",
    "OpenAdapter",
    "OpenCheckpoint",
    "ResizeReport",
    "RunReport",
    "RuntimeInspection",
    "SpectraDiff",
    "SpectraReport",
    "UnmergeReport",
    "UsageError",
    "VerifyReport",
    "combine",
    "convert",
    "convert_model",
    "count",
    "diff",
    "diff_spectra",
    "edit_metadata",
    "extract",
    "init",
    "inspect",
    "inspect_for",
    "merge",
    "open_adapter",
    "open_checkpoint",
    "read_report",
    "resize",
    "run",
    "spectra",
    "unmerge",
    "verify",
    "write_report",
]


if not TYPE_CHECKING:  # a type checker that saw it would take every name for one of ours

    def __getattr__(name: str) -> Any:
        """Load a name of `_HOMES` on first use."""
        if name in _HOMES:
            from importlib import import_module

            return getattr(import_module(f".{_HOMES[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names alone."""
    return __all__
