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
    """Count what LoRA and its rivals would train of a model, and what each adds at inference.

    Args:
        path: A checkpoint, of which the headers are read, or a config.json (or a folder with one alone) of a model type
            in CONFIG_FAMILIES.
        rank: LoRA's rank, the adapters' bottleneck, the prefixes' length.
        params: Instead of --rank: the largest size of each method that fits.

    Raises:
        UsageError: no matrix has that rank.
        InputError: the files cannot be read, or have nothing to train.
    """

    work: ClassVar[str] = "count.command.run_count"

    path: Annotated[StrPath, Opt(metavar="CONFIG-OR-CHECKPOINT")]
    _: KW_ONLY
    rank: Annotated[Positive | None, Opt("Rank and method", "N", "8")] = None
    params: Annotated[ParameterCount | None, Opt("Rank and method", "4M")] = None
    target: calls.Target = ()
    exclude: calls.Exclude = ()
    layers: calls.OfLayers = None


count = function_of(Count)
