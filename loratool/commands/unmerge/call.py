"""The call of `unmerge`: its arguments, options and words."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from .. import calls
from ..adapter_requests import Adapters
from ..arguments import Opt, StrPath
from ..calls import Call, function_of, output

if TYPE_CHECKING:
    from ...views.unmerge import UnmergeReport  # noqa: F401


@dataclass(frozen=True)
class Unmerge(Call["UnmergeReport"]):
    """Restore the base of a merge, bit for bit.

    Args:
        merged: The output of `merge`.
        adapters: The adapters of the merge with their weights, in any order.
        undo: The undo file. Needed if it is neither in nor beside MERGED.
        approximate: Subtract and round, if you have no undo file. The report says how many weights can be wrong.

    Raises:
        InputError: an adapter or a weight is not that of the merge, a file was edited since, the undo file has another
            version, or an update cannot be subtracted. Nothing is written then.
        UsageError: the arguments contradict each other.
    """

    work: ClassVar[str] = "unmerge.command.run_unmerge"
    work_in_place: ClassVar[str] = "unmerge.in_place.unmerge_in_place"

    merged: StrPath
    adapters: Annotated[Adapters, Opt(metavar="ADAPTER[:WEIGHT]...")]
    out: Annotated[StrPath | None, output("unmerged")] = None
    _: KW_ONLY
    undo: Annotated[StrPath | None, Opt("About the inputs", "FILE")] = None
    approximate: Annotated[bool, Opt("About the inputs")] = False
    in_place: calls.InPlace = False
    by: calls.By = None
    allow: calls.AllowOpen = ()
    force: calls.Force = False
    resume: calls.Resume = False
    dry_run: calls.DryRun = False
    drop: calls.Drop = ()
    alpha: calls.Alpha = None
    attest: calls.Attest = None
    device: calls.Device = "auto"
    progress: calls.Progress = None
    workers: calls.Workers = None


unmerge = function_of(Unmerge)
