"""Plan an adapter's conversion, by what it is of and what is asked for: `image`, `language` and others plan the output.

An image model's modules have other names and rows in each format; of a language model's adapter a format, a runtime or
an option says what changes: names, scales, rows, kinds.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...adapters.adapter import Adapter
from ...adapters.formats import FORMATS, loaded_by
from ...adapters.formats.peft import Peft
from ...adapters.formats.peft_config import base_mutating_init_of
from ...adapters.stacked import load_stacked_factors
from ...adapters.updates.dora import DoRA
from ...architectures.families import FAMILIES
from ...architectures.families.table import DENOISERS
from ...binding.image_modules import (
    KNOWN,
    SourceModule,
    detect_families,
    may_be_of_another,
    read_source_modules,
    refuse_unknown_blocks,
)
from ...binding.selection import Selection
from ...errors import InputError, NeedsFlag, UsageError
from ...files.checkpoint import read_config
from ...numerics.factored_svd import core
from ...reports.numbers import KEPT_ENOUGH, plural, share
from .as_low_rank import AsLowRank, as_low_rank
from .dora_to_lora import without_dora
from .factors import NO_LOSS, Loss
from .for_runtime import plan_for_runtime, prepare_for_runtime
from .image import ImageAdapter, plan_image
from .image_base import FamilyChoice, choose_family
from .language import plan_language
from .plain import plan_plain
from .rename import rename_modules
from .request import ADD_INITIAL, AdapterOutput, ConvertRequest, ModuleConvert, low_rank_modules, select_updates
from .subtract_initial import subtract_init
from .to_class import plan_class_names
from .to_gguf import plan_gguf

NAMED_INITS = ("pissa", "olora")  # the inits that their name describes; others need a config beside it


@dataclass(frozen=True)
class _Subject:
    """Say what an adapter is of.

    Attributes:
        choice: of its image family.
        is_single: whether the formats of source and output are of one model, as language models' are.
        modules: those of the adapter.
        wanted: those that --exclude leaves.
    """

    choice: FamilyChoice
    is_single: bool
    modules: Sequence[SourceModule]
    wanted: Sequence[SourceModule]

    @property
    def family(self) -> str | None:
        """A key of FAMILIES; None for a language model, or for an image model that is not known."""
        return self.choice.key


def plan_convert(
    source: Adapter, request: ConvertRequest, folder: Path, opened: ExitStack, family: str | None = None
) -> AdapterOutput:
    """Plan a conversion, from headers as far as possible.

    Args:
        folder: where temporary files are put; `opened` closes them.
        family: a key of FAMILIES, if other adapters tell it.

    Raises:
        UsageError: an option is not for this adapter, or contradicts another.
        NeedsFlag: modules can only be left out, or only the base tells something.
        InputError: nothing could load the result.
    """
    if request.to != source.format:
        source = FORMATS[source.format].in_other_names(source)
    if request.rename:
        source, renamed = rename_modules(source, request.rename)
        made = plan_convert(source, replace(request, rename=()), folder, opened, family)
        return replace(made, modules=tuple(_before_renames(row, renamed) for row in made.modules))
    found = as_low_rank(source, request.exclude)
    made = _plan_low_rank(found, request, folder, opened, family)
    made = replace(made, warnings=tuple(_loss_warning(found.adapter, request, made)))
    if not found.kinds:
        return made
    rows = tuple(
        replace(row, how="expanded") if row.how == "exact" and found.kinds.keys() & set(row.sources) else row
        for row in made.modules
    )
    return replace(made, modules=rows, notes=(*made.notes, *found.notes()))


def _loss_warning(source: Adapter, request: ConvertRequest, made: AdapterOutput) -> Iterator[str]:
    """Yield a warning if modules lose more of their change than `merge` lets pass.

    The loss in all is weighted by the size of the changes. Of a module that is split each part counts alike.
    """
    weak = [row for row in made.modules if row.error > 1 - KEPT_ENOUGH]
    if not weak:
        return
    parts = Counter(module for row in made.modules for module in row.sources)
    squares = {module: _squared_norm(source, module, made.lost) / count for module, count in parts.items()}
    sizes = [sum(squares[module] for module in row.sources) for row in made.modules]
    lost = sum(row.error**2 * size for row, size in zip(made.modules, sizes, strict=True))
    worst = max(weak, key=lambda row: row.error)
    is_cut = request.rank is not None or any(loss.how == "truncated" for loss in made.lost.values())
    remedy = "a higher --rank loses less, and a merge nothing" if is_cut else "--dtype fp32 loses less"
    yield (
        f"{len(weak):,} of {plural(len(made.modules), 'module')} lose more than {1 - KEPT_ENOUGH:.0%} of their change: "
        f"{share(math.sqrt(lost / sum(sizes)))} is lost in all, {share(worst.error)} in {worst.name}; {remedy}"
    )


def _squared_norm(source: Adapter, module: str, lost: Mapping[str, Loss]) -> float:
    """Return ||D||^2 of a module of the source, which of DoRA its approximation has told."""
    if module in lost:
        return lost[module].total
    update = source.updates[module]
    B, A = load_stacked_factors(source, update.cls.without_norm(update))
    return float(torch.linalg.vector_norm(core(B, A))) ** 2


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
    source, base = found.adapter, None
    subject = _find_subject(source, request, family)
    of_language = subject.is_single and subject.family is None
    if request.runtime:
        if not of_language:
            raise UsageError("--for is for adapters of language models", remedy="--to has the formats of image models")
        source, request, base = prepare_for_runtime(source, request, opened)
        if loaded_by(request.runtime or "").key == Peft.key:
            return plan_for_runtime(source, request, base, found.losses, folder, opened)
    names_class = _names_class(source, request) and of_language
    _check_options(source, subject, request, names_class)
    if subject.family is not None:
        refuse_unknown_blocks(source, subject.modules, subject.family)
        source = _without_initial(source, [each.module for each in subject.wanted], request, opened)
    source, approximated = without_dora(source, request, folder, opened)
    lost = {m: found.losses.get(m, NO_LOSS) + approximated.get(m, NO_LOSS) for m in found.losses.keys() | approximated}
    if subject.family is not None:
        return replace(_plan_image(source, subject, subject.family, request, lost), lost=lost)
    if subject.is_single:
        return replace(plan_one_model(source, request, lost, opened, names_class), lost=lost)
    if not subject.modules:
        kinds = " and ".join(sorted({update.cls.kind for update in source.updates.values()}))
        raise InputError(
            f"has no low-rank factors to convert, only whole changes ({kinds})",
            culprit=source.name,
            remedy="merge it into its base; of the merged model loratool extract BASE MERGED makes an adapter",
        )
    raise InputError(
        f"is no adapter of an image model that is known ({KNOWN}), with modules like "
        + min(source.updates, default="none")
        + ("" if FORMATS[request.to].can.usual_for == "model" else f": nothing could load it as {request.to}"),
        culprit=source.name,
    )


def _find_subject(source: Adapter, request: ConvertRequest, family: str | None) -> _Subject:
    """Tell what an adapter is of, by its modules' names and, where several models have such, by --base.

    Raises:
        NeedsFlag: only a base could tell.
    """
    modules, _ = read_source_modules(source)
    selection = Selection(request.exclude or ("",))
    wanted = [each for each in modules if not selection.selects(each.module)]
    is_single = all(FORMATS[each].can.components == "one" for each in (source.format, request.to))
    if family is not None:
        choice = FamilyChoice(family)
    else:
        families = detect_families(modules) or detect_families(wanted)
        of_class = request.base is not None and "_class_name" in read_config(request.base)  # one of diffusers'
        if is_single and not of_class:
            families = tuple(each for each in families if not may_be_of_another(modules, each))
        try:
            choice = choose_family(source.name, wanted, request, families)
        except NeedsFlag:
            if not is_single:
                raise
            choice = FamilyChoice(None)  # the names that it has are those of its model
    if is_single and not any(each.component in DENOISERS for each in modules):
        choice = FamilyChoice(None)  # a text encoder alone is converted as a language model
    return _Subject(choice, is_single, modules, wanted)


def _names_class(source: Adapter, request: ConvertRequest) -> bool:
    """Return whether a language model's modules get the names of the class that PEFT wraps, if there is a base."""
    if request.to != Peft.key or request.layout or request.plain:
        return False
    # a config.json alone has told what the names of the source are, and a class's names are told by weights
    is_config = request.base is not None and Path(request.base).name == "config.json"
    return not (is_config and FORMATS[source.format].can.told_by_model)


def _check_options(source: Adapter, subject: _Subject, request: ConvertRequest, names_class: bool) -> None:
    """Raise UsageError for an option that would do nothing, and InputError for a format of other models."""
    own, to = FORMATS[source.format].can, FORMATS[request.to].can
    dora = request.plain and any(each.update.cls is DoRA for each in subject.wanted)
    is_image = subject.family is not None
    may_be_image = is_image or not subject.is_single
    uses_base = request.layout or names_class or dora or may_be_image or own.told_by_model or to.told_by_model
    if subject.family is not None and to.told_by_model:
        message = f"is of {FAMILIES[subject.family].title}, and {request.to}'s files are for language models"
        raise InputError(message, culprit=source.name)
    if subject.family is not None and request.layout:
        raise UsageError("--layout is for adapters of language models")
    if to.named_by_model and request.layout:
        raise UsageError(f"--layout and --to {request.to} are two conversions: one after the other")
    if request.base is not None and not uses_base:
        raise UsageError(
            "--base is for the names of a language model's class with --to peft, for formats of a program's own model, "
            "for --layout, with --plain for DoRA, and for modules that several image models have"
        )
    if is_image and request.architecture is not None and request.architecture not in FAMILIES:
        message = f"--architecture of an image model's adapter is one of {', '.join(FAMILIES)}"
        raise UsageError(message, culprit=source.name)
    if request.architecture is not None and subject.is_single and not is_image:
        if not names_class or request.architecture in FAMILIES:
            raise UsageError(
                "--architecture is the family of an image model's adapter, or with --to peft, without --layout and "
                "--plain, the class of a language model"
            )
        if request.base is None:
            raise NeedsFlag("--architecture is a class of the model", remedy="add --base BASE with the model")


def _plan_image(
    source: Adapter, subject: _Subject, family: str, request: ConvertRequest, lost: Mapping[str, Loss]
) -> AdapterOutput:
    """Plan an image model's adapter, with a note on other models that it could be of."""
    load = functools.partial(low_rank_modules, source)
    init_of = functools.partial(base_mutating_init_of, source.config)
    image = ImageAdapter(source.name, source.file.metadata or {}, family, load, lost, init_of)
    made = plan_image(image, request, *read_source_modules(source))
    if not subject.choice.is_certain:
        made = replace(made, family=None)
    also = " and ".join(subject.choice.also)
    assumed = f"taken for {FAMILIES[family].title}'s: {also} has such modules as well, and no {request.to} files"
    return replace(made, notes=(*made.notes, assumed)) if also else made


def plan_one_model(
    source: Adapter, request: ConvertRequest, lost: Mapping[str, Loss], opened: ExitStack, names_class: bool = False
) -> AdapterOutput:
    """Plan an adapter of one model, whose kinds are those of `as_low_rank`, by the format and by what is asked for.

    Args:
        lost: module -> what was lost before.
        names_class: with a base, the modules get the names of its class.
    """
    kept, dropped = select_updates(source, request)
    if FORMATS[request.to].can.named_by_model:
        return plan_gguf(source, request, kept, dropped, lost, opened)
    if request.plain:
        return plan_plain(source, request, kept, dropped, lost, opened)
    if names_class and request.base is not None:
        return plan_class_names(source, request, kept, dropped, lost, opened)
    return plan_language(source, request, kept, dropped, lost)


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
