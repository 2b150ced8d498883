"""The calls of `convert`, of adapters, models and metadata, and of `inspect --for`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from ...adapters.formats import FORMATS, written_formats
from ...architectures.runtimes.table import RUNTIMES
from ...files.dtypes import FACTOR_DTYPES
from ...files.output.output import CONTAINERS
from .. import calls
from ..arguments import WORDS_TYPE, Opt, Positive, Size, StrPath, Words, dtype_of, one_of
from ..calls import Call, function_of
from ..choices import DENOISER_DROP_CHOICES, DROP_CHOICES, MODEL_DROP_CHOICES, QKV_LAYOUTS
from ..namings import MODEL_NAMINGS, ModelForm, ReadFormat, RuntimeName, WrittenFormat

if TYPE_CHECKING:
    from ...views.convert import ConvertReport  # noqa: F401
    from ...views.convert_model import CheckpointConvertReport  # noqa: F401
    from ...views.inspect_runtime import RuntimeInspection  # noqa: F401
    from ...views.metadata import MetadataReport  # noqa: F401

DroppedOfModel = Literal["ema", "optimizer", "components"]

MODEL_DROPS = {**MODEL_DROP_CHOICES, **DENOISER_DROP_CHOICES}

OUT = Opt("Output", "OUT", "converted, with that ending where it is a file", "-o", "A folder, or a file by its ending.")

DROP = Opt("Which modules", text="Leave out {meanings}.")


@dataclass(frozen=True)
class Convert(Call["ConvertReport"]):
    """Write an adapter in another format, or as a program loads it and applies it in full.

    Args:
        source: The adapter: a folder or a file.
        to: One of {words}: of PEFT's the output is a folder, or a file by its ending; of others a file.
        from_format: Format of ADAPTER, one of {words}.
        enable_lora: `enable_lora` of loralib's MergedLinear.
        plain: Standard LoRA: no rsLoRA, no patterns, alpha = rank everywhere.
        initial: With --plain or --for: what a PiSSA-like start was, which is subtracted.
        rank: With --plain or --for: truncated to this rank (a smaller one stays), DoRA to its own without.
        layout: A language model with {meanings}.
        runtime: Instead of --to: a language model's adapter as a program loads it and applies it in full, one of
            {words}.
        base: The model: with --to peft, for the names of its class; with --to gguf or mlx or from there, and with
            --layout, where sizes are to be told (its config.json will do); with --plain, for DoRA; with --for, the
            model that is served. Of an image model's adapter: the model, which decides the family.
        rename: Give a language model's modules other paths first: the end of a path is replaced (wq=q_proj); of a glob
            each wildcard is the same in the new path (h.*.attn=layers.*.self_attn); of re:EXPRESSION, groups are \\1,
            \\2.

    Raises:
        UsageError: `source` is a model (`convert_model`), or an option contradicts another.
        NeedsFlag: modules can only be left out.
        InputError: nothing could load the result. Nothing is written then.
    """

    work: ClassVar[str] = "convert.adapter.run_convert"

    source: Annotated[StrPath, Opt(metavar="ADAPTER|CHECKPOINT")]
    out: Annotated[StrPath | None, OUT] = None
    _: KW_ONLY
    to: Annotated[WrittenFormat, one_of(written_formats())] | None = None
    from_format: Annotated[
        Annotated[ReadFormat, one_of(FORMATS)] | None, Opt("About the inputs", "FORMAT", "detected")
    ] = None
    enable_lora: Annotated[Sequence[bool], Opt("About the inputs", "1,0,1")] = ()
    plain: Annotated[bool, Opt("Output")] = False
    initial: Annotated[StrPath | None, Opt("About the inputs", "ADAPTER")] = None
    rank: Annotated[Positive | None, Opt("Rank and method", "N")] = None
    layout: Annotated[Annotated[Literal["split", "fused"], one_of(QKV_LAYOUTS)] | None, Opt("Output")] = None
    runtime: Annotated[Annotated[RuntimeName, one_of(RUNTIMES)] | None, Opt("Output", "RUNTIME")] = None
    base: Annotated[StrPath | None, Opt("About the inputs", "BASE")] = None
    architecture: calls.Architecture = None
    rename: Annotated[Words, Opt("Output", "PATTERN=PATH")] = ()
    exclude: calls.Exclude = ()
    drop: Annotated[
        calls.Dropped | Sequence[calls.Dropped],
        replace(WORDS_TYPE, choices=tuple(DROP_CHOICES), meanings=DROP_CHOICES),
        DROP,
    ] = ()
    dtype: Annotated[
        Literal["keep", "fp32", "fp16", "bf16"], dtype_of(("keep", *FACTOR_DTYPES)), Opt(text="Dtype of the factors.")
    ] = "keep"
    alpha: calls.Alpha = None
    card: calls.Card = True
    force: calls.Force = False
    dry_run: calls.DryRun = False


@dataclass(frozen=True)
class ConvertModel(Call["CheckpointConvertReport"]):
    """Write a model in another container, type or number of shards, or a denoiser under other names.

    Args:
        source: The model: a folder or a file.
        to: One of {words}: safetensors or torch; of a denoiser diffusers or single-file; by default the container that
            the suffix of `out` tells, else safetensors.
        max_shard_size: Split a checkpoint into shards of this size.
        tokenizer: Of a GGUF model: where the tokenizer's files are, which are copied.

    Raises:
        UsageError, InputError, NeedsFlag: before anything is written.
        InputError: a number would become infinite. What was written is removed.
    """

    work: ClassVar[str] = "convert.checkpoint.run_convert_model"

    source: StrPath
    out: Annotated[StrPath | None, OUT] = None
    _: KW_ONLY
    to: Annotated[ModelForm, one_of((*CONTAINERS, *MODEL_NAMINGS))] | None = None
    max_shard_size: Annotated[Size | None, Opt("Output", "5GB", "its own shards")] = None
    tokenizer: Annotated[StrPath | None, Opt("Output", "FOLDER")] = None
    drop: Annotated[
        DroppedOfModel | Sequence[DroppedOfModel],
        replace(WORDS_TYPE, choices=tuple(MODEL_DROPS), meanings=MODEL_DROPS),
        DROP,
    ] = ()
    dtype: calls.MergeDtype = "keep"
    force: calls.Force = False
    resume: calls.Resume = False
    dry_run: calls.DryRun = False
    progress: calls.Progress = None
    workers: calls.Workers = None


@dataclass(frozen=True)
class EditMetadata(Call["MetadataReport"]):
    """Write a safetensors file with other metadata; all else stays, byte for byte.

    Args:
        source: The file.
        set: Set a key of a safetensors file's metadata; all else stays, byte for byte.
        unset: Remove a key of its metadata, in the same way.

    Raises:
        UsageError: a key says what the tensors mean, or is not there; or `out` is no file.
        InputError: the source is no single safetensors file.
    """

    work: ClassVar[str] = "convert.metadata.run_edit_metadata"

    source: StrPath
    out: Annotated[StrPath | None, OUT] = None
    _: KW_ONLY
    set: Annotated[Mapping[str, str] | None, Opt("Output", "KEY=VALUE")] = None
    unset: Annotated[Words, Opt("Output", "KEY")] = ()
    force: calls.Force = False
    dry_run: calls.DryRun = False
    progress: calls.Progress = None


@dataclass(frozen=True)
class InspectFor(Call["RuntimeInspection"]):
    """Report from headers what a runtime does with an adapter.

    Args:
        path: The adapter: a folder or a file.
        runtime: What a program would ignore, misread or refuse of an adapter, one of {words}; exit with 1 if it is
            anything.
        base: The model that is served; without one, names and what depends on its class are not compared.

    Raises:
        InputError: the files cannot be read, or the runtime is not known to serve the class of the base with adapters.
        UsageError: there is no such runtime.
    """

    work: ClassVar[str] = "convert.inspect_runtime.run_inspect_for"

    path: StrPath
    _: KW_ONLY
    runtime: Annotated[RuntimeName, one_of(RUNTIMES), Opt("Checks", "RUNTIME")]
    base: StrPath | None = None
    alpha: calls.Alpha = None


convert = function_of(Convert)

convert_model = function_of(ConvertModel)

edit_metadata = function_of(EditMetadata)

inspect_for = function_of(InspectFor)
