"""Select from headers the weights of a base that get factors, with their ranks, and compute the adapter's tensors.

Factors are computed one weight at a time, when the writer requests them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...adapters.formats.content import AdapterContent
from ...adapters.formats.format import Format
from ...adapters.formats.peft import Peft
from ...adapters.formats.peft_config import lora_config
from ...adapters.updates.dora import DoRA
from ...adapters.weight_kinds import WEIGHT_KINDS, FactorLayout, factor_shapes, lay_factors, locate_factors
from ...architectures.classes import ModelClass
from ...architectures.prefixes import module_path
from ...binding.merge.merge_plan import MergePlan
from ...binding.modules.image_modules import make_source_module
from ...binding.modules.placement import Placement
from ...binding.modules.selection import matches_pattern
from ...binding.weights.model_weights import ModelWeight
from ...errors import UsageError, shell_word
from ...files.checkpoint import Checkpoint
from ...files.containers.safetensors_file import data_order
from ...files.dtypes import TensorSpec
from ...files.hub.names import base_fields
from ...files.tensor_ref import BLOCK, TensorRef, read_float32
from ...numerics.arrays import Array, Device, Numbers, doubled, fetched, like_of, widen
from ...numerics.linalg import concatenate, norm
from ...numerics.seeded_random import Draw
from ...numerics.svd import energy_of, row_blocks
from ...streaming.parallel import map_in_order, worker_count
from ...streaming.segment import UpdateLoader
from ...transform.base import Base
from ...transform.image import plan_image
from ...transform.image_base import family_of, image_weights, is_image_adapter
from ...transform.lazy import Made, Tensors, start
from ...transform.log import NO_LOSS, Loss
from ...transform.new_factors import factored_update, new_adapter
from ...transform.output import content
from ...transform.plan import plan_one_model
from ...transform.request import ConvertRequest, request_for
from .methods import INITS, InitialFactors, InitWeight

MAGNITUDE = "lora_magnitude_vector"

# End of a model class's name -> the task type under which PEFT's wrapper adds no modules of its own to it.
TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM"}

# Model types whose ...ForConditionalGeneration goes from text to text: PEFT's SEQ_2_SEQ_LM passes token ids alone.
TEXT_TO_TEXT = frozenset(
    """bart bigbird_pegasus blenderbot blenderbot-small led longt5 m2m_100 mbart mt5 mvp nllb-moe pegasus pegasus_x
    plbart prophetnet switch_transformers t5 umt5""".split()
)


def task_type(kind: ModelClass | None) -> str | None:
    """Return PEFT's task type for a class. None if there is none."""
    if kind is None:
        return None
    if kind.name.endswith("ForConditionalGeneration") and kind.model_type in TEXT_TO_TEXT:
        return "SEQ_2_SEQ_LM"
    return next((task for end, task in TASKS.items() if kind.name.endswith(end)), None)


def assign_ranks(
    candidates: Sequence[ModelWeight],
    rank: int,
    patterns: Mapping[str, int],
    params: int | None,
    method: str,
    dora: bool,
) -> dict[str, int]:
    """Return each candidate's rank: that of the first pattern that matches, else `rank`.

    With `params`, the largest rank within that many parameters replaces `rank`.

    Raises:
        UsageError: a pattern matches no candidate, `params` is too few, or a rank cannot be a candidate's.
    """
    for pattern in patterns:
        if not any(candidate.is_named(pattern) for candidate in candidates):
            raise UsageError("in --rank-pattern matches no target", culprit=pattern)
    named = {candidate.name: _named_rank(candidate, patterns) for candidate in candidates}
    rest = [candidate for candidate in candidates if not named[candidate.name]]
    multiple = 2 if method == "orthogonal" else 1
    if params is not None:
        spent = sum(
            candidate.parameters_per_rank * named[candidate.name] + candidate.sizes[1] * dora
            for candidate in candidates
        )
        parameters_per_rank = sum(candidate.parameters_per_rank for candidate in rest)
        if spent + multiple * parameters_per_rank > params:
            what = f"rank {multiple} of these targets" if rest else "--rank-pattern"
            raise UsageError(f"--params {params} is too small: {what} needs {spent + multiple * parameters_per_rank}")
        if rest:
            largest = min((params - spent) // parameters_per_rank, *(candidate.max_rank for candidate in rest))
            rank = max(multiple, largest - largest % multiple)
    for candidate in candidates:
        chosen = named[candidate.name] = named[candidate.name] or rank
        if chosen > candidate.max_rank:
            out, inp = candidate.sizes[1:]
            limit, module = candidate.max_rank - candidate.max_rank % multiple, candidate.paths[-1]
            raise UsageError(
                f"is {out} x {inp}, so rank {chosen} is too high",
                culprit=candidate.name,
                remedy=f"lower the rank, or add --rank-pattern {shell_word(f'{module}={limit}')}"
                if limit
                else f"add --exclude {shell_word(module)}",
            )
        if method == "orthogonal" and chosen % 2:
            raise UsageError(f"orthogonal needs an even rank, not {chosen}", culprit=candidate.name)
    return named


def _named_rank(weight: ModelWeight, patterns: Mapping[str, int]) -> int:
    """Return the rank of the first pattern that matches, 0 for none.

    Raises:
        UsageError: patterns give parts of one weight of the class several ranks.
    """
    names = [(*weight.paths, module_path(name)) for name in weight.names]
    ranks = [
        next((r for p, r in patterns.items() if any(matches_pattern(p, path) for path in paths)), 0) for paths in names
    ]
    if len({*ranks}) > 1:
        raise UsageError(
            f"is one parameter of the class, but --rank-pattern gives its parts the ranks {sorted({*ranks} - {0})}",
            culprit=weight.in_model,
            remedy=f"use {shell_word(weight.in_model.rpartition('.')[2])}",
        )
    return ranks[0]


@dataclass(frozen=True)
class AdaptedWeight:
    """A weight that gets factors."""

    weight: ModelWeight
    wrapper: str  # the path of the PEFT layer that has them
    rank: int
    scale: float  # s

    @property
    def keys(self) -> tuple[str, str]:
        A, B = WEIGHT_KINDS[self.weight.kind].keys
        return f"{self.wrapper}.{A}", f"{self.wrapper}.{B}"

    @property
    def magnitude(self) -> TensorSpec:
        """DoRA's magnitudes, shaped as PEFT shapes them (`peft/tuners/lora/dora.py`)."""
        out = self.weight.sizes[1]
        dimensions = len(self.weight.spec.shape)
        return TensorSpec("F32", (1, out, *[1] * (dimensions - 2)) if self.weight.kind == "conv" else (out,))


def make_adapted_weights(
    candidates: Sequence[ModelWeight], ranks: Mapping[str, int], alpha: float | None, rslora: bool
) -> tuple[list[AdaptedWeight], FactorLayout]:
    """Return each candidate with its wrapper, rank and scale. `alpha` None means alpha = rank."""
    by_name = {each.in_model: each for each in candidates}
    kinds = {name: each.kind for name, each in by_name.items()}
    bare = {name for name, each in by_name.items() if each.bare}
    layout = locate_factors(kinds, {name: ranks[each.name] for name, each in by_name.items()}, {}, bare)
    adapted_weights = []
    for wrapper, (name, _) in layout.wrappers.items():
        weight = by_name[name]
        rank = ranks[weight.name]
        divisor = math.sqrt(rank) if rslora else rank
        adapted_weights.append(AdaptedWeight(weight, wrapper, rank, (rank if alpha is None else alpha) / divisor))
    return adapted_weights, layout


class AdapterInitializer:
    """The adapter's tensors by name, computed one weight at a time, in the order of writing.

    On a CPU each core works on its own weight: products with few columns wait for memory, and two cores on one product
    for each other. `done` is called with each weight's bytes.
    """

    def __init__(
        self,
        base: Checkpoint,
        adapted_weights: Sequence[AdaptedWeight],
        method: str,
        seed: int,
        dora: bool,
        device: Device,
    ) -> None:
        self._base = base
        self._init, self._seed, self._dora, self._like = INITS[method], seed, dora, like_of(device)
        self._weight_of = {key: adapted for adapted in adapted_weights for key in adapted.keys}
        self.specs: dict[str, TensorSpec] = {}
        for adapted in adapted_weights:
            shapes = factor_shapes(adapted.weight.kind, adapted.weight.spec.shape, adapted.rank)
            self.specs.update((key, TensorSpec("F32", shape)) for key, shape in zip(adapted.keys, shapes, strict=True))
        self.magnitude_specs = {
            f"{adapted.wrapper}.{MAGNITUDE}": adapted.magnitude for adapted in adapted_weights if dora
        }
        self.magnitudes: dict[str, Numbers] = {}
        self.gaps: dict[str, float] = {}
        self.done: Callable[[int], None] = lambda nbytes: None
        self._last: dict[str, Numbers] = {}
        order = dict.fromkeys(self._weight_of[key] for key in data_order(self.specs))
        workers = worker_count(device) if self._init.reads or dora else 1
        self._factors = map_in_order(self._make_factors, order, workers)

    def load(self, key: str) -> Numbers:
        """Return a tensor: factors in the order of their data, then the magnitudes."""
        if key in self.magnitudes:
            return self.magnitudes[key]
        if key not in self._last:
            adapted, self._last = next(self._factors)
            self.done(adapted.weight.spec.nbytes)
        return self._last[key]

    def load_any(self, key: str) -> Numbers:
        """Return a tensor in any order, but each weight's magnitude last.

        Only the factors of the last weight are cached. Others are computed again.
        """
        if key in self.magnitudes:
            return self.magnitudes[key]
        if key not in self._last:
            adapted = self._weight_of[key]
            if adapted.weight.name not in self.gaps:
                self.done(adapted.weight.spec.nbytes)
            _, self._last = self._make_factors(adapted)
        return self._last[key]

    def close(self) -> None:
        self._factors.close()

    @np.errstate(all="ignore")
    def _make_factors(self, adapted: AdaptedWeight) -> tuple[AdaptedWeight, dict[str, Numbers]]:
        weight, shape = adapted.weight, adapted.weight.spec.shape
        reads = self._init.reads or self._dora
        factors = self._of_each_matrix(adapted) if reads else self._make(adapted, weight.sizes)
        self.gaps[weight.name] = factors.gap
        sides = lay_factors(weight.kind, factors.A, factors.B, shape)
        return adapted, dict(zip(adapted.keys, map(Numbers.of, sides), strict=True))

    def _make(self, adapted: AdaptedWeight, sizes: tuple[int, int, int], values: Array | None = None) -> InitialFactors:
        given = InitWeight(sizes, adapted.weight.kind == "embedding", values)
        return self._init.make(given, adapted.rank, adapted.scale, Draw(self._seed, adapted.weight.name))

    def _of_each_matrix(self, adapted: AdaptedWeight) -> InitialFactors:
        """Return the factors that need the weight's values, and store its magnitudes. One matrix is in memory."""
        weight, (_, out, inp), factors = adapted.weight, adapted.weight.sizes, list[InitialFactors]()
        for parts in weight.matrices(self._base.ref):
            rows = [read_float32(part, self._like) for part in parts]
            W = concatenate(rows) if len(rows) > 1 else rows[0]
            values = WEIGHT_KINDS[weight.kind].stack(W[None] if weight.role == "experts" else W)
            factors.append(self._make(adapted, (1, out, inp), values))
            if self._dora:
                norms = fetched(concatenate([norm(doubled(block), 1) for block in row_blocks(values[0])]))
                magnitudes = norms.astype(np.float32).reshape(adapted.magnitude.shape)
                self.magnitudes[f"{adapted.wrapper}.{MAGNITUDE}"] = Numbers.of(magnitudes)
        A, B = (np.concatenate([getattr(each, side) for each in factors], 1) for side in "AB")
        return InitialFactors(A, B, max(each.gap for each in factors))


def adapter_config(
    kind: ModelClass | None, name: str, layout: FactorLayout, method: str, alpha: float | None, **flags: bool
) -> dict[str, Any]:
    """Return PEFT's adapter_config.json.

    `kind` is the wrapped class, `name` that of the base, and `flags` are use_dora and use_rslora.
    """
    fields: dict[str, Any] = {} if alpha is None else {"lora_alpha": alpha, "alpha_pattern": {}}
    return lora_config(
        layout.modules,
        layout.parameters,
        **base_fields(name),
        init_lora_weights=INITS[method].field,
        task_type=task_type(kind),
        **fields,
        **flags,
    )


def residual_errors(plan: MergePlan, result: Checkpoint) -> dict[str, tuple[float, float]]:
    """Return name -> (||W' + s B A - W||^2, ||W||^2) for each weight W and its residual W'.

    plan: of the merge that took the factors out; result: its output.
    """
    load = UpdateLoader()

    def distance(name: str) -> tuple[float, float]:
        sides = plan.sources[name], result.ref(name)
        both = [_residual_error(placement, load, *sides) for placement in plan.placements[name]]
        return math.fsum(error for error, _ in both), math.fsum(square for _, square in both)

    with closing(map_in_order(distance, plan.placements, worker_count())) as distances:
        return dict(zip(plan.placements, distances, strict=True))


@np.errstate(all="ignore")
def _residual_error(
    placement: Placement, load: UpdateLoader, base: TensorRef, residual: TensorRef
) -> tuple[float, float]:
    (term,) = load(placement).matrix(placement.expert).terms(1.0, placement.transposed)
    # a residual of 16 bits is 1e-3 off, which float32 resolves to four digits and more in half the time
    wide = np.float32 if residual.spec.dtype in ("BF16", "F16") else np.float64
    left, right = (term.left.wide() * float(term.scale)).astype(wide), term.right.wide().astype(wide)
    row_count = max(1, BLOCK // right.shape[1])
    errors, squares = [], []
    for row in range(placement.start, placement.stop, row_count):
        stop = min(row + row_count, placement.stop)
        both = (side.read_matrix(placement.rows, row, stop) for side in (base, residual))
        W, R = (widen(side, np.empty(side.shape, wide)) for side in both)
        rows = slice(placement.skip + row - placement.start, placement.skip + stop - placement.start)
        squares.append(energy_of(W))
        R -= W
        R += left[rows] @ right
        errors.append(energy_of(R))
    return math.fsum(errors), math.fsum(squares)


def plan_start(
    base: Checkpoint,
    to: Format,
    adapted_weights: Sequence[AdaptedWeight],
    starter: AdapterInitializer,
    config: Mapping[str, Any],
) -> tuple[AdapterContent, tuple[str, ...]]:
    """Return the output of `init` in format `to`, and notes for the user. `config` is PEFT's adapter_config.json."""
    specs = {**starter.specs, **starter.magnitude_specs}
    is_image = is_image_adapter(base, to)
    if to.key == Peft.key and not is_image:
        return AdapterContent(specs, starter.load, config), ()
    new_modules = {}
    for to_adapt in adapted_weights:
        module = _made(to_adapt, starter)
        new_modules[module.update.module] = module
    adapter = new_adapter(str(base.path), base.shards[0], new_modules, config)
    request = ConvertRequest(to.key, base=Base(str(base.path), base.config, False, lambda what: base))
    if not is_image:
        with request_for("init"):
            state = plan_one_model(start(adapter), request)
        return content(state, base.config), state.notes
    weights, weight_of = image_weights(base), {adapted.wrapper: adapted.weight.name for adapted in adapted_weights}
    family = family_of(base, to)
    sources = [make_source_module(m, update, *weights[weight_of[m]]) for m, update in adapter.updates.items()]
    state = plan_image(start(adapter), family, request, sources, [], {})
    return content(state), state.notes


def _made(adapted: AdaptedWeight, starter: AdapterInitializer) -> Made:
    """Return a weight's factors as a module of the new adapter."""
    weight, specs = adapted.weight, starter.specs
    key_A, key_B = adapted.keys
    sides = specs[key_A], specs[key_B]
    E, _, _ = weight.sizes
    update = factored_update(weight.kind, weight.in_model, adapted.wrapper, sides, adapted.scale, E, weight.bare)
    keys = {"A": key_A, "B": key_B}
    magnitude = f"{adapted.wrapper}.{MAGNITUDE}"
    if magnitude in starter.magnitude_specs:
        update = DoRA.of(update, magnitude, starter.magnitude_specs[magnitude], along_inputs=False)
        keys["magnitude"] = magnitude  # which is known once the factors are

    def make() -> tuple[Tensors, Loss]:
        return {role: starter.load_any(key) for role, key in keys.items()}, NO_LOSS

    return Made(update, make, (), numbers=False)
