"""The call of `recover`: its arguments, options and words."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from .. import calls
from ..arguments import Opt, StrPath
from ..calls import Call, function_of

if TYPE_CHECKING:
    from ...views.recover import RecoverReport  # noqa: F401


@dataclass(frozen=True)
class Recover(Call["RecoverReport"]):
    """End a change in place that was interrupted.

    Args:
        model: The model, by its own name. The inputs of the change must be where they were.
        back: Take the change back: the model is what it was, bit for bit.

    Raises:
        InputError: no change of the model was interrupted, or its inputs are gone or others.
    """

    work: ClassVar[str] = "recover.command.run_recover"

    model: StrPath
    _: KW_ONLY
    back: Annotated[bool, Opt("Output")] = False
    dry_run: calls.DryRun = False
    progress: calls.Progress = None


recover = function_of(Recover)
