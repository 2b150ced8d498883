"""Find the weights of an image model that a new adapter of `extract` or `init` can have factors for.

The VAE, norms, biases and embeddings get none. `image` plans what is written.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from contextlib import closing
from dataclasses import replace

from ...adapters.formats import FORMATS, usual_format, written_formats
from ...adapters.formats.format import Format
from ...adapters.updates.low_rank import LowRank
from ...adapters.updates.update import UpdateSpec
from ...architectures.components import DENOISER_PREFIXES
from ...architectures.families import FAMILIES
from ...architectures.families.table import DENOISERS
from ...architectures.image import ImageModules, image_modules, image_parts
from ...architectures.prefixes import module_path
from ...architectures.roles import weight_role
from ...binding.image_modules import KNOWN, SourceModule, detect_family, make_source_module
from ...errors import InputError, NeedsFlag, UsageError
from ...files.checkpoint import Checkpoint, open_checkpoint, require_one_model
from ...files.dtypes import TensorSpec
from .module_map import plan_target_modules


def image_weights(base: Checkpoint) -> dict[str, tuple[str, str]]:
    """Return the names of linear layers and convolutions, each with (component, path); empty for no image model."""
    shapes = {name: spec.shape for name, spec in base.specs.items()}
    found = image_parts(shapes)
    return {
        n: part for n, part in found.items() if weight_role(module_path(n), len(shapes[n]), True) in ("linear", "conv")
    }


def choose_format(base: Checkpoint, to: str | None) -> Format:
    """Return the format of an adapter for this base: `to`, or the usual one, which its users' tools load.

    Raises:
        InputError: nothing could load an adapter of this base in that format.
    """
    weights = image_weights(base)
    several = bool(base.parts) or len({component for component, _ in weights.values()}) > 1
    if to is None and weights and (several or _is_renamed(base)):
        return usual_format("pipeline" if base.parts else "single file")
    found = usual_format("model") if to is None else FORMATS[to]
    if found.can.components == "one":
        require_one_model(base)
        _refuse_unknown(base)
        if several:
            *others, last = (key for key, each in written_formats().items() if each.can.components == "many")
            raise InputError(
                f"is an image model of several components, and {to}'s adapters are for one",
                culprit=str(base.path),
                remedy=f"pass --to {', '.join(others)} or {last}",
            )
    elif not weights:
        raise InputError(f"is no image model: nothing could load it as {to}", culprit=str(base.path))
    return found


def _refuse_unknown(base: Checkpoint) -> None:
    """Raise InputError for a single file of an image model that is in no table: PEFT adapts diffusers' classes only."""
    known = "_class_name" in base.config or "architectures" in base.config or image_weights(base)
    if not known and all(name.startswith(DENOISER_PREFIXES[:2]) for name in base.specs):
        raise InputError(
            "is a single file of an image model that is not known, with its makers' names, under which nothing loads "
            "an adapter",
            culprit=str(base.path),
            remedy="pass the diffusers folder of the model's transformer, and the fine-tune's",
        )


def is_image_adapter(base: Checkpoint, to: Format) -> bool:
    """Return whether an adapter of a base is planned by the tables of image models.

    So is one for the denoiser alone whose base has other names than diffusers', for which PEFT's is.
    """
    return to.can.components == "many" or _is_renamed(base)


def require_language_model(base: Checkpoint, to: Format, architecture: str | None) -> None:
    """Raise UsageError for --architecture of an image model, whose parts have one class each."""
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
    """Return patterns for everything that no image adapter can change."""
    weights = image_weights(base)
    rest = {
        module_path(name) for name in base.specs if name not in weights and not name.startswith("first_stage_model.")
    }
    return ("first_stage_model.*", *sorted(rest))


def choose_family(
    name: str, families: Sequence[str], sources: list[SourceModule], base: str | os.PathLike[str] | None, to: Format
) -> str | None:
    """Return the image family of an adapter, a key of FAMILIES, or None if its modules are of no such model.

    Args:
        name: of the adapter, for messages.
        families: those that its modules fit.
        base: the model, which tells the family where the modules do not.
        to: the format to write.

    Raises:
        NeedsFlag: the modules are in several families, for which different files would be written.
        InputError: the base is of none of them.
    """
    if base is not None and len(families) > 1:
        with closing(open_checkpoint(base)) as model:
            found = family_of(model)
        if found not in families:
            titles = " and ".join(FAMILIES[each].title for each in families)
            raise InputError(f"is of {titles}, and {base} of {FAMILIES[found].title}", culprit=name)
        return found
    denoisers = [source for source in sources if source.component in DENOISERS]
    families = [each for each in families if each not in without_files(families, sources, to)] or families
    apart = families if denoisers else ()  # text encoders alone have the names that the first has
    meanings = {each: _meaning(denoisers, each, to) for each in apart}
    other = next((each for each in families[1:] if meanings.get(each) != meanings.get(families[0])), None)
    if other:
        raise NeedsFlag(
            f"has modules of both {FAMILIES[families[0]].title} and {FAMILIES[other].title}, which {to.key}'s files "
            "name in different ways",
            culprit=name,
            remedy="add --base BASE with the model",
        )
    return next(iter(families), None)


def without_files(families: Sequence[str], sources: Iterable[SourceModule], to: Format) -> list[str]:
    """Return those of some families of whose denoiser there are no files in a format."""
    there = {source.component for source in sources if source.component in DENOISERS}
    found = []
    for family in families:
        try:
            for component in there & {component.name for component in FAMILIES[family].components}:
                to.module_name(component, "", family)
        except InputError:
            found.append(family)
    return found


def _meaning(sources: list[SourceModule], family: str, to: Format) -> object:
    """Return what would be written for the modules of a family: the names, and the rows that each is made of."""
    plain = [replace(each, update=each.update.cls.without_norm(each.update)) for each in sources]
    try:
        return {
            to.module_name(target.component, target.path, family): [
                (part.source.module, part.start, part.stop, part.at) for part in target.parts
            ]
            for target in plan_target_modules(plain, family, to.naming(family))
        }
    except InputError as error:
        return error.message


def family_of(base: Checkpoint) -> str:
    """Return the family of an image model's base, a key of FAMILIES.

    Raises:
        InputError: it is of no known one.
    """
    known = _image(base).family
    if known and not known.up_attention:  # the UNets of different families may have the same modules
        return known.key
    one = {role: TensorSpec("F32", (1, 1)) for role in ("A", "B")}
    sources = []
    for name, (component, path) in image_weights(base).items():
        shape = base.specs[name].shape
        specs = {**one, "A": TensorSpec("F32", (1, *shape[1:])), "B": TensorSpec("F32", (shape[0], 1))}
        sources.append(make_source_module(name, UpdateSpec(LowRank, name, {}, specs), component, path))
    family = detect_family(sources)
    if family is None:
        raise InputError(f"is no image model that is known ({KNOWN})", culprit=str(base.path))
    return family
