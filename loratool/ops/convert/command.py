"""Run `convert`: an adapter in another format, or a checkpoint in another container, as the files tell.

Each tensor of an adapter is converted exactly, or its error is reported, or it is refused by name. `plan` plans the
output, and its tensors are made one by one; `checkpoint` converts whole models.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal, overload

from ...adapters.adapter import Adapter
from ...adapters.formats import FORMATS, AdapterFormat, holds_adapter, loaded_by, open_adapter, written_formats
from ...adapters.image_metadata import about_training, former_metadata
from ...adapters.stacked import FACTOR_TORCH_DTYPES as DTYPES
from ...architectures.runtimes.runtime import Runtime
from ...architectures.runtimes.table import RUNTIMES
from ...binding.selection import Selection, parse_patterns
from ...errors import InputError, NeedsFlag, UsageError
from ...files.checkpoint import read_config
from ...files.dtypes import MERGE_DTYPES
from ...files.model_card import code, shown_name
from ...files.output import CONTAINERS, naming_output
from ...files.output_paths import check_output_path
from ...files.weights_file import paths_of
from ...reports.report import WritingReport
from ...reports.writing import command_line
from ...streaming.ranks import current_job
from ...streaming.workers import Progress, one_thread
from ...transform.lazy import start
from ...transform.output import content, left_out, rows
from ...transform.plan import plan_convert
from ...transform.rename import new_paths
from ...transform.request import ConvertRequest
from ...transform.rows import ModuleConvert
from ..arguments import (
    Patterns,
    Positive,
    Size,
    StrPath,
    Words,
    checked,
    current_call,
    dtype_of,
    one_of,
    option_word,
    parse_size,
    parse_words,
)
from ..cards import adapter_card, error_share, input_word, options_of, source_facts
from ..choices import QKV_LAYOUTS
from ..inputs import given_base, leave_out, open_base, open_initial, refuse_own_names, without_base_option
from ..machine import require_ieee
from ..namings import MODEL_NAMINGS
from . import modelfile
from .checkpoint import WRITTEN, CheckpointConvertReport, CheckpointOptions, convert_checkpoint
from .metadata import MetadataReport, edit_file

# Those of WRITTEN, and of MODEL_NAMINGS the one that no format of adapters has
Container = Literal["safetensors", "torch", "single-file"]


CONVERT_DTYPES = {"keep": None, **DTYPES}


@dataclass(frozen=True)
class ConvertReport(WritingReport):
    """The result of `convert` of an adapter. family: a key of FAMILIES, None for a language model; dropped: modules and
    extras left out; notes: what the output cannot say; runtime: a key of RUNTIMES, where it is written for one;
    warnings: of changes of which a large part is lost.
    """

    shown_by: ClassVar[str] = "document.convert_document"
    rows: ClassVar[str] = "modules"

    adapter: str
    source_format: str
    out: str
    to: str
    family: str | None
    dry_run: bool
    modules: tuple[ModuleConvert, ...]
    dropped: tuple[str, ...]
    parameters: int
    nbytes: int
    notes: tuple[str, ...] = ()
    runtime: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdapterOptions:
    """The options of `convert` that are for adapters only."""

    from_format: str | None  # a key of FORMATS; None detects it
    exclude: tuple[str, ...]  # patterns of modules to leave out
    alpha: float | None  # of a file that has none
    enable_lora: tuple[bool, ...]  # the slices of loralib's MergedLinear that have an update
    plain: bool  # write standard LoRA, alpha being the rank everywhere
    initial: str | os.PathLike[str] | None  # the adapter before training, which is subtracted
    rank: int | None  # truncate to this rank
    layout: str | None  # a key of QKV_LAYOUTS
    base: str | os.PathLike[str] | None  # the model, for names, for the sizes of fused modules and for DoRA
    architecture: str | None  # the class of the base whose names the modules get
    runtime: str | None  # a key of RUNTIMES
    rename: tuple[str, ...]  # `PATTERN=PATH` of modules' paths

    def given(self) -> list[str]:
        """Return the names of the options that were given."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return [name for name, value in values.items() if not (value is None or value is False or value == ())]


@overload
def convert(
    source: StrPath,
    out: StrPath | None = None,
    *,
    to: AdapterFormat,
    from_format: str | None = None,
    exclude: Patterns = (),
    drop: Words = (),
    alpha: float | None = None,
    enable_lora: Sequence[bool] = (),
    plain: bool = False,
    initial: StrPath | None = None,
    rank: Positive | None = None,
    layout: str | None = None,
    base: StrPath | None = None,
    architecture: str | None = None,
    rename: Words = (),
    dtype: str = "keep",
    card: bool = True,
    force: bool = False,
    dry_run: bool = False,
) -> ConvertReport: ...


@overload
def convert(
    source: StrPath,
    out: StrPath | None = None,
    *,
    to: Container | None = None,
    drop: Words = (),
    dtype: str = "keep",
    max_shard_size: Size | None = None,
    tokenizer: StrPath | None = None,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    workers: Positive | None = None,
) -> CheckpointConvertReport: ...


@overload
def convert(
    source: StrPath,
    out: StrPath | None = None,
    *,
    to: str | None = None,
    dtype: str = "keep",
    max_shard_size: Size | None = None,
    tokenizer: StrPath | None = None,
    card: bool = True,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    workers: Positive | None = None,
    from_format: str | None = None,
    exclude: Patterns = (),
    drop: Words = (),
    alpha: float | None = None,
    enable_lora: Sequence[bool] = (),
    plain: bool = False,
    initial: StrPath | None = None,
    rank: Positive | None = None,
    layout: str | None = None,
    base: StrPath | None = None,
    architecture: str | None = None,
    runtime: str | None = None,
    rename: Words = (),
) -> ConvertReport | CheckpointConvertReport: ...


@overload
def convert(
    source: StrPath,
    out: StrPath | None = None,
    *,
    set: Mapping[str, str],
    unset: Words = (),
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MetadataReport: ...


@overload
def convert(
    source: StrPath,
    out: StrPath | None = None,
    *,
    unset: Words,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MetadataReport: ...


@checked
@require_ieee
def convert(
    source: StrPath,
    out: StrPath | None = None,
    *,
    to: Annotated[str, one_of((*written_formats(), *CONTAINERS, *MODEL_NAMINGS))] | None = None,
    dtype: Annotated[str, dtype_of(MERGE_DTYPES)] = "keep",
    max_shard_size: Size | None = None,
    tokenizer: StrPath | None = None,
    card: bool = True,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    workers: Positive | None = None,
    from_format: Annotated[str, one_of(FORMATS)] | None = None,
    exclude: Patterns = (),
    drop: Words = (),
    alpha: float | None = None,
    enable_lora: Sequence[bool] = (),
    plain: bool = False,
    initial: StrPath | None = None,
    rank: Positive | None = None,
    layout: Annotated[str, one_of(QKV_LAYOUTS)] | None = None,
    base: StrPath | None = None,
    architecture: str | None = None,
    runtime: Annotated[str, one_of(RUNTIMES)] | None = None,
    rename: Words = (),
    set: Mapping[str, str] | None = None,
    unset: Words = (),
) -> ConvertReport | CheckpointConvertReport | MetadataReport:
    """Write an adapter in another format, or a checkpoint in another container, dtype or shards.

    Which of both is done follows from the files of `source`, or from `to`.

    Args:
        to: of an adapter a key of `written_formats`: of PEFT's `out` is a folder, or a file by its
            ending; of the others it is a file. Of a checkpoint one of WRITTEN, safetensors by default; of an
            image model's denoiser a key of MODEL_NAMINGS as well: whose names its tensors get.
        dtype: of the factors a key of CONVERT_DTYPES, of a checkpoint a key of MERGE_DTYPES.
        max_shard_size: of a checkpoint: shards of at most this size, "5GB" or bytes; by default it keeps its own.
        tokenizer: of a GGUF model: the folder of which a tokenizer's files are copied.
        card: of an adapter: write README.md, a model card, into the output's folder.
        force: replace an output that exists.
        resume: of a checkpoint, go on where a run with the same inputs and options died, if one did.
        dry_run: check everything and write nothing.
        progress: of a checkpoint: called with the bytes done and the bytes in all.
        workers: of a checkpoint: threads that write; by default one for each core.
        from_format: a key of FORMATS; by default it is detected from the tensors' names.
        exclude: patterns of modules to leave out, which the target format may not hold.
        drop: what to leave out: of an adapter keys of DROP_CHOICES, of a checkpoint keys of MODEL_DROP_CHOICES,
            and of DENOISER_DROP_CHOICES where a denoiser's tensors get other names.
        alpha: for an adapter file without an alpha.
        enable_lora: the slices of loralib's MergedLinear that have an update.
        plain: write standard LoRA, alpha being the rank everywhere.
        initial: with `plain`: the adapter before training, which is subtracted exactly, at twice the rank.
        rank: with `plain`: truncate to this rank, which raises none; DoRA is truncated to its own without it.
        layout: a key of QKV_LAYOUTS, of a language model's fused modules.
        base: the model: with `layout` for the modules' sizes (its config.json will do), with `plain` for DoRA, and for
            the family of an image model that the modules do not tell. Otherwise, for a language model and PEFT's
            format, the modules get the names of the class that PEFT wraps.
        architecture: of an image model's adapter: a key of FAMILIES, if the modules do not tell it. Of a language
            model's, with `base`: that class, if it is not config.json's.
        runtime: instead of `to` a key of RUNTIMES: what is written is what that program loads and applies in full. With
            it, `rank`, `initial` and `base` are for all of its steps.
        rename: `PATTERN=PATH` of the modules' paths, applied in order before all else (`rename_modules`); the
            patterns of `exclude` are then of the new paths.
        set, unset: values of keys, and keys, of a safetensors file's metadata, which alone is another in the output.

    Raises:
        UsageError: an option is for the other kind of input, or contradicts another.
        NeedsFlag: modules can only be left out.
        InputError: nothing could load the result. Nothing is written then.
    """
    if set or unset:
        _refuse_others(source)
        current_job().leave()
        return edit_file(source, out, set or {}, parse_words(unset), force, dry_run, progress)
    options = AdapterOptions(
        from_format=from_format,
        exclude=parse_patterns(exclude),
        alpha=alpha,
        enable_lora=tuple(enable_lora),
        plain=plain,
        initial=initial,
        rank=rank,
        layout=layout,
        base=base,
        architecture=architecture,
        runtime=runtime,
        rename=parse_words(rename),
    )
    given = options.given()
    if runtime is not None:
        to = _format_for(runtime, to, options)
    is_one = bool(from_format) or holds_adapter(source)
    if runtime is not None and not is_one:
        raise UsageError("--for is for adapters, and this is a checkpoint", culprit=os.fspath(source))
    if is_one or (to in written_formats() and to not in (*MODEL_NAMINGS, *CONTAINERS)):
        of_checkpoints = {"tokenizer": tokenizer, "max-shard-size": max_shard_size, "resume": resume or None}
        for word, value in of_checkpoints.items():
            if value is not None:
                raise UsageError(f"--{word} is for checkpoints, not for adapters", culprit=os.fspath(source))
        if to not in written_formats():
            what = "needs --to, one" if to is None else f"{to!r} is none"
            message = f"is an adapter, and {what} of {', '.join(written_formats())}"
            remedy = "name the format, as --to peft; for a program that serves it: --for, as --for vllm"
            raise UsageError(message, culprit=os.fspath(source), remedy=remedy)
        current_job().leave()
        is_bare = base is not None and not read_config(base)
        if base is not None and is_bare and Path(base).name != "config.json":
            with ExitStack() as opened:
                refuse_own_names(open_base(base, "--base is the model under it", opened))
        try:
            with without_base_option(base) if is_bare else nullcontext(), one_thread():
                return _convert_adapter(source, out, to, dtype, options, parse_words(drop), force, dry_run)
        except InputError as error:
            if not is_one:
                error.remedy = f"as a checkpoint it can become {' or '.join(WRITTEN)}"
            raise
    if not card:
        given.append("no_card")
    if given:
        raise UsageError(
            f"--{option_word(given[0])} is for adapters, and this is a checkpoint", culprit=os.fspath(source)
        )
    checkpoint_options = CheckpointOptions(
        dtype, parse_size(max_shard_size), parse_words(drop), force, dry_run, tokenizer, resume
    )
    return convert_checkpoint(source, out, to, checkpoint_options, progress, workers)


def _refuse_others(source: str | os.PathLike[str]) -> None:
    """Raise UsageError for an option that converts, where metadata is edited."""
    for name, value in current_call().options.items():
        if name not in ("set", "unset", "force", "dry_run", "progress", "workers"):
            message = f"--{option_word(name, value is not False)} converts, and --set and --unset edit a file as it is"
            raise UsageError(message, culprit=os.fspath(source), remedy="do one after the other")


def _format_for(runtime: str, to: str | None, options: AdapterOptions) -> str:
    """Return the format that a runtime reads; raise UsageError for options that exclude it."""
    if to is not None:
        raise UsageError("--for says the format that its runtime reads, and --to another")
    for option in ("layout", "architecture"):
        if option in options.given():
            raise UsageError(f"--{option} and --for exclude each other: a runtime says what it reads")
    return loaded_by(runtime).key


def _convert_adapter(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    to: str,
    dtype: str,
    options: AdapterOptions,
    drop: tuple[str, ...],
    force: bool,
    dry_run: bool,
) -> ConvertReport:
    """Check the options against each other, and write the adapter in the format `to`."""
    if dtype not in CONVERT_DTYPES:
        raise UsageError(f"dtype {dtype!r} is none of {', '.join(CONVERT_DTYPES)}")
    if (options.initial is not None or options.rank is not None) and not (options.plain or options.runtime):
        raise UsageError("--initial and --rank are for --plain and --for")
    if options.layout is not None and options.plain:
        raise UsageError("--layout and --plain are two conversions: one after the other")
    with ExitStack() as opened, _whole_base(options):
        base = None if options.base is None else given_base(options.base, opened)
        model = base.config if base else None
        source = open_adapter(adapter, options.alpha, False, options.from_format, options.enable_lora, model)
        opened.callback(source.file.close)
        (source,) = leave_out([source], drop)
        if to != source.format:  # before --rename and --exclude, which go by these names
            source = FORMATS[source.format].in_other_names(source)
        runtime = RUNTIMES.get(options.runtime or "")
        path, is_file = _served_output(runtime, out) if runtime else FORMATS[to].output(out, "converted")
        read = [*paths_of([source.file]), *_files_beside(options)]
        exists = check_output_path(path, is_file, read, force, dry_run=dry_run)
        named = new_paths(source.updates, options.rename).values()
        Selection(options.exclude).require_used([*named], source.name, "--exclude")
        request = ConvertRequest(
            to=to,
            exclude=options.exclude,
            dtype=CONVERT_DTYPES[dtype],
            plain=options.plain,
            initial=None if options.initial is None else partial(open_initial, initial=options.initial, opened=opened),
            rank=options.rank,
            layout=options.layout,
            base=base,
            architecture=options.architecture,
            runtime=options.runtime,
            rename=options.rename,
        )
        made = plan_convert(start(source), request, path.absolute().parent, opened)
        written, modules = content(made, request.model), rows(made)
        lost = (*source.left_out, *left_out(source, made))
        if not dry_run:
            opened.enter_context(naming_output(path))
            call = current_call()
            words = (input_word(adapter), *options_of(call))
            make = partial(_card, source, words, to, modules, lost) if call.options.get("card", True) else None
            said = about_training(former_metadata(source.file.metadata or {}, options.rank is not None))
            carded = replace(written, metadata={**said, **written.metadata}, card=make)
            if runtime and runtime.modelfile:
                modelfile.write(path, carded, to, source)
            else:
                FORMATS[to].write(path, is_file, carded, [source.file])
        specs = FORMATS[to].as_file(written).specs.values()
        return ConvertReport(
            adapter=source.name,
            source_format=source.format,
            out=str(path),
            to=to,
            family=made.family,
            dry_run=dry_run,
            modules=modules,
            dropped=lost,
            parameters=sum(spec.size for spec in specs),
            nbytes=sum(spec.nbytes for spec in specs),
            notes=(*source.notes, *made.notes),
            runtime=request.runtime,
            warnings=made.warnings,
            exists=exists,
        )


def _card(
    source: Adapter, words: Sequence[str], to: str, modules: Sequence[ModuleConvert], left_out: Sequence[str]
) -> bytes:
    """Return the output's model card; `words` are those of its command."""
    how = [f"{count} {word}" for word, count in Counter(module.how for module in modules).items()]
    worst = max((module.error for module in modules), default=0.0)
    change = f", which changes none by more than {error_share(worst)} of its size" if worst else ", the same to the bit"
    facts = [*source_facts([(source, f"the adapter in {source.format}'s format")])]
    facts += [f"{len(modules)} modules, {', '.join(how)}{change}"]
    commands = (command_line("convert", *words, "-o", "converted"), command_line("inspect", "converted", "--strict"))
    title = f"{code(shown_name(source.name))} in {to}'s format"
    return adapter_card(title, to, [source], facts, commands, left_out)


def _served_output(runtime: Runtime, out: str | os.PathLike[str] | None) -> tuple[Path, bool]:
    """Return the path of an output that a runtime loads, and whether it is a file; raise UsageError for the other."""
    to = loaded_by(runtime.key)
    if not runtime.modelfile and not to.can.folder:
        return to.output(out, "converted")
    path = Path("converted" if out is None else out)
    if any(path.suffix in endings for endings in CONTAINERS.values()):
        message = f"would be a file, and {runtime.title} needs more beside the factors"
        raise UsageError(message, culprit=str(path), remedy="name a folder")
    return (path, False) if runtime.modelfile else to.output(path, "converted")


@contextmanager
def _whole_base(options: AdapterOptions) -> Iterator[None]:
    """Ask for all of the base where a runtime is served it: its config.json, which names alone need, will not do."""
    try:
        yield
    except NeedsFlag as error:
        if options.runtime and (error.remedy or "").startswith("add --base BASE"):
            error.remedy = "add --base BASE with the model that is served"
        raise


def _files_beside(options: AdapterOptions) -> Iterator[Path]:
    """Yield what is read beside the adapter itself: files, folders and the files in them."""
    for given in (options.base, options.initial):
        if given is not None and os.path.exists(given):
            yield Path(given)
            yield from (path for path in Path(given).glob("*") if path.is_file())
