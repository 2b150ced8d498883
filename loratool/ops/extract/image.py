"""Plan the adapter that `extract` writes in an image model's formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from ...adapters.formats.format import Format
from ...adapters.updates.low_rank import LowRank
from ...adapters.updates.update import UpdateSpec
from ...adapters.weight_kinds import factor_shapes
from ...binding.modules.image_modules import SourceModule, make_source_module
from ...errors import InputError, UsageError
from ...files.checkpoint import Checkpoint
from ...files.dtypes import TensorSpec, safetensors_name
from ...transform.delta_factors import DeltaFactors
from ...transform.image import plan_image
from ...transform.image_base import family_of, image_weights
from ...transform.lazy import Made, Tensors, start
from ...transform.log import NO_LOSS, Loss
from ...transform.new_factors import new_adapter
from ...transform.output import content, rows
from ...transform.request import ConvertRequest
from .adapter_plan import AdapterPlan


def plan_image_adapter(
    plan: AdapterPlan,
    to: Format,
    factored: Mapping[str, DeltaFactors],
    dtype: torch.dtype,
    base: Checkpoint,
    is_budget: bool,
) -> AdapterPlan:
    """Plan an adapter of format `to` with the ranks of a plan that was made for PEFT.

    Raises:
        InputError: the model's family is not known, or no matrix gets a rank.
        UsageError: the ranks follow from a budget, and the format needs more for modules that it splits.
    """
    weights, letters = image_weights(base), safetensors_name(dtype)

    def source(name: str, rank: int) -> SourceModule:
        shape = base.specs[name].shape
        A, B = factor_shapes("linear" if len(shape) == 2 else "conv", shape, rank)
        specs = {"A": TensorSpec(letters, A), "B": TensorSpec(letters, B)}
        tensors = {"A": f"{name}.A", "B": f"{name}.B"}
        return make_source_module(name, UpdateSpec(LowRank, name, tensors, specs), *weights[name])

    def made(each: SourceModule) -> Made:
        def make() -> tuple[Tensors, Loss]:
            A, B = factored[each.module].tensors(plan.ranks[each.module], dtype)
            return {"A": A, "B": B}, NO_LOSS

        return Made(each.update, make, (), numbers=False)

    family = family_of(base, to)
    sources = [source(name, rank) for name, rank in plan.ranks.items() if rank]
    if not sources:
        raise InputError("no matrix gets a rank, and image adapters hold nothing else", remedy="ask for more")
    adapter = new_adapter(
        str(base.path), base.shards[0], {each.module: made(each) for each in sources}, {"peft_type": "LORA"}
    )
    state = plan_image(start(adapter), family, ConvertRequest(to.key), sources, [], {})
    if is_budget and any(row.how == "split" for row in rows(state)):
        raise UsageError(
            f"--params and --size cannot be kept where {to.key} splits a fused module of the base, whose A then stands "
            "in each part: use --rank or --energy"
        )
    return replace(plan, content=content(state))
