"""The call of `run`: its arguments, options and words."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar

from .. import calls
from ..arguments import StrPath
from ..calls import Call, function_of

if TYPE_CHECKING:
    from ...views.run import RunReport  # noqa: F401


@dataclass(frozen=True)
class Run(Call["RunReport"]):
    """Run a recipe, a file that says what commands do in the words of their options.

    Args:
        recipe: A .json or, with PyYAML, a .yaml file. Relative paths in it start at the working folder.
        force: Replace outputs that exist, in every step.

    Raises:
        UsageError, InputError, NeedsFlag, MachineError: the recipe is wrong, and nothing is written; or a step fails,
            and the message names the steps whose outputs stay.
    """

    work: ClassVar[str] = "run.command.run_recipe"

    recipe: StrPath
    _: KW_ONLY
    force: calls.Force = False
    dry_run: calls.DryRun = False
    progress: calls.Progress = None


run = function_of(Run)
