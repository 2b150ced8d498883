"""Which weights of a base get factors and of which rank, decided from headers; and the adapter that they make.

The factors come one weight at a time, when the writer asks for them.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .apply import Loader
from .architectures.families import declared_class
from .architectures.peft import MAMBA_REFUSED, MAMBAS
from .architectures.renames import expert_part
from .architectures.roles import role
from .architectures.wrappers import module_of
from .checkpoint import Checkpoint
from .errors import InputError, UsageError
from .factoring import KINDS, Layout, factor_shapes, kind_of, lay_out, stack_sizes
from .formats.peft_write import lora_config
from .inits import INITS, Draw, Start, Weight
from .numerics.svd import energy_of
from .placing import Placement
from .plan import MergePlan
from .runtime import map_ahead, worker_count
from .source import Source
from .targets import Selection, matches
from .tensorfile import TORCH_FLOATS, TensorSpec, data_order
from .updates import Experts, LowRank
from .wrapping import namer, role_in_model

READ = 1 << 22  # numbers read at a time
MAGNITUDE = "lora_magnitude_vector"
# The classes of which PEFT's wrapper takes a task type without modules of its own -> the task type.
TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM"}
# Types whose ...ForConditionalGeneration goes from text to text: PEFT's SEQ_2_SEQ_LM passes token ids alone.
TEXT_TO_TEXT = frozenset(
    """bart bigbird_pegasus blenderbot blenderbot-small led longt5 m2m_100 mbart mt5 mvp nllb-moe pegasus pegasus_x
    plbart prophetnet switch_transformers t5 umt5""".split()
)


@dataclass(frozen=True)
class Candidate:
    """A weight that can have factors. sizes: (E, out, in) of its stack of matrices; in_model: its name in the model's
    class, which PEFT wraps.
    """

    name: str
    in_model: str
    kind: str
    source: Source
    sizes: tuple[int, int, int]

    @property
    def cost(self) -> int:
        """Parameters a rank."""
        E, out, inp = self.sizes
        return E * (out + inp)

    @property
    def most(self) -> int:
        """The rank that no change of it exceeds."""
        return min(self.sizes[1:])


def find_candidates(base: Checkpoint, selection: Selection, among: Collection[str] | None = None) -> list[Candidate]:
    """The weights that the selection's targets name; InputError for a pattern that names none. among: those that can
    have factors, where it is not for PEFT to say.
    """
    roles = {n: role(module_of(n), len(base.specs[n].shape), base.specs[n].dtype in TORCH_FLOATS) for n in among or ()}
    in_model = namer(base) if among is None else str
    eligible = _find_eligible(base, in_model) if among is None else {name: what for name, what in roles.items() if what}
    routers = _find_routers(eligible)
    for pattern in selection.target:
        if not any(_takes(pattern, name, what, routers) for name, what in eligible.items()):
            ends = {module_of(name).rpartition(".")[2] for name in eligible}
            near = difflib.get_close_matches(pattern, sorted(ends), 3, 0.4) or sorted(ends)[:8]
            raise InputError(
                "names no weight of the base that could have an adapter",
                culprit=f"--target {pattern}",
                remedy=f"there are {', '.join(near)}" if near else None,
            )
    replace(selection, target=()).require_used([*map(module_of, base.specs)], str(base.path))
    found = []
    for name, what in eligible.items():
        if selection.selects(module_of(name)) and any(_takes(each, name, what, routers) for each in selection.target):
            kind, source = kind_of(base.model_types, module_of(name), what), Source(base.shard_of[name], name)
            found.append(Candidate(name, in_model(name), kind, source, stack_sizes(kind, source.spec.shape)))
    if not found:
        raise InputError("the selection leaves no weight of the base", remedy="loosen --exclude or --layers")
    return found


def _find_eligible(base: Checkpoint, in_model: Callable[[str], str]) -> dict[str, str]:
    """The weights that PEFT can wrap -> their role: those of modules, and stacks of experts, but no other bare
    parameter (a Mamba's A_log, gpt-oss's biases of experts).
    """
    found = {name: role_in_model(base, name, in_model(name), spec) for name, spec in base.specs.items()}
    refused = MAMBA_REFUSED if base.model_type in MAMBAS else ()
    return {n: what for n, what in found.items() if what and module_of(n).rpartition(".")[2] not in refused}


def task_type(base: Checkpoint) -> str | None:
    name = declared_class(base.config)
    if name.endswith("ForConditionalGeneration") and base.model_type in TEXT_TO_TEXT:
        return "SEQ_2_SEQ_LM"
    return next((task for end, task in TASKS.items() if name.endswith(end)), None)


def _find_routers(names: Collection[str]) -> frozenset[str]:
    """The weights that choose among experts: no linear layers in transformers 5, so that PEFT cannot wrap most."""
    blocks = {name.partition(".experts.")[0] for name in names if ".experts." in name}
    return frozenset(f"{block}.{router}.weight" for block in blocks for router in ("gate", "router"))


def _takes(pattern: str, name: str, what: str, routers: Collection[str]) -> bool:
    """`all-linear` as PEFT means it: convolutions, stacks of experts and their routers have to be named."""
    return matches(pattern, module_of(name)) and (pattern != "all-linear" or (what == "linear" and name not in routers))


def choose_ranks(
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
        if not any(matches(pattern, module_of(each.name)) for each in candidates):
            raise UsageError("of --rank-pattern matches none of the targets", culprit=pattern)
    found = {
        each.name: next((r for p, r in patterns.items() if matches(p, module_of(each.name))), 0) for each in candidates
    }
    rest = [each for each in candidates if not found[each.name]]
    step = 2 if method == "orthogonal" else 1
    if params is not None:
        spent = sum(each.cost * found[each.name] + each.sizes[1] * dora for each in candidates)
        cost = sum(each.cost for each in rest)
        if spent + step * cost > params:
            what = f"rank {step} of these targets" if rest else "what --rank-pattern says"
            raise UsageError(f"--params {params} is too few: {what} takes {spent + step * cost}")
        if rest:
            most = min((params - spent) // cost, *(each.most for each in rest))
            rank = max(step, most - most % step)
    for each in candidates:
        chosen = found[each.name] = found[each.name] or rank
        if chosen > each.most:
            out, inp = each.sizes[1:]
            most, module = each.most - each.most % step, module_of(each.name)
            raise UsageError(
                f"is {out} x {inp}, and rank {chosen} is more than it can have",
                culprit=each.name,
                remedy=f"lower the rank, or add --rank-pattern {module}={most}" if most else f"add --exclude {module}",
            )
        if method == "orthogonal" and chosen % 2:
            raise UsageError(f"orthogonal halves the rank, and {chosen} is odd", culprit=each.name)
    return found


def check_parted(base: Checkpoint, ranks: Mapping[str, int], rslora: bool) -> None:
    """Refuse what PEFT cannot make a stack of: it takes all experts of one, at the rank of the most targets, and joins
    gate and up at twice that rank and alpha, which is another scale under rsLoRA
    (`peft/utils/transformers_weight_conversion.py`).
    """
    parts = {name: part for name in base.specs if (part := expert_part(name, base.model_types))}
    common = next(iter(Counter(ranks.values()).most_common(1)), (0, 0))[0]
    stacks = {parts[name].fused: name for name in ranks if name in parts}
    for name, part in parts.items():
        if part.fused not in stacks or not name.endswith(".weight"):
            continue
        if name not in ranks:
            raise UsageError(
                f"is a part of what PEFT stacks with {stacks[part.fused]}",
                culprit=name,
                remedy="target all experts of a layer, gate and up alike, or add --exclude 're:experts'",
            )
        if ranks[name] != common:
            raise UsageError(
                f"has rank {ranks[name]}, but PEFT stacks experts at the rank of most targets, {common}",
                culprit=name,
                remedy="give all experts one rank, and other ranks to what is not one, or add --exclude 're:experts'",
            )
        if rslora and part.parts > 1:
            raise UsageError(
                "PEFT joins its factors to another's at twice the rank, which changes rsLoRA's scale",
                culprit=name,
                remedy="leave rslora out, or add --exclude 're:experts'",
            )


@dataclass(frozen=True)
class Site:
    """A weight that gets factors. wrapper: PEFT's name for where; scale: s."""

    weight: Candidate
    wrapper: str
    rank: int
    scale: float

    @property
    def keys(self) -> tuple[str, str]:
        A, B = KINDS[self.weight.kind].keys
        return f"{self.wrapper}.{A}", f"{self.wrapper}.{B}"

    @property
    def magnitude(self) -> TensorSpec:
        """DoRA's, as PEFT shapes it (`peft/tuners/lora/dora.py`)."""
        out = self.weight.sizes[1]
        dimensions = len(self.weight.source.spec.shape)
        return TensorSpec("F32", (1, out, *[1] * (dimensions - 2)) if self.weight.kind == "conv" else (out,))


def make_sites(
    candidates: Sequence[Candidate], ranks: Mapping[str, int], alpha: float | None, rslora: bool
) -> tuple[list[Site], Layout]:
    """alpha: None is each one's own rank."""
    by_name = {each.in_model: each for each in candidates}
    kinds = {name: each.kind for name, each in by_name.items()}
    layout = lay_out(kinds, {name: ranks[each.name] for name, each in by_name.items()}, {})
    sites = []
    for wrapper, (name, _) in layout.wrappers.items():
        weight = by_name[name]
        rank = ranks[weight.name]
        divisor = math.sqrt(rank) if rslora else rank
        sites.append(Site(weight, wrapper, rank, (rank if alpha is None else alpha) / divisor))
    return sites, layout


class Starter:
    """The adapter's tensors by name, computed a weight at a time, in the order in which they are written.

    On a CPU a core has a weight: products with a few columns wait for the memory, and two cores for each other.
    done: called with each weight's bytes.
    """

    def __init__(self, sites: Sequence[Site], method: str, seed: int, dora: bool, device: torch.device) -> None:
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
        self._starts = map_ahead(self._start, order, workers)

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

    def _start(self, site: Site) -> tuple[Site, dict[str, Tensor]]:
        weight, shape = site.weight, site.weight.source.spec.shape
        reads = self._init.reads or self._dora
        values = KINDS[weight.kind].stack(read_float32(weight.source, self._device)) if reads else None
        given = Weight(weight.sizes, weight.kind == "embedding", values)
        start: Start = self._init.start(given, site.rank, site.scale, Draw(self._seed, weight.name))
        if self._dora and values is not None:
            norms = torch.linalg.vector_norm(values[0], dim=1, dtype=torch.float64).float().cpu()
            self.magnitudes[f"{site.wrapper}.{MAGNITUDE}"] = norms.view(site.magnitude.shape)
        self.gaps[weight.name] = start.gap
        A, B = KINDS[weight.kind].lay(start.A, start.B, shape)
        return site, dict(zip(site.keys, (A.contiguous(), B.contiguous()), strict=True))


def read_float32(source: Source, device: torch.device) -> Tensor:
    """A whole tensor; InputError where it holds nan or inf."""
    shape, size = source.spec.shape, source.spec.size
    out = torch.empty(shape, dtype=torch.float32, device=device)
    step = max(1, READ // (size // shape[0]))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        block = out[start:stop]
        block.copy_(source.file.rows(source.name, start, stop).reshape(block.shape))
        if not all(math.isfinite(end) for end in block.aminmax()):  # a nan is either
            raise InputError(
                f"holds nan, inf or more than float32 can; {source.file.path} is damaged", culprit=source.name
            )
    return out


def adapter_config(
    base: Checkpoint, name: str, layout: Layout, method: str, alpha: float | None, **flags: bool
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
    load = Loader(torch.device("cpu"))

    def distance(name: str) -> tuple[float, float]:
        sides = plan.sources[name], Source(result.shard_of[name], name)
        both = [_residual_error(placement, load, *sides) for placement in plan.placements[name]]
        return math.fsum(error for error, _ in both), math.fsum(square for _, square in both)

    with closing(map_ahead(distance, plan.placements, worker_count())) as found:
        return dict(zip(plan.placements, found, strict=True))


def _residual_error(placement: Placement, load: Loader, base: Source, residual: Source) -> tuple[float, float]:
    update = load(placement)
    if isinstance(update, Experts):
        assert placement.expert is not None
        update = update.expert(placement.expert)
    assert isinstance(update, LowRank)
    (term,) = update.terms(1.0, placement.transposed)
    # a residual of 16 bits is 1e-3 off, which float32 tells to four digits and more in half the time
    wide = torch.float32 if residual.spec.dtype in ("BF16", "F16") else torch.float64
    left, right = (term.left.double() * term.multiplier).to(wide), term.right.to(wide)
    step = max(1, READ // right.shape[1])
    errors, squares = [], []
    for start in range(placement.start, placement.stop, step):
        stop = min(start + step, placement.stop)
        W, R = (side.matrix_rows(placement.rows, start, stop).to(wide).flatten(1) for side in (base, residual))
        rows = slice(placement.skip + start - placement.start, placement.skip + stop - placement.start)
        squares.append(energy_of(W))
        errors.append(energy_of(R.sub_(W).addmm_(left[rows], right)))
    return math.fsum(errors), math.fsum(squares)
