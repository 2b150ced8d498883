"""The call of `resize`: its arguments, options and words."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from .. import calls
from ..arguments import Opt, Positive, StrPath
from ..calls import Call, function_of, output
from ..namings import To

if TYPE_CHECKING:
    from ...views.resize import ResizeReport  # noqa: F401


@dataclass(frozen=True)
class Resize(Call["ResizeReport"]):
    """Change an adapter's rank: the best approximation by a lower rank, or the same delta at a higher one.

    Give one of `rank`, `energy`, `params`, `size` and `rank_rule`. If `to` is given, ranks are those of the modules in
    that format.

    Args:
        adapter: A folder or a file.
        rank: New rank of every module. A module of a lower rank is padded with zeros.

    Raises:
        UsageError: two options contradict each other.
        InputError: the adapter has no factors, or the format cannot hold it. Nothing is written then.
    """

    work: ClassVar[str] = "resize.command.run_resize"

    adapter: StrPath
    out: Annotated[StrPath | None, output("resized")] = None
    _: KW_ONLY
    rank: Annotated[Positive | None, Opt("Rank and method", "N", letter="-r")] = None
    energy: calls.Energy = None
    params: calls.Params = None
    size: calls.Bytes = None
    rank_rule: calls.RankRule = None
    max_rank: calls.MaxRank = None
    imatrix: calls.Imatrix = None
    to: To = None
    dtype: calls.FactorDtype = "fp32"
    drop: calls.Drop = ()
    alpha: calls.Alpha = None
    card: calls.Card = True
    force: calls.Force = False
    dry_run: calls.DryRun = False
    device: calls.Device = "auto"
    progress: calls.Progress = None


resize = function_of(Resize)
