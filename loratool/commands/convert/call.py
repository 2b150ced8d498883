"""The calls of `convert`, of adapters, models and metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from ...adapters.formats import FORMATS, written_formats
from ...architectures.runtimes.table import PROGRAMS
from ...files.dtypes import FACTOR_DTYPES
from ...files.output.output import CONTAINERS
from .. import calls
from ..arguments import WORDS_TYPE, AnyDtype, Opt, Positive, Size, StrPath, Words, dtype_of, one_of
from ..calls import Call, function_of
from ..choices import DENOISER_DROP_CHOICES, DROP_CHOICES, MODEL_DROP_CHOICES, QKV_LAYOUTS
from ..namings import MODEL_NAMINGS, ModelForm, ReadFormat, RuntimeName, WrittenFormat

if TYPE_CHECKING:
    from ...views.convert import ConvertReport  # noqa: F401
    from ...views.convert_model import CheckpointConvertReport  # noqa: F401
    from ...views.metadata import MetadataReport  # noqa: F401

DroppedOfModel = Literal["ema", "optimizer", "components"]

MODEL_DROPS = {**MODEL_DROP_CHOICES, **DENOISER_DROP_CHOICES}

OUT = Opt(
    "Output",
    "OUT",
    "converted, with a suffix if it is a file",
    "-o",
    "Where to write: a folder, or a file if OUT has a suffix like .safetensors.",
)

DROP = Opt("Which modules", text="Exclude parts of the input. {meanings}.")


@dataclass(frozen=True)
class Convert(Call["ConvertReport"]):
    """Convert an adapter to another format, or to what a program loads and applies in full.

    Args:
        source: The adapter: a folder or a file.
        to: Format to write, one of {words}. PEFT's is a folder, or a file by the suffix of `out`; others are files.
        from_format: Format of ADAPTER, one of {words}. Needed if it cannot be detected.
        enable_lora: The value of enable_lora in loralib's MergedLinear, for an adapter of loralib.
        plain: Write standard LoRA: no rsLoRA, no rank or alpha patterns, alpha = rank.
        initial: The adapter before training. With --plain or --for, it is subtracted from a PiSSA-like adapter.
        rank: With --plain or --for: truncate modules of a higher rank to this one. DoRA keeps its own rank by default.
        layout: How a language model's modules are stored. {meanings}.
        runtime: Write the adapter so that this program applies it in full. Use it instead of --to. One of {words}.
        base: The model under the adapter. Needed for DoRA with --plain, and for sizes with --layout and the
            formats gguf and mlx (its config.json is enough). With --to peft, modules get the names of its class. With
            --for, it is the served model, or the one that DoRA's magnitudes are for. It decides the family of an image
            model's adapter.
        rename: Rename a language model's modules first. OLD=NEW replaces the end of a path (wq=q_proj). A glob keeps
            what its wildcards match (h.*.attn=layers.*.self_attn). re:EXPRESSION has groups \\1, \\2.

    Raises:
        UsageError: `source` is a model (use `convert_model`), or two options contradict each other.
        NeedsFlag: the format cannot hold some modules; `exclude` would leave them out.
        InputError: no program could load the result. Nothing is written then.
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
    rank: Annotated[Positive | None, Opt("Rank and method", "N", letter="-r")] = None
    layout: Annotated[Annotated[Literal["split", "fused"], one_of(QKV_LAYOUTS)] | None, Opt("Output")] = None
    runtime: Annotated[Annotated[RuntimeName, one_of(PROGRAMS)] | None, Opt("Output", "RUNTIME")] = None
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
        Literal["keep", "fp32", "fp16", "bf16"] | AnyDtype,
        dtype_of(("keep", *FACTOR_DTYPES)),
        Opt(text="Dtype of the factors."),
    ] = "keep"
    alpha: calls.Alpha = None
    card: calls.Card = True
    digest: calls.Digest = False
    attest: calls.Attest = None
    force: calls.Force = False
    dry_run: calls.DryRun = False


@dataclass(frozen=True)
class ConvertModel(Call["CheckpointConvertReport"]):
    """Convert a model to other files, another dtype or other shards, or a denoiser to other names.

    Args:
        source: The model: a folder or a file.
        to: Files to write, one of {words}. diffusers and single-file are for denoisers. The default follows the suffix
            of `out`, else it is safetensors.
        max_shard_size: Split a checkpoint into shards of at most this size.
        tokenizer: Copy the tokenizer from this folder. Needed for a GGUF model, if you want to load the output.

    Raises:
        UsageError, InputError, NeedsFlag: the request is not possible. Nothing is written then.
        InputError: a number becomes infinite in the new dtype. What was written is removed.
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
    digest: calls.Digest = False
    attest: calls.Attest = None
    force: calls.Force = False
    resume: calls.Resume = False
    dry_run: calls.DryRun = False
    progress: calls.Progress = None
    workers: calls.Workers = None


@dataclass(frozen=True)
class EditMetadata(Call["MetadataReport"]):
    """Edit the metadata of a safetensors file. The tensors are copied byte for byte.

    Args:
        source: The file.
        set: Set a key of a safetensors file's metadata. The tensors are copied byte for byte.
        unset: Remove a key of a safetensors file's metadata.

    Raises:
        UsageError: a key does not exist or describes the tensors, or `out` is not a file.
        InputError: the source is not a single safetensors file.
    """

    work: ClassVar[str] = "convert.metadata.run_edit_metadata"

    source: StrPath
    out: Annotated[StrPath | None, OUT] = None
    _: KW_ONLY
    set: Annotated[Mapping[str, str] | None, Opt("Output", "KEY=VALUE")] = None
    unset: Annotated[Words, Opt("Output", "KEY")] = ()
    digest: calls.Digest = False
    attest: calls.Attest = None
    force: calls.Force = False
    dry_run: calls.DryRun = False
    progress: calls.Progress = None


convert = function_of(Convert)

convert_model = function_of(ConvertModel)

edit_metadata = function_of(EditMetadata)
