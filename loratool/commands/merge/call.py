"""The call of `merge`: its arguments, options and words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from ...binding.merge.choices import LOSSY, TIED, TOKENIZERS, WAYS
from .. import calls
from ..adapter_requests import Adapters
from ..arguments import Opt, Size, StrPath, Words, one_of, with_meanings, words_of
from ..calls import Call, function_of, output

if TYPE_CHECKING:
    from ...views.merge import MergeReport  # noqa: F401


@dataclass(frozen=True)
class Merge(Call["MergeReport"]):
    """Add adapters to a base model's weights and write the merged model.

    Args:
        base: A file, a folder, an index JSON, or the name of a model on the hub.
        adapters: One or several, each a path, (path, weight) or (path, weight, weights of an image model's components
            and of modules by pattern, like {"te": 0.4, "mlp": 0}, of which the last that matches a module wins), or all
            as {path: weight}; they are added in one pass and rounded once.
        max_shard_size: Split the output into shards of this size.
        architecture: The class that the output's config.json names.
        labels: The names of the labels of the output's head.
        quantized: What becomes of quantized weights that an adapter changes: {meanings}.
        like: Write the merge in the format of this quantized model of BASE, with scales of its own.
        allow: lossy: requantize to codes of fewer than 8 bits too, which keep next to nothing of a delta.
        tied: Where an adapter changes one side of a tied head and embedding: {meanings}.
        initial: A PiSSA-like adapter as it was before training, to be subtracted.
        residual_base: BASE is what a PiSSA-like adapter's initialization made of it.

    Raises:
        UsageError, InputError, NeedsFlag: before anything is written.
        MachineError: the machine failed. After this, an OSError or a MemoryError what is done stays beside the output,
            for `resume`; after all else nothing.
    """

    work: ClassVar[str] = "merge.command.run_merge"

    base: StrPath
    adapters: Annotated[Adapters, Opt(metavar="ADAPTER[:WEIGHT]...")]
    out: Annotated[StrPath | None, output("merged")] = None
    _: KW_ONLY
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
    initial: Annotated[StrPath | None, Opt("About the inputs", "ADAPTER")] = None
    residual_base: Annotated[bool, Opt("About the inputs")] = False
    quantized: Annotated[Literal["mixed", "dequantize", "requantize"], one_of(WAYS), Opt("Output")] = "mixed"
    like: Annotated[StrPath | None, Opt("Output", "QUANTIZED")] = None
    allow: Annotated[Literal["lossy"] | Sequence[Literal["lossy"]], words_of([LOSSY]), Opt("Output")] = ()
    tokenizer: Annotated[
        StrPath | None,
        Opt(
            "Output",
            "base|adapter|FOLDER",
            "the adapter's if it changes the vocabulary",
            text=f"Whose tokenizer and chat template the output gets: {with_meanings(TOKENIZERS)}; or a folder's.",
        ),
    ] = None
    undo: calls.Undo = True
    card: calls.Card = True
    device: calls.Device = "auto"
    progress: calls.Progress = None
    workers: calls.Workers = None


merge = function_of(Merge)
