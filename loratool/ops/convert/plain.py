"""Plan a language model's adapter as plain LoRA: the scales are folded into the factors, and alpha is the rank.

A base-mutating init is subtracted, [A; A0] and [s B | -s B0] (peft's `subtract_mutated_init`), so that the adapter fits
the original base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from ...adapters.adapter import Adapter
from ...adapters.edited import CarriedTensor, EditedAdapter, edited_adapter_config
from ...adapters.formats import FORMATS
from ...adapters.formats.content import AdapterContent
from ...adapters.formats.peft import Peft
from ...adapters.formats.peft_config import base_mutating_init
from ...adapters.stacked import factor_dtypes, round_factors, stack_factors
from ...adapters.updates.add import AddDelta
from ...adapters.updates.update import UpdateSpec
from ...errors import NeedsFlag
from ...files.tensor_ref import TensorRef as Stored
from ...numerics.factored_svd import factored_svd
from ..inputs import WeightedAdapter, subtract_initial
from .factors import EPSILON, NO_LOSS, Loss, is_exact_product, relative_error
from .language import PT, config_from
from .request import AdapterOutput, ConvertRequest, ModuleConvert, alpha_notes

FactorPair = tuple[Tensor, Tensor]


def plan_plain(
    source: Adapter,
    request: ConvertRequest,
    kept: Mapping[str, UpdateSpec],
    dropped: tuple[str, ...],
    lost: Mapping[str, Loss],
    opened: ExitStack,
) -> AdapterOutput:
    """Plan the output.

    Args:
        lost: module -> what `dora_to_lora` or `as_low_rank` approximated.
        opened: closes the initial adapter.

    Raises:
        NeedsFlag: the init altered the base, and the initial adapter was not given.
    """
    init = base_mutating_init(source.config)
    if init and request.initial is None:
        raise NeedsFlag(
            f"was initialized with {init}, which changed the base under it",
            culprit=source.name,
            remedy="add --initial ADAPTER with the adapter as it was before training",
        )
    loaded: WeightedAdapter = ((source, 1.0),)
    if request.initial is not None:
        loaded = subtract_initial(loaded, request.initial, False, opened)
    names: dict[str, dict[str, str]] = {module: {} for module in kept}
    for name, (module, role) in FORMATS[request.to].names(source, kept).items():
        names[module][role] = name
    updates = {m: replace(u, tensors={r: names[m][r] for r in u.tensors}) for m, u in kept.items() if u.rank}
    dtype = request.dtype or torch.float32
    own = {m: u.rank * len(loaded) for m, u in updates.items()}
    cut = {m: request.rank for m, rank in own.items() if request.rank is not None and request.rank < rank}
    ranks = own | cut

    def factors(module: str) -> FactorPair:
        return _plain_factors(module, _exact_factors(module, loaded), cut.get(module), dtype)

    fields: dict[str, object] = {"init_lora_weights": True} if len(loaded) > 1 else {}
    like = replace(source, format=Peft.key)  # its config has the fields of every format of language models
    if source.format != Peft.key:
        like = replace(like, config=replace(source.config, peft=config_from(source, kept), own={}))
    edited = EditedAdapter(
        template=like,
        updates=updates,
        ranks=ranks,
        factors=factors,
        carried=_other_tensors(source, kept, names),
        dtype=dtype,
        fields=fields,
    )
    rows = []
    for module, update in updates.items():
        true = _exact_factors(module, loaded)
        error = _error(true, _plain_factors(module, true, cut.get(module), dtype), _is_exact(module, loaded))
        former = lost.get(module, NO_LOSS)
        error = math.hypot(error, former.relative)
        less = module in cut or former.how == "truncated"
        how = "truncated" if error and less else "rounded" if error else "exact" if update.scale == 1.0 else "folded"
        rows.append(ModuleConvert(module, (module,), how, ranks[module], float(ranks[module]), error))
    content = AdapterContent(edited.specs(), edited.loader(), edited_adapter_config(edited), PT, request.model)
    notes = (*alpha_notes(request.to, rows), *FORMATS[request.to].model_notes(request.model))
    return AdapterOutput(content, tuple(rows), dropped, notes)


def _exact_factors(module: str, loaded: WeightedAdapter) -> FactorPair:
    """Return (B, A) of the weighted sum of all adapters, in float64, weights and scales in B."""
    terms = [(w, *stack_factors(each.load(each.updates[module]))) for each, w in loaded if module in each.updates]
    return torch.cat([weight * B for weight, B, _ in terms], -1), torch.cat([A for *_, A in terms], -2)


def _is_exact(module: str, loaded: WeightedAdapter) -> bool:
    """Return whether float64 holds the module's factors with their scales folded in."""
    found = [each.updates[module] for each, _ in loaded if module in each.updates]
    return all(is_exact_product(factor_dtypes(u)[1], u.scale) for u in found)


def _plain_factors(module: str, true: FactorPair, rank: int | None, dtype: torch.dtype) -> FactorPair:
    return round_factors(module, true if rank is None else factored_svd(*true).truncated(rank), dtype)


def _error(true: FactorPair, made: FactorPair, is_exact: bool) -> float:
    if is_exact and all(torch.equal(one, two.double()) for one, two in zip(true, made, strict=True)):
        return 0.0
    return max(EPSILON, relative_error(true, made))


def _other_tensors(
    source: Adapter, kept: Mapping[str, UpdateSpec], names: Mapping[str, Mapping[str, str]]
) -> dict[str, CarriedTensor]:
    """Return the tensors other than factors; a trained bias of lora_B is multiplied by the factors' alpha / r."""
    found = {}
    for module, update in kept.items():
        for role, key in update.tensors.items():
            if role not in "AB":
                factor = update.scale if update.cls is AddDelta else 1.0
                found[names[module][role]] = CarriedTensor(((Stored(source.file, key), factor),))
        if update.base:
            found[names[module]["base"]] = CarriedTensor(((Stored(source.file, update.base), 1.0),))
    return found
