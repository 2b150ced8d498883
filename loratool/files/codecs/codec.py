"""Define the seam of a codec: how the tensors that a file stores make up one weight, a matrix of numbers.

`Codec` reads rows as numbers, which is all that a plain type has. `CodeFormat` is a codec of codes: one small integer
for each number, the same code for the same number wherever scale and offset are the same. From it follow reading,
merging back into codes, and undo; their places in the file are the packing's matter, their numbers the format's.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import InputError
from ..dtypes import BLOCK_TYPES, DTYPE_NAMES, DTYPES, TensorSpec
from ..weights_file import WeightsFile
from .quantized import Blocks, stated_blocks

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    Codes = npt.NDArray[Any]  # unsigned or signed integers, one code a number
    Wide = npt.NDArray[np.float64]


LONG_ROW, STRIP = 1 << 16, 1 << 20  # bytes: a row of which single columns are read, and of rows read at a time

SMALL = 1 << 16  # bytes: of a description or a shape beside codes, at most


class Fault(ValueError):
    """A fault of the tensors of a coded weight; it counts only if the weight is touched."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file has it: the bytes of its type."""

    file: WeightsFile
    name: str

    @property
    def spec(self) -> TensorSpec:
        return self.file.specs[self.name]

    def read(self, first: int, out: torch.Tensor) -> None:
        """Read numbers of the stored type into `out`, which is contiguous, from the number `first` on."""
        self.file.read_numbers(self.name, first, out)

    def numbers(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Return numbers of the stored type, flat, from the number `first` on; by default all that follow."""
        import torch

        kind = getattr(torch, DTYPE_NAMES[self.spec.dtype])
        out = torch.empty(self.spec.size - first if count is None else count, dtype=kind)
        if out.numel():
            self.read(first, out)
        return out

    @property
    def count(self) -> int:
        """How many `integers` there are."""
        return self.spec.nbytes if self.spec.dtype in BLOCK_TYPES else self.spec.size

    def integers(self, first: int = 0, count: int | None = None) -> Codes:
        """Return the same of an integer type, or the bit patterns of another type, as unsigned integers.

        Also of a type that an older torch does not have, as E8M0; of a type of blocks, all bytes.
        """
        import torch

        itemsize = DTYPES.get(self.spec.dtype, 8) // 8
        kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[itemsize]
        out = torch.empty(self.count - first if count is None else count, dtype=kind)
        if out.numel():
            self.read(first, out)
        return out.numpy().view(f"u{itemsize}")

    def floats(self, first: int = 0, count: int | None = None) -> Wide:
        """Return the same as float64, flat. E8M0 and bytes that mean it are the format's matter."""
        import numpy as np
        import torch

        from ...numerics.forms import FORMS, codes, wide, widen

        found = self.numbers(first, count)
        form = FORMS.get(found.dtype)
        if form and found.itemsize == 1:  # of which `wide` knows no nan
            return widen(found, torch.empty(found.shape, dtype=torch.float64)).numpy()
        with np.errstate(invalid="ignore"):  # a damaged tensor may have signaling nan
            return wide(codes(found), form).copy() if form else found.numpy().astype(np.float64)

    def box(self, rows: int, width: int, start: int, stop: int, first: int = 0) -> Codes:
        """Return columns start:stop of `rows` rows of so many columns, from the number `first` on, as `integers`.

        Some rows are read at a time, and of long ones only the columns, so that little more than the box is in memory.
        """
        import numpy as np

        itemsize = DTYPES[self.spec.dtype] // 8
        out = np.empty((rows, stop - start), f"u{itemsize}")
        if width * itemsize > LONG_ROW and (stop - start) * 4 < width:
            for row in range(rows):
                out[row] = self.integers(first + row * width + start, stop - start)
            return out
        step = max(1, STRIP // max(1, width * itemsize))
        for row in range(0, rows, step):
            count = min(step, rows - row)
            strip = self.integers(first + row * width, count * width).reshape(count, width)
            out[row : row + count] = strip[:, start:stop]
        return out

    def float_box(self, rows: int, width: int, start: int, stop: int) -> Wide:
        """Return the same of a float type as float64."""
        import torch

        from ...numerics.forms import FORMS, wide

        form = FORMS[getattr(torch, DTYPE_NAMES[self.spec.dtype])]
        return wide(self.box(rows, width, start, stop).view(form.code), form)


@dataclass(frozen=True)
class Found:
    """All that a codec looks at to tell the weights of a checkpoint."""

    specs: Mapping[str, TensorSpec]  # the stored tensors that no weight has yet
    declared: Mapping[str, Any] = field(default_factory=dict)  # the quantization config
    metadata: Mapping[str, str] = field(default_factory=dict)  # of the files
    read: Callable[[str], bytes] = lambda name: b""  # the bytes of a small tensor
    prefix: str = ""  # of a pipeline's component, before all names

    @cached_property
    def blocks(self) -> Blocks:
        """Return the blocks that the config names."""
        return stated_blocks(self.declared)

    @cached_property
    def _last_parts(self) -> frozenset[str]:
        return frozenset(name.rpartition(".")[2] for name in self.specs)

    @cached_property
    def _there(self) -> dict[tuple[str, ...], tuple[str, ...]]:
        return {}

    def there(self, ends: tuple[str, ...]) -> tuple[str, ...]:
        """Return those of the ends that any name may have, by the last parts of all names.

        Most are nowhere, and a mixture of experts has tens of thousands of weights beside which each would be sought.
        """
        if ends not in self._there:
            last = {end: end.rpartition(".")[2] for end in ends}
            self._there[ends] = tuple(e for e in ends if any(each.endswith(last[e]) for each in self._last_parts))
        return self._there[ends]

    def one_of(self, *names: str) -> str | None:
        """Return the first of these tensors that is there."""
        for name in names:  # no generator: some codecs ask for every tensor of a model
            if name in self.specs:
                return name
        return None

    def need(self, name: str, *dtypes: str) -> TensorSpec:
        """Return the spec of a tensor that a weight cannot do without.

        Raises:
            Fault: it is missing, or of none of these types.
        """
        spec = self.specs.get(name)
        if spec is None:
            raise Fault(f"{name} is missing beside it")
        if dtypes and spec.dtype not in dtypes:
            raise Fault(f"{name} is {spec.dtype}, not {' or '.join(dtypes)}")
        return spec

    def need_small(self, name: str, *dtypes: str) -> TensorSpec:
        """Return the same of a tensor that is read when the checkpoint is opened; Fault if it is large."""
        spec = self.need(name, *dtypes)
        if spec.nbytes > SMALL:
            raise Fault(f"{name} has {spec.nbytes} bytes, where a few hundred belong")
        return spec

    def shaped(self, name: str, shape: tuple[int, ...], *dtypes: str) -> TensorSpec:
        """Return the same of a tensor that must have a shape; one number has any shape of size 1."""
        spec = self.need(name, *dtypes)
        if spec.shape != shape and not (spec.size == 1 and set(shape) <= {1}):
            raise Fault(f"{name} has the shape {spec.shape}, not {shape}")
        return spec

    def json(self, name: str) -> Mapping[str, Any]:
        """Read a tensor whose bytes are a JSON object.

        Raises:
            Fault: they are not.
        """
        self.need_small(name, "U8", "I8")
        try:
            value = json.loads(self.read(name))
        except (ValueError, RecursionError) as error:
            raise Fault(f"{name} holds no JSON: it is cut off or damaged") from error
        if not isinstance(value, dict):
            raise Fault(f"{name} holds no JSON object")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """Read a small tensor of I32 or I64."""
        spec = self.need_small(name, "I32", "I64")
        data, width = self.read(name) if spec.size else b"", {"I32": 4, "I64": 8}[spec.dtype]
        return tuple(int.from_bytes(data[at : at + width], "little", signed=True) for at in range(0, len(data), width))


@dataclass(frozen=True)
class StoredWeight:
    """The stored tensors that make up one weight."""

    codec: Codec
    spec: TensorSpec  # of the weight: its shape, and "F64", or a narrower type that holds all its numbers
    tensors: tuple[str, ...]  # names, the codes first
    roles: tuple[str, ...] = ("codes",)  # what each of them is to the codec
    detail: Mapping[str, Any] = field(default_factory=dict, hash=False)  # what its layout is, as the codec needs it
    note: str = ""  # what the user should know: that the config says otherwise

    @property
    def names(self) -> dict[str, str]:
        """The names of its tensors by role."""
        return dict(zip(self.roles, self.tensors, strict=True))

    @property
    def kind(self) -> str:
        """The way in which it is stored, as reports call it: the codec's key, or one of the codec's types."""
        return str(self.detail.get("type", self.codec.key))

    @property
    def format(self) -> CodeFormat:
        """The codec of a weight that is stored as codes, as all weights of several tensors are."""
        assert isinstance(self.codec, CodeFormat)
        return self.codec


@dataclass(frozen=True)
class Parts:
    """A coded weight with its stored tensors, to be read."""

    weight: StoredWeight
    tensors: Mapping[str, StoredTensor] = field(hash=False)  # by role
    codes_spec: TensorSpec  # of the codes, which are not among the tensors on the way back: only `codes` reads them

    def __getitem__(self, role: str) -> StoredTensor:
        return self.tensors[role]

    def get(self, role: str) -> StoredTensor | None:
        return self.tensors.get(role)

    def detail(self, key: str) -> Any:
        return self.weight.detail[key]

    @property
    def shape(self) -> tuple[int, int, int]:
        """The weight as a stack of matrices: (matrices, rows, columns)."""
        *stack, rows, columns = self.weight.spec.shape
        return math.prod(stack), rows, columns

    def require_sound(self) -> None:
        """Read the companions once, as `CodeFormat.check` does; raise InputError if they are damaged."""
        _ = self._is_sound

    @cached_property
    def _is_sound(self) -> bool:
        self.weight.format.check(self)
        return True

    def damaged(self, role: str, what: str) -> InputError:
        """Return the error for a companion that no writer of the format writes."""
        return InputError(what, culprit=self.tensors[role].name, remedy="download the checkpoint anew")


class Codec(ABC):
    """Stored tensors <-> one weight, whose numbers are those that the format's formula gives in float64.

    A weight's numbers are counted as they lie in its shape, the last dimension fastest. `columns` of them are a row,
    the least that is decoded.
    """

    key: ClassVar[str]  # the name in CODECS, in undo files, messages and reports
    dtypes: ClassVar[frozenset[str]] = frozenset()  # types whose tensors are weights of this codec by themselves
    numbers: ClassVar[str] = "float64"  # torch's name of the type that rows are decoded to

    def columns(self, spec: TensorSpec) -> int:
        """Return the numbers of a row of a weight: of its last dimension, unless a codec decodes more or fewer."""
        return spec.shape[-1]

    @abstractmethod
    def read_rows(self, parts: Parts, start: int, out: torch.Tensor) -> None:
        """Decode rows from `start` on into `out`, the same bits on every machine.

        Args:
            out: (rows, columns), contiguous, on the CPU, of the type `numbers`.
        """


Piece = tuple[str, int, bytes]  # of a stored tensor: its role, the first byte, and the bytes from there on


class Quantizer(ABC):
    """Writes a weight in a format anew, with scales of its own, as the format's own software does.

    Args:
        parts: the weight as another model has it in this format, of which only layout, types and shapes count.

    Attributes:
        sees_all: whether all rows must be shown before the first is written.
        together: rows that share a scale: calls begin at their multiples. 0 for all rows of the weight in one order.
    """

    sees_all: ClassVar[bool] = False

    def __init__(self, parts: Parts, together: int = 1) -> None:
        self.parts, self.together = parts, together

    def specs(self) -> dict[str, TensorSpec]:
        """Return the stored tensors that are written, by role."""
        return {role: tensor.spec for role, tensor in self.parts.tensors.items()}

    def see(self, rows: torch.Tensor) -> None:
        """Look at rows, of a float type of 16 bits or more, in rising order; only if `sees_all`."""
        raise TypeError("it does not look first")

    @abstractmethod
    def rows(self, start: int, rows: torch.Tensor) -> tuple[Codes, list[Piece]]:
        """Return the codes of rows from `start` on, (rows, width), and what they are in the other tensors."""

    def rounded(self, rows: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
        """Return rows rounded to a type, as float32, for software that encodes weights of this type.

        Raises:
            InputError: a number is too large for the type.
        """
        import torch

        found = rows.to(kind).float()
        if not torch.isfinite(found).all():
            raise InputError(
                f"has weights too large for {str(kind).removeprefix('torch.')}, in which they are encoded",
                culprit=self.parts["codes"].name,
                remedy="take a model in another format with --like",
            )
        return found

    def rest(self) -> list[Piece]:
        """Return what is known once all rows were written; only if `together` is 0."""
        return []


class CodeFormat(Codec):
    """A codec of codes, with scales beside them.

    Rows are those of all matrices of a stack, one after the other. Codes are integers of the type `code`; a row of
    them may be wider than the weight's (`width`), by the padding of its last word.
    """

    ends: ClassVar[tuple[str, ...]]  # of the names of codes
    code_dtypes: ClassVar[frozenset[str]]  # of the tensors that hold codes
    code: ClassVar[str] = "uint8"  # numpy's name of the type of one code
    bits: ClassVar[int] = 4  # of a code, at most: fewer than 8 are too coarse for a LoRA's change
    padding_has_scales: ClassVar[bool] = False  # a row's padding is what its scales are made of

    @abstractmethod
    def claim(self, path: str, name: str, found: Found) -> StoredWeight | None:
        """Return the weight whose codes are the tensor `name`, None if they are another format's.

        Args:
            path: the name without its end.

        Raises:
            Fault: they are of this format, but a companion is missing or of another shape.
        """

    def weight_name(self, path: str, end: str) -> str:
        """Return the name that a weight has in a model that is not quantized. end: of the codes' name."""
        return f"{path}.weight"

    @abstractmethod
    def width(self, parts: Parts) -> int:
        """Return the codes of a row, padding included."""

    def with_padding(self, parts: Parts, start: int, padding: Codes) -> Parts:
        """Return a weight whose scales are made of the padding of rows from `start` on, if padding has any."""
        return parts

    @abstractmethod
    def row_multiple(self, parts: Parts) -> int:
        """Return the number of rows whose codes share bytes: rows are written by so many at a time."""

    @abstractmethod
    def codes(self, parts: Parts, start: int, stop: int) -> Codes:
        """Return the codes of rows start:stop, (rows, width)."""

    @abstractmethod
    def places(self, parts: Parts, start: int, codes: Codes) -> Iterator[tuple[int, bytes]]:
        """Yield what codes of rows from `start` on are in the tensor of codes: (first byte, bytes).

        Args:
            start: and the number of rows, multiples of `row_multiple`.
            codes: (rows, width).
        """

    @abstractmethod
    def values(self, parts: Parts, start: int, codes: Codes) -> Wide:
        """Return the numbers that codes of rows from `start` on mean: (rows, columns); padding is left out."""

    @abstractmethod
    def nearest(self, parts: Parts, start: int, numbers: Wide) -> Codes:
        """Return the codes nearest to numbers of rows from `start` on; 0.0 is +0. Undo files depend on each choice.

        Ties go to even codes, or to the lower number in a format that says so (bitsandbytes).

        Of numbers beyond the range it is the last code, of nan that of 0. Where a rounding of float64 decides between
        two neighbors, it may be either, but the same on every machine.

        Args:
            numbers: (rows, columns).

        Returns:
            (rows, columns), without padding.
        """

    @abstractmethod
    def ordinals(self, parts: Parts, codes: Codes) -> Codes:
        """Return int16 that order codes as their numbers before scale and zero point.

        -0 stands just below +0, of equal numbers the highest code first, and nan last, negative ones first.
        """

    @abstractmethod
    def zero(self, parts: Parts) -> int:
        """Return the code of +0, or of 0 with a zero point of 0: where it is the nearest, a code may be -0 instead."""

    @abstractmethod
    def from_ordinals(self, parts: Parts, ordinals: Codes) -> Codes:
        """Return the codes of ordinals; IndexError if one is no code's."""

    def quantizer(self, parts: Parts) -> Quantizer | None:
        """Return what writes a weight anew as `parts` is stored, None if that takes more than its numbers."""
        return None

    def check(self, parts: Parts) -> None:
        """Read the companions of a weight that is to be read or changed.

        Raises:
            InputError: a number among them is one that no writer of the format writes, nan for one.
        """

    def read_rows(self, parts: Parts, start: int, out: torch.Tensor) -> None:
        found = self.values(parts, start, self.codes(parts, start, start + len(out)))
        out.numpy()[...] = found
