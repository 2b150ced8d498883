"""The call of `demo`: its arguments, options and words."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from .. import calls
from ..arguments import Opt, StrPath
from ..calls import Call, function_of

if TYPE_CHECKING:
    from ...views.demo import DemoReport  # noqa: F401


@dataclass(frozen=True)
class Demo(Call["DemoReport"]):
    """Write small models and adapters for trying the commands, less than 2 MB.

    The weights are random numbers with a fixed seed, so every machine writes the same bytes.

    Args:
        folder: The folder to write.
        force: Replace the folder of an earlier demo.

    Raises:
        UsageError: the folder has other files, or cannot be written.
        NeedsFlag: the folder is that of an earlier demo.
    """

    work: ClassVar[str] = "demo.command.run_demo"

    folder: Annotated[StrPath, Opt(metavar="DIR")]
    _: KW_ONLY
    force: Annotated[bool, Opt("Output", letter="-f")] = False
    dry_run: calls.DryRun = False


demo = function_of(Demo)
