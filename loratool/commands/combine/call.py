"""The call of `combine`: its arguments, options and words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from .. import calls
from ..adapter_requests import Adapters
from ..arguments import Opt, Positive, StrPath, one_of, words_of
from ..calls import Call, function_of, output
from ..choices import COMBINE_ALLOW, COMBINE_METHODS, COMBINE_REFUSED, RANK_METHODS
from ..namings import To

if TYPE_CHECKING:
    from ...views.combine import CombineReport  # noqa: F401

CombineMethod = Literal[
    "cat",
    "ties",
    "ties-mergekit",
    "dare-linear",
    "dare-ties",
    "magnitude",
    "della",
    "knots",
    "tsv",
    "iso-c",
    "iso-cts",
    "wudi",
    "core-ties",
    "core-dare",
    "core-magnitude",
]

RuleOfSeveral = tuple[Literal["rank", "energy", "sv_ratio", "sv_cumulative", "sv_fro"], float]


@dataclass(frozen=True)
class Combine(Call["CombineReport"]):
    """Combine several adapters into one: their exact weighted sum, or by TIES, DARE, TSV and other methods.

    Args:
        adapters: One adapter or several: a path, (path, weight), (path, weight, weights of parts), a list of these, or
            {path: weight}. Weights of parts are by component or by module pattern, like {"te": 0.4, "down_proj": 0}.
        method: How to combine. {meanings}.
        density: Keep this share of each delta's entries. For tsv: keep this share of its singular values, by default
            all.
        seed: Seed of the random numbers.
        rank: Rank of every module.
        rank_method: How a method gets to --rank. {meanings}.
        rank_rule: Choose each module's rank by a rule: {words}.
        allow: {meanings}.

    Raises:
        UsageError: two options contradict each other.
        InputError: the adapters do not belong together.
        NeedsFlag: tensors cannot be summed, or the adapters look like those of two models. Nothing is written then.
    """

    work: ClassVar[str] = "combine.command.run_combine"

    adapters: Annotated[Adapters, Opt(metavar="ADAPTER[:WEIGHT]...")]
    out: Annotated[StrPath | None, output("combined")] = None
    _: KW_ONLY
    method: Annotated[
        CombineMethod, one_of(COMBINE_METHODS, COMBINE_REFUSED), Opt("Rank and method", "METHOD", free=True)
    ] = "cat"
    density: Annotated[float | None, Opt("Rank and method", "0.5")] = None
    seed: calls.Seed = 0
    rank: Annotated[Positive | None, Opt("Rank and method", "N", "the sum of the adapters'", letter="-r")] = None
    rank_method: Annotated[
        Annotated[Literal["ctm", "truncate"], one_of(RANK_METHODS)] | None,
        Opt("Rank and method", default="ctm with --rank; truncate for cat and della"),
    ] = None
    energy: calls.Energy = None
    params: calls.Params = None
    size: calls.Bytes = None
    rank_rule: Annotated[
        Annotated[RuleOfSeveral, calls.RULE_OF_SEVERAL_TYPE] | None, Opt("Rank and method", "NAME=VALUE")
    ] = None
    max_rank: calls.MaxRank = None
    imatrix: calls.Imatrix = None
    target: calls.Target = ()
    exclude: calls.Exclude = ()
    to: To = None
    dtype: calls.FactorDtype = "fp32"
    drop: calls.Drop = ()
    alpha: calls.Alpha = None
    allow: Annotated[
        Literal["unrelated"] | Sequence[Literal["unrelated"]], words_of(COMBINE_ALLOW), Opt("About the inputs")
    ] = ()
    card: calls.Card = True
    force: calls.Force = False
    dry_run: calls.DryRun = False
    device: calls.Device = "auto"
    progress: calls.Progress = None


combine = function_of(Combine)
