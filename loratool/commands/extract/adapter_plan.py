"""Plan the output of `extract` for one model, once the ranks are known: PEFT's format, and others from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ...adapters.formats.content import AdapterContent
from ...adapters.formats.format import Format
from ...adapters.formats.peft import Peft
from ...adapters.formats.peft_config import lora_config
from ...adapters.updates.low_rank import LowRank
from ...adapters.updates.update import UpdateSpec
from ...adapters.weight_kinds import factor_shapes, locate_factors
from ...architectures.prefixes import module_path
from ...binding.modules.image_modules import SourceModule, make_source_module
from ...binding.names.class_names import ClassNames
from ...binding.names.peft_names import target_modules
from ...binding.weights.model_weights import model_weights
from ...errors import InputError, UsageError
from ...files.checkpoint import Checkpoint
from ...files.dtypes import TensorSpec
from ...files.hub.names import base_fields
from ...files.tensor_ref import TensorRef
from ...numerics.arrays import rounded_to
from ...numerics.forms import Form
from ...transform.base import Base
from ...transform.delta_factors import DeltaFactors
from ...transform.image import plan_image
from ...transform.image_base import family_of, image_weights
from ...transform.lazy import Made, Tensors, Transformed, start
from ...transform.log import NO_LOSS, Loss
from ...transform.new_factors import factored_update, new_adapter, replaced_update
from ...transform.numbers import Settled
from ...transform.output import content, rows
from ...transform.plan import plan_one_model
from ...transform.request import ConvertRequest, request_for
from .changes import SortedDeltas


@dataclass(frozen=True)
class AdapterPlan:
    """An adapter with known ranks, ready to be written."""

    adapter: Transformed  # in PEFT's names
    content: AdapterContent  # of the format that is written
    ranks: Mapping[str, int]  # by the base tensor's name
    effective_rank: Callable[[str], float]  # that of the factors of a key of `ranks`
    stored: Callable[[str], float]  # relative error that the factors' dtype adds, for a key of `ranks`


def plan_adapter(
    deltas: SortedDeltas,
    factored: Mapping[str, DeltaFactors],
    ranks: Mapping[str, int],
    form: Form,
    base: Checkpoint,
    base_name: str,
) -> AdapterPlan:
    """Plan a PEFT adapter's tensors and config from factored deltas and exact tensors.

    `factored` and `ranks` have the base's tensor names; the factors' journal must be open until the last is loaded.
    """
    in_model = deltas.in_model or str
    weights = {name: delta.weight for name, delta in deltas.low_rank.items()}
    name_at = {weight.in_model: name for name, weight in weights.items()}
    uses = {
        weights[name].in_model: [(in_model(use), transposed) for use, transposed in delta.uses]
        for name, delta in deltas.low_rank.items()
        if delta.uses
    }
    layout = locate_factors(
        {path: factored[name].kind for path, name in name_at.items()},
        {path: ranks[name] for path, name in name_at.items() if name in ranks},
        uses,
        {weight.in_model for weight in weights.values() if weight.bare},
    )
    modules = layout.modules
    new_modules: dict[str, Made] = {}
    for wrapper, (path, transposed) in layout.wrappers.items():
        name = name_at[path]
        kind, shape, rank = factored[name].kind, factored[name].shape, ranks[name]
        A, B = factor_shapes(kind, shape, rank)
        A, B = (B[::-1], A[::-1]) if transposed else (A, B)
        sides = TensorSpec(form.name, A), TensorSpec(form.name, B)
        as_kind, bare = "head" if transposed else kind, weights[name].bare
        update = factored_update(as_kind, path, wrapper, sides, 1.0, factored[name].sizes[0], bare)

        def make(name: str = name, transposed: bool = transposed) -> tuple[Tensors, Loss]:
            A, B = factored[name].tensors(ranks[name], form)
            return {"A": B.T, "B": A.T} if transposed else {"A": A, "B": B}, NO_LOSS

        new_modules[update.module] = Made(update, make, (), numbers=False)
    if not layout.wrappers:
        new_modules |= _zero_pair(base, deltas.in_model, modules, form)
    for name, source in deltas.exact.items():
        path = in_model(name)
        owner = path.rpartition(".")[0]
        wrapped = owner in modules or f"{owner}.weight" in layout.parameters
        key = f"{owner}.base_layer.bias" if path.endswith(".bias") and wrapped else path
        update = replaced_update(path, key, source.spec)

        def copy(source: TensorRef = source) -> tuple[Tensors, Loss]:
            return {"value": source.numbers()}, NO_LOSS

        new_modules[update.module] = Made(update, copy, (), numbers=False)
    config = lora_config(
        modules,
        layout.parameters,
        target_modules=target_modules(base, deltas.in_model, modules) if deltas.in_model else sorted(modules),
        bias="all" if deltas.biased else "none",
        **base_fields(base_name),
        modules_to_save=sorted(deltas.saved) or None,
    )
    state = start(new_adapter(str(base.path), base.shards[0], new_modules, config))
    settled = Settled(state.adapter, state.log, config=config)
    return AdapterPlan(
        settled,
        content(settled),
        ranks,
        lambda name: factored[name].effective_rank(ranks[name]),
        lambda name: factored[name].rounding_error(ranks[name], form),
    )


def plan_language_adapter(plan: AdapterPlan, to: Format, base: Checkpoint) -> AdapterPlan:
    """Convert a plan for PEFT to another format of one model.

    Raises:
        NeedsFlag: the format cannot hold all changes.
    """
    if to.key == Peft.key:
        return plan
    request = ConvertRequest(to.key, base=Base(str(base.path), base.config, False, lambda what: base))
    with request_for("extract"):
        settled = plan_one_model(plan.adapter, request)
    return replace(plan, content=content(settled, base.config))


def _zero_pair(base: Checkpoint, in_model: ClassNames | None, modules: dict[str, int], form: Form) -> dict[str, Made]:
    """Return one pair of zero factors: PEFT loads no adapter without targets, not even one with biases."""
    for weight in model_weights(base, in_model):
        if weight.role == "linear" and not weight.bare:
            module, (_, out, inp) = module_path(weight.in_model), weight.sizes
            sides = TensorSpec(form.name, (1, inp)), TensorSpec(form.name, (out, 1))
            update = factored_update("linear", weight.in_model, module, sides, 1.0, 1, bare=False)

            def make(update: UpdateSpec = update) -> tuple[Tensors, Loss]:
                return {role: rounded_to(np.zeros(spec.shape), form) for role, spec in update.specs.items()}, NO_LOSS

            modules[module] = 1
            return {module: Made(update, make, (), numbers=False)}
    return {}


def plan_image_adapter(
    plan: AdapterPlan,
    to: Format,
    factored: Mapping[str, DeltaFactors],
    form: Form,
    base: Checkpoint,
    is_budget: bool,
) -> AdapterPlan:
    """Plan an adapter of format `to`, with the ranks of a plan for PEFT.

    Raises:
        InputError: the model's family is not known, or no matrix gets a rank.
        UsageError: the ranks follow from a budget, and the format needs more for modules that it splits.
    """
    weights = image_weights(base)

    def source(name: str, rank: int) -> SourceModule:
        shape = base.specs[name].shape
        A, B = factor_shapes("linear" if len(shape) == 2 else "conv", shape, rank)
        specs = {"A": TensorSpec(form.name, A), "B": TensorSpec(form.name, B)}
        tensors = {"A": f"{name}.A", "B": f"{name}.B"}
        return make_source_module(name, UpdateSpec(LowRank, name, tensors, specs), *weights[name])

    def made(module: SourceModule) -> Made:
        def make() -> tuple[Tensors, Loss]:
            A, B = factored[module.module].tensors(plan.ranks[module.module], form)
            return {"A": A, "B": B}, NO_LOSS

        return Made(module.update, make, (), numbers=False)

    family = family_of(base, to)
    sources = [source(name, rank) for name, rank in plan.ranks.items() if rank]
    if not sources:
        raise InputError(
            "no matrix gets a rank, so the adapter would be empty", remedy="choose a higher rank or budget"
        )
    adapter = new_adapter(
        str(base.path), base.shards[0], {each.module: made(each) for each in sources}, {"peft_type": "LORA"}
    )
    state = plan_image(start(adapter), family, ConvertRequest(to.key), sources, [], {})
    if is_budget and any(row.how == "split" for row in rows(state)):
        raise UsageError(
            f"--params and --size are not supported here: {to.key} splits a fused module of the base, and each part "
            "gets a copy of A: use --rank or --energy"
        )
    return replace(plan, content=content(state))
