"""The adapter that `extract` makes of an image model: kohya's, diffusers' or ComfyUI's names, and no biases.

The factors are those of every matrix, laid out by `convert_image`; whatever no image adapter can change (the VAE,
norms, biases, embeddings) is left out, and so named with its norm.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..adapter import UpdateSpec
from ..architectures.image import image_parts
from ..architectures.roles import role
from ..architectures.wrappers import module_of
from ..checkpoint import Checkpoint
from ..choices import EXTRACT_TO
from ..converting import Source, family_of
from ..errors import InputError, UsageError
from ..extraction import Plan
from ..factoring import Factored, FactorSpool, factor_shapes
from ..formats.peft_write import SAFETENSORS
from ..tensorfile import TensorSpec
from ..updates import LowRank
from .convert_image import Image, plan_image
from .convert_language import Wish

DENOISER = "model.diffusion_model."


def _parts(base: Checkpoint) -> dict[str, tuple[str, str]]:
    """Linear layers and convolutions -> (component, path)."""
    shapes = {name: spec.shape for name, spec in base.specs.items()}
    found = image_parts(shapes)
    return {n: part for n, part in found.items() if role(module_of(n), len(shapes[n]), True) in ("linear", "conv")}


def choose_target(base: Checkpoint, to: str | None) -> str:
    """Raises InputError for an image convention where the base is no image model."""
    parts = _parts(base)
    if to in (None, "peft"):
        return to or ("kohya" if any(name.startswith(DENOISER) for name in parts) else "peft")
    if to not in EXTRACT_TO:
        raise UsageError(f"format {to!r} is none of {', '.join(EXTRACT_TO)}")
    if not parts:
        raise InputError(f"is no image model: nothing could load it as {to}", culprit=str(base.path))
    assert to is not None
    return to


def left_out(base: Checkpoint) -> tuple[str, ...]:
    """Patterns of the matrices that no image adapter can change."""
    parts = _parts(base)
    rest = {module_of(name) for name in base.specs if name not in parts and not name.startswith("first_stage_model.")}
    return ("first_stage_model.*", *sorted(rest))


def plan_image_adapter(
    plan: Plan,
    to: str,
    factored: Mapping[str, Factored],
    spool: FactorSpool,
    dtype: torch.dtype,
    base: Checkpoint,
    is_budget: bool,
) -> Plan:
    """plan: of PEFT's adapter, whose ranks these are. Raises InputError for a family that is not known."""
    shapes, parts = {name: spec.shape for name, spec in base.specs.items()}, _parts(base)
    letters = SAFETENSORS[str(dtype).removeprefix("torch.")]

    def source(name: str, rank: int) -> Source:
        A, B = factor_shapes("linear" if len(shapes[name]) == 2 else "conv", shapes[name], rank)
        specs = {"A": TensorSpec(letters, A), "B": TensorSpec(letters, B)}
        component, path = parts[name]
        return Source(name, UpdateSpec("lora", name, {"A": name, "B": name}, specs), component, path)

    def load(each: Source) -> LowRank:
        A, B = spool.tensors(factored[each.module], plan.ranks[each.module], dtype)
        return LowRank(A, B, 1.0)

    family = family_of([source(name, 1) for name in parts])
    if family is None:
        raise InputError("is no image model that is known (SD 1, SD 2, SDXL, Flux)", culprit=str(base.path))
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
