"""loratool merges, converts, combines and inspects LoRA adapters and checkpoints: exact, streaming, on files.

    import loratool

    report = loratool.merge("base.safetensors", ["adapter.safetensors"], "merged.safetensors")
    print(report.kept)

Every command of the command line except `guide` is a function here with the same name and meaning. Each returns a
frozen report, and raises subclasses of `LoratoolError`; `write_report` makes a page of it, and `read_report` reads it
back. `open_adapter` and `open_checkpoint` look into files: lazy mappings from names to modules and tensors.
`save_adapter` writes an adapter of tensors.
The module `live` merges into models in memory, and takes the merge out again. The guide `python` shows all of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import CheckError, InputError, LoratoolError, MachineError, NeedsFlag, UsageError

if TYPE_CHECKING:
    from . import live
    from .commands.adapter_requests import AdapterPath, Adapters
    from .commands.apply.call import apply
    from .commands.combine.call import combine
    from .commands.convert.call import convert, convert_model, edit_metadata
    from .commands.count.call import count
    from .commands.demo.call import demo
    from .commands.diff.call import diff, diff_headers, diff_spectra
    from .commands.env.call import env
    from .commands.extract.call import extract
    from .commands.init.call import init
    from .commands.inspect.call import inspect, inspect_files, inspect_for, spectra
    from .commands.merge.call import merge
    from .commands.opened import AdapterModule, OpenAdapter, OpenCheckpoint, open_adapter, open_checkpoint
    from .commands.patch.call import patch
    from .commands.recover.call import recover
    from .commands.report_files import read_report, write_report
    from .commands.resize.call import resize
    from .commands.run.call import run
    from .commands.saved import save_adapter
    from .commands.unmerge.call import unmerge
    from .commands.verify.call import verify, verify_attestation
    from .live import iter_merged
    from .views.apply import ApplyReport
    from .views.attestation import AttestationReport
    from .views.combine import CombineReport
    from .views.convert import ConvertReport
    from .views.convert_model import CheckpointConvertReport
    from .views.count import CountReport
    from .views.demo import DemoReport
    from .views.diff_adapters import AdapterDiff
    from .views.diff_headers import HeadersDiff
    from .views.diff_models import CheckpointDiff
    from .views.diff_several import AdaptersDiff
    from .views.diff_spectra import SpectraDiff
    from .views.env import EnvReport
    from .views.extract import ExtractReport
    from .views.foreign_patch import ForeignPatchReport
    from .views.init import InitReport
    from .views.inspect_adapter import AdapterInspection
    from .views.inspect_delta import DeltaInspection
    from .views.inspect_files import FilesReport
    from .views.inspect_model import CheckpointReport, MethodReport
    from .views.inspect_patch import PatchInspection
    from .views.inspect_runtime import RuntimeInspection
    from .views.inspect_spectra import SpectraReport
    from .views.merge import MergeReport
    from .views.metadata import MetadataReport
    from .views.patch import PatchReport
    from .views.recover import RecoverReport
    from .views.resize import ResizeReport
    from .views.run import RunReport
    from .views.unmerge import UnmergeReport
    from .views.verify import VerifyReport

    __version__: str

# name -> its module, empty if it is one; loaded on first use so that `import loratool` starts without torch
_HOMES = {
    "AdapterPath": "commands.adapter_requests",
    "Adapters": "commands.adapter_requests",
    "AdapterInspection": "views.inspect_adapter",
    "AdapterDiff": "views.diff_adapters",
    "AdaptersDiff": "views.diff_several",
    "CheckpointDiff": "views.diff_models",
    "diff": "commands.diff.call",
    "HeadersDiff": "views.diff_headers",
    "SpectraDiff": "views.diff_spectra",
    "diff_headers": "commands.diff.call",
    "diff_spectra": "commands.diff.call",
    "ApplyReport": "views.apply",
    "apply": "commands.apply.call",
    "AttestationReport": "views.attestation",
    "CheckpointReport": "views.inspect_model",
    "CheckpointConvertReport": "views.convert_model",
    "CombineReport": "views.combine",
    "combine": "commands.combine.call",
    "ConvertReport": "views.convert",
    "convert": "commands.convert.call",
    "convert_model": "commands.convert.call",
    "CountReport": "views.count",
    "count": "commands.count.call",
    "DeltaInspection": "views.inspect_delta",
    "DemoReport": "views.demo",
    "demo": "commands.demo.call",
    "MergeReport": "views.merge",
    "MetadataReport": "views.metadata",
    "edit_metadata": "commands.convert.call",
    "MethodReport": "views.inspect_model",
    "EnvReport": "views.env",
    "env": "commands.env.call",
    "ExtractReport": "views.extract",
    "extract": "commands.extract.call",
    "FilesReport": "views.inspect_files",
    "ForeignPatchReport": "views.foreign_patch",
    "InitReport": "views.init",
    "init": "commands.init.call",
    "inspect": "commands.inspect.call",
    "inspect_files": "commands.inspect.call",
    "inspect_for": "commands.inspect.call",
    "iter_merged": "live.iterate",
    "live": "",
    "merge": "commands.merge.call",
    "AdapterModule": "commands.opened",
    "OpenAdapter": "commands.opened",
    "OpenCheckpoint": "commands.opened",
    "open_adapter": "commands.opened",
    "open_checkpoint": "commands.opened",
    "read_report": "commands.report_files",
    "write_report": "commands.report_files",
    "PatchInspection": "views.inspect_patch",
    "PatchReport": "views.patch",
    "patch": "commands.patch.call",
    "RecoverReport": "views.recover",
    "recover": "commands.recover.call",
    "ResizeReport": "views.resize",
    "resize": "commands.resize.call",
    "RuntimeInspection": "views.inspect_runtime",
    "SpectraReport": "views.inspect_spectra",
    "RunReport": "views.run",
    "save_adapter": "commands.saved",
    "run": "commands.run.call",
    "spectra": "commands.inspect.call",
    "UnmergeReport": "views.unmerge",
    "unmerge": "commands.unmerge.call",
    "VerifyReport": "views.verify",
    "verify": "commands.verify.call",
    "verify_attestation": "commands.verify.call",
}

__all__ = [
    "AdapterDiff",
    "AdapterInspection",
    "AdapterModule",
    "AdapterPath",
    "Adapters",
    "AdaptersDiff",
    "ApplyReport",
    "AttestationReport",
    "CheckError",
    "CheckpointConvertReport",
    "CheckpointDiff",
    "CheckpointReport",
    "CombineReport",
    "ConvertReport",
    "CountReport",
    "DeltaInspection",
    "DemoReport",
    "EnvReport",
    "ExtractReport",
    "FilesReport",
    "ForeignPatchReport",
    "HeadersDiff",
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
    "PatchInspection",
    "PatchReport",
    "RecoverReport",
    "ResizeReport",
    "RunReport",
    "RuntimeInspection",
    "SpectraDiff",
    "SpectraReport",
    "UnmergeReport",
    "UsageError",
    "VerifyReport",
    "apply",
    "combine",
    "convert",
    "convert_model",
    "count",
    "demo",
    "diff",
    "diff_headers",
    "diff_spectra",
    "edit_metadata",
    "env",
    "extract",
    "init",
    "inspect",
    "inspect_files",
    "inspect_for",
    "iter_merged",
    "live",
    "merge",
    "open_adapter",
    "open_checkpoint",
    "patch",
    "read_report",
    "recover",
    "resize",
    "run",
    "save_adapter",
    "spectra",
    "unmerge",
    "verify",
    "verify_attestation",
    "write_report",
]


if not TYPE_CHECKING:  # a type checker that saw it would take every name for one of ours

    def __getattr__(name: str) -> Any:
        """Load a name of `_HOMES` on first use, and read the version where the package is installed."""
        if name == "__version__":
            from importlib.metadata import version

            return version("loratool")
        if name in _HOMES:
            from importlib import import_module

            if not _HOMES[name]:
                return import_module(f".{name}", __name__)
            return getattr(import_module(f".{_HOMES[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names alone."""
    return __all__
