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

    The output of another method is one, too: the tensors' names tell which it is.

    Args:
        path: A folder or a file.
        base: Hold an adapter against this model: what binds, and the delta's size.

    Raises:
        InputError: the files cannot be read.
        UsageError: `base` or `alpha` is given, and the files are no LoRA.
    """

    work: ClassVar[str] = "inspect.command.run_inspect"

    path: StrPath
    _: KW_ONLY
    base: Annotated[StrPath | None, Opt("Checks", "BASE")] = None
    alpha: calls.Alpha = None


@dataclass(frozen=True)
class Spectra(Call["SpectraReport"]):
    """Return the singular values of every selected module.

    Of a model these are all linear layers if no target is named, of an adapter all its deltas.

    Args:
        path: A folder or a file.
        base: The model under an adapter, to count the intruder dimensions of each merged weight.

    Raises:
        InputError: nothing is selected, a weight's codes cannot be read, or a tensor holds nan or inf.
        UsageError: an option of the base's is given without one, or `base` beside a model.
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
