"""The call of `extract`: its arguments, options and words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from .. import calls
from ..arguments import Opt, Positive, StrPath, one_of, words_of
from ..calls import Call, function_of, output
from ..choices import EMBED_CHOICES
from ..namings import ScaledFormat, extract_formats, titles_of

if TYPE_CHECKING:
    from ...views.extract import ExtractReport  # noqa: F401


@dataclass(frozen=True)
class Extract(Call["ExtractReport"]):
    """Extract an adapter from a full fine-tune: the best approximation of TUNED - BASE for a rank.

    The output is a PEFT folder, or a file with its config beside it if `out` ends in .safetensors. An image model in
    one file gives a kohya file, a pipeline one diffusers file for all components. Give at most one of `rank`, `energy`,
    `params`, `size` and `rank_rule`. Quantized weights of either model are dequantized first.

    Args:
        base: The model before fine-tuning.
        tuned: The fine-tune.
        rank: Rank of every matrix.
        embed: How to store changed embeddings and heads. {meanings}.
        certify: Prove how far each matrix is from the best of its rank, instead of estimating it.
        bias: Do not store changed biases and norms.
        seed: Seed of the random start of the SVD.
        allow: unrelated: extract even if TUNED does not look like a fine-tune of BASE.

    Raises:
        InputError: the models do not belong together, are equal, have an unsupported quantization, or hold nan. Nothing
            is written then.
    """

    work: ClassVar[str] = "extract.command.run_extract"

    base: StrPath
    tuned: StrPath
    out: Annotated[StrPath | None, output("adapter")] = None
    _: KW_ONLY
    rank: Annotated[Positive | None, Opt("Rank and method", "N", "8", letter="-r")] = None
    energy: calls.Energy = None
    params: calls.Params = None
    size: calls.Bytes = None
    rank_rule: calls.RankRule = None
    max_rank: calls.MaxRank = None
    imatrix: calls.Imatrix = None
    embed: Annotated[Literal["lora", "full", "skip"], one_of(EMBED_CHOICES), Opt("Which modules")] = "lora"
    certify: Annotated[bool, Opt("Rank and method")] = False
    bias: Annotated[bool, Opt("Which modules")] = True
    to: Annotated[
        Annotated[ScaledFormat, one_of(extract_formats())] | None,
        Opt("Output", default="by BASE", text="Format to write. {meanings}.", meanings=titles_of(extract_formats())),
    ] = None
    architecture: calls.Architecture = None
    dtype: calls.FactorDtype = "fp32"
    seed: calls.Seed = 0
    allow: Annotated[
        Literal["unrelated"] | Sequence[Literal["unrelated"]], words_of(["unrelated"]), Opt("About the inputs")
    ] = ()
    target: calls.Target = ()
    exclude: calls.Exclude = ()
    layers: calls.OfLayers = None
    digest: calls.Digest = False
    card: calls.Card = True
    attest: calls.Attest = None
    force: calls.Force = False
    resume: calls.Resume = False
    dry_run: calls.DryRun = False
    device: calls.Device = "auto"
    progress: calls.Progress = None


extract = function_of(Extract)
