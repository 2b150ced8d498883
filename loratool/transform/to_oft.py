"""Keep OFT when an adapter becomes PEFT's: the same rotations, in PEFT's names and with a config of PEFT's OFT.

Files of OneTrainer and of forks of musubi-tuner have PEFT's tensors, and mean its series of five terms. A rotation acts
on the inputs, so all parts of a fused module have the same. Numbers change in two cases. OneTrainer turns a convolution
by R where PEFT takes R.T, and R(Q).T is R(-Q). A division (`scaled_oft`) and a bound that differs between modules go
into the numbers. Sources: `peft/tuners/oft/{config,layer}.py`; `modules/module/LoRAModule.py` of OneTrainer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.formats import FORMATS
from ..adapters.formats.peft import Peft
from ..adapters.image_metadata import former_metadata
from ..adapters.updates.oft import OFT, TERMS, TRIANGLES, Rotation, blocks_of
from ..adapters.updates.replace import ReplaceTensor
from ..adapters.updates.update import UpdateSpec
from ..architectures.families import FAMILIES
from ..architectures.families.lookup import complete_parts, kernel_of, locate
from ..architectures.families.table import DENOISERS
from ..binding.modules.image_modules import (
    KNOWN,
    SourceModule,
    detect_families,
    find_unknown_modules,
    fitting_families,
    has_known_sizes,
    read_source_modules,
)
from ..errors import InputError, NeedsFlag, UsageError
from ..numerics.arrays import rounded_to
from ..numerics.forms import FORMS
from .image import one_component
from .image_base import OFFERED, FamilyChoice, choose_family
from .lazy import Made, Tensors, Transformed, only, restated, with_modules
from .log import NO_LOSS, Loss
from .module_map import table_of
from .numbers import Settled, settle
from .output import in_format
from .refusals import cannot_convert
from .request import ConvertRequest, selected
from .to_class import to_class

SERIES = "0.18.0"  # the first PEFT whose series is that of OneTrainer's files

INSTEAD = "--plain --base BASE --rank R"  # makes LoRA of it

# Ends of layers in diffusers' names: in groups, which PEFT's OFT has not, or a convolution in some models only
UNFIT = {"sana": "ff.conv_depth", "cogvideox": "patch_embed.proj"}


def keeps_oft(source: Adapter, request: ConvertRequest) -> bool:
    """Return whether a conversion keeps rotations, as PEFT's format alone does."""
    is_kept = request.to == Peft.key and not request.plain and request.runtime is None
    return is_kept and any(update.cls is OFT for update in selected(source, request.exclude).values())


def plan_oft(state: Transformed, request: ConvertRequest, opened: Adapter) -> Settled:
    """Plan the conversion of an adapter of OFT to PEFT's.

    Args:
        opened: the adapter before it was renamed.

    Raises:
        UsageError: an option is not for OFT.
        NeedsFlag: modules must be excluded or become LoRA, or only the user can know their names.
        InputError: the model is unknown, or two modules would become one.
    """
    for option, value in (("layout", request.layout), ("dtype", request.dtype)):
        if value is not None:
            raise UsageError(f"--{option} is for factors, and {opened.name} is OFT", remedy="leave it out")
    updates = selected(state.adapter, request.exclude)
    is_pefts = opened.format == Peft.key
    others = [m for m, u in updates.items() if u.cls is not OFT and not (is_pefts and u.cls is ReplaceTensor)]
    if others:
        kinds = ", ".join(dict.fromkeys(updates[module].kind for module in others))
        raise cannot_convert(opened.name, f"({kinds}) are more than an adapter of PEFT's OFT can hold", others)
    state = only(state, updates)
    return _of_peft(state, request, opened) if is_pefts else _of_image_model(state, request)


def _of_peft(state: Transformed, request: ConvertRequest, opened: Adapter) -> Settled:
    """Plan PEFT's own OFT: the same tensors and settings, of modules that may have other names."""
    old = next((module for module, update in state.adapter.updates.items() if "oft_r" in update.specs), None)
    if old:
        raise NeedsFlag("is OFT of PEFT up to 0.15, which PEFT no longer loads", culprit=old, flags=INSTEAD)
    of_diffusers = "_class_name" in request.model  # whose names the modules have
    if request.architecture is not None and (of_diffusers or request.architecture in FAMILIES):
        raise UsageError("--architecture is for the names of a language model's class, and PEFT's OFT keeps others")
    if request.architecture is not None and request.base is None:
        raise NeedsFlag("--architecture is a class of the model", flags="--base BASE", why="with the model")
    if _modules(state.adapter) != _modules(opened):
        state = replace(state, adapter=restated(state.adapter))
    if request.base is not None and not of_diffusers:
        base = request.base.open("--base is the model whose class the adapter is for")
        state = to_class(state, base, request.architecture)
    config, rank = state.adapter.config.peft, opened.config.peft.get("r")
    fields = {"target_modules": sorted(_modules(state.adapter)), **config, **({} if rank is None else {"r": rank})}
    return replace(in_format(settle(state, None), FORMATS[Peft.key]), config=fields)


def _modules(adapter: Adapter) -> set[str]:
    """Return what PEFT's config lists: the modules with a rotation."""
    return {update.target for update in adapter.updates.values() if update.cls is OFT}


def _of_image_model(state: Transformed, request: ConvertRequest) -> Settled:
    """Plan another program's OFT of one component of an image model, in diffusers' names."""
    source = state.adapter
    sources, impossible = read_source_modules(source, (OFT,))
    choice = _choose_family(source, sources, request)
    family = choice.key or ""
    sources, more = one_component(sources)
    places = {each.module: _place(each, family) for each in sources}
    impossible += [*more, *find_unknown_modules(sources, family)]
    impossible += [module for module, place in places.items() if place is None and module not in impossible]
    if impossible:
        raise cannot_convert(source.name, "cannot be carried to peft as OFT", impossible)
    size, shared = _block_size(source)
    eps = _common_bound(source)
    planned: dict[str, Made] = {}
    for module, place in places.items():
        assert place is not None
        for path in place.paths:
            if path in planned:
                raise InputError("two modules of the adapter would become this one", culprit=path)
            planned[path] = _plan_module(source, module, path, place, eps)
    settled = settle(with_modules(state, planned, {}, {}, Peft.key), None)
    metadata = former_metadata(source.file.metadata or {}, new_ranks=False)
    metadata.pop("loratool", None)
    config = {
        "peft_type": "OFT",
        "task_type": None,
        "r": 0,
        "oft_block_size": size,
        "block_share": shared,
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": TERMS,
        "coft": bool(eps),
        **({"eps": eps} if eps else {}),
        "target_modules": sorted(planned),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_weights": True,
        "module_dropout": 0.0,
        "modules_to_save": None,
        "peft_version": SERIES,
    }
    metadata["format"] = "pt"
    return replace(settled, config=config, metadata=metadata, family=family, is_certain=choice.is_certain)


@dataclass(frozen=True)
class _Place:
    """A module in diffusers' class."""

    paths: tuple[str, ...]  # of the modules that have its rows
    kernel: tuple[int, ...]  # of a convolution


def _place(source: SourceModule, family: str) -> _Place | None:
    """Return the place of a module; None if PEFT's OFT cannot have it there, or the family does not tell it."""
    table = table_of(source, family)
    located = locate(table, source.path) if table else None
    paths = complete_parts(located) if located else (source.path,)
    kernel = kernel_of(FAMILIES[family], source.path) if source.component in DENOISERS else ()
    is_square = kernel in ((), kernel[:1] * 2)  # PEFT has no other convolutions
    if not paths or not is_square or paths[0].endswith(UNFIT.get(family, "no module")):
        return None
    return _Place(paths, kernel)


def _choose_family(source: Adapter, sources: list[SourceModule], request: ConvertRequest) -> FamilyChoice:
    """Return the image family: the only one that fits, or any of them if all have the modules alike.

    Raises:
        NeedsFlag: only the user can know the family.
        InputError: it is no known image model.
    """
    likely = detect_families(sources)
    name = source.name
    if not likely:
        message = f"is not an adapter of a known image model ({KNOWN}): it has modules like {min(source.updates)}"
        raise InputError(message, culprit=name)
    if request.architecture is not None and request.architecture not in FAMILIES:
        raise UsageError(f"--architecture of an image model's adapter is one of {', '.join(FAMILIES)}", culprit=name)
    if request.architecture is not None or request.base is not None:
        return choose_family(name, sources, request, likely)
    is_told = bool(FAMILIES[likely[0]].up_attention) or has_known_sizes(sources, likely[0])
    possible = likely if is_told else fitting_families(sources)
    first, *rest = ([_place(each, key) for each in sources] for key in possible)
    if any(places != first for places in rest):
        could = " or of ".join(FAMILIES[key].title for key in possible[:2])
        options = " or ".join(f"--architecture {key}" for key in possible[:OFFERED])
        raise NeedsFlag(f"can be of {could} by its names, whose layers differ", culprit=name, flags=options)
    return FamilyChoice(possible[0], is_certain=not rest)


def _plan_module(source: Adapter, module: str, path: str, place: _Place, eps: float) -> Made:
    """Return a module of the output. eps: the bound in the config."""
    update = source.updates[module]
    (role,) = (role for role in update.specs if role in TRIANGLES)
    said, spec, tensors = _rotation_of(update), update.specs[role], {role: f"{path}.{role}.weight"}
    turned, has_factor = bool(place.kernel), said.is_scaled or said.eps != eps
    if has_factor and spec.dtype != "F64":
        spec = replace(spec, dtype="F32")
    detail = Rotation(said.coefficients, eps=eps)
    made = replace(update, module=path, tensors=tensors, specs={role: spec}, transposed=False, detail=detail)
    read = replace(update, detail=replace(said, turned=turned))

    def make() -> tuple[Tensors, Loss]:
        if not (turned or has_factor):
            return {role: source.file.numbers(update.tensors[role])}, NO_LOSS
        loaded = source.load(read)
        assert isinstance(loaded, OFT)
        numbers = loaded.multiplied_out() if has_factor else loaded.value.wide()
        value = rounded_to(-numbers if turned else numbers, FORMS[spec.dtype])
        loss = _loss(loaded, replace(loaded, value=value, rotation=detail)) if has_factor else NO_LOSS
        return {role: value}, loss

    how = "split" if len(place.paths) > 1 else "folded" if turned or has_factor else "exact"
    return Made(made, make, (module,), how, numbers=turned or has_factor)


def _rotation_of(update: UpdateSpec) -> Rotation:
    assert isinstance(update.detail, Rotation)
    return update.detail


def _loss(before: OFT, after: OFT) -> Loss:
    """Return how far R - I of all blocks moved, which is what a weight is multiplied by."""
    R, made = (each.mixing(1.0, False).matrices for each in (before, after))
    return Loss(float(np.square(made - R).sum()), float(np.square(R).sum()))


def _common_bound(source: Adapter) -> float:
    """Return the bound that the config can have for all modules; 0 if they differ."""
    said = map(_rotation_of, source.updates.values())
    bounds = {(rotation.eps, rotation.is_scaled) for rotation in said}
    (eps, is_scaled), *others = bounds
    return 0.0 if others or is_scaled else eps


def _block_size(source: Adapter) -> tuple[int, bool]:
    """Return `oft_block_size`, from which PEFT finds the size in each module, and whether blocks share numbers.

    PEFT takes the divisor of the inputs that is nearest to it, and of two the smaller.

    Raises:
        NeedsFlag: no number leads to the sizes of all modules.
    """
    blocks = {module: blocks_of(update) for module, update in source.updates.items()}
    sizes = [size for size, _ in Counter(size for _, size in blocks.values()).most_common()]
    single = all(count == 1 for count, _ in blocks.values())
    if len(sizes) == 1:
        return sizes[0], single  # blocks of a whole module share their numbers as well
    common = sizes[0]
    other = next(module for module, (_, size) in blocks.items() if size != common)
    message = f"has blocks of {blocks[other][1]}, and others of {common}, which no one oft_block_size makes"
    if not single:
        inputs = {(count * size, size) for count, size in blocks.values()}
        divisors = [([d for d in range(1, width + 1) if width % d == 0], size) for width, size in inputs]
        for number in (*sizes, *range(1, max(sizes) + 1)):
            if all(min(each, key=lambda d: (abs(d - number), d)) == size for each, size in divisors):
                return number, False
    raise NeedsFlag(message, culprit=other, flags=INSTEAD)
