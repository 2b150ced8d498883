"""Plan a language model's adapter under the names and rows of its GGUF file, with one alpha for all modules.

The file has one alpha, and a module's scale is alpha / r with the module's rank. If a module has another scale, B is
multiplied by the quotient, which is exact for a power of two.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial

from ..adapters.formats import FORMATS
from ..adapters.formats.gguf import ALPHA, LlamaCpp
from ..adapters.gguf_factors import MadeUpdate
from ..adapters.gguf_names import gguf_updates, unfit_modules
from ..adapters.gguf_parts import ARCHITECTURE, GgufModel
from ..adapters.updates.update import UpdateSpec
from ..architectures.runtimes.llama_cpp import never_applied
from ..errors import NeedsFlag
from .finish import default_dtype
from .language import refuse_unsaid_init
from .lazy import Made, Tensors, Transformed, noted, with_modules
from .log import NO_LOSS, Loss
from .module_map import runs_of
from .numbers import Settled, settle, single, with_scales
from .output import in_format
from .refusals import cannot_convert
from .request import ConvertRequest


def plan_gguf(state: Transformed, request: ConvertRequest) -> Settled:
    """Plan the output.

    Raises:
        NeedsFlag: the names need the base, modules must be excluded, or the init altered the base.
        InputError: the base's names are in no table, or the adapter is of another model.
    """
    source = state.adapter
    updates = source.updates
    refuse_unsaid_init(source, FORMATS[request.to])
    if request.base is not None:
        model = GgufModel.of_config(request.model, request.base.path)
        for reason, modules in unfit_modules(source, model).items():
            raise cannot_convert(source.name, f"have no place in GGUF ({reason})", modules, among=updates)
        state, key = _with_gguf_names(state, model), model.architecture.key
        former = source.config.other_fields if source.format == request.to else {}
        fields: Mapping[str, object] = {**former, ARCHITECTURE: key, **model.facts.metadata(key)}
    elif source.format == request.to:
        fields = source.config.other_fields
    else:
        raise NeedsFlag(
            f"has transformers' names, and the names in {request.to}'s files depend on the base",
            culprit=source.name,
            flags="--base BASE",
            why="with the model (its config.json is enough)",
        )
    alpha = common_alpha(state.adapter.updates)
    settled = settle(with_scales(state, partial(_scale_and_quotient, alpha)), request.dtype or default_dtype(request))
    written = replace(in_format(settled, FORMATS[request.to]), config={**fields, ALPHA: alpha})
    return noted(written, *_notes(updates, settled.adapter.updates, str(fields[ARCHITECTURE])))


def _with_gguf_names(state: Transformed, model: GgufModel) -> Transformed:
    """Rename the modules to those of the model's GGUF file, with its rows."""
    updates, origins = gguf_updates(state.adapter, model)
    planned = {update.module: _plan_module(update, origins[update.module]) for update in updates}
    bases = [update.update.base for update in planned.values() if update.update.base]
    return with_modules(state, planned, {}, {name: name for name in bases}, LlamaCpp.key)


def _plan_module(update: MadeUpdate, parts: tuple[str, ...]) -> Made:
    """Return a module of the GGUF file; each number is from its parts or 0."""
    source = update.source
    experts, out, slices = source.experts, source.shape[-2], list[tuple[str, int, int, int | None]]()
    if update.rows and len(update.rows) < out:
        runs = [(e * out + start, e * out + stop) for e in range(experts) for start, stop in runs_of(update.rows)]
        slices = [(source.module, start, stop, None) for start, stop in runs]

    def make() -> tuple[Tensors, Loss]:
        beside = {"magnitude": update.magnitude()} if update.magnitude else {}
        return {**update.load(), **beside}, NO_LOSS

    how = "fused" if len(parts) > 1 else "split" if slices else "exact"
    return Made(update.spec(), make, parts, how, numbers=False, slices=tuple(slices))


def _scale_and_quotient(alpha: float, update: UpdateSpec) -> tuple[float, float]:
    """Return the scale for the file's alpha, and the factor of B that keeps the change the same."""
    scale = alpha / update.rank if alpha else 1.0
    is_said = alpha in (0.0, single(update.scale * update.rank))
    return scale, 1.0 if is_said else update.scale * update.rank / alpha


def _notes(updates: Mapping[str, UpdateSpec], written: Collection[str], architecture: str) -> Iterator[str]:
    """Yield notes on weights left out, and on modules that llama.cpp never applies."""
    if dead := never_applied(architecture, written):
        listed = ", ".join(dead[:4]) + (", ..." if dead[4:] else "")
        yield (
            f"llama.cpp loads {listed} of {architecture} and never applies them (as of llama-cpp-python 0.3.36): "
            "merge the adapter to have their change"
        )


def common_alpha(updates: Mapping[str, UpdateSpec]) -> float:
    """Return the most common alpha of the modules, in float32; or 0, which in files means that all scales are 1."""
    alphas = Counter(single(update.scale * update.rank) for update in updates.values())
    if len(alphas) > 1 and all(update.scale == 1 for update in updates.values()):
        return 0.0
    alphas.pop(0.0, None)
    alphas.pop(math.inf, None)  # overflows float32; the scale in the factors may not
    return alphas.most_common(1)[0][0] if alphas else 1.0
