"""The calls of `inspect`, alone, with --spectra and with --for."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from ...architectures.runtimes.table import PROGRAMS
from .. import calls
from ..arguments import Opt, StrPath, one_of
from ..calls import Call, function_of
from ..namings import RuntimeName

if TYPE_CHECKING:
    from ...views.inspect_adapter import AdapterInspection  # noqa: F401
    from ...views.inspect_delta import DeltaInspection  # noqa: F401
    from ...views.inspect_files import FilesReport  # noqa: F401
    from ...views.inspect_model import (
        CheckpointReport,  # noqa: F401
        MethodReport,  # noqa: F401
    )
    from ...views.inspect_patch import PatchInspection  # noqa: F401
    from ...views.inspect_runtime import RuntimeInspection  # noqa: F401
    from ...views.inspect_spectra import SpectraReport  # noqa: F401


@dataclass(frozen=True)
class Inspect(Call["CheckpointReport | AdapterInspection | MethodReport | PatchInspection | DeltaInspection"]):
    """Show what is in a checkpoint or an adapter, and what is wrong with it.

    Files of other methods, such as a ControlNet, are recognized by the names of their tensors. Of a patch only the
    index is read.

    Args:
        path: A folder or a file.
        base: Check an adapter against this model: which modules match, and how large the delta is.
        digest: Show the sha256 of all tensors, which does not depend on shards, file names or the order of headers.

    Raises:
        InputError: the files cannot be read.
        UsageError: `base` or `alpha` is given, but the files are not a LoRA.
    """

    work: ClassVar[str] = "inspect.command.run_inspect"

    path: StrPath
    _: KW_ONLY
    base: Annotated[StrPath | None, Opt("Checks", "BASE")] = None
    alpha: calls.Alpha = None
    digest: Annotated[bool, Opt("Output")] = False
    progress: calls.Progress = None


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


@dataclass(frozen=True)
class InspectFor(Call["RuntimeInspection"]):
    """Report from headers what a runtime does with an adapter.

    Args:
        path: The adapter: a folder or a file.
        runtime: Show what this program would ignore, misread or refuse in an adapter; exit with 1 if there is
            anything. One of {words}.
        base: The served model. Without it, names and what depends on its class are not compared.

    Raises:
        InputError: the files cannot be read, or the runtime is not known to support adapters for the base's class.
        UsageError: there is no such runtime.
    """

    work: ClassVar[str] = "inspect.for_runtime.run_inspect_for"

    path: StrPath
    _: KW_ONLY
    runtime: Annotated[RuntimeName, one_of(PROGRAMS), Opt("Checks", "RUNTIME")]
    base: StrPath | None = None
    alpha: calls.Alpha = None


@dataclass(frozen=True)
class InspectFiles(Call["FilesReport"]):
    """Hash all files, and compare them with a signature (model.sig) and the hub's list, if those are beside.

    Digests are compared. That the signature is right is for model_signing to say.

    Args:
        path: A folder or a file.

    Raises:
        InputError: the files cannot be read, or the signature is damaged or of another kind.
    """

    work: ClassVar[str] = "inspect.files.run_inspect_files"

    path: StrPath
    _: KW_ONLY
    progress: calls.Progress = None


inspect = function_of(Inspect)

spectra = function_of(Spectra)

inspect_for = function_of(InspectFor)

inspect_files = function_of(InspectFiles)
