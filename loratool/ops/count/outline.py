"""Outline a model from names and shapes alone: its blocks, their width, its biases, and the matrices LoRA can change.

Nothing here knows a family but by the tables in `architectures`: the shapes say what is a block and how wide it is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ...architectures.experts import EXPERTS, PARTS_OF_STACKS, expert_part
from ...architectures.families.lookup import rows_of_runs
from ...architectures.families.table import Fused
from ...architectures.prefixes import module_path
from ...architectures.projections import projections
from ...architectures.roles import HEADS, weight_role
from ...binding.resolve import strip_wrappers
from ...binding.selection import Selection, matches_pattern
from ...errors import InputError, UsageError
from ...files.dtypes import FLOAT8, TORCH_FLOATS, TensorSpec
from .formulas import CountedMatrix, Outline

# Tensors that some versions of some models store beside the weights, and that are not trained.
BUFFERS = re.compile(r"((^|\.)(attn|attention)\.(masked_)?bias|inv_freq|running_(mean|var)|e_score_correction_bias)$")


MASKED_HEAD_MODULES = ("cls.", "lm_predictions.", "generator_lm_head.")


_BLOCK = re.compile(r"^(.*?)(?<![^.])(\d{1,5})\.(?=.)")


_NORM = re.compile(r"(norm|ln_)\w*\.(weight|gamma)$", re.IGNORECASE)


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
    in_model: str = ""  # its path in the model's class, if the file has another
    group: str = ""  # of `beside_layers.GROUPS`, if no pattern names it
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of a stack: role -> paths of single experts

    @property
    def roles(self) -> tuple[str, ...]:
        return projections(self.path)

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
    """Return what is trained of a file: floats that are no buffers, a bias that is there twice once."""
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
    """Return the tensors with single experts as one stack, where the model's class has one, and what is in each.

    Experts of which some are missing, or of several shapes, stay single; they have no parts.
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
        found = {specs[name].shape for name in names.values()}
        parts |= dict.fromkeys(names.values(), {})
        if len(found) == 1 and names.keys() == {(p, e) for p in range(len(roles)) for e in range(experts)}:
            ((rows, columns),) = found
            stacked[stack] = TensorSpec(specs[names[0, 0]].dtype, (experts, len(roles) * rows, columns))
            stack_of |= dict.fromkeys(names.values(), stack)
            paths = [[module_path(names[p, e]) for e in range(experts)] for p in range(len(roles))]
            parts[stack] = {role: tuple(each) for role, each in zip(roles, paths, strict=True)}
    return {stack_of.get(name, name): stacked.get(stack_of.get(name, ""), spec) for name, spec in specs.items()}, parts


def parts_in_files(specs: Mapping[str, TensorSpec], model_type: str) -> Parts:
    """Return what is in each stack of a model's class, by the names that files of its type have for single experts."""
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
    """Find the blocks of every stack whose blocks each have at least LEAST_MATRICES matrices, and all one width."""
    stacks: dict[str, dict[int, dict[str, TensorSpec]]] = {}
    for name, spec in specs.items():
        found = _BLOCK.match(name)
        if found:
            stacks.setdefault(found[1], {}).setdefault(int(found[2]), {})[name] = spec
    blocks: list[ModelBlock] = []
    for stack, members in stacks.items():
        widths = {_width(each) for each in members.values()}
        if len(widths) == 1 and (width := widths.pop()):
            blocks += [ModelBlock(stack, n, width, sum(s.size for s in members[n].values())) for n in sorted(members)]
    return tuple(blocks)


def _width(specs: Mapping[str, TensorSpec]) -> int:
    """Return the dimension that most of a block's matrices, and a norm, have; 0 for too few matrices."""
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
    """Collect what the formulas need; `layers`: those whose biases and blocks a method may touch, None for all."""
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
    found = []
    for name, spec in specs.items():
        path, block = module_path(name), _BLOCK.match(name)
        kind = "experts" if name in parts else weight_role(path, len(spec.shape), True)
        if spec.size and kind and (path != name or kind == "experts"):
            stacked = kind == "experts" and len(spec.shape) == 3
            copies, rows = (spec.shape[0], spec.shape[1]) if stacked else (1, spec.shape[0])
            width = width_of.get((block[1], int(block[2])), 0) if block else 0
            single = next(iter(parts.get(name, {}).values()), (path,))[0]
            group = groups.get(name) or groups.get(single) or groups.get(f"{single}.weight") or ""
            columns, whole = spec.size // (copies * rows), module_path(in_model(name))
            found.append(Matrix(path, kind, copies, rows, columns, width, whole, group, parts.get(name, {})))
    if tied is not None and tied[1] not in specs:
        rows, columns = specs[tied[0]].shape
        found.append(Matrix(module_path(tied[1]), "head", 1, rows, columns, 0))
    return tuple(found)


def names_one(pattern: str, matrix: Matrix) -> bool:
    """Return whether a pattern of --target means a matrix or some rows of it: by its path, or by a role."""
    if matrix.group:
        return False
    return _names_whole(pattern, matrix) or any(_names_role(pattern, matrix, role) for role in matrix.roles)


def _names_whole(pattern: str, matrix: Matrix) -> bool:
    if pattern == "all-linear":
        return matrix.kind == "linear"
    return any(matches_pattern(pattern, path) for path in {matrix.path, matrix.in_model} - {""})


def _names_role(pattern: str, matrix: Matrix, role: str) -> bool:
    """Return whether a pattern means some rows of a matrix: by their role, or by the names of single experts.

    Raises:
        UsageError: it names some of the experts, of which one parameter of the class has all.
    """
    named = [matches_pattern(pattern, path) for path in matrix.parts.get(role, ()) if pattern != "all-linear"]
    if any(named) and not all(named):
        one, other = (matrix.parts[role][named.index(way)] for way in (True, False))
        last = matrix.path.rpartition(".")[2]
        raise UsageError(
            f"and {other} are both in {matrix.path}, a single parameter of the class: select both or neither",
            culprit=one,
            remedy=f"name {last}",
        )
    return pattern == role or any(named)


def find_targets(matrices: Sequence[Matrix], selection: Selection) -> tuple[CountedMatrix, ...]:
    """Return the selected matrices; a fused one that is named itself is one, else each of its roles that is named.

    A stack of experts of which all roles are named is one too, as PEFT knows no other factors of it. The patterns of `selection` may also be roles, as `architectures.projections.projections` returns.

    Raises:
        InputError: the shapes do not tell which rows of a fused matrix a role has.
    """
    within = Selection(layers=selection.layers)
    query_rows = {m.parent: m.other for m in matrices if m.roles == ("o_proj",)}
    found: list[CountedMatrix] = []
    for m in matrices:
        by_path = any(_names_whole(p, m) for p in selection.target if p not in m.roles)
        excluded = any(_names_whole(p, m) for p in selection.exclude if p not in m.roles)
        if excluded or m.group or not within.selects(m.path):
            continue
        left = [r for r in m.roles if not any(_names_role(p, m, r) for p in selection.exclude)]
        kept = [r for r in left if by_path or any(_names_role(p, m, r) for p in selection.target)]
        if len(kept) == len(m.roles) and (by_path or len(kept) == 1 or m.kind == "experts"):
            found.append(CountedMatrix(m.path, m.columns, m.rows, m.copies))
        elif kept:
            rows = _role_rows(m, query_rows.get(m.parent))
            found += [CountedMatrix(f"{m.path}[{role}]", m.inp, rows[role], m.copies) for role in kept]
    return tuple(found)


def _role_rows(matrix: Matrix, query_rows: int | None) -> dict[str, int]:
    """Return how many outputs each role of a fused matrix has: equal ones, but for keys and values that share heads."""
    out, count = matrix.rows * matrix.columns // matrix.inp, len(matrix.roles)
    shared = query_rows is not None and count > 2
    fused = Fused(matrix.roles, ("queries", *[None] * (count - 1)) if shared else ())
    rows = rows_of_runs(fused, matrix.inp, out, queries=query_rows or 0)
    if rows is None:
        raise InputError(
            f"is {matrix.rows} x {matrix.columns}: which of it is {', '.join(matrix.roles)} is not known",
            culprit=matrix.path,
            remedy="name the whole in --target",
        )
    return dict(zip(matrix.roles, rows, strict=True))
