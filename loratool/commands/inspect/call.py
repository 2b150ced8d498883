"""The calls of `inspect`, alone and with --spectra; that of `inspect --for` is in `convert.call`."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from .. import calls
from ..arguments import Opt, StrPath
from ..calls import Call, function_of

if TYPE_CHECKING:
    from ...views.inspect_adapter import AdapterInspection  # noqa: F401
    from ...views.inspect_model import (
        CheckpointReport,  # noqa: F401
        MethodReport,  # noqa: F401
    )
    from ...views.inspect_spectra import SpectraReport  # noqa: F401


@dataclass(frozen=True)
class Inspect(Call["CheckpointReport | AdapterInspection | MethodReport"]):
    """Show what is in a checkpoint or an adapter, and what is wrong with it.

    Files of other methods, such as a ControlNet, are recognized by the names of their tensors.

    Args:
        path: A folder or a file.
        base: Check an adapter against this model: which modules match, and how large the delta is.

    Raises:
        InputError: the files cannot be read.
        UsageError: `base` or `alpha` is given, but the files are not a LoRA.
    """

    work: ClassVar[str] = "inspect.command.run_inspect"

    path: StrPath
    _: KW_ONLY
    base: Annotated[StrPath | None, Opt("Checks", "BASE")] = None
    alpha: calls.Alpha = None


@dataclass(frozen=True)
class Spectra(Call["SpectraReport"]):
    """Return the singular values of the selected modules: linear layers of a model, or deltas of an adapter.

    Without targets, all are selected.

    Args:
        path: A folder or a file.
        base: The model under an adapter. With it, the intruder dimensions of each merged weight are counted.

    Raises:
        InputError: nothing is selected, or a weight has unreadable codes, nan or inf.
        UsageError: `top` or `threshold` is given without `base`, or `base` is given with a model.
    """

    work: ClassVar[str] = "inspect.spectra.run_spectra"

    path: StrPath
    _: KW_ONLY
    base: StrPath | None = None
    top: calls.Top = None
    threshold: calls.Threshold = None
    target: calls.Target = ()
    exclude: calls.Exclude = ()
    layers: calls.OfLayers = None
    alpha: calls.Alpha = None
    device: calls.Device = "auto"
    progress: calls.Progress = None


inspect = function_of(Inspect)

spectra = function_of(Spectra)
