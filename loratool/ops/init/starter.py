"""Which weights of a base get factors and of which rank, decided from headers; and the adapter that they make.

The factors come one weight at a time, when the writer asks for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...adapters.formats.peft_write import lora_config
from ...adapters.updates import Experts, LowRank
from ...adapters.weight_kinds import WEIGHT_KINDS, FactorLayout, factor_shapes, locate_factors
from ...architectures.config_tensors import declared_class
from ...architectures.prefixes import module_path
from ...binding.candidates import Candidate
from ...binding.merge_plan import MergePlan
from ...binding.placement import Placement
from ...binding.selection import matches_pattern
from ...errors import UsageError
from ...files.checkpoint import Checkpoint
from ...files.dtypes import TensorSpec
from ...files.safetensors_file import data_order
from ...files.tensor_ref import READ_NUMBERS, TensorRef, read_float32
from ...numerics.seeded_random import Draw
from ...numerics.svd import energy_of
from ...streaming.apply import UpdateLoader
from ...streaming.workers import map_in_order, worker_count
from .methods import INITS, InitialFactors, InitWeight

MAGNITUDE = "lora_magnitude_vector"


# The classes of which PEFT's wrapper takes a task type without modules of its own -> the task type.
TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM"}


# Types whose ...ForConditionalGeneration goes from text to text: PEFT's SEQ_2_SEQ_LM passes token ids alone.
TEXT_TO_TEXT = frozenset(
    """bart bigbird_pegasus blenderbot blenderbot-small led longt5 m2m_100 mbart mt5 mvp nllb-moe pegasus pegasus_x
    plbart prophetnet switch_transformers t5 umt5""".split()
)


def task_type(base: Checkpoint) -> str | None:
    name = declared_class(base.config)
    if name.endswith("ForConditionalGeneration") and base.model_type in TEXT_TO_TEXT:
        return "SEQ_2_SEQ_LM"
    return next((task for end, task in TASKS.items() if name.endswith(end)), None)


def assign_ranks(
    candidates: Sequence[Candidate],
    rank: int,
    patterns: Mapping[str, int],
    params: int | None,
    method: str,
    dora: bool,
) -> dict[str, int]:
    """The rank of each: of the first pattern that matches, else `rank`, or the largest for which the adapter has at
    most `params` parameters.
    """
    for pattern in patterns:
        if not any(matches_pattern(pattern, module_path(each.name)) for each in candidates):
            raise UsageError("of --rank-pattern matches none of the targets", culprit=pattern)
    found = {
        each.name: next((r for p, r in patterns.items() if matches_pattern(p, module_path(each.name))), 0)
        for each in candidates
    }
    rest = [each for each in candidates if not found[each.name]]
    step = 2 if method == "orthogonal" else 1
    if params is not None:
        spent = sum(each.parameters_per_rank * found[each.name] + each.sizes[1] * dora for each in candidates)
        cost = sum(each.parameters_per_rank for each in rest)
        if spent + step * cost > params:
            what = f"rank {step} of these targets" if rest else "what --rank-pattern says"
            raise UsageError(f"--params {params} is too few: {what} takes {spent + step * cost}")
        if rest:
            most = min((params - spent) // cost, *(each.max_rank for each in rest))
            rank = max(step, most - most % step)
    for each in candidates:
        chosen = found[each.name] = found[each.name] or rank
        if chosen > each.max_rank:
            out, inp = each.sizes[1:]
            most, module = each.max_rank - each.max_rank % step, module_path(each.name)
            raise UsageError(
                f"is {out} x {inp}, and rank {chosen} is more than it can have",
                culprit=each.name,
                remedy=f"lower the rank, or add --rank-pattern {module}={most}" if most else f"add --exclude {module}",
            )
        if method == "orthogonal" and chosen % 2:
            raise UsageError(f"orthogonal halves the rank, and {chosen} is odd", culprit=each.name)
    return found


@dataclass(frozen=True)
class AdaptedWeight:
    """A weight that gets factors. wrapper: PEFT's name for where; scale: s."""

    weight: Candidate
    wrapper: str
    rank: int
    scale: float

    @property
    def keys(self) -> tuple[str, str]:
        A, B = WEIGHT_KINDS[self.weight.kind].keys
        return f"{self.wrapper}.{A}", f"{self.wrapper}.{B}"

    @property
    def magnitude(self) -> TensorSpec:
        """DoRA's, as PEFT shapes it (`peft/tuners/lora/dora.py`)."""
        out = self.weight.sizes[1]
        dimensions = len(self.weight.source.spec.shape)
        return TensorSpec("F32", (1, out, *[1] * (dimensions - 2)) if self.weight.kind == "conv" else (out,))


def make_adapted_weights(
    candidates: Sequence[Candidate], ranks: Mapping[str, int], alpha: float | None, rslora: bool
) -> tuple[list[AdaptedWeight], FactorLayout]:
    """alpha: None is each one's own rank."""
    by_name = {each.in_model: each for each in candidates}
    kinds = {name: each.kind for name, each in by_name.items()}
    layout = locate_factors(kinds, {name: ranks[each.name] for name, each in by_name.items()}, {})
    sites = []
    for wrapper, (name, _) in layout.wrappers.items():
        weight = by_name[name]
        rank = ranks[weight.name]
        divisor = math.sqrt(rank) if rslora else rank
        sites.append(AdaptedWeight(weight, wrapper, rank, (rank if alpha is None else alpha) / divisor))
    return sites, layout


class AdapterInitializer:
    """The adapter's tensors by name, computed a weight at a time, in the order in which they are written.

    On a CPU a core has a weight: products with a few columns wait for the memory, and two cores for each other.
    done: called with each weight's bytes.
    """

    def __init__(
        self, sites: Sequence[AdaptedWeight], method: str, seed: int, dora: bool, device: torch.device
    ) -> None:
        self._init, self._seed, self._dora, self._device = INITS[method], seed, dora, device
        self._site_of = {key: site for site in sites for key in site.keys}
        self.specs: dict[str, TensorSpec] = {}
        for site in sites:
            shapes = factor_shapes(site.weight.kind, site.weight.source.spec.shape, site.rank)
            self.specs.update((key, TensorSpec("F32", shape)) for key, shape in zip(site.keys, shapes, strict=True))
        self.magnitude_specs = {f"{site.wrapper}.{MAGNITUDE}": site.magnitude for site in sites if dora}
        self.magnitudes: dict[str, Tensor] = {}
        self.gaps: dict[str, float] = {}
        self.done: Callable[[int], None] = lambda nbytes: None
        self._last: dict[str, Tensor] = {}
        order = dict.fromkeys(self._site_of[key] for key in data_order(self.specs))
        workers = worker_count() if device.type == "cpu" and (self._init.reads or dora) else 1
        self._starts = map_in_order(self._start, order, workers)

    def load(self, key: str) -> Tensor:
        """Factors in the order of their data, then the magnitudes."""
        if key in self.magnitudes:
            return self.magnitudes[key]
        if key not in self._last:
            site, self._last = next(self._starts)
            self.done(site.weight.source.spec.nbytes)
        return self._last[key]

    def load_any(self, key: str) -> Tensor:
        """In any order, of a weight its magnitude last; another weight's are computed anew."""
        if key in self.magnitudes:
            return self.magnitudes[key]
        if key not in self._last:
            site = self._site_of[key]
            if site.weight.name not in self.gaps:
                self.done(site.weight.source.spec.nbytes)
            _, self._last = self._start(site)
        return self._last[key]

    def close(self) -> None:
        self._starts.close()

    def _start(self, site: AdaptedWeight) -> tuple[AdaptedWeight, dict[str, Tensor]]:
        weight, shape = site.weight, site.weight.source.spec.shape
        reads = self._init.reads or self._dora
        values = WEIGHT_KINDS[weight.kind].stack(read_float32(weight.source, self._device)) if reads else None
        given = InitWeight(weight.sizes, weight.kind == "embedding", values)
        start: InitialFactors = self._init.make(given, site.rank, site.scale, Draw(self._seed, weight.name))
        if self._dora and values is not None:
            norms = torch.linalg.vector_norm(values[0], dim=1, dtype=torch.float64).float().cpu()
            self.magnitudes[f"{site.wrapper}.{MAGNITUDE}"] = norms.view(site.magnitude.shape)
        self.gaps[weight.name] = start.gap
        A, B = WEIGHT_KINDS[weight.kind].lay(start.A, start.B, shape)
        return site, dict(zip(site.keys, (A.contiguous(), B.contiguous()), strict=True))


def adapter_config(
    base: Checkpoint, name: str, layout: FactorLayout, method: str, alpha: float | None, **flags: bool
) -> dict[str, Any]:
    """name: the base's, as the config shall say it; flags: use_dora, use_rslora."""
    fields: dict[str, Any] = {} if alpha is None else {"lora_alpha": alpha, "alpha_pattern": {}}
    return lora_config(
        layout.modules,
        layout.parameters,
        base_model_name_or_path=name,
        init_lora_weights=INITS[method].field,
        task_type=task_type(base),
        **fields,
        **flags,
    )


def residual_errors(plan: MergePlan, result: Checkpoint) -> dict[str, tuple[float, float]]:
    """How far the residual and the factors taken out of it are from the base: name -> (||W' + s B A - W||^2,
    ||W||^2). plan: of the merge that took them out; result: what it wrote.
    """
    load = UpdateLoader(torch.device("cpu"))

    def distance(name: str) -> tuple[float, float]:
        sides = plan.sources[name], TensorRef(result.shard_of[name], name)
        both = [_residual_error(placement, load, *sides) for placement in plan.placements[name]]
        return math.fsum(error for error, _ in both), math.fsum(square for _, square in both)

    with closing(map_in_order(distance, plan.placements, worker_count())) as found:
        return dict(zip(plan.placements, found, strict=True))


def _residual_error(
    placement: Placement, load: UpdateLoader, base: TensorRef, residual: TensorRef
) -> tuple[float, float]:
    update = load(placement)
    if isinstance(update, Experts):
        assert placement.expert is not None
        update = update.expert(placement.expert)
    assert isinstance(update, LowRank)
    (term,) = update.terms(1.0, placement.transposed)
    # a residual of 16 bits is 1e-3 off, which float32 tells to four digits and more in half the time
    wide = torch.float32 if residual.spec.dtype in ("BF16", "F16") else torch.float64
    left, right = (term.left.double() * term.multiplier).to(wide), term.right.to(wide)
    step = max(1, READ_NUMBERS // right.shape[1])
    errors, squares = [], []
    for start in range(placement.start, placement.stop, step):
        stop = min(start + step, placement.stop)
        W, R = (side.matrix_rows(placement.rows, start, stop).to(wide).flatten(1) for side in (base, residual))
        rows = slice(placement.skip + start - placement.start, placement.skip + stop - placement.start)
        squares.append(energy_of(W))
        errors.append(energy_of(R.sub_(W).addmm_(left[rows], right)))
    return math.fsum(errors), math.fsum(squares)
