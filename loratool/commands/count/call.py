"""The call of `count`: its arguments, options and words."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from .. import calls
from ..arguments import Opt, ParameterCount, Positive, StrPath
from ..calls import Call, function_of

if TYPE_CHECKING:
    from ...views.count import CountReport  # noqa: F401


@dataclass(frozen=True)
class Count(Call["CountReport"]):
    """Count the parameters that LoRA and other methods would train, and what each method adds at inference.

    Args:
        path: A checkpoint, whose headers are read, or a config.json of a model type in CONFIG_FAMILIES, or its folder.
        rank: Rank of LoRA, bottleneck of adapters, length of prefixes.
        params: Choose the largest size of each method with at most this many parameters, instead of --rank.

    Raises:
        UsageError: the rank is higher than a matrix allows.
        InputError: the files cannot be read, or have nothing to train.
    """

    work: ClassVar[str] = "count.command.run_count"

    path: Annotated[StrPath, Opt(metavar="CONFIG-OR-CHECKPOINT")]
    _: KW_ONLY
    rank: Annotated[Positive | None, Opt("Rank and method", "N", "8", letter="-r")] = None
    params: Annotated[ParameterCount | None, Opt("Rank and method", "4M")] = None
    target: calls.Target = ()
    exclude: calls.Exclude = ()
    layers: calls.OfLayers = None


count = function_of(Count)
