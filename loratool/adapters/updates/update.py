"""Define an update of one tensor: `UpdateSpec`, known from headers, and `Update`, the class of a kind.

A kind answers what everything else asks of it: what it adds or by what it multiplies as exact reals (`terms`, `delta`,
`moved`), of which numbers it needs norms, its low-rank factors if it has any, and which shape it has.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import InputError, LoratoolError
from ...files.dtypes import TensorSpec
from ...files.tensor_ref import is_finite
from ...files.weights_file import WeightsFile
from ..config import AdapterConfig

if TYPE_CHECKING:
    from torch import Tensor

    from ...numerics.decide import Delta, Factor
    from ...numerics.products import Term


RowsOfDelta = Callable[[int, int], "Delta"]  # gives that of the rows from a start to a stop


@dataclass(frozen=True)
class Detail:
    """Hold for one kind of update what its tensors do not say."""

    @property
    def hashed(self) -> tuple[int, ...]:
        """The numbers in it that the weights file does not determine."""
        return ()


@dataclass(frozen=True)
class Stack(Detail):
    """Factors of several matrices in one tensor."""

    experts: int
    turned: bool | None = None  # the base has them as (expert, in, out); None if only its family tells


@dataclass(frozen=True)
class UpdateSpec:
    """One update before its tensors are read."""

    cls: type[Update]  # a class of UPDATES, or Unpaired
    module: str  # path of the module whose `weight` it changes, or of another parameter
    tensors: Mapping[str, str]  # role (A, B, ...) -> tensor in the adapter's file
    specs: Mapping[str, TensorSpec]  # role -> type and shape
    scale: float = 1.0
    transposed: bool | None = None  # the base stores (in, out); None if the format does not say
    detail: Detail | None = None
    base: str | None = None  # tensor in the adapter's file that replaces the weight under the update
    fault: str | None = None  # why it cannot be merged, if a damaged file is read leniently
    if_there: bool = False  # it changes a tensor that the base need not have
    everywhere: bool = False  # it changes a matrix wherever the model uses it: a tied head as well
    parameter: bool = False  # PEFT is told of its module's weight as a parameter, since it takes the module for another

    @property
    def kind(self) -> str:
        """The word for it in reports: a key of UPDATES, or that of `Unpaired`."""
        return self.cls.kind

    @property
    def target(self) -> str:
        """The name that it has in PEFT's config."""
        return f"{self.module}.weight" if self.parameter else self.module

    @property
    def additive(self) -> bool:
        return self.cls.additive

    @property
    def along_inputs(self) -> bool:
        """True if W' depends on the norms of its columns."""
        return self.cls.norm_axis(self, False) == 1

    @property
    def stored(self) -> tuple[str, ...]:
        """All of its tensors in the adapter's file."""
        return (*self.tensors.values(), *((self.base,) if self.base else ()))

    @property
    def rank(self) -> int:
        """The rank of the update of one matrix; 0 if the update has no factors."""
        return self.cls.rank(self)

    @property
    def experts(self) -> int:
        """How many matrices it is a stack of."""
        return self.detail.experts if isinstance(self.detail, Stack) else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that it changes: (out, in) for a linear layer, (experts, out, in) for a stack."""
        return self.cls.shape(self)


@dataclass(frozen=True)
class PeftMethod:
    """The adapters of PEFT that have one kind of update."""

    type: str  # `peft_type` in their config
    ends: Mapping[str, str]  # how their tensors' names end -> role
    alpha: str | None = None  # field of the config
    shared: tuple[str, ...] = ()  # roles, and names, of tensors that all modules have in common
    prunes: bool = False  # modules have other ranks than the config says


def require_rank(spec: UpdateSpec, config: AdapterConfig, rank: int) -> None:
    """Raise InputError if the config says another rank than the tensors have: a scale by either would be a guess."""
    said = config.rank_of(spec.module)
    if said not in (None, rank):
        raise InputError(
            f"the config says rank {said}, but its tensors have rank {rank}",
            culprit=spec.module,
            remedy="the config is of another adapter",
        )


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without the axes of a kernel that are 1 at its end: a kernel of 1 leaves a linear layer's."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


class Update(ABC):
    """One change of one tensor, with the tensors that make it loaded, in any float dtype."""

    kind: ClassVar[str]  # its word in reports
    roles: ClassVar[tuple[str, ...]]  # of its tensors in a file
    optional: ClassVar[tuple[str, ...]] = ()  # roles that need not be there
    suffixes: ClassVar[Mapping[str, str]] = {}  # how LyCORIS's names of its tensors end -> role
    peft: ClassVar[PeftMethod | None] = None
    additive: ClassVar[bool] = True  # any number of such updates of a tensor is summed; of the others it takes one
    stack: ClassVar[bool] = False  # it changes a stack of matrices
    flattened: ClassVar[bool] = False  # its columns may be a kernel's too, of which its tensors do not tell the size
    whole: ClassVar[bool] = False  # it changes a tensor as it is stored, not a matrix that may lie transposed in it

    @classmethod
    @abstractmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        """Return the shape of what it changes."""

    @classmethod
    def rank(cls, spec: UpdateSpec) -> int:
        """Return the rank of the change of one matrix if factors of that rank make it up, else 0."""
        return 0

    @classmethod
    def divisor(cls, spec: UpdateSpec) -> int:
        """Return the rank that alpha is divided by; 0 if there is none."""
        return cls.rank(spec)

    @classmethod
    def sums(cls, spec: UpdateSpec) -> bool:
        """Return whether its factors hold sums, which float64 may round, and not products of two numbers alone."""
        return False

    @classmethod
    def fits(cls, spec: UpdateSpec, shape: tuple[int, ...]) -> bool:
        """Return whether it changes a matrix or a convolution of this shape, (out, in, *kernel).

        A convolution with a kernel of 1 counts as a linear layer, as which its update may be written.
        """
        own = without_ones(spec.shape[1:] if cls.stack else spec.shape)
        return own == without_ones(shape) or (cls.flattened and own == (*shape[:1], math.prod(shape[1:])))

    @classmethod
    def flat(cls, spec: UpdateSpec) -> tuple[int | None, int | None]:
        """Return the outputs and inputs (times the kernel) of one matrix; None for what only the base tells."""
        shape = spec.shape[1:] if cls.stack else spec.shape
        return shape[0], math.prod(shape[1:])

    @classmethod
    def from_headers(
        cls,
        module: str,
        roles: Mapping[str, str],
        file: WeightsFile,
        config: AdapterConfig,
        transposed: bool | None = None,
        lenient: bool = False,
    ) -> UpdateSpec:
        """Make the spec of an update from the tensors found for its module.

        Args:
            roles: role -> tensor in the file, with `base` for a weight that is stored under the update.
            transposed: as `UpdateSpec.transposed`.
            lenient: record what the config lacks or contradicts in `UpdateSpec.fault` instead of raising an error.

        Raises:
            InputError: a tensor is missing, or the shapes contradict each other or the config.
            NeedsFlag: the file does not say its alpha.
        """
        cls.require(module, roles)
        specs = {role: file.specs[name] for role, name in roles.items() if role != "base"}
        tensors = {role: roles[role] for role in specs}
        cls.check(module, roles, specs)
        spec = UpdateSpec(cls, module, tensors, specs, 1.0, transposed, base=roles.get("base"))
        try:
            spec = cls.describe(spec, config)
            if not math.isfinite(spec.scale):
                raise InputError(f"its scale would be {spec.scale}", culprit=module)
        except LoratoolError as error:
            if not lenient:
                raise
            fault = f"{error.message}; {error.remedy}" if error.remedy else error.message
            return replace(spec, scale=spec.scale if math.isfinite(spec.scale) else 1.0, fault=fault)
        return spec

    @classmethod
    def require(cls, module: str, roles: Mapping[str, str]) -> None:
        """Raise InputError for a tensor that is missing."""
        for role in cls.roles:
            if role not in roles:
                other = next(iter(roles.values()))
                raise InputError(f"has no partner: the {role} factor of {module} is missing", culprit=other)

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        """Raise InputError for shapes that do not fit each other."""
        return

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        """Return the spec with its scale and detail, which may need the config."""
        return spec

    @classmethod
    def misfit(cls, spec: UpdateSpec, base: TensorSpec, adapter: str) -> str | None:
        """Return why an update of a whole tensor is not one of this tensor, or None.

        Args:
            adapter: its name for the message.
        """
        return None if spec.shape == base.shape else f"is {base.shape}, but {adapter} has {spec.shape} for it"

    @classmethod
    def of_bias(cls, spec: UpdateSpec, bias: str) -> UpdateSpec | None:
        """Return the update of the module's bias that comes with that of its weight.

        Args:
            bias: the bias's path.
        """
        return None

    @classmethod
    def load(cls, spec: UpdateSpec, file: WeightsFile, adapter: str) -> Update:
        """Read its tensors.

        Args:
            adapter: its name for messages.

        Raises:
            InputError: a tensor holds nan or inf.
        """
        tensors = {role: file.tensor(name) for role, name in spec.tensors.items()}
        for role, tensor in tensors.items():
            if not is_finite(tensor):
                raise InputError(f"holds nan or inf; {adapter} is damaged", culprit=spec.tensors[role])
        return cls.make(spec, tensors)

    @classmethod
    @abstractmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Tensor]) -> Update:
        """Return the update with these tensors, by role."""

    @classmethod
    def norm_axis(cls, spec: UpdateSpec, transposed: bool) -> int | None:
        """Return whether W' depends on the norm of each row (0) or column (1) as the base stores them, or neither."""
        return None

    @classmethod
    def without_norm(cls, spec: UpdateSpec) -> UpdateSpec:
        """Return the additive update that a decomposition is made with; any other spec as it is."""
        return spec

    def matrix(self, expert: int | None) -> Update:
        """Return the update of one matrix of a stack."""
        return self

    def terms(self, weight: float, transposed: bool) -> list[Term]:
        """Return products whose sum is `weight` times what it adds, as (out, in), or as (in, out) if `transposed`."""
        return []

    def delta(self, weight: float, transposed: bool) -> RowsOfDelta | None:
        """Return what it adds beside `terms`, as a function of a range of its rows (columns if `transposed`)."""
        return None

    def moved(self, weight: float, transposed: bool, rows: slice, columns: int) -> tuple[Delta | None, Factor]:
        """Return D and a of X = a W + D of an update that is not additive and needs no norms.

        Args:
            rows: of the update, as the base stores them.
            columns: of the base.

        Raises:
            TypeError: the kind adds something or needs norms. What it adds is not for this question.
        """
        raise TypeError(f"{self.kind} says what it does by terms, a delta or norms")

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Return (B (E, out, r), A (E, r, in)) in float64, with the scale in B; None if no factors make it up."""
        return None

    def singular_values(self) -> Tensor | None:
        """Return those of the change of each matrix, (E, k), largest first; None if it has no factors."""
        from ...numerics.factored_svd import singular_values

        found = self.factors()
        return None if found is None else singular_values(*found)

    def map(self, function: Callable[[Tensor], Tensor]) -> Update:
        """Return the update with a function applied to each of its tensors."""
        import torch

        changed: dict[str, Any] = {}
        for each in fields(self):  # type: ignore[arg-type]  # all kinds are dataclasses
            value = getattr(self, each.name)
            if isinstance(value, torch.Tensor):
                changed[each.name] = function(value)
            elif isinstance(value, Update):
                changed[each.name] = value.map(function)
        return replace(self, **changed)  # type: ignore[type-var]


@dataclass(frozen=True)
class Unpaired(Update):
    """A tensor of a damaged file, which can be inspected only."""

    kind = "unpaired"
    roles = ("value",)

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return spec.specs["value"].shape

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Tensor]) -> Update:
        raise InputError(spec.fault or "is damaged", culprit=spec.module)
