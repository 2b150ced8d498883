"""The call of `init`: its arguments, options and words."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from .. import calls
from ..arguments import Opt, ParameterCount, Positive, StrPath, one_of
from ..calls import Call, function_of, output
from ..choices import INIT_CHOICES, INIT_REFUSED
from ..namings import To

if TYPE_CHECKING:
    from ...views.init import InitReport  # noqa: F401

InitMethod = Literal["lora", "gaussian", "orthogonal", "pissa", "milora", "mica", "olora"]


@dataclass(frozen=True)
class Init(Call["InitReport"]):
    """Initialize an adapter for a base, from its files alone, to train: a PEFT folder, or for an image model in one
    file kohya's, for a pipeline diffusers'.

    Args:
        base: The model that the adapter will be trained on.
        method: {meanings}.
        rank: Rank of every weight.
        params: Choose the largest rank within this many parameters.
        rank_pattern: Other ranks by pattern: down_proj=16.
        alpha: Alpha of every module.
        dora: DoRA: with magnitudes, the norms of the base's rows.
        rslora: Scale the delta by alpha / sqrt(rank).
        residual: A folder for the base that pissa, milora and olora leave.
        dtype: Dtype of the residual.
        seed: Seed of the random numbers.

    Raises:
        UsageError, InputError, NeedsFlag: before anything is written.
    """

    work: ClassVar[str] = "init.command.run_init"

    base: StrPath
    out: Annotated[StrPath | None, output("adapter")] = None
    _: KW_ONLY
    method: Annotated[
        InitMethod, one_of(INIT_CHOICES, INIT_REFUSED), Opt("Rank and method", "|".join(INIT_CHOICES), free=True)
    ] = "lora"
    rank: Annotated[Positive | None, Opt("Rank and method", "N", "8")] = None
    params: Annotated[ParameterCount | None, Opt("Rank and method", "4M")] = None
    rank_pattern: calls.RankPattern = None
    alpha: Annotated[float | None, Opt("Rank and method", "N", "its rank")] = None
    dora: Annotated[bool, Opt("Rank and method")] = False
    rslora: Annotated[bool, Opt("Rank and method")] = False
    residual: Annotated[StrPath | None, Opt("Output", "OUT")] = None
    dtype: calls.MergeDtype = "keep"
    to: To = None
    architecture: calls.Architecture = None
    undo: calls.Undo = True
    seed: calls.Seed = 0
    target: calls.Target = ("all-linear",)
    exclude: calls.Exclude = ()
    layers: calls.OfLayers = None
    card: calls.Card = True
    force: calls.Force = False
    dry_run: calls.DryRun = False
    device: calls.Device = "auto"
    progress: calls.Progress = None


init = function_of(Init)
