"""The call of `patch`: its arguments, options and words."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from .. import calls
from ..adapter_requests import Adapters
from ..arguments import Opt, Paths, StrPath, one_of
from ..calls import Call, function_of
from ..choices import PATCH_DIALECTS

if TYPE_CHECKING:
    from ...views.foreign_patch import ForeignPatchReport  # noqa: F401
    from ...views.patch import PatchReport  # noqa: F401

Dialect = Literal["disk-delta", "skyrl", "prime-rl", "trl", "arc_v2"]


@dataclass(frozen=True)
class Patch(Call["PatchReport | ForeignPatchReport"]):
    """Write the difference of two models, of which `apply` makes the second from the first, bit for bit.

    Args:
        base: The model that the reader of the patch has.
        tuned: The model that the patch is to make of it; with --fold, patches from BASE on, in their order.
        adapter: Predict TUNED as BASE with these adapters merged. The patch has their files, and beside them only what
            the merge does not tell.
        to: Write a patch of another program. {meanings}.
        step: The version that the patch makes, by default the number in the name of OUT.
        encoding: xor or overwrite of disk-delta, gap_delta or raw of trl.
        checksum: xxh3-128, blake3 or adler32 of disk-delta.
        fold: Write one patch of several: it makes what they make of BASE one after the other.
        out: Where to write: a file.
        one_way: Leave out what the way back needs. That takes up to half of the time, and up to a tenth of the patch.
        fast: Write with fewer tables: up to a third less time where the compiled passes run, and up to half more bytes.

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
    to: Annotated[Annotated[Dialect, one_of(PATCH_DIALECTS)] | None, Opt("Output", "DIALECT")] = None
    step: Annotated[int | None, Opt("Output", "N")] = None
    encoding: Annotated[str | None, Opt("Output", "NAME")] = None
    checksum: Annotated[str | None, Opt("Output", "NAME")] = None
    fold: Annotated[bool, Opt("About the inputs")] = False
    one_way: Annotated[bool, Opt("Output")] = False
    fast: Annotated[bool, Opt("Output")] = False
    force: calls.Force = False
    resume: calls.Resume = False
    dry_run: calls.DryRun = False
    progress: calls.Progress = None
    workers: calls.Workers = None


patch = function_of(Patch)
