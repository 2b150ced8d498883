"""The interface of a codec: how the stored tensors of a file make up one weight, a matrix of numbers.

`Codec` reads rows as numbers, which is enough for plain types. `CodeFormat` is a codec of codes: one small integer for
each number, the same code for the same number wherever scale and offset are the same. Reading, merging back into codes,
and undo use it. The packing determines the codes' places in the file, and the format determines their numbers.
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
from ..dtypes import BLOCK_TYPES, DTYPES, TensorSpec
from ..weights_file import WeightsFile
from .quantized import Blocks, stated_blocks

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ...numerics.arrays import Numbers
    from ...numerics.forms import Form

    Codes = npt.NDArray[Any]  # unsigned or signed integers, one code per number
    Wide = npt.NDArray[np.float64]


LONG_ROW, STRIP = 1 << 16, 1 << 20  # bytes: of longer rows only columns are read; rows that are read at a time

SMALL = 1 << 16  # the most bytes of a description or a shape beside codes


class Fault(ValueError):
    """A fault in the tensors of a coded weight; it is reported only if the weight is used."""


@dataclass(frozen=True)
class StoredTensor:
    """A stored tensor: the bytes of its type."""

    file: WeightsFile
    name: str

    @property
    def spec(self) -> TensorSpec:
        return self.file.specs[self.name]

    def read(self, first: int, out: npt.NDArray[Any]) -> None:
        """Read numbers from `first` on into `out`, which is contiguous and of the stored type's width."""
        self.file.read_numbers(self.name, first, out)

    @property
    def count(self) -> int:
        """The number of `integers`."""
        return self.spec.nbytes if self.spec.dtype in BLOCK_TYPES else self.spec.size

    def integers(self, first: int = 0, count: int | None = None) -> Codes:
        """Return numbers of an integer type, or the bit patterns of another type as unsigned integers; flat.

        This includes types that an older torch does not have, such as E8M0. For types of blocks it returns all bytes.
        """
        import numpy as np

        out = np.empty(self.count - first if count is None else count, f"u{DTYPES.get(self.spec.dtype, 8) // 8}")
        if out.size:
            self.read(first, out)
        return out

    def floats(self, first: int = 0, count: int | None = None) -> Wide:
        """Return numbers as float64, flat. E8M0, and bytes that mean E8M0, are left to the format."""
        import numpy as np

        from ...numerics.arrays import Numbers
        from ...numerics.forms import FORMS

        patterns = self.integers(first, count)
        form = FORMS.get(self.spec.dtype)
        with np.errstate(invalid="ignore"):  # a damaged tensor may have signaling nan
            if form:
                return Numbers(patterns.view(form.bits_type), form).wide()
        signed = patterns.view(f"i{patterns.itemsize}") if self.spec.dtype.startswith("I") else patterns
        return signed.astype(np.float64)

    def box(self, rows: int, width: int, start: int, stop: int, first: int = 0) -> Codes:
        """Return columns start:stop of `rows` rows of `width` numbers from `first` on, as `integers`.

        Rows are read in strips, and only the columns of long rows, so memory is little more than the box.
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
        """Return the `box` of a float type as float64, from the first number on."""
        from ...numerics.forms import FORMS, wide

        form = FORMS[self.spec.dtype]
        return wide(self.box(rows, width, start, stop).view(form.bits_type), form)


@dataclass(frozen=True)
class Unclaimed:
    """Everything that a codec needs to recognize the weights of a checkpoint."""

    specs: Mapping[str, TensorSpec]  # the stored tensors that no weight has claimed yet
    declared: Mapping[str, Any] = field(default_factory=dict)  # the quantization config
    metadata: Mapping[str, str] = field(default_factory=dict)  # of the files
    read: Callable[[str], bytes] = lambda name: b""  # the bytes of a small tensor
    prefix: str = ""  # of a pipeline's component, before all names

    @cached_property
    def blocks(self) -> Blocks:
        """Return the blocks that the config names."""
        return stated_blocks(self.declared)

    @cached_property
    def last_parts(self) -> frozenset[str]:
        """Return the last parts of all names."""
        return frozenset(name.rpartition(".")[2] for name in self.specs)

    @cached_property
    def _present(self) -> dict[tuple[str, ...], tuple[str, ...]]:
        return {}

    def present(self, ends: tuple[str, ...]) -> tuple[str, ...]:
        """Return the suffixes that some name may have, comparing the last parts of all names.

        Most are absent, and a mixture of experts has tens of thousands of weights to search for each of them.
        """
        if ends not in self._present:
            last = {end: end.rpartition(".")[2] for end in ends}
            self._present[ends] = tuple(e for e in ends if any(each.endswith(last[e]) for each in self.last_parts))
        return self._present[ends]

    def one_of(self, *names: str) -> str | None:
        """Return the first of these names that is a tensor; None if none is."""
        for name in names:  # no generator, for speed: some codecs ask for every tensor of a model
            if name in self.specs:
                return name
        return None

    def need(self, name: str, *dtypes: str) -> TensorSpec:
        """Return the spec of a tensor that a weight requires.

        Raises:
            Fault: it is missing, or has none of these types.
        """
        spec = self.specs.get(name)
        if spec is None:
            raise Fault(f"{name} is missing beside it")
        if dtypes and spec.dtype not in dtypes:
            raise Fault(f"{name} is {spec.dtype}, not {' or '.join(dtypes)}")
        return spec

    def need_small(self, name: str, *dtypes: str) -> TensorSpec:
        """Return the `need` of a tensor that is read when the checkpoint is opened; raise Fault if it is large."""
        spec = self.need(name, *dtypes)
        if spec.nbytes > SMALL:
            raise Fault(f"{name} has {spec.nbytes} bytes, where a few hundred belong")
        return spec

    def shaped(self, name: str, shape: tuple[int, ...], *dtypes: str) -> TensorSpec:
        """Return the `need` of a tensor that must have a shape; one number has any shape of size 1."""
        spec = self.need(name, *dtypes)
        if spec.shape != shape and not (spec.size == 1 and set(shape) <= {1}):
            raise Fault(f"{name} has the shape {spec.shape}, not {shape}")
        return spec

    def json(self, name: str) -> Mapping[str, Any]:
        """Read a tensor whose bytes are a JSON object.

        Raises:
            Fault: they are not an object.
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
        return tuple(
            int.from_bytes(data[start : start + width], "little", signed=True) for start in range(0, len(data), width)
        )


@dataclass(frozen=True)
class StoredWeight:
    """The stored tensors that make up one weight."""

    codec: Codec
    spec: TensorSpec  # of the weight: its shape, and "F64" or a narrower type that holds all its numbers
    tensors: tuple[str, ...]  # names, the codes first
    roles: tuple[str, ...] = ("codes",)  # the codec's role of each tensor
    detail: Mapping[str, Any] = field(default_factory=dict, hash=False)  # the layout, as the codec needs it
    note: str = ""  # a note for the user: the config contradicts the tensors

    @property
    def names(self) -> dict[str, str]:
        """The names of its tensors by role."""
        return dict(zip(self.roles, self.tensors, strict=True))

    @property
    def kind(self) -> str:
        """The format's name in reports: the codec's key, or one of the codec's types."""
        return str(self.detail.get("type", self.codec.key))

    @property
    def format(self) -> CodeFormat:
        """The codec of the weight; all weights of several tensors are codes."""
        assert isinstance(self.codec, CodeFormat)
        return self.codec


@dataclass(frozen=True)
class Parts:
    """A coded weight with its stored tensors, for reading."""

    weight: StoredWeight
    tensors: Mapping[str, StoredTensor] = field(hash=False)  # by role
    codes_spec: TensorSpec  # of the codes; an undo does not have them among the tensors, since only `codes` reads them

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
        """Run `CodeFormat.check` once; raise InputError if companions are damaged."""
        _ = self._is_sound

    @cached_property
    def _is_sound(self) -> bool:
        self.weight.format.check(self)
        return True

    def damaged(self, role: str, what: str) -> InputError:
        """Return the error for a companion with content that no writer of the format writes."""
        return InputError(what, culprit=self.tensors[role].name, remedy="download the checkpoint again")


class Codec(ABC):
    """Stored tensors <-> one weight, with the numbers that the format's formula gives in float64.

    A weight's numbers are in the order of its shape, the last dimension fastest. `columns` of them are a row, the least
    that is dequantized.
    """

    key: ClassVar[str]  # the name in CODECS, in undo files, messages and reports
    dtypes: ClassVar[frozenset[str]] = frozenset()  # types of tensors that are complete weights of this codec
    numbers: ClassVar[str] = "F64"  # the form of dequantized rows

    def columns(self, spec: TensorSpec) -> int:
        """Return how many numbers a row has: the last dimension, unless the codec dequantizes more or fewer."""
        return spec.shape[-1]

    @abstractmethod
    def read_rows(self, parts: Parts, start: int, out: Numbers) -> None:
        """Dequantize rows from `start` on into `out`, with the same bits on every machine.

        Args:
            out: (rows, columns), contiguous, on the CPU, of the form `numbers`.
        """


Piece = tuple[str, int, bytes]  # of a stored tensor: its role, the first byte, and the bytes from there on


class Quantizer(ABC):
    """Encodes a weight with new scales, like the format's own software.

    Args:
        parts: the weight of another model in this format; only layout, types and shapes are used.

    Attributes:
        sees_all: whether `see` must get all rows before the first is encoded.
        together: rows that share a scale; calls begin at multiples of it. 0: calls get all rows of the weight in order.
    """

    sees_all: ClassVar[bool] = False

    def __init__(self, parts: Parts, together: int = 1) -> None:
        self.parts, self.together = parts, together

    def specs(self) -> dict[str, TensorSpec]:
        """Return the specs of the stored tensors that are written, by role."""
        return {role: tensor.spec for role, tensor in self.parts.tensors.items()}

    def see(self, rows: Numbers) -> None:
        """Inspect rows, as `rows` gets them, in rising order; only called if `sees_all`."""
        raise TypeError("it does not look first")

    @abstractmethod
    def rows(self, start: int, rows: Numbers) -> tuple[Codes, list[Piece]]:
        """Return the codes of rows from `start` on, (rows, width), and the pieces of the other tensors for them.

        Args:
            rows: on the CPU, of a form of 16 bits or more.
        """

    def rounded(self, rows: Numbers, form: Form) -> npt.NDArray[np.float32]:
        """Return rows rounded to a form, as float32, for formats whose software encodes weights of this type.

        Raises:
            InputError: a number is too large for the type.
        """
        import numpy as np

        from ...numerics.arrays import floats_of

        rounded = floats_of(rows, form)
        if not np.isfinite(rounded).all():
            raise InputError(
                f"has weights too large for {form.torch_name}, in which they are encoded",
                culprit=self.parts["codes"].name,
                remedy="use a model in another format with --like",
            )
        return rounded

    def rest(self) -> list[Piece]:
        """Return the pieces that depend on all rows; only called if `together` is 0."""
        return []


class CodeFormat(Codec):
    """A codec of codes, with scales beside them.

    The rows of all matrices of a stack follow each other. Codes are integers of the type `code`. A row of codes may be
    wider than the weight's (`width`) by the padding of its last word.
    """

    ends: ClassVar[tuple[str, ...]]  # suffixes of the names of codes
    code_dtypes: ClassVar[frozenset[str]]  # of the tensors that hold codes
    code: ClassVar[str] = "uint8"  # numpy's name of the type of one code
    bits: ClassVar[int] = 4  # the most bits of a code; fewer than 8 are too coarse for a LoRA's change
    padding_has_scales: ClassVar[bool] = False  # a row's scales are in its padding
    mixes: ClassVar[bool] = False  # a number depends on several codes of its row; undo guesses codes from W' alone

    @abstractmethod
    def claim(self, path: str, name: str, unclaimed: Unclaimed) -> StoredWeight | None:
        """Return the weight whose codes are the tensor `name`; None if they are in another format.

        Args:
            path: the name without its suffix.

        Raises:
            Fault: they are of this format, but a companion is missing or of another shape.
        """

    def weight_name(self, path: str, end: str) -> str:
        """Return the name of a weight in an unquantized model. end: the suffix of the codes' name."""
        return f"{path}.weight"

    @abstractmethod
    def width(self, parts: Parts) -> int:
        """Return the number of codes in a row, with padding."""

    def with_padding(self, parts: Parts, start: int, padding: Codes) -> Parts:
        """Return the weight with its scales taken from the padding of rows from `start` on, if they are there."""
        return parts

    @abstractmethod
    def row_multiple(self, parts: Parts) -> int:
        """Return the number of rows whose codes share bytes; rows are written in multiples of it."""

    @abstractmethod
    def codes(self, parts: Parts, start: int, stop: int) -> Codes:
        """Return the codes of rows start:stop, (rows, width)."""

    @abstractmethod
    def places(self, parts: Parts, start: int, codes: Codes) -> Iterator[tuple[int, bytes]]:
        """Yield the bytes in the tensor of codes for codes of rows from `start` on: (first byte, bytes).

        Args:
            start: like the number of rows, a multiple of `row_multiple`.
            codes: (rows, width).
        """

    @abstractmethod
    def values(self, parts: Parts, start: int, codes: Codes) -> Wide:
        """Return the numbers of codes of rows from `start` on, (rows, columns), without padding."""

    def unmixed(self, parts: Parts, start: int, codes: Codes) -> Wide:
        """Return the numbers of codes before those of a row are mixed; `values` in a format that does not mix them."""
        return self.values(parts, start, codes)

    @abstractmethod
    def nearest(self, parts: Parts, start: int, numbers: Wide) -> Codes:
        """Return the codes nearest to numbers of rows from `start` on; 0.0 is +0. Undo files depend on each choice.

        Ties go to even codes, or to the lower number in a format with that rule (bitsandbytes).

        Numbers beyond the range get the last code, and nan gets the code of 0. Where float64's rounding decides between
        two neighbors, it may be either, but the same on every machine.

        Args:
            numbers: (rows, columns).

        Returns:
            (rows, columns), without padding.
        """

    @abstractmethod
    def ordinals(self, parts: Parts, codes: Codes) -> Codes:
        """Return int16 ordinals in the order of the codes' numbers before scale and zero point.

        -0 is just below +0. Of equal numbers, the highest code is first. nan is last, negative ones first.
        """

    @abstractmethod
    def zero(self, parts: Parts) -> int:
        """Return the code of +0, or of 0 with a zero point of 0; where it is nearest, the code may be -0 instead."""

    @abstractmethod
    def from_ordinals(self, parts: Parts, ordinals: Codes) -> Codes:
        """Return the codes of ordinals; raise IndexError for an ordinal without a code."""

    def rounds_alone(self, weight: StoredWeight) -> bool:
        """Return whether a number can get its nearest code, whatever codes its neighbors have."""
        return True

    def quantizer(self, parts: Parts) -> Quantizer | None:
        """Return a quantizer to the format of `parts`; None if it needs more than the weight's numbers."""
        return None

    def check(self, parts: Parts) -> None:
        """Check the companions of a weight before it is read or changed.

        Raises:
            InputError: a companion has a number that no writer of the format writes, such as nan.
        """

    def read_rows(self, parts: Parts, start: int, out: Numbers) -> None:
        numbers = self.values(parts, start, self.codes(parts, start, start + len(out)))
        out.bits.view("f8")[...] = numbers
