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
    from .commands.combine.command import combine
    from .commands.convert.adapter import convert
    from .commands.convert.checkpoint import convert_model
    from .commands.convert.inspect_runtime import inspect_for
    from .commands.convert.metadata import edit_metadata
    from .commands.count.command import count
    from .commands.diff.command import diff
    from .commands.diff.spectra import diff_spectra
    from .commands.extract.command import extract
    from .commands.init.command import init
    from .commands.inputs import AdapterPath, Adapters
    from .commands.inspect.command import inspect
    from .commands.inspect.spectra import spectra
    from .commands.merge.command import merge
    from .commands.opened import AdapterModule, OpenAdapter, OpenCheckpoint, open_adapter, open_checkpoint
    from .commands.report_files import read_report, write_report
    from .commands.resize import resize
    from .commands.run.command import run
    from .commands.unmerge import unmerge
    from .commands.verify.command import verify
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
    "AdapterPath": "commands.inputs",
    "Adapters": "commands.inputs",
    "AdapterInspection": "views.inspect_adapter",
    "AdapterDiff": "views.diff_adapters",
    "AdaptersDiff": "views.diff_several",
    "CheckpointDiff": "views.diff_models",
    "diff": "commands.diff.command",
    "SpectraDiff": "views.diff_spectra",
    "diff_spectra": "commands.diff.spectra",
    "CheckpointReport": "views.inspect_model",
    "CheckpointConvertReport": "views.convert_model",
    "CombineReport": "views.combine",
    "combine": "commands.combine.command",
    "ConvertReport": "views.convert",
    "convert": "commands.convert.adapter",
    "convert_model": "commands.convert.checkpoint",
    "CountReport": "views.count",
    "count": "commands.count.command",
    "MergeReport": "views.merge",
    "MetadataReport": "views.metadata",
    "edit_metadata": "commands.convert.metadata",
    "MethodReport": "views.inspect_model",
    "ExtractReport": "views.extract",
    "extract": "commands.extract.command",
    "InitReport": "views.init",
    "init": "commands.init.command",
    "inspect": "commands.inspect.command",
    "inspect_for": "commands.convert.inspect_runtime",
    "merge": "commands.merge.command",
    "AdapterModule": "commands.opened",
    "OpenAdapter": "commands.opened",
    "OpenCheckpoint": "commands.opened",
    "open_adapter": "commands.opened",
    "open_checkpoint": "commands.opened",
    "read_report": "commands.report_files",
    "write_report": "commands.report_files",
    "ResizeReport": "views.resize",
    "resize": "commands.resize",
    "RuntimeInspection": "views.inspect_runtime",
    "SpectraReport": "views.inspect_spectra",
    "RunReport": "views.run",
    "run": "commands.run.command",
    "spectra": "commands.inspect.spectra",
    "UnmergeReport": "views.unmerge",
    "unmerge": "commands.unmerge",
    "VerifyReport": "views.verify",
    "verify": "commands.verify.command",
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
