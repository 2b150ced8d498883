"""Convert other kinds of updates with exact factors to LoRA: LoHa, LoKr, AdaLoRA, Tucker's convolutions.

Their factors multiply out to those of LoRA (`Update.factors`). The rank depends on the kind: for LoHa it is the product
of the two ranks, for LoKr of the sides' ranks. A DoRA of such a kind becomes a DoRA of LoRA. The factors are float32,
and the scale stays beside them; the rounding error of float32 is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.config import AdapterConfig
from ..adapters.formats import FORMATS, capabilities
from ..adapters.formats.peft_config import config_of, listed_as_parameters
from ..adapters.stacked import load_stacked_factors, round_factors
from ..adapters.updates.dora import DoRA
from ..adapters.updates.experts import Experts
from ..adapters.updates.low_rank import LowRank
from ..adapters.updates.update import UpdateSpec
from ..architectures.families import FAMILIES
from ..architectures.families.lookup import kernel_of
from ..architectures.families.table import DENOISERS
from ..architectures.roles import weight_role
from ..binding.modules.image_modules import SourceModule, detect_family, read_source_modules
from ..binding.modules.selection import Selection
from ..errors import InputError, NeedsFlag, shell_word
from ..files.dtypes import TensorSpec
from ..numerics.arrays import Numbers
from ..numerics.forms import F32, Wide
from .lazy import Made, Tensors, Transformed, with_factors
from .log import NO_LOSS, Loss
from .numbers import alpha_for_scale, loss_between

# fields of PEFT's config with the same meaning in all methods
COMMON_FIELDS = (
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "modules_to_save",
    "peft_version",
    "revision",
    "task_type",
)


def expand(state: Transformed, left: Sequence[str] = ()) -> Transformed:
    """Return the adapter with LoRA in place of every other kind with exact factors, and a note on each kind.

    Args:
        left: patterns of modules that stay unchanged.

    Raises:
        NeedsFlag: the kernel of a convolution is unknown.
    """
    source, kinds = state.adapter, kinds_to_expand(state.adapter, left)
    if not kinds:
        return state
    modules, _ = read_source_modules(source)
    family, by_name = detect_family(modules), {source_module.module: source_module for source_module in modules}
    planned = {m: _planned(source, m, _kernel(source.updates[m], by_name.get(m), family)) for m in kinds}
    changed = with_factors(state, planned)
    adapter = replace(changed.adapter, config=config_of_lora(source, changed.adapter.updates))
    return replace(changed, adapter=adapter, notes=(*state.notes, *_notes(adapter, kinds)))


def kinds_to_expand(source: Adapter, left: Sequence[str] = ()) -> dict[str, str]:
    """Return the modules of kinds other than LoRA with exact factors: module -> kind."""
    selection, kinds = Selection(tuple(left) or ("",)), {}
    for module, update in source.updates.items():
        inner = update.cls.without_norm(update)
        if update.rank and inner.cls not in (LowRank, Experts) and not selection.selects(module):
            kinds[module] = inner.kind
    return kinds


def _notes(adapter: Adapter, kinds: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence for each kind, with the ranks of its modules as LoRA."""
    for kind in dict.fromkeys(kinds.values()):
        ranks = {adapter.updates[module].rank for module, other in kinds.items() if other == kind}
        count, least, most = list(kinds.values()).count(kind), min(ranks), max(ranks)
        rank = f"rank {least}" if least == most else f"ranks {least} to {most}"
        yield f"{adapter.name}: its {count} modules of {kind} are LoRA of {rank} when multiplied out"


def _kernel(update: UpdateSpec, source: SourceModule | None, family: str | None) -> tuple[int, ...]:
    """Return the kernel of an update's convolution, which LoHa's and LoKr's flattened factors hide; () for a layer."""
    if len(update.shape) > 2:
        return update.shape[2:]
    if source is None or family is None or source.component not in DENOISERS:
        if "conv" in update.module.lower():
            raise NeedsFlag(
                f"is {update.kind} of a convolution by its name, but its factors do not tell the kernel",
                culprit=update.module,
                flags=f"--exclude {shell_word(update.module)}",
                why="to exclude it",
            )
        return ()
    kernel = kernel_of(FAMILIES[family], source.path)
    if update.shape[1] % math.prod(kernel):
        raise InputError(f"has {update.shape[1]} columns, which no kernel {kernel} has", culprit=update.module)
    return kernel


def _planned(source: Adapter, module: str, kernel: tuple[int, ...]) -> Made:
    """Return the module as LoRA, with float32 factors and an alpha that may round the scale."""
    update = source.updates[module]
    inner = update.cls.without_norm(update)
    out, columns = inner.cls.flat(inner)
    assert out is not None and columns is not None, "a kind with factors knows its sizes"
    rank, embedding, name_of = inner.rank, is_embedding(source, module), namer(source, inner)
    sides = {
        "A": TensorSpec("F32", (rank, out) if embedding else (rank, columns // math.prod(kernel), *kernel)),
        "B": TensorSpec("F32", (columns, rank) if embedding else (out, rank, *(1 for _ in kernel))),
    }
    alpha = alpha_for_scale(inner.scale, rank)
    lora = replace(
        inner, cls=LowRank, tensors={r: name_of(r) for r in sides}, specs=sides, scale=alpha / rank, detail=None,
        transposed=True if embedding else inner.transposed,
    )  # fmt: skip
    scale = lora.scale

    def make() -> tuple[Tensors, Loss]:
        true = _exact_factors(source, module)
        sides = dict(zip("BA", round_factors(module, true, F32), strict=True))
        if embedding:
            shaped = {"A": sides["B"].T, "B": sides["A"].T}
        else:
            shaped = {role: side.reshape(*lora.specs[role].shape) for role, side in sides.items()}
        beside = {role: source.file.numbers(name) for role, name in update.tensors.items() if role == "magnitude"}
        return {**shaped, **beside}, _loss(inner, true, (sides["B"], sides["A"]), scale)

    if "magnitude" in update.tensors:
        lora = DoRA.of(lora, update.tensors["magnitude"], update.specs["magnitude"], update.along_inputs)
    return Made(lora, make, (module,), "expanded")


def is_embedding(source: Adapter, module: str) -> bool:
    """Return whether a format has the transpose's factors of a module, with names of their own, as PEFT has."""
    return "embedding_A" in FORMATS[source.format].ends and weight_role(module, 2, True) == "embedding"


def namer(source: Adapter, inner: UpdateSpec) -> Callable[[str], str]:
    """Return a function from a factor's role to its name in the format, with the prefix of the module's tensors."""
    sort = "embedding_" if is_embedding(source, inner.module) else ""
    stored = next(iter(inner.tensors.values()))
    prefix = stored[: max(0, stored.find(inner.module))]
    return lambda role: prefix + FORMATS[source.format].tensor_name(inner.module, sort + role)


def _exact_factors(source: Adapter, module: str) -> tuple[Wide, Wide]:
    """Return the exact (B, A) in float64, without the scale, which stays in alpha."""
    update = source.updates[module]
    B, A = load_stacked_factors(source, replace(update.cls.without_norm(update), scale=1.0))
    return B[0], A[0]


@np.errstate(over="ignore")
def _loss(inner: UpdateSpec, true: tuple[Wide, Wide], rounded: tuple[Numbers, Numbers], scale: float) -> Loss:
    """Return the rounding error of float32 and of alpha / r."""
    wide = any(spec.dtype == "F64" for spec in inner.specs.values())  # float64 holds products of shorter types
    B, A = (side.wide() for side in rounded)
    held = np.array_equal(B, true[0]) and np.array_equal(A, true[1])
    if held and not wide and not inner.cls.sums(inner) and scale == inner.scale:
        return NO_LOSS
    return loss_between((true[0] * inner.scale, true[1]), (B * scale, A))


def config_of_lora(source: Adapter, updates: Mapping[str, UpdateSpec]) -> AdapterConfig:
    """Return the config of an adapter whose updates have become LoRA, or DoRA of it."""
    both = {u.target: (u.rank, alpha_for_scale(u.scale, u.rank)) for u in updates.values() if u.rank}
    alphas = {alpha for _, alpha in both.values()}
    alone = alphas.pop() if len(alphas) == 1 else None
    if capabilities(source).alpha != "config":
        return replace(source.config, alpha=alone)
    fields = {key: value for key, value in source.config.peft.items() if key in COMMON_FIELDS}
    dora = any(update.cls is DoRA for update in updates.values())
    peft: dict[str, Any] = {**config_of(both, listed_as_parameters(updates.values())), **fields, "use_dora": dora}
    return replace(
        source.config,
        rank=peft["r"],
        alpha=peft["lora_alpha"],
        use_rslora=False,
        rank_pattern=peft["rank_pattern"],
        alpha_pattern=peft["alpha_pattern"],
        peft=peft,
    )
