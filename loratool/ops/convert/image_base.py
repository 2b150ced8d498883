"""Image models as bases of new adapters: which weights can have factors, under which names, and what is left out.

What `extract` and `init` make of such a base is laid out by `convert_image`. No image adapter can change the VAE,
norms, biases and embeddings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ...adapters.adapter import UpdateSpec
from ...architectures.image import MAKERS, MARKS, SINGLE_PREFIXES, image_parts
from ...architectures.prefixes import module_path
from ...architectures.roles import weight_role
from ...errors import InputError
from ...files.checkpoint import Checkpoint, require_one_model
from ...files.dtypes import TensorSpec
from .source_modules import IMAGE_FAMILIES, SINGLE_COMPONENT, detect_family, make_source_module

DENOISER = "model.diffusion_model."  # how the names of its weights begin in a single file of all components


OWN_NAMES = ("sgm", "flux", "sd3")  # of MARKS, those of a model's makers


def image_weights(base: Checkpoint) -> dict[str, tuple[str, str]]:
    """Linear layers and convolutions -> (component, path); empty for what is no image model."""
    shapes = {name: spec.shape for name, spec in base.specs.items()}
    found = image_parts(shapes)
    return {
        n: part for n, part in found.items() if weight_role(module_path(n), len(shapes[n]), True) in ("linear", "conv")
    }


def choose_format(base: Checkpoint, to: str | None) -> str:
    """`to`, or what the base's users load: diffusers' for a pipeline, kohya's for a file with its makers' names, else
    PEFT's. Raises InputError for what nothing could load.
    """
    weights = image_weights(base)
    several = bool(base.parts) or any(name.startswith(DENOISER) for name in weights)
    own = any(mark in name for name in weights for mark, kind in MARKS.items() if kind in OWN_NAMES)
    if to is None and weights and (several or own):
        return "diffusers" if base.parts else "kohya"
    if to in (None, *SINGLE_COMPONENT):
        require_one_model(base)
        _refuse_makers_names(base)
        if several:
            raise InputError(
                f"is an image model of several components, and {to}'s adapters are for one",
                culprit=str(base.path),
                remedy="pass --to kohya, diffusers or comfy",
            )
        return to or "peft"
    assert to is not None
    if not weights:
        raise InputError(f"is no image model: nothing could load it as {to}", culprit=str(base.path))
    return to


def _refuse_makers_names(base: Checkpoint) -> None:
    """Raise for the single file of a transformer whose names no class has: PEFT's adapters are diffusers' models'."""
    if "_class_name" in base.config or "architectures" in base.config:
        return
    own = {name: next((p for p in SINGLE_PREFIXES if name.startswith(p)), "") for name in base.specs}
    marks = (MAKERS.get(name.removeprefix(prefix)) for name, prefix in own.items())
    family = next(filter(None, marks), None)
    alone = all(prefix in SINGLE_PREFIXES[:2] for prefix in own.values())
    if family or (alone and not image_weights(base)):
        raise InputError(
            f"is a single file of {family or 'an image model'} with its makers' names, under which nothing loads an "
            "adapter",
            culprit=str(base.path),
            remedy="pass the diffusers folder of the model's transformer, and the fine-tune's",
        )


def weights_for_format(base: Checkpoint, form: str) -> Collection[str] | None:
    """Those that an adapter of this form can change, where it is an image model's; else None."""
    return image_weights(base) if form not in SINGLE_COMPONENT else None


def unsupported_patterns(base: Checkpoint) -> tuple[str, ...]:
    """Patterns of the matrices that no image adapter can change."""
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
        sources.append(make_source_module(name, UpdateSpec("lora", name, {}, specs), component, path))
    family = detect_family(sources)
    if family is None:
        raise InputError(
            f"is no image model that is known ({', '.join(IMAGE_FAMILIES.values())})", culprit=str(base.path)
        )
    return family
