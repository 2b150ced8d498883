"""Plan an image model's adapter in any format, for `convert`, `extract` and `init`.

Modules that keep their factors are planned from headers. Tensors are computed when they are written, one module at a
time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..adapters.adapter import Adapter
from ..adapters.formats import FORMATS, written_formats
from ..adapters.formats.content import NewModule
from ..adapters.formats.format import Format
from ..adapters.image_metadata import former_metadata
from ..adapters.updates.add import AddDelta
from ..adapters.updates.dora import DoRA
from ..architectures.families import FAMILIES
from ..architectures.families.table import DENOISERS
from ..binding.modules.image_modules import SourceModule, find_unknown_modules
from ..binding.modules.selection import Selection
from ..errors import InputError, NeedsFlag, shell_word
from .for_image_program import notes_on_names
from .lazy import Transformed, noted
from .module_map import TargetModule, plan_target_modules
from .numbers import Settled, alpha_for_scale, cut_ranks, fold, fold_biases, settle, single
from .output import rows
from .refusals import cannot_convert, no_factors
from .regroup import regroup
from .request import INITIAL, WHAT_INITIAL, ConvertRequest, alpha_notes
from .value_modules import CARRIED, ValueModule, end_of, plan_carried, read_value_modules, settle_values


def plan_image(
    state: Transformed,
    family: str,
    request: ConvertRequest,
    sources: list[SourceModule],
    impossible: list[str],
    metadata: Mapping[str, str],
    init_of: Callable[[str], str | None] = lambda module: None,
) -> Settled:
    """Plan the output.

    Args:
        sources: the modules of `state` by component and path.
        impossible: modules that no format of image adapters supports.
        metadata: of the source's file.
        init_of: module -> the init that altered its base, or None.

    Raises:
        NeedsFlag: modules must be excluded or converted with --plain first.
        InputError: nothing is left, or two modules would become one.
    """
    to = FORMATS[request.to]
    if request.plain or "diff_b" in to.value_ends:  # a difference of a bias has no scale
        state = fold_biases(state)
    values = _values(state.adapter, request, family)
    carried = {value.source.module for each in values.values() for value in each}
    impossible = [module for module in impossible if module not in carried]
    if not sources and not carried:
        raise no_factors(state.adapter)
    wanted = _wanted(
        state.adapter.name, request, sources, impossible + find_unknown_modules(sources, family), bool(carried)
    )
    targets = plan_target_modules(wanted, family, to.naming(family))
    for target in targets:
        module = target.parts[0].source.module
        if (init := init_of(module)) and target.how != "exact":
            message = f"would be {target.how}, and was initialized with {init} from the whole matrix of its base"
            raise NeedsFlag(message, culprit=module, flags=INITIAL, why=WHAT_INITIAL)
    names = dict[str, TargetModule]()
    for target in targets:
        name = to.module_name(target.component, target.path, family)
        if names.setdefault(name, target) is not target:
            raise InputError("two modules of the adapter would become this one", culprit=name)
    beside = plan_carried(state.adapter, values, family, to, names)
    state = regroup(state, names, to=to, beside=beside)
    if request.rank is not None:
        state = cut_ranks(state, request.rank)
    settled = settle(fold(state, _folded(state.adapter, request)), request.dtype)
    modules = {}
    for module, update in settled.adapter.updates.items():
        if not update.rank:
            continue
        alpha = alpha_for_scale(update.scale, update.rank)
        init = init_of(names[module].parts[0].source.module)
        modules[module] = NewModule(
            names[module].component, update.rank, alpha, update.cls is DoRA, update.along_inputs, init
        )
    _refuse_mixed(to, modules)
    _refuse_scaled_biases(settled.adapter)
    stays = former_metadata(metadata, new_ranks=request.rank is not None)
    stays.pop("loratool", None)
    config, described = to.describe(family, stays, modules)
    planned = replace(settled, config=config, metadata=described, family=family)
    notes = []  # on what programs apply in another way, or not
    if not request.runtime:
        notes = [*to.notes(family, modules), *notes_on_names(to, family, wanted, names)]
    return noted(planned, *alpha_notes(request.to, rows(settled)), *notes)


def _values(adapter: Adapter, request: ConvertRequest, family: str) -> dict[str, list[ValueModule]]:
    """Return the updates without factors that the format has names for, by `end_of`."""
    to, selection = FORMATS[request.to], Selection(request.exclude or ("",))
    values: dict[str, list[ValueModule]] = {}
    for value in settle_values(read_value_modules(adapter, CARRIED), FAMILIES[family]):
        if not selection.selects(value.source.module) and (end := end_of(value, family, to, adapter)):
            values.setdefault(end, []).append(value)
    return values


def _refuse_scaled_biases(adapter: Adapter) -> None:
    """Raise NeedsFlag for a bias whose scale is not that of the factors beside it, which readers apply to both."""
    for module, update in adapter.updates.items():
        owner = adapter.updates.get(module.removesuffix(".bias"))
        if update.cls is AddDelta and owner and update.scale != owner.scale:
            message = f"is added {update.scale:g} times, and the factors beside it have a scale of {owner.scale:g}"
            raise NeedsFlag(message, culprit=module, flags="--plain")


def _folded(adapter: Adapter, request: ConvertRequest) -> list[str]:
    """Return the modules whose scale must be folded into the factors.

    These are modules whose alpha is infinite in float32, or underflows to 0, or is a 0 that stands for the rank; and
    all modules if the files have no alphas: for image models that means a scale of 1.
    """
    can, to_fold = FORMATS[request.to].can, []
    for module, update in adapter.updates.items():
        if not update.rank:
            continue
        alpha = abs(single(alpha_for_scale(update.scale, update.rank))) if can.alpha == "tensor" else 1.0
        unwritable = alpha == math.inf or (alpha == 0 and (can.zero_alpha_is_rank or update.scale != 0))
        if request.plain or can.alpha == "none" or unwritable:
            to_fold.append(module)
    return to_fold


def _wanted(
    name: str, request: ConvertRequest, sources: list[SourceModule], impossible: list[str], has_values: bool
) -> list[SourceModule]:
    to, can, selection = request.to, FORMATS[request.to].can, Selection(request.exclude or ("",))
    wanted = [source for source in sources if source.module not in impossible and not selection.selects(source.module)]
    if can.components == "one":
        wanted, more = one_component(wanted)
        impossible = impossible + more
    columns = next((s.module for s in wanted if s.update.along_inputs and not can.input_norms), None)
    if columns:
        message = f"is DoRA along the inputs, which {to}'s files cannot express"
        raise NeedsFlag(message, culprit=columns, flags="--plain --base BASE", why="with the model")
    unsupported = [s.module for s in wanted if s.update.cls not in can.kinds or (not can.kernels and _has_kernel(s))]
    unsupported += [s.module for s in wanted if s.update.base]  # a weight under the factors has no name in the format
    wanted = [source for source in wanted if source.module not in unsupported]
    unsupported += [module for module in impossible if not selection.selects(module)]
    if unsupported:
        what = f"cannot be carried to {to}{' as plain LoRA' if request.plain else ''}"
        exclude = "" if len(unsupported) < 4 else f"--exclude {shell_word(_prefixes(unsupported))}"
        raise cannot_convert(name, what, unsupported, exclude)
    if not wanted and not has_values:
        raise InputError("nothing is left to convert", culprit=name)
    return wanted


def _refuse_mixed(to: Format, modules: Mapping[str, NewModule]) -> None:
    """Raise InputError if only some modules of a component are DoRA, but the config has one flag for all."""
    if to.can.alpha not in ("config", "metadata"):
        return
    for component in dict.fromkeys(module.component for module in modules.values()):
        members = {name: module for name, module in modules.items() if module.component == component}
        dora = [name for name, module in members.items() if module.dora]
        other = next((name for name in members if dora and name not in dora), None)
        if other:
            message = f"is not DoRA, but {dora[0]} is; {to.key}'s loader needs one kind for all modules of a model"
            free = " and ".join(key for key, other in written_formats().items() if other.can.alpha == "tensor")
            remedy = f"use --to {free}, which record the kind of each module, or add --plain --base BASE with the model"
            raise InputError(message, culprit=other, remedy=remedy)


def _has_kernel(source: SourceModule) -> bool:
    return math.prod(source.update.specs["A"].shape[2:]) != 1


def one_component(sources: list[SourceModule]) -> tuple[list[SourceModule], list[str]]:
    """Return the modules of the denoiser, or else of the first text encoder, and the names of the others.

    A PEFT adapter is for one model only.
    """
    components = [source.component for source in sources]
    first = next((component for component in DENOISERS if component in components), next(iter(components), ""))
    return [s for s in sources if s.component == first], [s.module for s in sources if s.component != first]


def _prefixes(modules: Sequence[str]) -> str:
    """Return a comma-separated list of globs, one for each prefix of the names."""
    prefixes = dict.fromkeys(
        m[: m.index("_", 5) + 1] if m.startswith("lora_") else m.split(".")[0] + "." for m in modules
    )
    return ",".join(f"{prefix}*" for prefix in prefixes)
