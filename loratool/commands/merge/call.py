"""The call of `merge`: its arguments, options and words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from ...binding.merge.choices import TIED, TOKENIZERS, WAYS
from .. import calls
from ..adapter_requests import Adapters
from ..arguments import Opt, Size, StrPath, Words, one_of, words_of
from ..calls import Call, function_of, output
from ..choices import MERGE_ALLOW

if TYPE_CHECKING:
    from ...views.merge import MergeReport  # noqa: F401


@dataclass(frozen=True)
class Merge(Call["MergeReport"]):
    """Add adapters to a base model's weights and write the merged model.

    Args:
        base: The model: a file, a folder, an index JSON, or a repo id on the hub.
        adapters: One adapter or several: a path, (path, weight), (path, weight, weights of parts), a list of these, or
            {path: weight}. Weights of parts are by component of an image model or by module pattern, like
            {"te": 0.4, "mlp": 0}; the last match wins. All adapters are added in one pass and rounded once.
        max_shard_size: Split the output into shards of at most this size.
        architecture: Class to name in the output's config.json.
        labels: Label names of the output's head.
        quantized: What to do with quantized weights that an adapter changes. {meanings}.
        like: Quantize the output like this quantized version of BASE, with new scales.
        allow: Allow what would be refused. {meanings}.
        tied: What to do if an adapter changes only one side of a tied head and embedding. {meanings}.
        initial: The adapter before training, to be subtracted. Needed to merge a PiSSA-like adapter into the original
            base.
        replace: Replace these adapters of an earlier merge, with their weights: BASE is the merged model with its undo
            file. The output is that of a merge into the base, which is not needed.
        residual_base: BASE is the residual of a PiSSA-like initialization, not the original model.

    Raises:
        UsageError, InputError, NeedsFlag: the request is not possible. Nothing is written then.
        MachineError: the machine failed. After this error, an OSError or a MemoryError, the finished part stays beside
            the output for `resume`. After other errors nothing stays.
    """

    work: ClassVar[str] = "merge.command.run_merge"
    work_in_place: ClassVar[str] = "merge.in_place.merge_in_place"

    base: StrPath
    adapters: Annotated[Adapters, Opt(metavar="ADAPTER[:WEIGHT]...")]
    out: Annotated[StrPath | None, output("merged")] = None
    _: KW_ONLY
    in_place: calls.InPlace = False
    by: calls.By = None
    force: calls.Force = False
    resume: calls.Resume = False
    dry_run: calls.DryRun = False
    dtype: calls.MergeDtype = "keep"
    max_shard_size: Annotated[Size | None, Opt("Output", "5GB", "the base's shards")] = None
    target: calls.Target = ()
    exclude: calls.Exclude = ()
    layers: calls.OfLayers = None
    drop: calls.Drop = ()
    alpha: calls.Alpha = None
    tied: Annotated[Literal["untie", "share", "refuse"], one_of(TIED), Opt("About the inputs")] = "untie"
    architecture: Annotated[str | None, Opt("Output", "CLASS", "by the adapter's head or task, or the base's")] = None
    labels: Annotated[Words, Opt("Output", "A,B,...", "the adapter's, or LABEL_0, LABEL_1, ...", commas=True)] = ()
    replace: Annotated[Adapters | None, Opt("About the inputs", "ADAPTER[:WEIGHT]")] = None
    initial: Annotated[StrPath | None, Opt("About the inputs", "ADAPTER")] = None
    residual_base: Annotated[bool, Opt("About the inputs")] = False
    quantized: Annotated[Literal["mixed", "dequantize", "requantize"], one_of(WAYS), Opt("Output")] = "mixed"
    like: Annotated[StrPath | None, Opt("Output", "QUANTIZED")] = None
    allow: Annotated[
        Literal["lossy", "widen", "open-files"] | Sequence[Literal["lossy", "widen", "open-files"]],
        words_of(MERGE_ALLOW),
        Opt("Output"),
    ] = ()
    tokenizer: Annotated[
        StrPath | None,
        Opt(
            "Output",
            "base|adapter|FOLDER",
            "the adapter's if it changes the vocabulary",
            text="Which tokenizer and chat template to write. {meanings}.",
            meanings={**TOKENIZERS, "FOLDER": "those of a folder"},
        ),
    ] = None
    undo: calls.Undo = True
    digest: calls.Digest = False
    card: calls.Card = True
    attest: calls.Attest = None
    device: calls.Device = "auto"
    progress: calls.Progress = None
    workers: calls.Workers = None


merge = function_of(Merge)
