"""Run `convert`: an adapter in another format, or a checkpoint in another container, as the files tell.

Each tensor of an adapter is converted exactly, or its error is reported, or it is refused by name. `image`, `language`
and `plain` plan the output, and its tensors are made one by one; `checkpoint` converts whole models.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, overload

from ...adapters.adapter import Adapter
from ...adapters.formats import FORMATS, AdapterFormat, holds_adapter, loaded_by, open_adapter, written_formats
from ...adapters.formats.peft import Peft, virtual_adapter
from ...adapters.formats.peft_config import base_mutating_init_of
from ...adapters.stacked import FACTOR_TORCH_DTYPES as DTYPES
from ...adapters.updates.dora import DoRA
from ...architectures.families import FAMILIES
from ...architectures.families.table import DENOISERS
from ...architectures.runtimes.table import RUNTIMES
from ...binding.selection import Selection
from ...errors import InputError, NeedsFlag, UsageError
from ...files.checkpoint import read_config
from ...files.output import CONTAINERS, check_output_path, naming_output
from ...files.weights_file import paths_of
from ...streaming.workers import Progress
from ..choices import MODEL_NAMINGS, QKV_LAYOUTS
from ..inputs import leave_out, without_base_option
from ..machine import require_ieee
from . import modelfile
from .as_low_rank import AsLowRank, as_low_rank
from .checkpoint import WRITTEN, CheckpointConvertReport, CheckpointOptions, convert_checkpoint
from .dora_to_lora import without_dora
from .factors import NO_LOSS
from .for_runtime import plan_for_runtime, prepare_for_runtime
from .image import ImageAdapter, plan_image
from .image_base import choose_family, without_files
from .language import plan_language
from .plain import plan_plain
from .rename import new_paths, rename_modules
from .request import ADD_INITIAL, AdapterOutput, ConvertRequest, ModuleConvert, low_rank_modules, select_updates
from .source_modules import KNOWN, detect_families, may_be_of_another, read_source_modules, refuse_unknown_blocks
from .subtract_initial import subtract_init
from .to_class import plan_class_names
from .to_gguf import keep_errors, plan_gguf

# Those of WRITTEN, and of MODEL_NAMINGS the one that no format of adapters has
Container = Literal["safetensors", "torch", "single-file"]


CONVERT_DTYPES = {"keep": None, **DTYPES}


NAMED_INITS = ("pissa", "olora")  # the inits that their name describes; others need a config beside it


@dataclass(frozen=True)
class ConvertReport:
    """The result of `convert` of an adapter. family: a key of FAMILIES, None for a language model; dropped: modules and
    extras left out; notes: what the output cannot say; runtime: a key of RUNTIMES, where it is written for one.
    """

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
    rename: tuple[str, ...]  # `PATTERN=REPLACEMENT` of modules' paths

    def given(self) -> list[str]:
        """Return the names of the options that were given."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return [name for name, value in values.items() if not (value is None or value is False or value == ())]


@overload
def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    to: AdapterFormat,
    from_format: str | None = None,
    exclude: Sequence[str] = (),
    drop: Sequence[str] = (),
    alpha: float | None = None,
    enable_lora: Sequence[bool] = (),
    plain: bool = False,
    initial: str | os.PathLike[str] | None = None,
    rank: int | None = None,
    layout: str | None = None,
    base: str | os.PathLike[str] | None = None,
    architecture: str | None = None,
    rename: Sequence[str] = (),
    dtype: str = "keep",
    force: bool = False,
    dry_run: bool = False,
) -> ConvertReport: ...


@overload
def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    to: Container | None = None,
    drop: Sequence[str] = (),
    dtype: str = "keep",
    max_shard_bytes: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    workers: int | None = None,
) -> CheckpointConvertReport: ...


@overload
def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    to: str | None = None,
    dtype: str = "keep",
    max_shard_bytes: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    workers: int | None = None,
    from_format: str | None = None,
    exclude: Sequence[str] = (),
    drop: Sequence[str] = (),
    alpha: float | None = None,
    enable_lora: Sequence[bool] = (),
    plain: bool = False,
    initial: str | os.PathLike[str] | None = None,
    rank: int | None = None,
    layout: str | None = None,
    base: str | os.PathLike[str] | None = None,
    architecture: str | None = None,
    runtime: str | None = None,
    rename: Sequence[str] = (),
) -> ConvertReport | CheckpointConvertReport: ...


@require_ieee
def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    to: str | None = None,
    dtype: str = "keep",
    max_shard_bytes: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    workers: int | None = None,
    from_format: str | None = None,
    exclude: Sequence[str] = (),
    drop: Sequence[str] = (),
    alpha: float | None = None,
    enable_lora: Sequence[bool] = (),
    plain: bool = False,
    initial: str | os.PathLike[str] | None = None,
    rank: int | None = None,
    layout: str | None = None,
    base: str | os.PathLike[str] | None = None,
    architecture: str | None = None,
    runtime: str | None = None,
    rename: Sequence[str] = (),
) -> ConvertReport | CheckpointConvertReport:
    """Write an adapter in another format, or a checkpoint in another container, dtype or shards.

    Which of both is done follows from the files of `source`, or from `to`.

    Args:
        to: of an adapter a key of `written_formats`: of PEFT's `out` is a folder, or a file by its
            ending; of the others it is a file. Of a checkpoint one of WRITTEN, safetensors by default; of an
            image model's denoiser a key of MODEL_NAMINGS as well: whose names its tensors get.
        dtype: of the factors a key of CONVERT_DTYPES, of a checkpoint a key of MERGE_DTYPES.
        max_shard_bytes: of a checkpoint: split it into shards of at most this size; by default it keeps its own.
        tokenizer: of a GGUF model: the folder of which a tokenizer's files are copied.
        force: replace an output that exists.
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
        rank: with `plain`: truncate to this rank; DoRA is truncated to its own without it.
        layout: a key of QKV_LAYOUTS, of a language model's fused modules.
        base: the model: with `layout` for the modules' sizes (its config.json will do), with `plain` for DoRA, and for
            the family of an image model that the modules do not tell. Otherwise, for a language model and PEFT's
            format, the modules get the names of the class that PEFT wraps.
        architecture: with `base`: that class, if it is not config.json's.
        runtime: instead of `to` a key of RUNTIMES: what is written is what that program loads and applies in full. With
            it, `rank`, `initial` and `base` are for all of its steps.
        rename: `PATTERN=REPLACEMENT` of the modules' paths, applied in order before all else (`rename_modules`); the
            patterns of `exclude` are then of the new paths.

    Raises:
        UsageError: an option is for the other kind of input, or contradicts another.
        NeedsFlag: modules can only be left out.
        InputError: nothing could load the result. Nothing is written then.
    """
    flags = tuple(exclude), alpha, tuple(enable_lora), plain, initial, rank, layout, base, architecture
    options = AdapterOptions(from_format, *flags, runtime, tuple(rename))
    given = options.given()
    if runtime is not None:
        to = _format_for(runtime, to, options)
    is_one = bool(from_format) or holds_adapter(source)
    if runtime is not None and not is_one:
        raise UsageError("--for is for adapters, and this is a checkpoint", culprit=os.fspath(source))
    if is_one or (to in written_formats() and to not in (*MODEL_NAMINGS, *CONTAINERS)):
        if tokenizer is not None:
            raise UsageError("--tokenizer is for checkpoints, not for adapters", culprit=os.fspath(source))
        if max_shard_bytes is not None:
            raise UsageError("--max-shard-size is for checkpoints, not for adapters", culprit=os.fspath(source))
        if to not in written_formats():
            what = "needs --to, one" if to is None else f"{to!r} is none"
            raise UsageError(f"is an adapter, and {what} of {', '.join(written_formats())}", culprit=os.fspath(source))
        is_bare = base is not None and not read_config(base)
        try:
            with without_base_option(base) if is_bare else nullcontext():
                return _convert_adapter(source, out, to, dtype, options, tuple(drop), force, dry_run)
        except InputError as error:
            if not is_one:
                error.remedy = f"as a checkpoint it can become {' or '.join(WRITTEN)}"
            raise
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise UsageError(f"{option} is for adapters, and this is a checkpoint", culprit=os.fspath(source))
    checkpoint_options = CheckpointOptions(dtype, max_shard_bytes, tuple(drop), force, dry_run, tokenizer)
    return convert_checkpoint(source, out, to, checkpoint_options, progress, workers)


def _format_for(runtime: str, to: str | None, options: AdapterOptions) -> str:
    """Return the format that a runtime reads; raise UsageError for options that exclude it."""
    if runtime not in RUNTIMES:
        raise UsageError(f"runtime {runtime!r} is none of {', '.join(RUNTIMES)}")
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
    if options.from_format is not None and options.from_format not in FORMATS:
        raise UsageError(f"format {options.from_format!r} is none of {', '.join(FORMATS)}")
    if (options.initial is not None or options.rank is not None) and not (options.plain or options.runtime):
        raise UsageError("--initial and --rank are for --plain and --for")
    if options.rank is not None and options.rank < 1:
        raise UsageError(f"rank {options.rank} is out of range")
    if options.layout is not None and options.layout not in QKV_LAYOUTS:
        raise UsageError(f"layout {options.layout!r} is none of {', '.join(QKV_LAYOUTS)}")
    if options.architecture is not None and options.base is None:
        raise NeedsFlag("--architecture is a class of the model", remedy="add --base BASE with the model")
    if options.layout is not None and options.plain:
        raise UsageError("--layout and --plain are two conversions: one after the other")
    with ExitStack() as opened:
        model = None if options.base is None else read_config(options.base)
        source = open_adapter(adapter, options.alpha, False, options.from_format, options.enable_lora, model)
        opened.callback(source.file.close)
        (source,) = leave_out([source], drop)
        left_out = source.left_out
        runtime = RUNTIMES.get(options.runtime or "")
        path, is_file = modelfile.output(out) if runtime and runtime.modelfile else FORMATS[to].output(out, "converted")
        check_output_path(path, is_file, [*paths_of([source.file]), *_files_beside(options)], force)
        named = new_paths(source.updates, options.rename).values()
        Selection(options.exclude).require_used([*named], source.name, "--exclude")
        request = ConvertRequest(
            to,
            options.exclude,
            CONVERT_DTYPES[dtype],
            options.plain,
            options.initial,
            options.rank,
            options.layout,
            options.base,
            options.architecture,
            options.runtime,
            options.rename,
        )
        made = plan_convert(source, request, path.absolute().parent, opened)
        if not dry_run:
            opened.enter_context(naming_output(path))
            if runtime and runtime.modelfile:
                modelfile.write(path, made.content, to, source)
            else:
                FORMATS[to].write(path, is_file, made.content, [source.file])
        specs = FORMATS[to].as_file(made.content).specs.values()
        size = sum(spec.size for spec in specs), sum(spec.nbytes for spec in specs)
        names, notes = (source.name, source.format, str(path), to, made.family, dry_run), (*source.notes, *made.notes)
        return ConvertReport(*names, made.modules, (*left_out, *made.dropped), *size, notes, request.runtime)


def _files_beside(options: AdapterOptions) -> Iterator[Path]:
    """Yield what is read beside the adapter itself: files, folders and the files in them."""
    for given in (options.base, options.initial):
        if given is not None and os.path.exists(given):
            yield Path(given)
            yield from (path for path in Path(given).glob("*") if path.is_file())


def plan_convert(
    source: Adapter, request: ConvertRequest, folder: Path, opened: ExitStack, family: str | None = None
) -> AdapterOutput:
    """Plan a conversion, from headers as far as possible.

    Args:
        folder: where temporary files are put; `opened` closes them.
        family: a key of FAMILIES, if other adapters tell it.

    Raises:
        NeedsFlag, InputError, UsageError: as `convert_adapter`.
    """
    if request.to != source.format:
        source = FORMATS[source.format].in_other_names(source)
    if request.rename:
        source, renamed = rename_modules(source, request.rename)
        made = plan_convert(source, replace(request, rename=()), folder, opened, family)
        return replace(made, modules=tuple(_before_renames(row, renamed) for row in made.modules))
    found = as_low_rank(source, request.exclude)
    made = _plan_low_rank(found, request, folder, opened, family)
    if not found.kinds:
        return made
    rows = tuple(
        replace(row, how="expanded") if row.how == "exact" and found.kinds.keys() & set(row.sources) else row
        for row in made.modules
    )
    return replace(made, modules=rows, notes=(*made.notes, *found.notes()))


def _before_renames(row: ModuleConvert, renamed: Mapping[str, ModuleConvert]) -> ModuleConvert:
    """Return the row with the names that its sources had, and with what stating their scales again lost."""
    former = [renamed[source] for source in row.sources if source in renamed]
    sources = tuple(name for each in former for name in each.sources) or row.sources
    error = math.hypot(row.error, max((each.error for each in former), default=0.0))
    return replace(row, sources=sources, error=error, how="rounded" if error and row.how == "exact" else row.how)


def _plan_low_rank(
    found: AsLowRank, request: ConvertRequest, folder: Path, opened: ExitStack, family: str | None
) -> AdapterOutput:
    """Plan the conversion of an adapter whose kinds with factors are LoRA and DoRA made with it, and Experts."""
    source = found.adapter
    sources, _ = read_source_modules(source)
    selection = Selection(request.exclude or ("",))
    wanted = [each for each in sources if not selection.selects(each.module)]
    families = (family,) if family else detect_families(sources) or detect_families(wanted)
    single = all(FORMATS[each].can.components == "one" for each in (source.format, request.to))
    if single:
        families = tuple(each for each in families if not may_be_of_another(sources, each))
    tells_family = request.base is not None and len(families) > 1
    try:
        family = choose_family(source.name, families, wanted, request.base, FORMATS[request.to])
    except NeedsFlag:
        if not single:
            raise
        family = None  # the names that it has are those of its model
    if single and not any(each.component in DENOISERS for each in sources):
        family = None  # a text encoder alone is converted as a language model
    base = None
    if request.runtime:
        if family is not None or not single:
            raise UsageError("--for is for adapters of language models", remedy="--to has the formats of image models")
        source, request, base = prepare_for_runtime(source, request, opened)
        if loaded_by(request.runtime or "").key == Peft.key:
            return plan_for_runtime(source, request, base, found.losses, folder, opened)
    if family is not None and FORMATS[request.to].can.named_by_model:
        message = f"is of {FAMILIES[family].title}, and {request.to}'s files are of language models"
        raise InputError(message, culprit=source.name)
    if family is not None:
        refuse_unknown_blocks(source, sources, family)
        source = _without_initial(source, [each.module for each in wanted], request, opened)
    dora = request.plain and any(each.update.cls is DoRA for each in wanted)
    if FORMATS[request.to].can.named_by_model and request.layout:
        raise UsageError(f"--layout and --to {request.to} are two conversions: one after the other")
    for_names = single and family is None and request.to == Peft.key and not (request.layout or request.plain)
    of_both = FORMATS[source.format].can, FORMATS[request.to].can
    if of_both[0].named_by_model or of_both[0].checked_by_model:
        for_names &= request.base is None or Path(request.base).name != "config.json"
    told = any(can.named_by_model or can.checked_by_model for can in of_both)
    if request.base is not None and not (request.layout or dora or tells_family or for_names or told):
        raise UsageError(
            "--base is for the names of a language model's class with --to peft, for formats of a program's own model, "
            "for --layout, with --plain for DoRA, and for modules that several image models have"
        )
    if request.architecture is not None and not for_names:
        raise UsageError("--architecture is for a language model's adapter and --to peft, without --layout and --plain")
    source, approximated = without_dora(source, request, folder, opened)
    lost = {m: found.losses.get(m, NO_LOSS) + approximated.get(m, NO_LOSS) for m in found.losses.keys() | approximated}
    if family is not None:
        if request.layout:
            raise UsageError("--layout is for adapters of language models")
        if of_both[1].named_by_model or of_both[1].checked_by_model:
            what = f"is of {FAMILIES[family].title}, and {request.to}'s files are for language models"
            raise InputError(what, culprit=source.name)
        load, init_of = (
            functools.partial(low_rank_modules, source),
            functools.partial(base_mutating_init_of, source.config),
        )
        image = ImageAdapter(source.name, source.file.metadata or {}, family, load, lost, init_of)
        made = plan_image(image, request, *read_source_modules(source))
        none = () if tells_family else without_files(families, wanted, FORMATS[request.to])
        also = " and ".join(FAMILIES[each].title for each in none)
        assumed = f"taken for {FAMILIES[family].title}'s: {also} has such modules as well, and no {request.to} files"
        return replace(made, notes=(*made.notes, assumed)) if also else made
    if single:
        kept, dropped = select_updates(source, request)
        if FORMATS[request.to].can.named_by_model:
            if request.plain:
                made = plan_plain(source, replace(request, to=Peft.key), kept, dropped, lost, opened)
                source = virtual_adapter(source.name, source.file, made.content)
                return keep_errors(plan_gguf(source, request, source.updates, dropped, {}), made.modules)
            return plan_gguf(source, request, kept, dropped, lost)
        if request.plain:
            return plan_plain(source, request, kept, dropped, lost, opened)
        if for_names and request.base is not None:
            return plan_class_names(source, request, kept, dropped, lost, opened)
        return plan_language(source, request, kept, dropped, lost)
    raise InputError(
        f"is no adapter of an image model that is known ({KNOWN}), with modules like "
        + min(source.updates, default="none")
        + ("" if FORMATS[request.to].can.usual_for == "model" else f": nothing could load it as {request.to}"),
        culprit=source.name,
    )


def _without_initial(source: Adapter, modules: Sequence[str], request: ConvertRequest, opened: ExitStack) -> Adapter:
    """Subtract the initial adapter of an image model's, if it was given.

    Raises:
        NeedsFlag: it was not given, the init altered the base, and the output could not tell.
    """
    if request.initial is not None:
        return subtract_init(source, request.initial, opened)
    init = next(filter(None, (base_mutating_init_of(source.config, module) for module in modules)), None)
    keeps = not request.plain and FORMATS[request.to].can.starts and init and init.lower().startswith(NAMED_INITS)
    if init and not keeps:
        message = f"was initialized with {init}, which changed the base under it, and what is written could not say so"
        raise NeedsFlag(message, culprit=source.name, remedy=ADD_INITIAL)
    return source
