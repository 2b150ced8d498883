"""The call of `apply`: its arguments, options and words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from .. import calls
from ..arguments import Opt, Paths, StrPath, words_of
from ..calls import Call, function_of
from ..choices import APPLY_ALLOW

if TYPE_CHECKING:
    from ...views.apply import ApplyReport  # noqa: F401


@dataclass(frozen=True)
class Apply(Call["ApplyReport"]):
    """Make a model of another by one or more patches, bit for bit.

    Args:
        base: The model that the first patch was made of; with --reverse, the one that the last patch makes.
        patches: The patches, in their order: of loratool, or of a trainer (slime, miles, SGLang, SkyRL, prime-rl, TRL,
            Fireworks).
        out: Where to write: a folder or a file, as the model that the patch makes was.
        step: PATCH is a folder of versions that a trainer wrote: make this version, from the newest full one below.
        allow: Accept patches of other programs that would stop the command. {meanings}.
        reverse: Go back: make the base of the target, with the last patch first.

    Raises:
        InputError: a patch is damaged or of another model, or does not follow from the one before. Nothing is written
            then.
        UsageError: the arguments contradict each other.
    """

    work: ClassVar[str] = "apply.command.run_apply"
    work_in_place: ClassVar[str] = "apply.in_place.apply_in_place"

    base: StrPath
    patches: Annotated[Paths, Opt(metavar="PATCH...")]
    out: Annotated[StrPath | None, Opt("Output", "OUT", "patched, or patched.safetensors", "-o")] = None
    _: KW_ONLY
    step: Annotated[int | None, Opt("About the inputs", "N")] = None
    allow: Annotated[
        Literal["unknown", "unverified", "open-files"] | Sequence[Literal["unknown", "unverified", "open-files"]],
        words_of(APPLY_ALLOW),
        Opt("About the inputs"),
    ] = ()
    reverse: Annotated[bool, Opt("Output")] = False
    in_place: calls.InPlace = False
    by: calls.By = None
    force: calls.Force = False
    resume: calls.Resume = False
    dry_run: calls.DryRun = False
    progress: calls.Progress = None
    workers: calls.Workers = None


apply = function_of(Apply)
