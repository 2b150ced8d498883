"""The call of `verify`: its arguments, options and words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from ...binding.merge.choices import TIED
from .. import calls
from ..adapter_requests import Adapters
from ..arguments import Opt, StrPath, one_of, words_of
from ..calls import Call, function_of

if TYPE_CHECKING:
    from ...views.verify import VerifyReport  # noqa: F401


@dataclass(frozen=True)
class Verify(Call["VerifyReport"]):
    """Prove that MERGED is BASE with the adapters added, or say what is wrong with it.

    The modules that `target`, `exclude`, `layers` and `drop` leave out must be the base's.

    Args:
        base: The model that the adapters were added to.
        adapters: Those of the merge with their weights, as `merge` takes them.
        merged: The output of `merge`, or of another program.
        tied: The value that was given to merge.
        initial: The value that was given to merge.
        residual_base: Pass it if it was given to merge.
        allow: Accept as proven an update below half an ulp everywhere.

    Raises:
        InputError: the files do not belong together at all.
    """

    work: ClassVar[str] = "verify.command.run_verify"

    base: StrPath
    adapters: Annotated[Adapters, Opt(metavar="ADAPTER[:WEIGHT]...")]
    merged: StrPath
    _: KW_ONLY
    target: calls.Target = ()
    exclude: calls.Exclude = ()
    layers: calls.OfLayers = None
    drop: calls.Drop = ()
    alpha: calls.Alpha = None
    tied: Annotated[Literal["untie", "share", "refuse"], one_of(TIED), Opt("About the inputs")] = "untie"
    initial: Annotated[StrPath | None, Opt("About the inputs", "ADAPTER")] = None
    residual_base: Annotated[bool, Opt("About the inputs")] = False
    allow: Annotated[
        Literal["inconclusive"] | Sequence[Literal["inconclusive"]], words_of(["inconclusive"]), Opt("Checks")
    ] = ()
    progress: calls.Progress = None
    workers: calls.Workers = None


verify = function_of(Verify)
