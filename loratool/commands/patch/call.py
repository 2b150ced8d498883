"""The call of `patch`: its arguments, options and words."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from .. import calls
from ..adapter_requests import Adapters
from ..arguments import Opt, Paths, StrPath
from ..calls import Call, function_of

if TYPE_CHECKING:
    from ...views.patch import PatchReport  # noqa: F401


@dataclass(frozen=True)
class Patch(Call["PatchReport"]):
    """Write the difference of two models, of which `apply` makes the second from the first, bit for bit.

    Args:
        base: The model that the reader of the patch has.
        tuned: The model that the patch is to make of it; with --fold, patches from BASE on, in their order.
        adapter: Predict TUNED as BASE with these adapters merged, as --adapter ADAPTER[:WEIGHT]. The patch has their
            files, and beside them only what the merge does not tell.
        fold: Write one patch of several: it makes what they make of BASE one after the other.
        out: Where to write: a file.
        one_way: Leave out what the way back needs. That takes half of the time, and up to a tenth of the patch.
        fast: Write with fewer tables, in a third of the time; the patch is up to half larger.

    Raises:
        InputError: a model cannot be read, or has files that a patch cannot make again. Nothing is written then.
        UsageError: the arguments contradict each other.
    """

    work: ClassVar[str] = "patch.command.run_patch"

    base: StrPath
    tuned: Annotated[Paths, Opt(metavar="TUNED")]
    out: Annotated[StrPath | None, Opt("Output", "OUT", "loratool.patch", "-o")] = None
    _: KW_ONLY
    adapter: Annotated[Adapters | None, Opt("About the inputs", "ADAPTER[:WEIGHT]")] = None
    fold: Annotated[bool, Opt("About the inputs")] = False
    one_way: Annotated[bool, Opt("Output")] = False
    fast: Annotated[bool, Opt("Output")] = False
    force: calls.Force = False
    resume: calls.Resume = False
    dry_run: calls.DryRun = False
    progress: calls.Progress = None
    workers: calls.Workers = None


patch = function_of(Patch)
