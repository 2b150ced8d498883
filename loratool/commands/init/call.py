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
    """Initialize an adapter to train, from the files of its base.

    The output is a PEFT folder. An image model in one file gives a kohya file, a pipeline a diffusers file.

    Args:
        base: The model that you will train the adapter on.
        method: How A and B start. {meanings}.
        rank: Rank of every weight.
        params: Choose the highest rank with at most this many parameters in all.
        rank_pattern: Rank of the modules that match a pattern, like down_proj=16.
        alpha: Alpha of every module.
        dora: Make it a DoRA, with the norms of the base's rows as magnitudes.
        rslora: Scale the delta by alpha / sqrt(rank), instead of alpha / rank.
        residual: Write the residual base to this folder. Needed for pissa, milora and olora.
        dtype: Dtype of the residual.
        seed: Seed of the random numbers.

    Raises:
        UsageError, InputError, NeedsFlag: the request is not possible. Nothing is written then.
    """

    work: ClassVar[str] = "init.command.run_init"

    base: StrPath
    out: Annotated[StrPath | None, output("adapter")] = None
    _: KW_ONLY
    method: Annotated[
        InitMethod, one_of(INIT_CHOICES, INIT_REFUSED), Opt("Rank and method", "|".join(INIT_CHOICES), free=True)
    ] = "lora"
    rank: Annotated[Positive | None, Opt("Rank and method", "N", "8", letter="-r")] = None
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
