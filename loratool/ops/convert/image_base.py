"""Find the weights of an image model that a new adapter of `extract` or `init` can have factors for.

The VAE, norms, biases and embeddings get none. `image` plans what is written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ...adapters.formats import FORMATS, usual_format, written_formats
from ...adapters.formats.format import Format
from ...adapters.updates.low_rank import LowRank
from ...adapters.updates.update import UpdateSpec
from ...architectures.families import family_of_names, names_maker
from ...architectures.image import MAKERS, SINGLE_PREFIXES, image_parts
from ...architectures.prefixes import module_path
from ...architectures.roles import weight_role
from ...errors import InputError
from ...files.checkpoint import Checkpoint, require_one_model
from ...files.dtypes import TensorSpec
from .source_modules import detect_family, known_families, make_source_module

DENOISER = "model.diffusion_model."  # the denoiser's prefix in a single file of all components


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
    several = bool(base.parts) or any(name.startswith(DENOISER) for name in weights)
    denoiser = [path for component, path in weights.values() if component == "unet"]
    table = family_of_names(denoiser)
    maker_names = table is not None and any(names_maker(table, path) for path in denoiser)
    if to is None and weights and (several or maker_names):
        return usual_format("pipeline" if base.parts else "single file")
    found = usual_format("model") if to is None else FORMATS[to]
    if found.can.components == "one":
        require_one_model(base)
        _refuse_makers_names(base)
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


def _refuse_makers_names(base: Checkpoint) -> None:
    """Raise InputError for a single file with its makers' names, since PEFT adapts diffusers' model classes only."""
    if "_class_name" in base.config or "architectures" in base.config:
        return
    prefixes = {name: next((p for p in SINGLE_PREFIXES if name.startswith(p)), "") for name in base.specs}
    marks = (MAKERS.get(name.removeprefix(prefix)) for name, prefix in prefixes.items())
    family = next(filter(None, marks), None)
    alone = all(prefix in SINGLE_PREFIXES[:2] for prefix in prefixes.values())
    if family or (alone and not image_weights(base)):
        raise InputError(
            f"is a single file of {family or 'an image model'} with its makers' names, under which nothing loads an "
            "adapter",
            culprit=str(base.path),
            remedy="pass the diffusers folder of the model's transformer, and the fine-tune's",
        )


def weights_for_format(base: Checkpoint, to: Format) -> Collection[str] | None:
    """Return the weights that an adapter of an image format can change; None for a format of one model."""
    return image_weights(base) if to.can.components == "many" else None


def unsupported_patterns(base: Checkpoint) -> tuple[str, ...]:
    """Return patterns for everything that no image adapter can change."""
    weights = image_weights(base)
    rest = {
        module_path(name) for name in base.specs if name not in weights and not name.startswith("first_stage_model.")
    }
    return ("first_stage_model.*", *sorted(rest))


def _family(base: Checkpoint, weights: Mapping[str, tuple[str, str]]) -> str:
    one = {role: TensorSpec("F32", (1, 1)) for role in ("A", "B")}
    sources = []
    for name, (component, path) in weights.items():
        shape = base.specs[name].shape
        specs = {**one, "A": TensorSpec("F32", (1, *shape[1:])), "B": TensorSpec("F32", (shape[0], 1))}
        sources.append(make_source_module(name, UpdateSpec(LowRank, name, {}, specs), component, path))
    family = detect_family(sources)
    if family is None:
        raise InputError(f"is no image model that is known ({known_families()})", culprit=str(base.path))
    return family
