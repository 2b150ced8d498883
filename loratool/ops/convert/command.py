"""Run `convert`: an adapter in another format, or a checkpoint in another container, as the files tell.

Each tensor of an adapter is converted exactly, or its error is reported, or it is refused by name. `image`, `language`
and `plain` plan the output, and its tensors are made one by one; `checkpoint` converts whole models.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...adapters.adapter import Adapter
from ...adapters.formats import FORMATS, holds_adapter, open_adapter
from ...adapters.formats.peft_config import base_mutating_init_of
from ...adapters.stacked import FACTOR_TORCH_DTYPES as DTYPES
from ...binding.selection import Selection
from ...errors import InputError, NeedsFlag, UsageError
from ...files.output import CONTAINERS, check_output_name, check_output_path, naming_output
from ...streaming.workers import Progress
from ..choices import FORMAT_CHOICES, QKV_LAYOUTS
from ..denormals import keep_denormals
from .checkpoint import CheckpointConvertReport, convert_checkpoint
from .dora_to_lora import dora_to_lora
from .image import ImageAdapter, plan_image, write_output
from .language import plan_language
from .plain import plan_plain
from .request import ADD_INITIAL, AdapterOutput, ConvertRequest, ModuleConvert, low_rank_modules, select_updates
from .source_modules import IMAGE_FAMILIES, SINGLE_COMPONENT, detect_family, read_source_modules, refuse_unknown_blocks
from .subtract_initial import subtract_init

CONVERT_DTYPES = {"keep": None, **DTYPES}


INIT_FORMATS = ("peft", "diffusers")  # the formats that hold init_lora_weights


NAMED_INITS = ("pissa", "olora")  # the inits that their name describes; others need a config beside it


@dataclass(frozen=True)
class ConvertReport:
    """The result of `convert` of an adapter. family: a key of FAMILIES, None for a language model; dropped: modules
    left out; notes: what the output cannot say.
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


@keep_denormals
def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    to: str | None = None,
    dtype: str = "keep",
    max_shard_bytes: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    workers: int | None = None,
    **of_adapters: Any,
) -> ConvertReport | CheckpointConvertReport:
    """`convert_adapter` or `convert_checkpoint`, by what is in the files of `source`.

    of_adapters: the other options of `convert_adapter`. Raises UsageError for an option of the other verb.
    """
    given = {name: value for name, value in of_adapters.items() if not (value is None or value is False or value == ())}
    is_one = bool(given.get("from_format")) or holds_adapter(source)
    if is_one or to in FORMAT_CHOICES:
        if max_shard_bytes is not None:
            raise UsageError("--max-shard-size is for checkpoints, not for adapters", culprit=os.fspath(source))
        if to not in FORMAT_CHOICES:
            what = "needs --to, one" if to is None else f"{to!r} is none"
            raise UsageError(f"is an adapter, and {what} of {', '.join(FORMAT_CHOICES)}", culprit=os.fspath(source))
        try:
            return convert_adapter(source, out, to=to, dtype=dtype, force=force, dry_run=dry_run, **of_adapters)
        except InputError as error:
            if not is_one:
                error.remedy = f"as a checkpoint it can become {' or '.join(CONTAINERS)}"
            raise
    if given:
        first = next(iter(given))
        option = {"layout": "--for"}.get(first, f"--{first.replace('_', '-')}")
        raise UsageError(f"{option} is for adapters, and this is a checkpoint", culprit=os.fspath(source))
    return convert_checkpoint(
        source,
        out,
        to=to,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        force=force,
        dry_run=dry_run,
        progress=progress,
        workers=workers,
    )


def convert_adapter(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    to: str,
    from_format: str | None = None,
    drop: Sequence[str] = (),
    alpha: float | None = None,
    enable_lora: Sequence[bool] = (),
    plain: bool = False,
    initial: str | os.PathLike[str] | None = None,
    rank: int | None = None,
    layout: str | None = None,
    base: str | os.PathLike[str] | None = None,
    dtype: str = "keep",
    force: bool = False,
    dry_run: bool = False,
) -> ConvertReport:
    """Write an adapter in another format; if an error is raised, nothing is written.

    Args:
        out: for `peft` a folder, or a file if it ends in .safetensors; for the others a file.
        to: a key of FORMAT_CHOICES.
        from_format: a key of FORMATS, if the tensors' names do not tell it.
        drop: patterns of modules to leave out.
        alpha: for a file that does not hold its own.
        enable_lora: which slices of loralib's MergedLinear have factors.
        plain: write standard LoRA, with alpha equal to the rank. DoRA then needs `base`, and is truncated to its rank.
        initial: with `plain`, the adapter before training: a base-mutating init is subtracted, at twice the rank.
        rank: with `plain`, the rank to truncate to.
        layout: a key of QKV_LAYOUTS, for a language model's fused modules.
        base: the model, or its config.json, that tells the rows of q, k and v; or the model under DoRA.
        dtype: the factors', a key of CONVERT_DTYPES.

    Raises:
        UsageError: the options contradict each other.
        NeedsFlag: something can only be dropped, or needs another option.
        InputError: nothing could load the output.
    """
    if to not in FORMAT_CHOICES:
        raise UsageError(f"format {to!r} is none of {', '.join(FORMAT_CHOICES)}")
    if dtype not in CONVERT_DTYPES:
        raise UsageError(f"dtype {dtype!r} is none of {', '.join(CONVERT_DTYPES)}")
    if from_format is not None and from_format not in FORMATS:
        raise UsageError(f"format {from_format!r} is none of {', '.join(FORMATS)}")
    if (initial is not None or rank is not None) and not plain:
        raise UsageError("--initial and --rank are for --plain")
    if rank is not None and rank < 1:
        raise UsageError(f"rank {rank} is out of range")
    if layout is not None and layout not in QKV_LAYOUTS:
        raise UsageError(f"layout {layout!r} is none of {', '.join(QKV_LAYOUTS)}")
    if layout is not None and plain:
        raise UsageError("--for and --plain are two conversions: one after the other")
    if layout is None and not plain and base is not None:
        raise UsageError("--base is for --for, and with --plain for DoRA")
    with ExitStack() as opened:
        source = open_adapter(adapter, alpha, format=from_format, enabled=tuple(enable_lora))
        opened.callback(source.file.close)
        path, is_file = check_output_name(
            out if out is not None else ("converted" if to == "peft" else "converted.safetensors")
        )
        if to != "peft" and not is_file:
            raise UsageError(f"{to} adapters are single files", culprit=str(path), remedy="name it X.safetensors")
        check_output_path(path, is_file, [source.file.path], force)
        Selection(tuple(drop)).require_used(source.updates, source.name, "--drop")
        request = ConvertRequest(to, tuple(drop), CONVERT_DTYPES[dtype], plain, initial, rank, layout, base)
        made = plan_convert(source, request, path.absolute().parent, opened)
        if not dry_run:
            opened.enter_context(naming_output(path))
            write_output(made, to, path, is_file, [source.file])
        size = sum(spec.size for spec in made.specs.values()), sum(spec.nbytes for spec in made.specs.values())
        names = (os.fspath(adapter), source.format, str(path), to, made.family, dry_run)
        return ConvertReport(*names, made.modules, made.dropped, *size, made.notes)


def plan_convert(
    source: Adapter, request: ConvertRequest, folder: Path, opened: ExitStack, family: str | None = None
) -> AdapterOutput:
    """Plan a conversion, from headers as far as possible.

    Args:
        folder: where temporary files are put; `opened` closes them.
        family: a key of IMAGE_FAMILIES, if other adapters tell it.

    Raises:
        NeedsFlag, InputError, UsageError: as `convert_adapter`.
    """
    sources, _ = read_source_modules(source)
    selection = Selection(request.drop or ("",))
    wanted = [each for each in sources if not selection.selects(each.module)]
    family = family or detect_family(sources) or detect_family(wanted)
    single = source.format in SINGLE_COMPONENT and request.to in SINGLE_COMPONENT
    if single and not any(each.component == "unet" for each in sources):
        family = None  # a text encoder alone is converted as a language model
    if family is not None:
        refuse_unknown_blocks(source, sources, family)
        source = _without_initial(source, [each.module for each in wanted], request, opened)
    source, lost = _without_dora(source, request, folder, opened)
    if family is not None:
        if request.layout:
            raise UsageError("--for is for adapters of language models")
        load, init_of = (
            functools.partial(low_rank_modules, source),
            functools.partial(base_mutating_init_of, source.config),
        )
        image = ImageAdapter(source.name, source.file.metadata or {}, family, load, lost, init_of)
        return plan_image(image, request, *read_source_modules(source))
    if single:
        kept, dropped = select_updates(source, request)
        if request.plain:
            return plan_plain(source, request, kept, dropped, lost, opened)
        return plan_language(source, request, kept, dropped)
    raise InputError(
        f"is no adapter of an image model that is known ({', '.join(IMAGE_FAMILIES.values())}), with modules like "
        + min(source.updates, default="none")
        + ("" if request.to == "peft" else f": nothing could load it as {request.to}"),
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
    keeps = not request.plain and request.to in INIT_FORMATS and init and init.lower().startswith(NAMED_INITS)
    if init and not keeps:
        message = f"was initialized with {init}, which changed the base under it, and what is written could not say so"
        raise NeedsFlag(message, culprit=source.name, remedy=ADD_INITIAL)
    return source


def _without_dora(
    source: Adapter, request: ConvertRequest, folder: Path, opened: ExitStack
) -> tuple[Adapter, dict[str, tuple[float, float]]]:
    """Return the adapter, without DoRA if the output cannot hold it, and the errors of `dora_to_lora` by module."""
    selection = Selection(request.drop or ("",))
    dora = [m for m, update in source.updates.items() if update.kind == "dora" and not selection.selects(m)]
    if not request.plain and (request.to != "loralib" or not dora):
        return source, {}
    if request.base is None and dora:
        message = f"is DoRA, whose change only the base tells ({len(dora)} modules)"
        option = "--base BASE" if request.plain else "--plain --base BASE"
        raise NeedsFlag(message, culprit=dora[0], remedy=f"add {option} with the model")
    if request.base is None:
        return source, {}
    if not dora:
        raise UsageError("--base is for --for, and with --plain for DoRA, of which the adapter has none")
    return dora_to_lora(source, request.base, request.rank, folder, opened)
