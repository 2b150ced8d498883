"""List the weights of the class that PEFT wraps, with the rows of the file's tensors that make up each.

Most weights are one tensor of the file. But transformers stacks separate experts of a file and splits its fused
matrices, and an adapter has factors for the weights of the class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ...adapters.weight_kinds import stack_shape, weight_kind
from ...architectures.experts import TRANSPOSED_TO_FIT, expert_part
from ...architectures.fused_rows import RowPart
from ...architectures.prefixes import module_path
from ...architectures.roles import weight_role
from ...errors import InputError
from ...files.checkpoint import Checkpoint
from ...files.dtypes import TensorSpec
from ...files.tensor_ref import TensorRef
from ..modules.resolve import fused_parts, strip_wrappers
from ..modules.selection import matches_pattern
from ..names.class_names import ClassNames
from ..names.peft_names import is_bare, is_plain, role_in_model


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor of the file, as a matrix with its last dimension as columns."""

    name: str
    span: tuple[int, int] | None = None  # (start, stop); None for all of the tensor, unchanged


@dataclass(frozen=True)
class ModelWeight:
    """A weight of the class that PEFT wraps, which can have factors."""

    name: str  # the file's name if it is one tensor, else the class's
    in_model: str  # its name in the class
    role: str  # `architectures.roles.weight_role`, or router
    kind: str  # a key of WEIGHT_KINDS
    bare: bool  # PEFT's config must list it as a parameter, not as a module
    spec: TensorSpec  # in the class
    pieces: tuple[tuple[Piece, ...], ...]  # for each of its matrices, from top to bottom

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Return (E, out, in) of its stack of matrices."""
        return stack_shape(self.kind, self.spec.shape)

    @property
    def parameters_per_rank(self) -> int:
        E, out, inp = self.sizes
        return E * (out + inp)

    @property
    def max_rank(self) -> int:
        """The largest possible rank of this weight's delta."""
        return min(self.sizes[1:])

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the file's tensors."""
        return tuple(dict.fromkeys(piece.name for matrix in self.pieces for piece in matrix))

    @property
    def paths(self) -> tuple[str, ...]:
        """Return the paths that a pattern may match."""
        return tuple(dict.fromkeys(map(module_path, (self.name, self.in_model))))

    def is_named(self, pattern: str) -> bool:
        """Return whether a pattern matches the weight or one of its tensors."""
        return any(matches_pattern(pattern, path) for path in (*self.paths, *map(module_path, self.names)))

    def matrices(self, ref: Callable[[str], TensorRef]) -> Iterator[list[TensorRef]]:
        """Yield the rows of each matrix as a list of parts, from top to bottom.

        Args:
            ref: a name in the file -> the weight's tensor.
        """
        for matrix in self.pieces:
            yield [ref(p.name).part(*p.span) if p.span else ref(p.name) for p in matrix]


def model_weights(base: Checkpoint, in_model: ClassNames | None) -> list[ModelWeight]:
    """Return the weights that can have factors, in the order of the file; incomplete weights have no role.

    Args:
        in_model: the names in the class that PEFT wraps; None for an adapter that PEFT need not load, which has the
            file's modules.

    Raises:
        InputError: two tensors of the file are one weight of the class.
    """
    rearranged = rearranged_weights(base, in_model) if in_model else {}
    weights = []
    for name, spec in base.specs.items():
        if name in rearranged:
            weights += [weight_of_class for weight_of_class in rearranged[name] if name == weight_of_class.names[0]]
        elif weight := weight_of_tensor(base, name, spec, in_model):
            weights.append(weight)
    owners: dict[str, str] = {}
    for weight_of_class in (weight for weight in weights if weight.in_model):
        first = owners.setdefault(weight_of_class.in_model, weight_of_class.names[0])
        if first != weight_of_class.names[0]:
            raise InputError(
                f"and {weight_of_class.names[0]} are one weight of the class, {weight_of_class.in_model}", culprit=first
            )
    return weights


def weight_of_tensor(base: Checkpoint, name: str, spec: TensorSpec, in_model: ClassNames | None) -> ModelWeight | None:
    """Return the weight of the class that is one tensor of the file; None if it cannot have factors."""
    path = in_model(name) if in_model else name
    plain = weight_role(module_path(name), len(spec.shape), is_plain(base, name, spec))
    role = role_in_model(base, name, path, spec) if in_model else plain
    if not role:
        return None
    kind = weight_kind(base.model_types, module_path(name), "linear" if role == "router" else role)
    kind = "experts-turned" if kind == "experts" and _is_transposed(base, name, spec) else kind
    pieces: tuple[tuple[Piece, ...], ...] = ((Piece(name),),)
    if kind.startswith("experts"):
        rows = spec.shape[1]
        pieces = tuple((Piece(name, (e * rows, (e + 1) * rows)),) for e in range(spec.shape[0]))
    bare = in_model is not None and is_bare(in_model.family, path, role)
    return ModelWeight(name, path, role, kind, bare, spec, pieces)


def _is_transposed(base: Checkpoint, name: str, spec: TensorSpec) -> bool:
    """Return whether a stack in a file of TRANSPOSED_TO_FIT is (expert, in, out), by the layer's input size."""
    width = next((base.configs[t].get("hidden_size") for t in base.model_types if t in TRANSPOSED_TO_FIT), None)
    place = 1 if name.endswith("down_proj") else 2  # the axis of the width in (expert, out, in)
    return width is not None and spec.shape[place] != width == spec.shape[3 - place]


def rearranged_weights(base: Checkpoint, in_model: ClassNames) -> dict[str, list[ModelWeight]]:
    """Return each tensor that is not a full weight of the class -> the weights that have rows of it.

    A weight has no role if it cannot have factors in PEFT: its rows are in another order than the file's, the file
    lacks some of them, or the class has no such weight.
    """
    joined: dict[str, _Joined] = {}
    split: list[ModelWeight] = []
    for name, spec in base.specs.items():
        if (part := expert_part(strip_wrappers(name), base.model_types)) and len(spec.shape) == 2:
            rows = spec.shape[0]
            fused = joined.setdefault(part.fused, _Joined(part.fused, part.parts * rows, True))
            fused.members[part.expert, part.part * rows] = Piece(name, (0, rows))
            continue
        for row in fused_parts(name, spec, base.configs):
            if row.stop - row.start == row.module_rows:
                split.append(_split(base, in_model, name, row))
                continue
            path, count = f"{row.module}.weight" if len(spec.shape) == 2 else row.module, row.stop - row.start
            fused = joined.setdefault(path, _Joined(path, row.module_rows, len(spec.shape) == 3))
            for e in range(spec.shape[0] if fused.stacked else 1):
                fused.members[e, row.skip] = Piece(name, (e * count, (e + 1) * count))
    by_tensor: dict[str, list[ModelWeight]] = {}
    for weight in (*split, *(_join(base, in_model, each) for each in joined.values())):
        for name in weight.names:
            by_tensor.setdefault(name, []).append(weight)
    return by_tensor


@dataclass
class _Joined:
    """A weight of the class with the rows of several tensors."""

    name: str  # canonical
    rows: int  # of each of its matrices
    stacked: bool  # it is a stack of experts
    members: dict[tuple[int, int], Piece] = field(default_factory=dict)  # (expert, first row in it) -> rows


def _join(base: Checkpoint, in_model: ClassNames, joined: _Joined) -> ModelWeight:
    path, matrices = in_model(joined.name), dict[int, list[Piece]]()
    for expert, row in sorted(joined.members):
        matrices.setdefault(expert, []).append(joined.members[expert, row])
    specs = {piece.name: base.specs[piece.name] for piece in joined.members.values()}
    complete = [*matrices] == [*range(len(matrices))] and all(
        sum(piece.span[1] - piece.span[0] for piece in pieces if piece.span) == joined.rows
        for pieces in matrices.values()
    )
    plain = len({spec.shape[-1] for spec in specs.values()}) == 1 and all(
        is_plain(base, each, spec) for each, spec in specs.items()
    )
    first = next(iter(specs.values()))
    shape = (*((len(matrices),) if joined.stacked else ()), joined.rows, first.shape[-1])
    role = weight_role(module_path(path), len(shape), True) if plain and complete and path else ""
    bare, pieces = is_bare(in_model.family, path, role), tuple(map(tuple, matrices.values()))
    spec = TensorSpec(first.dtype, shape)
    return ModelWeight(path or joined.name, path, role, role or "linear", bare, spec, pieces)


def _split(base: Checkpoint, in_model: ClassNames, name: str, row: RowPart) -> ModelWeight:
    spec = base.specs[name]
    ending = "" if row.module.endswith(".bias") or len(spec.shape) == 3 else ".weight"
    path = in_model(row.module + ending)
    shape = (row.module_rows, *spec.shape[1:])
    is_matrix = len(shape) == 2 and is_plain(base, name, spec) and not row.permuted and bool(path)
    role = weight_role(module_path(path), 2, True) if is_matrix else ""
    pieces = ((Piece(name, (row.start, row.stop)),),)
    bare = is_bare(in_model.family, path, role)
    named = path or row.module + ending
    return ModelWeight(named, path, role, role or "linear", bare, TensorSpec(spec.dtype, shape), pieces)
