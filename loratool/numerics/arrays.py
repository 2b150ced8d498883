"""Arrays of stored numbers, and the operations that differ between numpy on the CPU and torch on a GPU.

`Numbers` are bit patterns with their form. All computing is in float32 or float64: on the CPU in numpy's arrays, on a
GPU in tensors of torch, which is imported for that alone. Operators and slices are the same in both.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .forms import F16, F64, FORMS, Bits, Form, Positions, Wide, integers

Array = Any  # a numpy array, or a torch tensor on a GPU
ON_CPU = np.empty(0)  # for what is made where another array is


class Device(str):
    """A device by torch's name of it: `cpu`, or `cuda:0`."""

    @property
    def is_gpu(self) -> bool:
        return self != "cpu"


CPU = Device("cpu")

Kind = type[np.float32] | type[np.float64]  # in which an array is computed


@dataclass(frozen=True, slots=True)
class Numbers:
    """Stored numbers of one form.

    Attributes:
        bits: their patterns as signed integers.
    """

    bits: Array
    form: Form

    @classmethod
    def empty(cls, form: Form, *shape: int) -> Numbers:
        return cls(np.empty(shape, form.bits_type), form)

    @classmethod
    def of(cls, x: npt.NDArray[Any]) -> Numbers:
        """Return numpy's floats of 16 to 64 bits, which share their memory."""
        form = next(form for form in FORMS.values() if form.native and form.native == x.dtype)  # None equals float64
        return cls(np.ascontiguousarray(x).view(form.bits_type), form)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.bits.shape)

    @property
    def size(self) -> int:
        """How many numbers."""
        return math.prod(self.bits.shape)

    @property
    def on_gpu(self) -> bool:
        return not isinstance(self.bits, np.ndarray)

    @property
    def T(self) -> Numbers:
        return Numbers(self.bits.T, self.form)

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, place: Any) -> Numbers:
        return Numbers(self.bits[place], self.form)

    def __abs__(self) -> Numbers:
        return Numbers(self.bits & self.form.size, self.form)

    @property
    def matrix(self) -> Numbers:
        """The first axis by all others."""
        if len(self.bits.shape) == 2:
            return self
        return self.reshape(len(self), self.size // max(1, len(self)))

    def reshape(self, *shape: int) -> Numbers:
        return Numbers(self.bits.reshape(shape), self.form)

    def split(self, parts: int) -> list[Numbers]:
        """Return so many equal parts of the rows."""
        height = len(self) // parts
        return [self[k * height : (k + 1) * height] for k in range(parts)]

    def host(self) -> Bits:
        """Return the patterns in the CPU's memory."""
        return np.ascontiguousarray(fetched(self.bits)).reshape(self.shape)  # it gives a scalar an axis

    def wide(self) -> Wide:
        """Return the numbers in float64, in a new array; inf and nan too."""
        out = np.empty(self.shape)
        widen(Numbers(self.host(), self.form), out)
        return out

    def floats(self) -> npt.NDArray[Any]:
        """Return the CPU's numbers in float32, or in float64 if they have it; they may share their memory."""
        if self.form.native and self.form.itemsize > 2:
            return self.bits.view(self.form.native)  # type: ignore[no-any-return]
        return widen(self, np.empty(self.shape, np.float32))  # type: ignore[no-any-return]

    def is_finite(self) -> Array:
        """Return where the numbers are neither inf nor nan."""
        return (self.bits & self.form.size) < self.form.inf

    def all_finite(self) -> bool:
        return largest_ordinal(self) < self.form.inf


def empty(kind: npt.DTypeLike, *shape: int, like: Array) -> Array:
    """Return an array where `like` is."""
    if isinstance(like, np.ndarray):
        return np.empty(shape, kind)
    import torch

    return torch.empty(shape, dtype=torch.from_numpy(np.empty(0, kind)).dtype, device=like.device)


def sent(x: npt.NDArray[Any], like: Array) -> Array:
    """Return an array of the CPU where `like` is."""
    if isinstance(like, np.ndarray):
        return x
    import torch

    return torch.from_numpy(x).to(like.device)


def fetched(x: Array) -> npt.NDArray[Any]:
    """Return an array in the CPU's memory."""
    return np.asarray(x if isinstance(x, np.ndarray | np.generic) else x.cpu())


def doubled(x: Array) -> Array:
    """Return an array in float64; itself if it is."""
    return x.astype(np.float64, copy=False) if isinstance(x, np.ndarray) else x.double()


@np.errstate(invalid="ignore")  # signaling nan
def widen(x: Numbers, out: Array) -> Array:
    """Write numbers into `out`, of a type that holds them all, and return it."""
    bits, form = x.bits, x.form
    if x.on_gpu:
        return out.copy_(_tensor(x))
    if form.itemsize == 1 or form == F16:  # numpy's cast of fp16 takes three times as long as a table
        np.take(_table(form.name, out.dtype.name), bits.view(f"u{form.itemsize}"), out=out, mode="wrap")
    elif form.native:
        np.copyto(out, bits.view(form.native), casting="unsafe")
    elif out.dtype == np.float32:
        np.left_shift(bits.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32, casting="unsafe")
    else:
        np.copyto(out, (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32))
    return out


def _tensor(x: Numbers) -> Any:
    """Return numbers on a GPU as a tensor of their type."""
    import torch

    return x.bits.view(getattr(torch, x.form.torch_name))


@cache
def _table(name: str, kind: str) -> npt.NDArray[Any]:
    """Return the numbers of all patterns; a nan has the sign of its pattern on every processor."""
    form = FORMS[name]
    patterns: Bits = np.arange(2 * (form.size + 1), dtype=f"u{form.itemsize}").view(form.bits_type)
    m, e = integers(patterns, form)
    size = np.ldexp(np.abs(m).astype(np.float64), e.astype(np.intc))
    ordinal = patterns & form.bits_type(form.size)
    size[ordinal >= form.inf] = np.nan
    if form.has_inf:
        size[ordinal == form.inf] = np.inf
    return np.copysign(size, np.where(patterns < 0, -1.0, 1.0)).astype(kind)


@np.errstate(all="ignore")
def narrow(x: Array, out: Numbers, ties: bool = True) -> None:
    """Round numbers into `out`: to nearest, an overflow to inf, or to nan where there is no inf.

    float64 is rounded to 16 or 8 bits by way of float32, except to fp16 on the CPU if ties go to even.

    Args:
        ties: ties go to even. Otherwise they may go anywhere.
    """
    bits, form = out.bits, out.form
    if out.on_gpu:
        _tensor(out).copy_(x)
    elif form == F16 and not ties:
        _round_to_fp16(x.astype(np.float32, copy=False), bits)
    elif form.native:
        np.copyto(bits.view(form.native), x, casting="unsafe")
    elif form.itemsize == 2:
        patterns = x.astype(np.float32, copy=False).view(np.int32)
        half = (patterns >> 16 & 1) + np.int32(0x7FFF) if ties else np.int32(0x8000)
        np.right_shift(patterns + half, 16, out=bits, casting="unsafe")
        if ties and (is_nan := np.isnan(x)).any():  # of which the sum may wrap
            bits[is_nan] = form.inf | 1 << (form.precision - 2)
    else:
        bits[...] = _rounded_to_8_bits(x.astype(np.float32, copy=False), form)


@np.errstate(all="ignore")
def rounded_to(x: npt.NDArray[Any], form: Form) -> Numbers:
    """Return float32 or float64 numbers rounded as torch casts them: to 16 or 8 bits by way of float32."""
    out = Numbers.empty(form, *x.shape)
    narrow(x if form == F64 else x.astype(np.float32, copy=False), out)
    return out


def recast(x: Numbers, form: Form) -> Numbers:
    """Return numbers in another form, rounded as by `rounded_to`; themselves if they have it."""
    return x if x.form == form else rounded_to(x.wide(), form)


@np.errstate(all="ignore")
def rounded_in(x: npt.NDArray[Any], form: Form) -> npt.NDArray[Any]:
    """Return float32 or float64 numbers as `floats` of a form, rounded to it; x itself if it is of that type.

    So an operation in a form of 16 bits is one in float32 and then this, as in torch.
    """
    return rounded_to(x, form).floats() if form.itemsize == 2 else x.astype(form.native, copy=False)


def floats_of(x: Numbers, form: Form) -> npt.NDArray[Any]:
    """Return the `floats` of numbers that are cast to a form."""
    return x.floats() if x.form == form else rounded_in(x.floats(), form)


def _round_to_fp16(x: npt.NDArray[np.float32], out: Bits) -> None:
    """Write the nearest numbers of fp16, of a tie the larger; by integers, as numpy's cast takes twice as long."""
    patterns = x.view(np.int32)
    upper = np.empty(x.shape, np.int16)
    np.right_shift(patterns, 16, out=upper, casting="unsafe")  # sign, exponent and 7 bits more
    np.right_shift(patterns + np.int32(0x1000 - (112 << 23)), 13, out=out, casting="unsafe")
    size = upper & np.int16(0x7FFF)
    out &= np.int16(0x7FFF)
    upper &= np.int16(-0x8000)
    out |= upper
    places = np.flatnonzero(size < 0x3880)  # below 2**-14 all steps are 2**-24, as those of float32 from 1/2 to 1
    steps = (np.abs(x.take(places)) + np.float32(0.5)).view(np.int32) - 0x3F000000
    out.put(places, steps | upper.take(places))
    if size.size and int(size.max()) >= 0x4780:  # 2**16
        places = np.flatnonzero(size >= 0x4780)
        out.put(places, x.take(places).astype(np.float16).view(np.int16))


def _rounded_to_8_bits(x: npt.NDArray[np.float32], form: Form) -> Bits:
    sizes = np.abs(x)
    patterns, drop = sizes.view(np.int32), 24 - form.precision
    ordinals = patterns >> drop
    ordinals &= 1
    ordinals += patterns
    ordinals += np.int32((1 << (drop - 1)) - 1 - ((form.least + 126) << 23))
    ordinals >>= drop
    np.minimum(ordinals, form.inf, out=ordinals)
    is_small = sizes < 2.0 ** (form.least + 1)  # where all steps are one, as those of float32 at 2**23 of them
    base = np.float32(2.0 ** (form.least - form.precision + 24))
    sizes += base
    patterns -= base.view(np.int32)
    np.copyto(ordinals, patterns, where=is_small)
    bits = ordinals.astype(np.int8)
    bits[np.isnan(x)] = form.size
    bits |= np.signbit(x).astype(np.int8) << 7
    return bits


def matmul(left: Array, right: Array, out: Array) -> None:
    """Write left @ right."""
    if isinstance(out, np.ndarray):
        np.matmul(left, right, out=out)
    else:
        import torch

        torch.matmul(left, right, out=out)


def dot(x: Array, y: Array) -> float:
    """Return the sum of products of two arrays of one shape."""
    return float(x.reshape(-1) @ y.reshape(-1))


def dots_of_rows(x: Array, y: Array) -> Wide:
    """Return the sum of products of each row, (rows,)."""
    if isinstance(x, np.ndarray):
        return np.array([float(one @ other) for one, other in zip(x, y, strict=True)])
    return fetched((x * y).sum(1).double())


def not_equal(x: Array, y: Array, out: Array) -> Array:
    """Write a mask of where two arrays differ, and return it."""
    if isinstance(out, np.ndarray):
        return np.not_equal(x, y, out=out)
    import torch

    return torch.ne(x, y, out=out)


def where(mask: Array, x: Any, y: Any) -> Array:
    """Return x where the mask is set, and y elsewhere."""
    if isinstance(mask, np.ndarray | np.generic):
        return np.where(mask, x, y)
    import torch

    return torch.where(mask, x, y)


def largest_ordinal(x: Numbers) -> int:
    """Return the largest ordinal of |x|, inf and nan included; 0 of no numbers."""
    bits, form = x.bits, x.form
    if x.on_gpu:
        return int((bits & form.size).max()) if x.size else 0
    positive = np.maximum.reduce(bits, axis=None, initial=0)
    negative = np.maximum.reduce(bits.view(f"u{form.itemsize}"), axis=None, initial=0)
    return max(int(positive), int(negative) & form.size)


def positions(mask: Array) -> Positions:
    """Return the flat positions where a mask is set."""
    if isinstance(mask, np.ndarray):
        return np.flatnonzero(mask)
    return fetched(mask.reshape(-1).nonzero().squeeze(1))


def take(x: Numbers, places: Positions) -> Bits:
    """Return the bit patterns at flat positions."""
    if not x.on_gpu:
        patterns: Bits = x.bits.reshape(-1).take(places)
        return patterns
    return fetched(x.bits.reshape(-1)[sent(places, x.bits)])


def put(x: Numbers, places: Positions, bits: Bits) -> None:
    """Write the bit patterns at flat positions of a contiguous array."""
    flat = x.bits.reshape(-1)
    flat[places if not x.on_gpu else sent(places, x.bits)] = bits if not x.on_gpu else sent(bits, x.bits)


def bytes_of(x: npt.NDArray[Any]) -> memoryview:
    """Return an array's bytes."""
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8).data


def like_of(device: Device) -> Array:
    """Return an array on a device, for what is made where another array is."""
    if not device.is_gpu:
        return ON_CPU
    import torch

    return torch.empty(0, dtype=torch.float64, device=device)


def stream_of(device: Device) -> tuple[Any, AbstractContextManager[Any]]:
    """Return a stream on a GPU, and the context that computes in it; None and nothing on the CPU."""
    if not device.is_gpu:
        return None, nullcontext()
    import torch

    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream, torch.cuda.stream(stream)


def send(x: Array, out: Array) -> None:
    """Copy an array to or from a GPU, in its stream."""
    import torch

    source, target = (torch.from_numpy(each) if isinstance(each, np.ndarray) else each for each in (x, out))
    target.copy_(source, non_blocking=True)


def pinned(kind: npt.DTypeLike, size: int) -> npt.NDArray[Any]:
    """Return an array in pages that a GPU can read by itself."""
    import torch

    return torch.empty(size * np.dtype(kind).itemsize, dtype=torch.uint8, pin_memory=True).numpy().view(kind)
