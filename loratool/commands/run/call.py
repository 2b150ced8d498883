"""The call of `run`: its arguments, options and words."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from .. import calls
from ..arguments import Opt, StrPath
from ..calls import Call, function_of

if TYPE_CHECKING:
    from ...views.run import RunReport  # noqa: F401


@dataclass(frozen=True)
class Run(Call["RunReport"]):
    """Run a recipe: a file with one command or several, and their options.

    Args:
        recipe: A .json file, with PyYAML a .yaml file, or a .toml file of mlrecipe. Its relative paths start at the
            working folder.
        force: Replace outputs that exist, in every step.
        lock: Record the digests of what the steps read and write in RECIPE.lock.json, beside the recipe.
        locked: Check inputs before the first step, and outputs, against that lock; exit with 1 if one differs.

    Raises:
        UsageError, InputError, NeedsFlag, MachineError: the recipe is wrong, and nothing is written. Or a step fails;
            then the message names the outputs of finished steps, which stay.
        CheckError: with `locked`, an input or an output is not what the lock records. Of inputs, nothing is written.
    """

    work: ClassVar[str] = "run.command.run_recipe"

    recipe: StrPath
    _: KW_ONLY
    force: calls.Force = False
    dry_run: calls.DryRun = False
    lock: Annotated[bool, Opt("Checks")] = False
    locked: Annotated[bool, Opt("Checks")] = False
    progress: calls.Progress = None


run = function_of(Run)
