"""Outline a model from names and shapes: its blocks, their width, its biases, and the matrices that LoRA can change.

Families are known only through the tables in `architectures`. Shapes decide what is a block, and its width.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ...architectures.beside_layers import MTP, ROUTERS
from ...architectures.experts import EXPERTS, PARTS_OF_STACKS, expert_part
from ...architectures.families.lookup import rows_of_runs
from ...architectures.families.table import Fused
from ...architectures.peft import BARE_ROUTERS, LINEAR_ROUTERS, STACKED_BY_PEFT, UNCOUNTED_MIXTURES
from ...architectures.prefixes import module_path
from ...architectures.projections import projections
from ...architectures.roles import HEADS, weight_role
from ...binding.modules.resolve import strip_wrappers
from ...binding.modules.selection import Selection, matches_pattern
from ...binding.weights.default_targets import LAYERS_ALONE
from ...errors import InputError, UsageError
from ...files.dtypes import FLOAT8, TORCH_FLOATS, TensorSpec
from .formulas import CountedMatrix, Outline

# Tensors that some versions of some models store beside the weights, and that are not trained.
BUFFERS = re.compile(r"((^|\.)(attn|attention)\.(masked_)?bias|inv_freq|running_(mean|var)|e_score_correction_bias)$")

MASKED_HEAD_MODULES = ("cls.", "lm_predictions.", "generator_lm_head.")

_BLOCK = re.compile(r"^(.*?)(?<![^.])(\d{1,5})\.(?=.)")

_NORM = re.compile(r"(norm|ln_)\w*\.(weight|gamma)$", re.IGNORECASE)

SINGLE = "single experts"  # of which the class has a stack and the file not all, or two stacks: no factors fit them

LEAST_MATRICES = 4  # in a block: a fused attention, its output, up and down


@dataclass(frozen=True)
class ModelBlock:
    """One of a stack of blocks of one width."""

    stack: str  # the path before its number
    number: int
    width: int
    parameters: int


@dataclass(frozen=True)
class Matrix:
    """A tensor seen as a number of matrices of rows x columns."""

    path: str
    kind: str  # as in `architectures.roles`
    copies: int
    rows: int
    columns: int
    width: int  # of the block that it is in, 0 outside of blocks
    in_model: str = ""  # its path in the model's class
    group: str = ""  # of `beside_layers.GROUPS`, if no pattern names it; or SINGLE
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of a stack: role -> paths of single experts

    @property
    def roles(self) -> tuple[str, ...]:
        return projections(self.in_model if self.kind == "experts" else self.path)

    @property
    def cost(self) -> int:
        """The parameters that one rank takes."""
        return self.copies * (self.rows + self.columns)

    @property
    def parent(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def inp(self) -> int:
        """The side of a fused matrix that reads the block's stream: Conv1D and some experts store (in, out)."""
        return self.rows if self.rows == self.width else self.columns

    @property
    def other(self) -> int:
        """The side that is not the block's stream."""
        return self.rows if self.columns == self.width else self.columns


def parameters_of(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return the trained tensors of a file: floats other than buffers. A bias that is stored twice counts once."""
    twins = {
        name for name in specs if name.endswith(".decoder.bias") and name.replace(".decoder.bias", ".bias") in specs
    }
    return {
        name: spec
        for name, spec in specs.items()
        if (spec.dtype in TORCH_FLOATS or spec.dtype in FLOAT8) and name not in twins and not BUFFERS.search(name)
    }


Parts = dict[str, dict[str, tuple[str, ...]]]  # stack -> role -> the paths that its experts have in a file


def stack_experts(specs: Mapping[str, TensorSpec], model_types: Sequence[str]) -> tuple[dict[str, TensorSpec], Parts]:
    """Return the tensors with single experts as stacks, where the model's class has stacks, and the parts of each.

    Experts stay single if some are missing or their shapes differ. They have no parts, and get no factors.
    """
    members: dict[str, dict[tuple[int, int], str]] = {}
    for name, spec in specs.items():
        part = expert_part(strip_wrappers(name), model_types) if len(spec.shape) == 2 else None
        if part:
            before, _, last = part.fused.rpartition(".experts.")
            stack = f"{name.rpartition('.experts.')[0] or before}.experts.{last}"
            members.setdefault(stack, {})[part.part, part.expert] = name
    stack_of: dict[str, str] = {}
    parts: Parts = {}
    stacked: dict[str, TensorSpec] = {}
    for stack, names in members.items():
        roles = PARTS_OF_STACKS[stack.rpartition(".")[2]]
        experts = len(names) // len(roles)
        shapes = {specs[name].shape for name in names.values()}
        parts |= {name: {} for name in names.values()}
        if len(shapes) == 1 and names.keys() == {(p, e) for p in range(len(roles)) for e in range(experts)}:
            ((rows, columns),) = shapes
            stacked[stack] = TensorSpec(specs[names[0, 0]].dtype, (experts, len(roles) * rows, columns))
            stack_of |= dict.fromkeys(names.values(), stack)
            paths = [[module_path(names[p, e]) for e in range(experts)] for p in range(len(roles))]
            parts[stack] = {role: tuple(each) for role, each in zip(roles, paths, strict=True)}
    return {stack_of.get(name, name): stacked.get(stack_of.get(name, ""), spec) for name, spec in specs.items()}, parts


def parts_in_files(specs: Mapping[str, TensorSpec], model_type: str) -> Parts:
    """Return the parts of each stack of a model's class, by the names of single experts in its files."""
    parts: Parts = {}
    for stack, spec in specs.items():
        before, _, last = stack.rpartition(".")
        rows = {part: name for name, (fused, part, _) in EXPERTS.get(model_type, {}).items() if fused == last}
        if rows and len(spec.shape) == 3:
            for part, role in enumerate(PARTS_OF_STACKS[last]):
                paths = tuple(f"{before}.{expert}.{rows[part]}" for expert in range(spec.shape[0]))
                parts.setdefault(stack, {})[role] = paths
    return parts


def find_blocks(specs: Mapping[str, TensorSpec]) -> tuple[ModelBlock, ...]:
    """Find the blocks of stacks. Each block must have at least LEAST_MATRICES matrices, and all the same width."""
    stacks: dict[str, dict[int, dict[str, TensorSpec]]] = {}
    for name, spec in specs.items():
        match = _BLOCK.match(name)
        if match:
            stacks.setdefault(match[1], {}).setdefault(int(match[2]), {})[name] = spec
    blocks: list[ModelBlock] = []
    for stack, members in stacks.items():
        widths = {_width(each) for each in members.values()}
        if len(widths) == 1 and (width := widths.pop()):
            blocks += [ModelBlock(stack, n, width, sum(s.size for s in members[n].values())) for n in sorted(members)]
    return tuple(blocks)


def _width(specs: Mapping[str, TensorSpec]) -> int:
    """Return the dimension that most of a block's matrices, and a norm, share. 0 for too few matrices."""
    matrices = [spec.shape[-2:] for spec in specs.values() if len(spec.shape) in (2, 3) and spec.size]
    norms = {spec.size for name, spec in specs.items() if len(spec.shape) == 1 and _NORM.search(name)}
    counts = Counter(size for shape in matrices for size in set(shape) if not norms or size in norms)
    return counts.most_common(1)[0][0] if counts and len(matrices) >= LEAST_MATRICES else 0


def main_stack(blocks: Sequence[ModelBlock]) -> tuple[ModelBlock, ...]:
    """Return the stack with the most parameters."""
    sizes: Counter[str] = Counter()
    for block in blocks:
        sizes[block.stack] += block.parameters
    largest = sizes.most_common(1)[0][0] if sizes else ""
    return tuple(block for block in blocks if block.stack == largest)


def make_outline(
    specs: Mapping[str, TensorSpec],
    blocks: Sequence[ModelBlock],
    targets: Sequence[CountedMatrix],
    layers: frozenset[int] | None,
    context: int | None,
) -> Outline:
    """Collect the numbers for the formulas. `layers` are those that methods may change, None for all."""
    main = main_stack(blocks)
    within = Selection(layers=layers)
    return Outline(
        total=sum(spec.size for spec in specs.values()),
        biases=sum(spec.size for name, spec in specs.items() if _is_bias(name, spec) and within.selects(name)),
        width=main[0].width if main else 0,
        widths=tuple(block.width for block in blocks if layers is None or block.number in layers),
        layers=tuple(block.parameters for block in main),
        context=context,
        targets=tuple(targets),
    )


def _is_bias(name: str, spec: TensorSpec) -> bool:
    last = name.rpartition(".")[2]
    is_head = name.split(".")[0] in HEADS or name.startswith(MASKED_HEAD_MODULES)
    return (last.endswith("bias") or last == "beta") and len(spec.shape) <= 2 and not is_head


def find_matrices(
    specs: Mapping[str, TensorSpec],
    blocks: Sequence[ModelBlock],
    tied: tuple[str, str] | None = None,
    parts: Parts | None = None,
    groups: Mapping[str, str] | None = None,
    in_model: Callable[[str], str] = str,
) -> tuple[Matrix, ...]:
    """Find every tensor that LoRA could change: matrices, convolutions with flattened kernels, stacks of experts.

    Args:
        specs, parts: as `stack_experts` returns them.
        tied: the names of an embedding and of a head that is the same tensor; LoRA can change what the head alone
            computes.
        groups: of tensors in the file, as `find_unnamed` returns them.
        in_model: name in the file -> name in the model's class.
    """
    parts, groups = parts or {}, groups or {}
    width_of = {(b.stack, b.number): b.width for b in blocks}
    matrices = []
    for name, spec in specs.items():
        path, block = module_path(name), _BLOCK.match(name)
        model_path = module_path(in_model(name))
        kind = weight_role(path, len(spec.shape), True)
        if name in parts or (kind == "conv" and weight_role(model_path, len(spec.shape), True) == "experts"):
            kind = "experts"
        if spec.size and kind and (path != name or kind == "experts"):
            stacked = kind == "experts" and len(spec.shape) == 3
            copies, rows = (spec.shape[0], spec.shape[1]) if stacked else (1, spec.shape[0])
            width = width_of.get((block[1], int(block[2])), 0) if block else 0
            single = next(iter(parts.get(name, {}).values()), (path,))[0]
            group = groups.get(name) or groups.get(single) or groups.get(f"{single}.weight") or ""
            group = SINGLE if name in parts and not parts[name] else group
            columns = spec.size // (copies * rows)
            matrices.append(Matrix(path, kind, copies, rows, columns, width, model_path, group, parts.get(name, {})))
    if tied is not None and tied[1] not in specs:
        rows, columns = specs[tied[0]].shape
        head = module_path(tied[1])
        matrices.append(Matrix(head, "head", 1, rows, columns, 0, head))
    return tuple(matrices)


def names_one(pattern: str, matrix: Matrix) -> bool:
    """Return whether a pattern of --target selects a matrix or some of its rows, by path or by role."""
    if matrix.group:
        return False
    return _names_whole(pattern, matrix) or any(_names_role(pattern, matrix, role) for role in matrix.roles)


def _names_whole(pattern: str, matrix: Matrix) -> bool:
    if pattern == "all-linear":
        return matrix.kind == "linear"
    return any(matches_pattern(pattern, path) for path in {matrix.path, matrix.in_model})


def _names_role(pattern: str, matrix: Matrix, role: str) -> bool:
    """Return whether a pattern selects some rows of a matrix, by their role or by the names of single experts.

    Raises:
        UsageError: it names only some of the experts in one parameter of the class.
    """
    named = [matches_pattern(pattern, path) for path in matrix.parts.get(role, ()) if pattern != "all-linear"]
    if any(named) and not all(named):
        included, excluded = (matrix.parts[role][named.index(way)] for way in (True, False))
        last = matrix.path.rpartition(".")[2]
        raise UsageError(
            f"and {excluded} are both in {matrix.path}, a single parameter of the class: select both or neither",
            culprit=included,
            remedy=f"use {last}",
        )
    return pattern == role or any(named)


def find_targets(matrices: Sequence[Matrix], selection: Selection) -> tuple[CountedMatrix, ...]:
    """Return the selected matrices. A fused matrix is one if its own path is named, else one per named role.

    A stack of experts is one if all its roles are named, as PEFT has no other factors for it. The patterns of
    `selection` can also be roles, as `architectures.projections.projections` returns.

    Raises:
        InputError: the shapes do not tell which rows of a fused matrix a role has.
    """
    within = Selection(layers=selection.layers)
    query_rows = {m.parent: m.other for m in matrices if m.roles == ("o_proj",)}
    targets: list[CountedMatrix] = []
    for m in matrices:
        by_path = any(_names_whole(p, m) for p in selection.target if p not in m.roles)
        excluded = any(_names_whole(p, m) for p in selection.exclude if p not in m.roles)
        if excluded or m.group or not within.selects(m.path):
            continue
        left = [r for r in m.roles if not any(_names_role(p, m, r) for p in selection.exclude)]
        roles = [r for r in left if by_path or any(_names_role(p, m, r) for p in selection.target)]
        if len(roles) == len(m.roles) and (by_path or len(roles) == 1 or m.kind == "experts"):
            targets.append(CountedMatrix(m.path, m.columns, m.rows, m.copies))
        elif roles:
            rows = _role_rows(m, query_rows.get(m.parent))
            targets += [CountedMatrix(f"{m.path}[{role}]", m.inp, rows[role], m.copies) for role in roles]
    return tuple(targets)


def named_cost(matrices: Sequence[Matrix], selection: Selection) -> int | None:
    """Return the parameters that one rank takes if patterns are names only, as for `init`.

    None if a pattern names nothing, or only some roles of a stack of experts.
    """

    def is_named(pattern: str, m: Matrix) -> bool:
        others = [path for paths in m.parts.values() for path in paths]
        return not m.group and (_names_whole(pattern, m) or any(matches_pattern(pattern, path) for path in others))

    within, cost = Selection((), selection.exclude, selection.layers), 0
    if not all(any(is_named(pattern, m) for m in matrices) for pattern in selection.target):
        return None
    for m in matrices:
        named = [p for p in selection.target if is_named(p, m)]
        if named and within.selects(m.path) and within.selects(m.in_model):
            names_all = any(_names_whole(p, m) for p in named)
            if not names_all and not all(any(_names_role(p, m, r) for p in named) for r in m.parts):
                return None
            cost += m.cost
    return cost


@dataclass(frozen=True)
class PeftTargets:
    """The targets of PEFT if it is given --target as its `target_modules`.

    Attributes:
        cost: the parameters that one rank takes.
        more: what it takes that `find_targets` does not: one of `beside_layers.GROUPS`, or experts.
        fewer, stacks: last names of layers, and of stacks of experts, that `find_targets` takes and it does not.
        doubled: last names of stacks that get twice the rank.
    """

    cost: int
    more: tuple[str, ...]
    fewer: tuple[str, ...]
    stacks: tuple[str, ...]
    doubled: tuple[str, ...]


def peft_targets(
    matrices: Sequence[Matrix], selection: Selection, targets: Sequence[CountedMatrix], family: str
) -> PeftTargets | None:
    """Return what PEFT 0.21 trains of a mixture of experts; None where it refuses, or a pattern is none of its own.

    None also of a type that is not known well enough: of BARE_ROUTERS all are but those of UNCOUNTED_MIXTURES.

    Of the types in STACKED_BY_PEFT it takes the names of single experts and of routers for those of the class's
    stacks, wherever they are, also those of all-linear; a stack of two projections gets the rank of both together.
    """
    if family not in BARE_ROUTERS - UNCOUNTED_MIXTURES:
        return None
    names, taken = {*selection.target}, STACKED_BY_PEFT.get(family, frozenset())
    every = names == {"all-linear"}
    if not every and not all(re.fullmatch(r"[\w.]+", name) and name not in LAYERS_ALONE for name in names):
        return None
    ours, within = {each.name for each in targets}, Selection((), selection.exclude, selection.layers)
    cost = 0
    more, fewer, stacks, doubled = (set[str]() for _ in range(4))
    for m in matrices:
        last = m.in_model.rpartition(".")[2]
        times = int(any(m.in_model == name or m.in_model.endswith(f".{name}") for name in names))
        if m.kind == "experts":
            single = {paths[0].rpartition(".")[2] for paths in m.parts.values()} & taken
            if single and not every and 0 < len(single & names) < len(single):
                return None
            times = len(single) if every or single & names else 0  # a stack itself is no module
        elif last in taken:
            times = int(last == "gate" and (every or last in names))  # named `gate.weight`, a parameter
        elif every:
            times = int(m.kind == "linear" and (m.group != ROUTERS or family in LINEAR_ROUTERS))
        if m.group in (MTP, SINGLE) or not (within.selects(m.path) and within.selects(m.in_model)):
            continue
        cost += times * m.cost
        if times and m.path not in ours:
            more.add(m.group or m.kind)
        if not times and m.path in ours:
            (stacks if m.kind == "experts" else fewer).add(last)
        if times > 1:
            doubled.add(last)
    return PeftTargets(cost, *(tuple(sorted(each)) for each in (more, fewer, stacks, doubled))) if cost else None


def _role_rows(matrix: Matrix, query_rows: int | None) -> dict[str, int]:
    """Return how many outputs each role of a fused matrix has: all the same, but for shared keys and values."""
    out, count = matrix.rows * matrix.columns // matrix.inp, len(matrix.roles)
    shared = query_rows is not None and count > 2
    fused = Fused(matrix.roles, ("queries", *[None] * (count - 1)) if shared else ())
    rows = rows_of_runs(fused, matrix.inp, out, queries=query_rows or 0)
    if rows is None:
        raise InputError(
            f"is {matrix.rows} x {matrix.columns}, and how {', '.join(matrix.roles)} share its rows is unknown",
            culprit=matrix.path,
            remedy="give the name of the full matrix in --target",
        )
    return dict(zip(matrix.roles, rows, strict=True))
