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
    from .ops.combine.command import combine
    from .ops.convert.adapter import convert
    from .ops.convert.checkpoint import convert_model
    from .ops.convert.inspect_runtime import inspect_for
    from .ops.convert.metadata import edit_metadata
    from .ops.count.command import count
    from .ops.diff.command import diff
    from .ops.diff.spectra import diff_spectra
    from .ops.extract.command import extract
    from .ops.init.command import init
    from .ops.inputs import AdapterPath, Adapters
    from .ops.inspect.command import inspect
    from .ops.inspect.spectra import spectra
    from .ops.merge.command import merge
    from .ops.opened import AdapterModule, OpenAdapter, OpenCheckpoint, open_adapter, open_checkpoint
    from .ops.report_files import read_report, write_report
    from .ops.resize.command import resize
    from .ops.run.command import run
    from .ops.unmerge.command import unmerge
    from .ops.verify.command import verify
    from .views.combine import CombineReport
    from .views.convert import ConvertReport
    from .views.convert_model import CheckpointConvertReport
    from .views.count import CountReport
    from .views.diff_adapters import AdapterDiff
    from .views.diff_models import CheckpointDiff
    from .views.diff_several import AdaptersDiff
    from .views.diff_spectra import SpectraDiff
    from .views.extract import ExtractReport
    from .views.init import InitReport
    from .views.inspect_adapter import AdapterInspection
    from .views.inspect_model import CheckpointReport, MethodReport
    from .views.inspect_runtime import RuntimeInspection
    from .views.inspect_spectra import SpectraReport
    from .views.merge import MergeReport
    from .views.metadata import MetadataReport
    from .views.resize import ResizeReport
    from .views.run import RunReport
    from .views.unmerge import UnmergeReport
    from .views.verify import VerifyReport

# name -> its module, loaded on first use so that `import loratool` starts without torch
_HOMES = {
    "AdapterPath": "ops.inputs",
    "Adapters": "ops.inputs",
    "AdapterInspection": "views.inspect_adapter",
    "AdapterDiff": "views.diff_adapters",
    "AdaptersDiff": "views.diff_several",
    "CheckpointDiff": "views.diff_models",
    "diff": "ops.diff.command",
    "SpectraDiff": "views.diff_spectra",
    "diff_spectra": "ops.diff.spectra",
    "CheckpointReport": "views.inspect_model",
    "CheckpointConvertReport": "views.convert_model",
    "CombineReport": "views.combine",
    "combine": "ops.combine.command",
    "ConvertReport": "views.convert",
    "convert": "ops.convert.adapter",
    "convert_model": "ops.convert.checkpoint",
    "CountReport": "views.count",
    "count": "ops.count.command",
    "MergeReport": "views.merge",
    "MetadataReport": "views.metadata",
    "edit_metadata": "ops.convert.metadata",
    "MethodReport": "views.inspect_model",
    "ExtractReport": "views.extract",
    "extract": "ops.extract.command",
    "InitReport": "views.init",
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
    "ResizeReport": "views.resize",
    "resize": "ops.resize.command",
    "RuntimeInspection": "views.inspect_runtime",
    "SpectraReport": "views.inspect_spectra",
    "RunReport": "views.run",
    "run": "ops.run.command",
    "spectra": "ops.inspect.spectra",
    "UnmergeReport": "views.unmerge",
    "unmerge": "ops.unmerge.command",
    "VerifyReport": "views.verify",
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
