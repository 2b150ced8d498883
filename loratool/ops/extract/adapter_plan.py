"""Plan the adapter of one model that `extract` writes, once the ranks are known: PEFT's, and from it any other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from ...adapters.formats.content import AdapterContent
from ...adapters.formats.format import Format
from ...adapters.formats.peft import Peft, virtual_adapter
from ...adapters.formats.peft_config import lora_config
from ...adapters.weight_kinds import WEIGHT_KINDS, factor_shapes, locate_factors
from ...architectures.prefixes import module_path
from ...binding.class_names import ClassNames
from ...binding.model_weights import model_weights
from ...binding.peft_names import target_modules
from ...files.checkpoint import Checkpoint
from ...files.dtypes import TensorSpec, safetensors_name
from ...files.hub_names import base_fields
from ...transform.base import Base
from ...transform.delta_factors import DeltaFactors
from ...transform.lazy import start
from ...transform.output import content
from ...transform.plan import plan_one_model
from ...transform.request import ConvertRequest, request_for
from .changes import SortedDeltas


@dataclass(frozen=True)
class AdapterPlan:
    """An adapter whose ranks are known, ready to be written."""

    content: AdapterContent
    ranks: Mapping[str, int]  # by the base tensor's name
    effective_rank: Callable[[str], float]  # that of the factors of a key of `ranks`
    stored: Callable[[str], float]  # relative error that the factors' dtype adds, for a key of `ranks`


def plan_adapter(
    found: SortedDeltas,
    factored: Mapping[str, DeltaFactors],
    ranks: Mapping[str, int],
    dtype: torch.dtype,
    base: Checkpoint,
    base_name: str,
) -> AdapterPlan:
    """Plan a PEFT adapter's tensors and config from factored deltas and from tensors that are kept exactly.

    `factored` and `ranks` have the base's tensor names; the factors' journal must be open until the last is loaded.
    """
    in_model = found.in_model or str
    weights = {name: delta.weight for name, delta in found.low_rank.items()}
    name_at = {weight.in_model: name for name, weight in weights.items()}
    uses = {
        weights[name].in_model: [(in_model(use), transposed) for use, transposed in delta.uses]
        for name, delta in found.low_rank.items()
        if delta.uses
    }
    layout = locate_factors(
        {path: factored[name].kind for path, name in name_at.items()},
        {path: ranks[name] for path, name in name_at.items() if name in ranks},
        uses,
        {weight.in_model for weight in weights.values() if weight.bare},
    )
    modules = layout.modules
    tensors: dict[str, Callable[[], torch.Tensor]] = {}
    specs: dict[str, TensorSpec] = {}
    letters = safetensors_name(dtype)

    def factors(name: str, transposed: bool, side: int) -> Callable[[], torch.Tensor]:
        def load() -> torch.Tensor:
            pair = factored[name].tensors(ranks[name], dtype)
            return pair[1 - side].T.contiguous() if transposed else pair[side]

        return load

    for wrapper, (path, transposed) in layout.wrappers.items():
        name = name_at[path]
        kind = WEIGHT_KINDS["head" if transposed else factored[name].kind]
        shapes = factor_shapes(factored[name].kind, factored[name].shape, ranks[name])
        for side, key in enumerate(kind.keys):
            tensors[f"{wrapper}.{key}"] = factors(name, transposed, side)
            specs[f"{wrapper}.{key}"] = TensorSpec(letters, shapes[1 - side][::-1] if transposed else shapes[side])
    for name, source in found.exact.items():
        path = in_model(name)
        owner = path.rpartition(".")[0]
        wrapped = owner in modules or f"{owner}.weight" in layout.parameters
        key = f"{owner}.base_layer.bias" if path.endswith(".bias") and wrapped else path
        tensors[key] = lambda source=source: source.tensor()  # type: ignore[misc]
        specs[key] = source.spec
    if not layout.wrappers:
        _zero_pair(base, found.in_model, tensors, specs, modules, letters, dtype)
    config = lora_config(
        modules,
        layout.parameters,
        target_modules=target_modules(base, found.in_model, modules) if found.in_model else sorted(modules),
        bias="all" if found.biased else "none",
        **base_fields(base_name),
        modules_to_save=sorted(found.saved) or None,
    )
    return AdapterPlan(
        AdapterContent(specs, lambda key: tensors[key](), config),
        ranks,
        lambda name: factored[name].effective_rank(ranks[name]),
        lambda name: factored[name].stored(ranks[name], dtype),
    )


def plan_language_adapter(plan: AdapterPlan, to: Format, base: Checkpoint) -> AdapterPlan:
    """Return a plan that was made for PEFT in another format of one model.

    Raises:
        NeedsFlag: what changed is more than the format can hold.
    """
    if to.key == Peft.key:
        return plan
    adapter = virtual_adapter(str(base.path), base.shards[0], plan.content)
    request = ConvertRequest(to.key, base=Base(str(base.path), base.config, False, lambda what: base))
    with request_for("extract"):
        made = plan_one_model(start(adapter), request)
    return replace(plan, content=content(made, base.config))


def _zero_pair(
    base: Checkpoint,
    in_model: ClassNames | None,
    tensors: dict[str, Callable[[], torch.Tensor]],
    specs: dict[str, TensorSpec],
    modules: dict[str, int],
    letters: str,
    dtype: torch.dtype,
) -> None:
    """Add one pair of zero factors: PEFT loads no adapter that targets nothing, not even one of biases alone."""
    for weight in model_weights(base, in_model):
        if weight.role == "linear" and not weight.bare:
            module, (_, out, inp) = module_path(weight.in_model), weight.sizes
            for key, shape in (("lora_A.weight", (1, inp)), ("lora_B.weight", (out, 1))):
                specs[f"{module}.{key}"] = TensorSpec(letters, shape)
                tensors[f"{module}.{key}"] = lambda shape=shape: torch.zeros(shape, dtype=dtype)  # type: ignore[misc]
            modules[module] = 1
            bias = f"{module}.bias"
            if bias in specs:
                specs[f"{module}.base_layer.bias"] = specs.pop(bias)
                tensors[f"{module}.base_layer.bias"] = tensors.pop(bias)
            return
