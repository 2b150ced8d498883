"""Image models as bases of new adapters: which weights can have factors, under which names, and what is left out.

What `extract` and `init` make of such a base is laid out by `convert_image`. No image adapter can change the VAE,
norms, biases and embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from ..adapter import UpdateSpec
from ..architectures.image import MAKERS, MARKS, SINGLE_PREFIXES, image_parts
from ..architectures.roles import role
from ..architectures.wrappers import PEFT_PREFIX, module_of
from ..checkpoint import Checkpoint, require_one_model
from ..converting import FAMILIES, SINGLE_COMPONENT, Source, as_source, family_of
from ..errors import InputError, UsageError
from ..extraction import Plan
from ..factoring import Factored, FactorSpool, factor_shapes
from ..formats import FORMATS
from ..formats.peft_write import SAFETENSORS
from ..initialization import Site, Starter
from ..tensorfile import TensorSpec
from ..unwritten import UnwrittenFile
from ..updates import LowRank
from .convert_image import Image, plan_image
from .convert_language import Output, Wish, asked_by, low_rank, plan_language, select

DENOISER = "model.diffusion_model."  # how the names of its weights begin in a single file of all components
OWN_NAMES = ("sgm", "flux", "sd3")  # of MARKS, those of a model's makers


def image_weights(base: Checkpoint) -> dict[str, tuple[str, str]]:
    """Linear layers and convolutions -> (component, path); empty for what is no image model."""
    shapes = {name: spec.shape for name, spec in base.specs.items()}
    found = image_parts(shapes)
    return {n: part for n, part in found.items() if role(module_of(n), len(shapes[n]), True) in ("linear", "conv")}


def choose_form(base: Checkpoint, to: str | None) -> str:
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


def weights_for(base: Checkpoint, form: str) -> Collection[str] | None:
    """Those that an adapter of this form can change, where it is an image model's; else None."""
    return image_weights(base) if form not in SINGLE_COMPONENT else None


def left_out(base: Checkpoint) -> tuple[str, ...]:
    """Patterns of the matrices that no image adapter can change."""
    weights = image_weights(base)
    rest = {module_of(name) for name in base.specs if name not in weights and not name.startswith("first_stage_model.")}
    return ("first_stage_model.*", *sorted(rest))


def _family(base: Checkpoint, weights: Mapping[str, tuple[str, str]]) -> str:
    one = {role: TensorSpec("F32", (1, 1)) for role in ("A", "B")}
    sources = []
    for name, (component, path) in weights.items():
        shape = base.specs[name].shape
        specs = {**one, "A": TensorSpec("F32", (1, *shape[1:])), "B": TensorSpec("F32", (shape[0], 1))}
        sources.append(as_source(name, UpdateSpec("lora", name, {}, specs), component, path))
    family = family_of(sources)
    if family is None:
        raise InputError(f"is no image model that is known ({', '.join(FAMILIES.values())})", culprit=str(base.path))
    return family


def plan_image_adapter(
    plan: Plan,
    to: str,
    factored: Mapping[str, Factored],
    spool: FactorSpool,
    dtype: torch.dtype,
    base: Checkpoint,
    is_budget: bool,
) -> Plan:
    """What `extract` writes. plan: of PEFT's adapter, whose ranks these are. Raises InputError for a family that is not
    known.
    """
    weights, letters = image_weights(base), SAFETENSORS[str(dtype).removeprefix("torch.")]

    def source(name: str, rank: int) -> Source:
        shape = base.specs[name].shape
        A, B = factor_shapes("linear" if len(shape) == 2 else "conv", shape, rank)
        specs = {"A": TensorSpec(letters, A), "B": TensorSpec(letters, B)}
        return as_source(name, UpdateSpec("lora", name, {"A": name, "B": name}, specs), *weights[name])

    def load(each: Source) -> LowRank:
        A, B = spool.tensors(factored[each.module], plan.ranks[each.module], dtype)
        return LowRank(A, B, 1.0)

    family = _family(base, weights)
    sources = [source(name, rank) for name, rank in plan.ranks.items() if rank]
    if not sources:
        raise InputError("no matrix gets a rank, and image adapters hold nothing else", remedy="ask for more")
    made = plan_image(Image(str(base.path), {}, family, load), Wish(to), sources, [])
    if is_budget and any(module.how == "split" for module in made.modules):
        raise UsageError(
            f"--params and --size cannot be kept where {to} splits a fused module of the base, whose A then stands in "
            "each part: use --rank or --energy"
        )
    return Plan(made.specs, made.load, made.metadata, plan.ranks, plan.effective_rank, plan.stored)


def plan_start(base: Checkpoint, to: str, sites: Sequence[Site], starter: Starter, config: Mapping[str, Any]) -> Output:
    """What `init` writes. config: of PEFT's adapter."""
    specs = {**starter.specs, **starter.magnitude_specs}
    if to == "peft":
        return Output(specs, starter.load, config, {}, (), (), ())
    file = UnwrittenFile(
        base.shards[0],
        {PEFT_PREFIX + name: spec for name, spec in specs.items()},
        lambda name: starter.load_any(name.removeprefix(PEFT_PREFIX)),
        {"loratool": json.dumps({"adapter_config": config})},
    )
    adapter = FORMATS["peft"].read(str(base.path), file, None, False)
    wish = Wish(to)
    if to == "loralib":
        with asked_by("init"):
            return plan_language(adapter, wish, *select(adapter, wish))
    weights, weight_of = image_weights(base), {site.wrapper: site.weight.name for site in sites}
    family = _family(base, weights)
    sources = [as_source(m, update, *weights[weight_of[m]]) for m, update in adapter.updates.items()]
    return plan_image(Image(adapter.name, {}, family, lambda each: low_rank(adapter, each)), wish, sources, [])
