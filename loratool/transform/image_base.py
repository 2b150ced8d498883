"""Find the weights of an image model that a new adapter of `extract` or `init` can have factors for.

The VAE, norms, biases and embeddings get none. `image` plans the output.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from ..adapters.formats import FORMATS, usual_format, written_formats
from ..adapters.formats.format import Format
from ..adapters.updates.low_rank import LowRank
from ..adapters.updates.update import UpdateSpec
from ..architectures.components import DENOISER_PREFIXES, FOLDERS
from ..architectures.families import FAMILIES
from ..architectures.families.lookup import names_maker
from ..architectures.families.table import DENOISERS, Naming
from ..architectures.image import ImageModules, image_modules, image_parts
from ..architectures.prefixes import module_path
from ..architectures.roles import weight_role
from ..binding.modules.image_modules import (
    KNOWN,
    SourceModule,
    detect_families,
    find_unknown_modules,
    fitting_families,
    has_known_sizes,
    make_source_module,
)
from ..errors import InputError, NeedsFlag, UsageError, brief
from ..files.checkpoint import Checkpoint, open_checkpoint, require_one_model
from ..files.dtypes import TensorSpec
from .module_map import plan_target_modules
from .request import ConvertRequest

OFFERED = 4  # families that a remedy lists


def image_weights(base: Checkpoint) -> dict[str, tuple[str, str]]:
    """Return the names of linear layers and convolutions, each with (component, path); empty for other models."""
    shapes = {name: spec.shape for name, spec in base.specs.items()}
    parts = image_parts(shapes)
    return {
        n: part
        for n, part in parts.items()
        if weight_role(module_path(n), len(shapes[n]), True) in ("linear", "conv")
        and shapes[n][1:] != (1,)  # frequencies of an embedding of time, which no layer holds
    }


def choose_format(base: Checkpoint, to: str | None) -> Format:
    """Return the format of an adapter for this base: `to`, or the one that its users' tools load.

    Raises:
        InputError: no program could load an adapter of this base in that format.
    """
    weights = image_weights(base)
    several = bool(base.parts) or len({component for component, _ in weights.values()}) > 1
    if to is None and weights and (several or _is_renamed(base)):
        return usual_format("pipeline" if base.parts else "single file")
    chosen = usual_format("model") if to is None else FORMATS[to]
    if chosen.can.components == "one":
        require_one_model(base)
        _refuse_unknown(base)
        if several:
            *others, last = (key for key, written in written_formats().items() if written.can.components == "many")
            raise InputError(
                f"is an image model of several components, and {to}'s adapters are for one",
                culprit=str(base.path),
                remedy=f"pass --to {', '.join(others)} or {last}",
            )
    elif not weights:
        raise InputError(f"is not an image model: nothing can load it as {to}", culprit=str(base.path))
    return chosen


def _refuse_unknown(base: Checkpoint) -> None:
    """Raise InputError for a single file of an unknown image model: PEFT adapts diffusers' classes only."""
    known = "_class_name" in base.config or "architectures" in base.config or image_weights(base)
    if not known and all(name.startswith(DENOISER_PREFIXES[:2]) for name in base.specs):
        raise InputError(
            "is a single file of an unknown image model with its maker's names, and no loader finds an adapter by "
            "these",
            culprit=str(base.path),
            remedy="pass the diffusers folder of the model's transformer, and the fine-tune's",
        )


def is_image_adapter(base: Checkpoint, to: Format) -> bool:
    """Return whether an adapter of a base is planned by the tables of image models.

    PEFT's format is planned by them only if the base's denoiser has other names than diffusers'.
    """
    return to.can.components == "many" or _is_renamed(base)


def require_language_model(base: Checkpoint, to: Format, architecture: str | None) -> None:
    """Raise UsageError for --architecture with an image model, whose components have one class each."""
    if architecture is not None and is_image_adapter(base, to):
        raise UsageError("--architecture is for language models, and this is an image model", culprit=str(base.path))


def weights_for_format(base: Checkpoint, to: Format) -> Collection[str] | None:
    """Return the weights that an adapter of an image model can change; None for another model."""
    return image_weights(base) if is_image_adapter(base, to) else None


def _is_renamed(base: Checkpoint) -> bool:
    """Return whether the tensors of an image model's denoiser have other names than in diffusers' class."""
    prefixed = any(path != module_path(n) for n, (part, path) in image_weights(base).items() if part in DENOISERS)
    return prefixed or _image(base).has_maker_names


def _image(base: Checkpoint) -> ImageModules:
    return image_modules({name: spec.shape for name, spec in base.specs.items()})


def unsupported_patterns(base: Checkpoint) -> tuple[str, ...]:
    """Return patterns for all modules that no image adapter can change."""
    weights = image_weights(base)
    rest = {
        module_path(name) for name in base.specs if name not in weights and not name.startswith("first_stage_model.")
    }
    return ("first_stage_model.*", *sorted(rest))


@dataclass(frozen=True)
class FamilyChoice:
    """The image family whose table converts an adapter, and how certain it is."""

    key: str | None  # a key of FAMILIES; None if the modules are of no such model
    is_certain: bool = True  # else several families fit, and the output is the same for all of them
    also: tuple[str, ...] = ()  # titles of families that repeat this one and have no files of the format


def choose_family(
    name: str, sources: list[SourceModule], request: ConvertRequest, likely: Sequence[str]
) -> FamilyChoice:
    """Return the image family of an adapter: the one that the request or its base names, else that of its modules.

    A base's config decides, whatever the sizes. Without one, a family is taken if the names and sizes of all modules
    are those of a known model of it, and of no other family's but one that `repeats` it. If those of several families
    fit, or the sizes are of no known model, the output must not depend on the family.

    Args:
        name: of the adapter, for messages.
        likely: the families that its modules fit best, keys of FAMILIES; empty if they fit no image model.

    Raises:
        NeedsFlag: only the user can know the family.
        InputError: the base, or the family that the request names, is another model.
    """
    to = FORMATS[request.to]
    denoisers = [source for source in sources if source.component in DENOISERS]
    if not likely or (not denoisers and len(likely) == 1):
        return FamilyChoice(next(iter(likely), None))
    fitting = fitting_families(sources)
    named = request.architecture if request.architecture in FAMILIES else None
    if named and named not in fitting:
        other = next(iter(find_unknown_modules(sources, named)), sources[0].module)
        raise InputError(f"is not a module of {FAMILIES[named].title}, which --architecture names", culprit=other)
    of_base = _families_of_request(name, request, [named] if named else fitting, likely)
    if named:
        return FamilyChoice(named)
    if not denoisers:  # text encoders alone have the same names in all of them
        return FamilyChoice(next(iter(of_base), likely[0]))
    is_sized = has_known_sizes(sources, likely[0])
    is_maker = len(fitting) == 1 and any(names_maker(FAMILIES[fitting[0]], key.path) for key in denoisers)
    is_told = bool(of_base) or is_sized or is_maker or bool(FAMILIES[likely[0]].up_attention)
    possible = of_base or (likely if is_told else fitting)
    others = without_files(possible, sources, to)
    outcomes = {key: _meaning(denoisers, key, to) for key in possible if key not in others}
    meanings = {key: outcome for key, outcome in outcomes.items() if not isinstance(outcome, str)}
    if not meanings:
        return FamilyChoice(possible[0])  # the plan refuses it
    first, *rest = meanings
    meaning = meanings[first]
    repeating = [key for key in others if FAMILIES[key].repeats == first]
    is_same = others == repeating and all(meanings[key] == meaning for key in rest)
    if is_same and is_told:
        return FamilyChoice(first, not (rest or others), tuple(FAMILIES[key].title for key in repeating))
    # such files have the model's own names, whatever its family
    free = to.can.usual_for in ("model", "pipeline")
    is_own = meaning.keys() == {to.module_name(key.component, key.path, first) for key in denoisers}
    if free and is_own and all(meanings[key] == meaning for key in rest):
        return FamilyChoice(first, False)
    titles = [FAMILIES[key].title for key in (*meanings, *others)]
    could = " or of ".join([*titles[:2], *([] if len(titles) == 2 else ["another"])])
    sizes = "" if is_told else ", and no such model is known with its sizes"
    of_key = [f"--architecture {key}" for key in list(meanings)[:OFFERED]]
    raise NeedsFlag(
        f"can be of {could} by its names{sizes}; what {to.key}'s files call its modules depends on that",
        culprit=name,
        flags=" or ".join([*of_key, *(() if request.base else ("--base BASE",))]),
        why=", ..." if len(meanings) > OFFERED else "",
    )


def _families_of_request(
    name: str, request: ConvertRequest, fitting: Sequence[str], likely: Sequence[str]
) -> tuple[str, ...]:
    """Return the families, among those that fit the modules, that the base can be of; empty without a base.

    Raises:
        InputError: the base is of no such family.
    """
    if request.base is None:
        return ()
    if request.base.is_config:
        class_name = _class_of(request.model)
        of_base = _of_class(class_name, request.model)
    else:
        with closing(open_checkpoint(request.base.path)) as model:
            of_base, class_name = _families_of(model), denoiser_class(model)
    found = tuple(key for key in of_base if key in fitting)
    if not found:
        what = " or ".join(FAMILIES[key].title for key in (fitting if len(fitting) == 1 else likely))
        unknown = f"a {brief(class_name)}, which is not a known image model" if class_name else "not an image model"
        of = FAMILIES[of_base[0]].title if of_base else f"{unknown} ({KNOWN})"
        raise InputError(f"is of {what} by its names, and {request.base.path} is {of}", culprit=name)
    return found


def without_files(families: Sequence[str], sources: Iterable[SourceModule], to: Format) -> list[str]:
    """Return the families, among these, whose denoisers have no files in a format."""
    components = {source.component for source in sources if source.component in DENOISERS}
    without = []
    for family in families:
        try:
            for component in components & {component.name for component in FAMILIES[family].components}:
                to.module_name(component, "", family)
        except InputError:
            without.append(family)
    return without


def _meaning(sources: list[SourceModule], family: str, to: Format) -> dict[str, list[tuple[str, int, int, int]]] | str:
    """Return the names in the output for a family and the rows of each, or an error message."""
    plain = [replace(source, update=source.update.cls.without_norm(source.update)) for source in sources]
    try:
        return {
            to.module_name(target.component, target.path, family): [
                (part.source.module, part.start, part.stop, part.target_start) for part in target.parts
            ]
            for target in plan_target_modules(plain, family, to.naming(family))
        }
    except InputError as error:
        return error.message


def denoiser_class(base: Checkpoint) -> str | None:
    """Return the class that the config of a base's denoiser names; None if it has none."""
    return _class_of(_denoiser_config(base))


def _denoiser_config(base: Checkpoint) -> Mapping[str, Any]:
    """Return the config of a base's denoiser; empty if none names a class."""
    folders = {f"{folder}/" for folder, component in FOLDERS.items() if component in DENOISERS}
    configs = [part.config for part in base.parts if part.prefix in folders] or [base.config]
    return next(filter(_class_of, configs), {})


def _class_of(config: Mapping[str, Any]) -> str | None:
    named = config.get("_class_name")
    return named if isinstance(named, str) else None


def family_of(base: Checkpoint, to: Format) -> str:
    """Return the family of an image model's base, a key of FAMILIES; its table names the modules.

    Raises:
        InputError: the family is unknown.
    """
    families = _families_of(base)
    if not families and all(to.naming(key) is Naming.DIFFUSERS for key in FAMILIES):  # under the base's own names
        families = _families_by_names(base)
    if not families:
        class_name = denoiser_class(base)
        named = f" ({brief(class_name)})" if class_name else ""
        raise InputError(f"is not a known image model{named}: {KNOWN}", culprit=str(base.path))
    return families[0]


def _families_of(base: Checkpoint) -> tuple[str, ...]:
    """Return the families of an image model's base, the likeliest first; empty if none is known.

    If its config names a class, these are the families of the class. Names tell among these.
    """
    by_names, named = _families_by_names(base), denoiser_class(base)
    of_class = by_names if named is None else _of_class(named, _denoiser_config(base))
    return tuple(key for key in by_names if key in of_class) or of_class


def _of_class(named: str | None, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the families whose denoiser is this class of diffusers, with these fields in its config."""
    return tuple(
        key
        for key, family in FAMILIES.items()
        if named in (family.diffusers_class, *family.other_classes)
        and all(config.get(name, value) == value for name, value in family.config.items())
    )


def _families_by_names(base: Checkpoint) -> tuple[str, ...]:
    image = _image(base)
    known = image.family
    if known and not known.up_attention:  # the UNets of different families may have the same modules
        # what is beside a transformer tells which of several pipelines it is of
        is_alone = not base.parts and not image.has_maker_names
        alike = [key for key, family in FAMILIES.items() if family.blocks is known.blocks and family is not known]
        return (known.key, *(alike if is_alone else ()))
    unit = {role: TensorSpec("F32", (1, 1)) for role in ("A", "B")}
    sources = []
    for name, (component, path) in image_weights(base).items():
        shape = base.specs[name].shape
        specs = {**unit, "A": TensorSpec("F32", (1, *shape[1:])), "B": TensorSpec("F32", (shape[0], 1))}
        sources.append(make_source_module(name, UpdateSpec(LowRank, name, {}, specs), component, path))
    return detect_families(sources)
