"""List the weights of the class that PEFT wraps, each with the rows of the file's tensors that it is loaded from.

Most are one tensor of the file. But transformers stacks experts that a file has one by one, and splits what a file has
fused: an adapter has factors for what is in the class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ..adapters.weight_kinds import stack_shape, weight_kind
from ..architectures.prefixes import module_path
from ..architectures.renames import expert_part
from ..architectures.roles import weight_role
from ..files.checkpoint import Checkpoint
from ..files.dtypes import TensorSpec
from ..files.tensor_ref import TensorRef
from .peft_names import is_bare, is_plain, role_in_model
from .resolve import strip_wrappers


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor of the file, seen as a matrix with the columns of its last dimension."""

    name: str
    span: tuple[int, int] | None = None  # start and stop; None for all of the tensor, as it is


@dataclass(frozen=True)
class ModelWeight:
    """A weight of the class that PEFT wraps, which can have factors."""

    name: str  # of the file's tensor if it is one, else that of the class
    in_model: str  # its name in the class
    role: str  # `architectures.roles.weight_role`, or router
    kind: str  # a key of WEIGHT_KINDS
    bare: bool  # PEFT has to be told of it as a parameter, not as a module
    spec: TensorSpec  # in the class
    pieces: tuple[tuple[Piece, ...], ...]  # of each of its matrices, one below the other

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
        """The largest rank that a delta of this weight can have."""
        return min(self.sizes[1:])

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the file's tensors."""
        return tuple(dict.fromkeys(piece.name for matrix in self.pieces for piece in matrix))

    @property
    def is_rearranged(self) -> bool:
        """Return whether it is several tensors of the file, or some rows of one."""
        return self.name not in self.names

    @property
    def paths(self) -> tuple[str, ...]:
        """Return the paths under which a pattern may name it."""
        return tuple(dict.fromkeys(map(module_path, (self.name, self.in_model))))

    def matrices(self, ref: Callable[[str], TensorRef]) -> Iterator[list[TensorRef]]:
        """Yield the rows of each matrix, as the weights of `ref` that are below one another.

        Args:
            ref: a name in the file -> where that weight is read from.
        """
        for matrix in self.pieces:
            yield [ref(p.name).part(*p.span) if p.span else ref(p.name) for p in matrix]


def model_weights(base: Checkpoint, in_model: Callable[[str], str] | None) -> list[ModelWeight]:
    """Return the weights that can have factors, in the order of the file.

    Args:
        in_model: of `peft_names.namer`; None for an adapter that PEFT need not load, whose modules are the file's.
    """
    stacks = _find_stacks(base) if in_model else {}
    found = []
    for name, spec in base.specs.items():
        if name in stacks:
            stack = stacks[name]
            if stack and name == next(iter(stack.members.values())):
                found.append(_stacked(base, in_model or str, stack))
        elif weight := weight_of_tensor(base, name, spec, in_model):
            found.append(weight)
    return found


def weight_of_tensor(
    base: Checkpoint, name: str, spec: TensorSpec, in_model: Callable[[str], str] | None
) -> ModelWeight | None:
    """Return the weight of the class that is one tensor of the file; None if it can have no factors."""
    path = in_model(name) if in_model else name
    plain = weight_role(module_path(name), len(spec.shape), is_plain(base, name, spec))
    role = role_in_model(base, name, path, spec) if in_model else plain
    if not role:
        return None
    kind = weight_kind(base.model_types, module_path(name), role)
    pieces: tuple[tuple[Piece, ...], ...] = ((Piece(name),),)
    if kind.startswith("experts"):
        rows = spec.shape[1]
        pieces = tuple((Piece(name, (e * rows, (e + 1) * rows)),) for e in range(spec.shape[0]))
    return ModelWeight(name, path, role, kind, in_model is not None and is_bare(base, path, role), spec, pieces)


@dataclass
class _Stack:
    """The tensors of single experts that the class stacks in one parameter."""

    fused: str  # canonical
    parts: int  # equal slices of an expert's rows, as gate and up are
    members: dict[tuple[int, int], str] = field(default_factory=dict)  # (expert, part) -> name


def _find_stacks(base: Checkpoint) -> dict[str, _Stack | None]:
    """Map the tensors of single experts to their stacks, or to None where some of a stack are missing or no numbers."""
    found: dict[str, _Stack] = {}
    for name in base.specs:
        if part := expert_part(strip_wrappers(name), base.model_types):
            stack = found.setdefault(part.fused, _Stack(part.fused, part.parts))
            stack.members[part.expert, part.part] = name
    stacks: dict[str, _Stack | None] = {}
    for stack in found.values():
        experts = 1 + max(expert for expert, _ in stack.members)
        specs = {base.specs[name] for name in stack.members.values()}
        whole = len(stack.members) == experts * stack.parts and len(specs) == 1
        plain = all(is_plain(base, name, base.specs[name]) for name in stack.members.values())
        stacks |= dict.fromkeys(
            stack.members.values(), stack if whole and plain and len(specs.pop().shape) == 2 else None
        )
    return stacks


def _stacked(base: Checkpoint, in_model: Callable[[str], str], stack: _Stack) -> ModelWeight:
    rows, columns = base.specs[next(iter(stack.members.values()))].shape
    experts = len(stack.members) // stack.parts
    pieces = tuple(tuple(Piece(stack.members[e, part]) for part in range(stack.parts)) for e in range(experts))
    spec = TensorSpec(base.specs[pieces[0][0].name].dtype, (experts, stack.parts * rows, columns))
    name = in_model(stack.fused)
    return ModelWeight(name, name, "experts", "experts", True, spec, pieces)
