"""loratool: surgery on LoRA checkpoints, exact and streaming, on files alone.

    import loratool

    report = loratool.merge("base.safetensors", ["adapter.safetensors"], "merged.safetensors")
    print(report.kept)

The verbs of the command line but `guide` are functions of the same names and meaning, and each returns a frozen report.
Errors are children of `LoratoolError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import InputError, LoratoolError, MachineError, NeedsFlag, UsageError

if TYPE_CHECKING:
    from .ops.combine import CombineReport, combine
    from .ops.convert import ConvertReport, convert
    from .ops.convert_checkpoint import CheckpointConvertReport
    from .ops.count import CountReport, count
    from .ops.diff import AdapterDiff, CheckpointDiff, diff
    from .ops.extract import ExtractReport, extract
    from .ops.init import InitReport, init
    from .ops.inspect import CheckpointReport, inspect
    from .ops.inspect_adapter import AdapterInspection
    from .ops.merge import merge
    from .ops.merge_report import MergeReport
    from .ops.resize import ResizeReport, resize
    from .ops.spectra import SpectraReport, spectra
    from .ops.unmerge import UnmergeReport, unmerge
    from .ops.verify import VerifyReport, verify

# Loaded on first use, so that `import loratool` and the command line start without torch.
_HOMES = {
    "AdapterInspection": "inspect_adapter",
    "AdapterDiff": "diff",
    "CheckpointDiff": "diff",
    "diff": "diff",
    "CheckpointReport": "inspect",
    "CheckpointConvertReport": "convert_checkpoint",
    "CombineReport": "combine",
    "combine": "combine",
    "ConvertReport": "convert",
    "convert": "convert",
    "CountReport": "count",
    "count": "count",
    "MergeReport": "merge_report",
    "ExtractReport": "extract",
    "extract": "extract",
    "InitReport": "init",
    "init": "init",
    "inspect": "inspect",
    "merge": "merge",
    "ResizeReport": "resize",
    "resize": "resize",
    "SpectraReport": "spectra",
    "spectra": "spectra",
    "UnmergeReport": "unmerge",
    "unmerge": "unmerge",
    "VerifyReport": "verify",
    "verify": "verify",
}

__all__ = [
    "AdapterDiff",
    "AdapterInspection",
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
    "NeedsFlag",
    "ResizeReport",
    "SpectraReport",
    "UnmergeReport",
    "UsageError",
    "VerifyReport",
    "combine",
    "convert",
    "count",
    "diff",
    "extract",
    "init",
    "inspect",
    "merge",
    "resize",
    "spectra",
    "unmerge",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f".ops.{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
