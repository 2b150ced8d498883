"""Plan an adapter's conversion, by its target model and the request: `image`, `language` and others plan the output.

An image model's modules have other names and rows in each format. For a language model's adapter, the format, the
runtime and the options determine what changes: names, scales, rows, kinds.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from ..adapters.adapter import Adapter
from ..adapters.formats import FORMATS, loaded_by
from ..adapters.formats.peft import Peft
from ..adapters.formats.peft_config import base_mutating_init_of
from ..adapters.updates.dora import DoRA
from ..architectures.families import FAMILIES
from ..architectures.families.table import DENOISERS
from ..architectures.runtimes.image_programs import IMAGE_RUNTIMES
from ..binding.modules.image_modules import (
    KNOWN,
    SourceModule,
    detect_families,
    may_be_of_another,
    read_source_modules,
    refuse_unknown_blocks,
)
from ..binding.modules.selection import Selection
from ..durable.journal import Journal
from ..errors import InputError, NeedsFlag, UsageError
from .base_copies import without_copies
from .change_to_lora import change_to_lora, low_rank, needs_weight
from .delta_factors import RESULTS
from .expand import expand
from .finish import finish, plain
from .for_image_program import finish_for_image_program, prepare_for_image_program
from .for_runtime import plan_for_runtime, prepare_for_runtime
from .image import plan_image
from .image_base import FamilyChoice, choose_family
from .language import refuse_layout_of_init, refuse_unsaid_init, to_layout
from .lazy import Transformed, noted, only
from .numbers import Settled, one_scale, subtract_start
from .refusals import no_factors
from .rename import rename_modules
from .request import INITIAL, WHAT_INITIAL, ConvertRequest, select_updates, selected
from .to_class import to_class
from .to_gguf import plan_gguf
from .to_oft import keeps_oft, plan_oft
from .value_modules import CARRIED, read_value_modules

OF_FAMILY = ("ss_base_model_version", "ss_network_module")  # metadata that tells the family
NAMED_INITS = ("pissa", "olora")  # inits that their name alone describes; others need a config too


@dataclass(frozen=True)
class TargetModel:
    """The model family that an adapter was trained for.

    Attributes:
        choice: of its image family.
        is_single: the formats of source and output are for one model, as language models' are.
        modules: all modules of the adapter.
        wanted: the modules that --exclude does not select.
    """

    choice: FamilyChoice
    is_single: bool
    modules: Sequence[SourceModule]
    wanted: Sequence[SourceModule]

    @property
    def family(self) -> str | None:
        """A key of FAMILIES; None for a language model, or for an unknown image model."""
        return self.choice.key


def plan_convert(
    state: Transformed, request: ConvertRequest, folder: Path, opened: ExitStack, family: str | None = None
) -> Settled:
    """Plan a conversion, from headers as far as possible.

    Args:
        folder: for temporary files; `opened` closes them.
        family: a key of FAMILIES, if other adapters determine it.

    Raises:
        UsageError: an option is not for this adapter, or contradicts another.
        NeedsFlag: unsupported modules must be excluded, or the base is needed.
        InputError: no program could load the result.
    """
    source = state.adapter
    if request.rename:
        state = rename_modules(state, request.rename)
        request = replace(request, rename=())
    if keeps_oft(state.adapter, request):
        return plan_oft(state, request, source)
    state = expand(state, request.exclude)
    return _plan_low_rank(state, request, folder, opened, family)


def _plan_low_rank(
    state: Transformed, request: ConvertRequest, folder: Path, opened: ExitStack, family: str | None
) -> Settled:
    """Plan the conversion of an adapter whose kinds with factors are LoRA, DoRA of LoRA, and Experts."""
    source, base = state.adapter, None
    if request.plain and not any(update.rank for update in selected(source, request.exclude).values()):
        state = _without_weights(state, request, folder, opened)  # factors tell the model
    target = find_target_model(state.adapter, request, family)
    of_language = target.is_single and target.family is None
    program = IMAGE_RUNTIMES.get(request.runtime or "")
    if program:
        if target.family is None:
            message = f"is not an adapter of a known image model ({KNOWN}), and --for {program.key} is for these"
            raise InputError(message, culprit=source.name)
        request = prepare_for_image_program(source, program, request, target.family, target.wanted)
    elif request.runtime:
        if not of_language:
            message = f"--for {request.runtime} is for adapters of language models"
            raise UsageError(message, remedy=f"name one of {', '.join(IMAGE_RUNTIMES)}")
        state, request, base = prepare_for_runtime(state, request)
        if loaded_by(request.runtime or "").key == Peft.key:
            request = replace(request, to=Peft.key)
            return plan_for_runtime(_without_weights(state, request, folder, opened), request, base)
    names_class = _names_class(source, request) and of_language
    _check_options(source, target, request, names_class)
    if target.family is not None:
        refuse_unknown_blocks(state.adapter, target.modules, target.family)
        state = _without_initial(state, [source_module.module for source_module in target.wanted], request)
    state = _without_weights(state, request, folder, opened)
    if target.family is not None:
        planned = _plan_image(state, target, target.family, request, source)
        return finish_for_image_program(planned, program, request, source) if program else planned
    if target.is_single:
        return plan_one_model(state, request, names_class)
    if not any(update.rank for update in source.updates.values()):
        raise no_factors(source)
    raise InputError(
        f"is not an adapter of a known image model ({KNOWN}): it has modules like "
        + min(source.updates, default="none")
        + ("" if FORMATS[request.to].can.usual_for == "model" else f": nothing can load it as {request.to}"),
        culprit=source.name,
    )


def find_target_model(source: Adapter, request: ConvertRequest, family: str | None) -> TargetModel:
    """Find the model of an adapter by its modules' names and, if several models have such names, by --base.

    Raises:
        NeedsFlag: several models fit, and there is no base.
    """
    modules, _ = read_source_modules(source)
    if not modules and "diff" in FORMATS[request.to].value_ends:
        modules = [value.source for value in read_value_modules(source, CARRIED) if value.is_matrix]
    selection = Selection(request.exclude or ("",))
    wanted = [source_module for source_module in modules if not selection.selects(source_module.module)]
    is_single = all(FORMATS[key].can.components == "one" for key in (source.format, request.to))
    if family is not None:
        choice = FamilyChoice(family)
    else:
        families = detect_families(modules) or detect_families(wanted)
        of_class = request.base is not None and "_class_name" in request.model  # one of diffusers'
        if is_single and not of_class:
            families = tuple(key for key in families if not may_be_of_another(modules, key))
        try:
            choice = choose_family(source.name, wanted, request, families)
        except NeedsFlag:
            if not is_single:
                raise
            choice = FamilyChoice(None)  # its names are those of its model
    if is_single and not any(source_module.component in DENOISERS for source_module in modules):
        choice = FamilyChoice(None)  # a text encoder alone is converted as a language model
    return TargetModel(choice, is_single, modules, wanted)


def _names_class(source: Adapter, request: ConvertRequest) -> bool:
    """Return whether a language model's modules get the names of the class that PEFT wraps, if there is a base."""
    if request.to != Peft.key or request.layout or request.plain:
        return False
    # a config.json alone was needed for the source's names; the names of a class need the weights
    is_config = request.base is not None and request.base.is_config
    return not (is_config and FORMATS[source.format].can.depends_on_base)


def _check_options(source: Adapter, target: TargetModel, request: ConvertRequest, names_class: bool) -> None:
    """Raise UsageError for an option without effect, and InputError for a format of other models."""
    source_can, to = FORMATS[source.format].can, FORMATS[request.to].can
    needed = request.plain and any(needs_weight(update) for update in source.updates.values())
    is_image = target.family is not None
    may_be_image = is_image or not target.is_single
    uses_base = (
        request.layout or names_class or needed or may_be_image or source_can.depends_on_base or to.depends_on_base
    )
    if target.family is not None and to.depends_on_base:
        message = f"is of {FAMILIES[target.family].title}, and {request.to}'s files are for language models"
        raise InputError(message, culprit=source.name)
    if target.family is not None and request.layout:
        raise UsageError("--layout is for adapters of language models")
    if to.named_by_model and request.layout:
        raise UsageError(f"--layout and --to {request.to} are two conversions: one after the other")
    if request.base is not None and not uses_base:
        raise UsageError(
            "--base is for the names of a language model's class with --to peft, for formats of a program's own model, "
            "for --layout, with --plain for kinds that need the weight, and for modules that several image models have"
        )
    if is_image and request.architecture is not None and request.architecture not in FAMILIES:
        message = f"--architecture of an image model's adapter is one of {', '.join(FAMILIES)}"
        raise UsageError(message, culprit=source.name)
    if request.architecture is not None and target.is_single and not is_image:
        if not names_class or request.architecture in FAMILIES:
            raise UsageError(
                "--architecture is the family of an image model's adapter, or with --to peft, without --layout and "
                "--plain, the class of a language model"
            )
        if request.base is None:
            raise NeedsFlag("--architecture is a class of the model", flags="--base BASE", why="with the model")


def _plan_image(
    state: Transformed, target: TargetModel, family: str, request: ConvertRequest, source: Adapter
) -> Settled:
    """Plan an image model's adapter, with a note on other models that fit it."""
    start_of = functools.partial(base_mutating_init_of, state.adapter.config)
    sources, impossible = read_source_modules(state.adapter)
    planned = plan_image(state, family, request, sources, impossible, source.file.metadata or {}, start_of)
    if target.choice.is_certain:
        return planned
    if also := " and ".join(target.choice.also):
        assumed = (
            f"taken for {FAMILIES[family].title}'s: modules like these, but no {request.to} files, are also of {also}"
        )
        planned = noted(planned, assumed)
    former = source.file.metadata or {}
    metadata = {
        key: former.get(key, text) if key in OF_FAMILY else text
        for key, text in planned.metadata.items()
        if key not in OF_FAMILY or key in former
    }
    return replace(planned, is_certain=False, metadata=metadata)


def plan_one_model(state: Transformed, request: ConvertRequest, names_class: bool = False) -> Settled:
    """Plan an adapter of one model, whose kinds `expand` has reduced, by the format and the request.

    Args:
        names_class: rename the modules to the names of the base's class, if there is a base.
    """
    to = FORMATS[request.to]
    if to.can.depends_on_base and request.base is not None:
        state = without_copies(state, request)
    source = state.adapter
    state = only(state, select_updates(source, request))
    if request.plain:
        state = plain(state, request)
    elif names_class and request.base is not None:
        base = request.base.open("--base is the model whose class the adapter is for")
        state = to_class(state, base, request.architecture)
    else:
        refuse_unsaid_init(source, to)
    if to.can.one_scale:  # before parts are fused, whose scales would be rounded into float32 first
        state = one_scale(state)
    if request.layout:
        refuse_layout_of_init(source)
        state = to_layout(state, request)
    return plan_gguf(state, request) if to.can.named_by_model else finish(state, request)


def _without_weights(state: Transformed, request: ConvertRequest, folder: Path, opened: ExitStack) -> Transformed:
    """Return LoRA in place of updates that need the weight, with the requested rank, or else their own.

    DoRA stays if the output supports it.

    Args:
        folder: for the nameless journal of the factors; `opened` closes it.

    Raises:
        NeedsFlag: the base's weights are missing.
    """
    keeps = not request.plain and DoRA in FORMATS[request.to].can.kinds
    updates = selected(state.adapter, request.exclude)
    found = [m for m, update in updates.items() if needs_weight(update) and not (keeps and update.cls is DoRA)]
    if not found:
        return state
    kind = "DoRA" if updates[found[0]].cls is DoRA else updates[found[0]].kind
    message = f"is {kind}, whose change depends on the base ({len(found)} modules)"
    if request.layout:
        first = "first loratool convert --plain --base BASE, without --layout"
        raise InputError(message, culprit=found[0], remedy=first)
    missing = [] if request.plain or request.runtime else ["--plain"]
    if request.rank is None and any(not low_rank(updates[module]) for module in found):
        missing.append("--rank R")
    if request.base is None or request.base.is_config:
        missing.append("--base BASE with the model and its weights")
    if missing or request.base is None:
        raise NeedsFlag(message, culprit=found[0], flags=" ".join(missing))
    base = request.base.open("--base is the model under it")
    journal = Journal(folder / "factors", RESULTS)
    opened.callback(journal.close)
    journal.open_nameless()
    return change_to_lora(state, base, request.rank, journal)


def _without_initial(state: Transformed, modules: Sequence[str], request: ConvertRequest) -> Transformed:
    """Subtract the initial adapter from an image model's adapter, if it was given.

    Raises:
        NeedsFlag: it was not given, the init altered the base, and the output cannot record that.
    """
    source = state.adapter
    if request.initial is not None:
        return subtract_start(state, request.initial(source))
    init = next(filter(None, (base_mutating_init_of(source.config, module) for module in modules)), None)
    keeps = not request.plain and FORMATS[request.to].can.starts and init and init.lower().startswith(NAMED_INITS)
    if init and not keeps:
        message = f"was initialized with {init}, which changed the base under it, and the output could not record that"
        raise NeedsFlag(message, culprit=source.name, flags=INITIAL, why=WHAT_INITIAL)
    return state
