"""An update of one tensor: `UpdateSpec`, known from headers, and `Update`, the base class of all kinds.

A kind defines its exact arithmetic (`terms`, `delta`, `moved`), the axis of the norms that it needs, its low-rank
factors if it has any, and its shape.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...errors import InputError, LoratoolError
from ...files.dtypes import TensorSpec
from ...files.weights_file import WeightsFile
from ..config import AdapterConfig

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.decide import Delta, Entries, Factor
    from ...numerics.forms import Wide
    from ...numerics.mixed import Mixing
    from ...numerics.products import Term


# What is wrong in how a program reads an update
Fault = Literal["turned", "unbound", "unscaled", "bound by alpha"]

RowsOfDelta = Callable[[int, int], "Delta"]  # (start, stop) -> the delta of these rows


@dataclass(frozen=True)
class Detail:
    """Facts on an update of one kind that its tensors lack."""

    @property
    def hashed(self) -> tuple[int, ...]:
        """The numbers in it that are not in the weights file."""
        return ()


@dataclass(frozen=True)
class Stack(Detail):
    """Factors of several matrices in one tensor."""

    experts: int
    transposed: bool | None = None  # the base has them as (expert, in, out); None if it depends on the family


@dataclass(frozen=True)
class UpdateSpec:
    """An update before its tensors are read."""

    cls: type[Update]  # a class of UPDATES, or Unpaired
    module: str  # path of the module with the `weight` that it changes, or of another parameter
    tensors: Mapping[str, str]  # role (A, B, ...) -> tensor in the adapter's file
    specs: Mapping[str, TensorSpec]  # role -> type and shape
    scale: float = 1.0
    transposed: bool | None = None  # the base stores (in, out); None if the format leaves it open
    detail: Detail | None = None
    base: str | None = None  # tensor in the adapter's file that replaces the weight under the update
    fault: str | None = None  # why it cannot be merged, if a damaged file is read leniently
    optional: bool = False  # a base may lack the tensor that it changes
    everywhere: bool = False  # it changes all uses of a matrix, including a tied head
    parameter: bool = False  # PEFT's config lists the weight as a parameter, since PEFT mistakes the module's type

    @property
    def kind(self) -> str:
        """Its kind in reports: a key of UPDATES, or the kind of `Unpaired`."""
        return self.cls.kind

    @property
    def target(self) -> str:
        """Its name in PEFT's config."""
        return f"{self.module}.weight" if self.parameter else self.cls.target(self.module)

    @property
    def additive(self) -> bool:
        return self.cls.additive

    @property
    def along_inputs(self) -> bool:
        """True if W' depends on the norms of its columns."""
        return self.cls.norm_axis(self, False) == 1

    @property
    def stored(self) -> tuple[str, ...]:
        """All names of its tensors in the adapter's file."""
        return (*self.tensors.values(), *((self.base,) if self.base else ()))

    @property
    def rank(self) -> int:
        """The rank of the update of one matrix; 0 if the update has no factors."""
        return self.cls.rank(self)

    @property
    def experts(self) -> int:
        """The number of matrices in its stack."""
        return self.detail.experts if isinstance(self.detail, Stack) else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the changed tensor: (out, in) for a linear layer, (experts, out, in) for a stack."""
        return self.cls.shape(self)


@dataclass(frozen=True)
class PeftMethod:
    """PEFT's adapters of one kind of update."""

    type: str  # `peft_type` in their config
    ends: Mapping[str, str]  # suffix of a tensor's name -> role
    alpha: str | None = None  # field of the config
    shared: tuple[str, ...] = ()  # roles, and names, of tensors shared by all modules
    prunes: bool = False  # ranks of modules can differ from the config's
    alone: str | None = None  # remedy for a file that has the shared tensors alone


@dataclass(frozen=True)
class Rotated:
    """What `inspect` says of rotations.

    Attributes:
        defect: the largest ||R.T R - 1|| of a block.
        is_bound: a bound makes one of them smaller.
    """

    defect: float
    is_bound: bool


@dataclass(frozen=True)
class Projected:
    """The change scale * (W U) K, W U being numbers of 36 bits for each row of W."""

    U: Numbers  # (in * kernel, p)
    K: Numbers  # (p, in * kernel)
    scale: Fraction


def require_rank(spec: UpdateSpec, config: AdapterConfig, rank: int) -> None:
    """Raise InputError if the config and the tensors have different ranks: either scale would be a guess."""
    stated = config.rank_of(spec.module)
    if stated not in (None, rank):
        raise InputError(
            f"the config says rank {stated}, but its tensors have rank {rank}",
            culprit=spec.module,
            remedy="the config is of another adapter",
        )


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without a kernel's trailing axes of 1; a kernel of 1 x 1 gives a linear layer's shape."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def finite_numbers(tensors: Mapping[str, str], file: WeightsFile, adapter: str) -> dict[str, Numbers]:
    """Read tensors by role; raise InputError for one that holds nan or inf. adapter: its name, for the message."""
    found = {role: file.numbers(name) for role, name in tensors.items()}
    for role, numbers in found.items():
        if not numbers.all_finite():
            raise InputError(f"holds nan or inf; {adapter} is damaged", culprit=tensors[role])
    return found


class Update(ABC):
    """A change of one tensor, with its numbers loaded, in any form."""

    kind: ClassVar[str]  # its name in reports
    roles: ClassVar[tuple[str, ...]]  # of its tensors in a file
    optional: ClassVar[tuple[str, ...]] = ()  # roles that may be missing
    suffixes: ClassVar[Mapping[str, str]] = {}  # suffix of LyCORIS's name for a tensor -> role
    peft: ClassVar[PeftMethod | None] = None
    additive: ClassVar[bool] = True  # a tensor can have any number of such updates, which are summed; else only one
    in_turn: ClassVar[bool] = True  # its program merges several that are not additive one after the other
    stack: ClassVar[bool] = False  # it changes a stack of matrices
    of_whole: ClassVar[bool] = False  # its change of some rows depends on how many rows the module has
    flattened: ClassVar[bool] = False  # its columns may include a kernel of a size that its tensors do not show
    in_stored_layout: ClassVar[bool] = False  # it changes a tensor in the stored layout, whether transposed or not
    reads_columns: ClassVar[bool] = False  # its change depends on numbers of each column (`reading`)
    projects: ClassVar[bool] = False  # its change has a product of the weight (`projected`), beside its terms
    mixes: ClassVar[bool] = False  # it multiplies the weight by matrices, so that its numbers mix (`mixing`)

    @classmethod
    @abstractmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        """Return the shape of the tensor that it changes."""

    @classmethod
    def target(cls, module: str) -> str:
        """Return the module that PEFT's config lists for an update of `module`."""
        return module

    @classmethod
    def rank(cls, spec: UpdateSpec) -> int:
        """Return the rank of the change of one matrix if it is a product of factors, else 0."""
        return 0

    @classmethod
    def divisor(cls, spec: UpdateSpec) -> int:
        """Return the rank that divides alpha; 0 if there is none."""
        return cls.rank(spec)

    @classmethod
    def sums(cls, spec: UpdateSpec) -> bool:
        """Return whether its factors hold sums, which float64 may round, and not only products of two numbers."""
        return False

    @classmethod
    def fits(cls, spec: UpdateSpec, shape: tuple[int, ...]) -> bool:
        """Return whether it can change a matrix or a convolution of this shape, (out, in, *kernel).

        A convolution with a kernel of 1 counts as a linear layer, because its update may be written for one.
        """
        changed_shape = without_ones(spec.shape[1:] if cls.stack else spec.shape)
        return changed_shape == without_ones(shape) or (
            cls.flattened and changed_shape == (*shape[:1], math.prod(shape[1:]))
        )

    @classmethod
    def flat(cls, spec: UpdateSpec) -> tuple[int | None, int | None]:
        """Return the outputs and inputs (times the kernel) of one matrix; None for a size that only the base has."""
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
        """Create the spec of an update from the tensors of its module.

        Args:
            roles: role -> tensor in the file, with `base` for a weight that is stored under the update.
            transposed: as `UpdateSpec.transposed`.
            lenient: record errors of the config in `UpdateSpec.fault` instead of raising them.

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
        """Return the spec with its scale and detail, which may depend on the config."""
        return spec

    @classmethod
    def misfit(cls, spec: UpdateSpec, base: TensorSpec, adapter: str) -> str | None:
        """Return why an update of a full tensor does not fit this tensor; None if it fits.

        Args:
            adapter: the adapter's name, for the message.
        """
        return None if spec.shape == base.shape else f"is {base.shape}, but {adapter} has {spec.shape} for it"

    @classmethod
    def of_bias(cls, spec: UpdateSpec, bias: str) -> UpdateSpec | None:
        """Return the update of the module's bias that follows from the weight's.

        Args:
            bias: the path of the bias.
        """
        return None

    @classmethod
    def load(cls, spec: UpdateSpec, file: WeightsFile, adapter: str) -> Update:
        """Read the tensors of an update.

        Args:
            adapter: the adapter's name, for messages.

        Raises:
            InputError: a tensor holds nan or inf.
        """
        return cls.make(spec, finite_numbers(spec.tensors, file, adapter))

    @classmethod
    @abstractmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> Update:
        """Return the update with these numbers, by role."""

    @classmethod
    def norm_axis(cls, spec: UpdateSpec, transposed: bool) -> int | None:
        """Return whether W' depends on the norm of each row (0) or column (1) as the base stores them, or neither."""
        return None

    @classmethod
    def change_rank(cls, spec: UpdateSpec) -> int:
        """Return the rank of the change of a weight, if it is low but needs the weight; else 0."""
        return 0

    @classmethod
    def of_tensor(cls, spec: UpdateSpec, shape: tuple[int, ...]) -> UpdateSpec:
        """Return the update of a base's tensor of this shape, if one that `mixes` is another one for other shapes."""
        return spec

    @classmethod
    def of_transposed(cls, spec: UpdateSpec) -> UpdateSpec:
        """Return the update of a weight that the base stores as (in, out), if another class computes it."""
        return spec

    @classmethod
    def projections(cls, spec: UpdateSpec, columns: int) -> int:
        """Return of how many numbers of a row of W the change depends, beside W. columns: of the base."""
        return 0

    @classmethod
    def reads_weight(cls, spec: UpdateSpec) -> tuple[str, int] | None:
        """Return the module on whose weight its change of a bias depends, and the weight's inputs, or None."""
        return None

    @classmethod
    def together(cls, spec: UpdateSpec, transposed: bool) -> int:
        """Return how many rows mix, as the base stores them: its own are in blocks of so many."""
        return 1

    @classmethod
    def misread(cls, spec: UpdateSpec) -> Mapping[Fault, UpdateSpec]:
        """Return what programs take the update for that have it wrong."""
        return {}

    @classmethod
    def without_norm(cls, spec: UpdateSpec) -> UpdateSpec:
        """Return the additive update inside a decomposition; any other spec unchanged."""
        return spec

    def matrix(self, expert: int | None) -> Update:
        """Return the update of one matrix of a stack."""
        return self

    def sized(self, outputs: int, inputs: int) -> Update:
        """Return the update of a weight of this size, if its tensors alone do not tell the size.

        Raises:
            InputError: it changes an element that such a weight does not have.
        """
        return self

    def terms(self, weight: float, transposed: bool) -> list[Term]:
        """Return products with the sum `weight` times its delta, as (out, in), or as (in, out) if `transposed`."""
        return []

    def delta(self, weight: float, transposed: bool) -> RowsOfDelta | None:
        """Return the rest of its delta, beside `terms`, as a function of a range of rows (columns if `transposed`)."""
        return None

    def moved(
        self, weight: float, transposed: bool, rows: slice, columns: int
    ) -> tuple[Delta | None, Factor | Entries]:
        """Return D and a of X = a W + D of an update that is not additive and needs no norms.

        Args:
            rows: of the update, as the base stores them.
            columns: of the base.

        Raises:
            TypeError: the kind is additive or needs norms.
        """
        raise TypeError(f"{self.kind} says what it does by terms, a delta or norms")

    def projected(self, weight: float) -> Projected:
        """Return the change of an update that `projects`, beside its terms."""
        raise TypeError(f"{self.kind} has no product of the weight")

    def reading(self) -> Numbers:
        """Return L, (p, out), of an update that `reads_columns`: its change depends on the numbers F = L W."""
        raise TypeError(f"{self.kind} does not read columns of the weight")

    def terms_of(self, F: Wide, weight: float) -> list[Term]:
        """Return the terms of the change of an update that `reads_columns`. F: (p, in)."""
        raise TypeError(f"{self.kind} does not read columns of the weight")

    def weighed(self) -> Numbers:
        """Return C, (in, 1), of an update of a bias that `reads_weight`: it adds W C, beside what `moved` says."""
        raise TypeError(f"{self.kind} does not read the weight of its module")

    def mixing(self, weight: float, transposed: bool) -> Mixing:
        """Return the change of an update that `mixes`, as the base stores the weight."""
        raise TypeError(f"{self.kind} does not multiply the weight by matrices")

    def rotated(self) -> Rotated | None:
        """Return what its rotations are like, of a kind that has any."""
        return None

    def factors(self) -> tuple[Wide, Wide] | None:
        """Return (B (E, out, r), A (E, r, in)) in float64, with the scale in B; None if it is not a product."""
        return None

    def singular_values(self, of_product: Callable[[Wide, Wide], Wide]) -> Wide | None:
        """Return the singular values of each matrix's change, (E, k), largest first; None without factors.

        Args:
            of_product: computes them from factors, as `factored_svd.singular_values`.
        """
        factors = self.factors()
        return None if factors is None else of_product(*factors)

    def absolute(self) -> Update:
        """Return an update whose delta is, element by element, the sum of the sizes of this one's summands, or more."""
        return self.map(abs)

    def map(self, function: Callable[[Numbers], Numbers]) -> Update:
        """Return the update with a function applied to each of its `Numbers`."""
        changed: dict[str, Any] = {}
        for attribute in fields(self):  # type: ignore[arg-type]  # all kinds are dataclasses
            value = getattr(self, attribute.name)
            if isinstance(value, Update):
                changed[attribute.name] = value.map(function)
            elif hasattr(value, "reshape"):  # numpy is not imported for this
                changed[attribute.name] = function(value)
        return replace(self, **changed)  # type: ignore[type-var]


@dataclass(frozen=True)
class Unpaired(Update):
    """A tensor of a damaged file, which can only be inspected."""

    kind = "unpaired"
    roles = ("value",)

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return spec.specs["value"].shape

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> Update:
        raise InputError(spec.fault or "is damaged", culprit=spec.module)
