"""Tensors computed from stored ones, for readers of files that store factors in another layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...errors import InputError
from ...files.containers.virtual import VirtualFile
from ...files.dtypes import TensorSpec
from ...files.weights_file import WeightsFile

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.forms import Bits


@dataclass(frozen=True)
class MadeTensor:
    """A tensor computed from stored ones when it is loaded."""

    spec: TensorSpec
    load: Callable[[], Numbers]


def copied(file: WeightsFile, name: str) -> MadeTensor:
    """Return a tensor of the file unchanged."""
    return MadeTensor(file.specs[name], lambda: file.numbers(name))


def made_of(file: WeightsFile, name: str, shape: Sequence[int], make: Callable[[Bits], Bits]) -> MadeTensor:
    """Return the result of `make` on the bits of a stored tensor; it has this shape and the stored type."""

    def load() -> Numbers:
        import numpy as np

        stored = file.numbers(name)
        return replace(stored, bits=np.ascontiguousarray(make(stored.bits)))

    return MadeTensor(TensorSpec(file.specs[name].dtype, tuple(shape)), load)


def block_at(file: WeightsFile, name: str, index: Sequence[int]) -> MadeTensor:
    """Return the block of a stored tensor at an index along its first dimensions; loading reads only the block."""
    spec = file.specs[name]
    block = TensorSpec(spec.dtype, spec.shape[len(index) :])
    number = 0
    for at, size in zip(index, spec.shape, strict=False):
        number = number * size + at

    def load() -> Numbers:
        from ...numerics.arrays import Numbers
        from ...numerics.forms import FORMS

        out = Numbers.empty(FORMS[block.dtype], *block.shape)
        if out.size:
            file.read_numbers(name, number * block.size, out.bits)
        return out

    return MadeTensor(block, load)


def rows_at(tensor: MadeTensor, runs: Sequence[tuple[int, int]]) -> MadeTensor:
    """Return rows of a tensor, concatenated; each run is (first, stop)."""
    rows = sum(stop - first for first, stop in runs)

    def load() -> Numbers:
        import numpy as np

        numbers = tensor.load()
        return replace(numbers, bits=np.concatenate([numbers.bits[first:stop] for first, stop in runs]))

    return MadeTensor(TensorSpec(tensor.spec.dtype, (rows, *tensor.spec.shape[1:])), load)


def made_of_bits(spec: TensorSpec, make: Callable[[], Bits]) -> MadeTensor:
    """Return the tensor of the bits that `make` computes."""

    def load() -> Numbers:
        from ...numerics.arrays import Numbers
        from ...numerics.forms import FORMS

        return Numbers(make(), FORMS[spec.dtype])

    return MadeTensor(spec, load)


def stored_bits(tensor: MadeTensor) -> Bits:
    """Load a tensor's bits in the type of its spec."""
    from ...numerics.arrays import recast
    from ...numerics.forms import FORMS

    bits: Bits = recast(tensor.load(), FORMS[tensor.spec.dtype]).bits
    return bits


def virtual_file(file: WeightsFile, tensors: Mapping[str, MadeTensor], metadata: Mapping[str, str]) -> VirtualFile:
    specs = {name: tensor.spec for name, tensor in tensors.items()}
    return VirtualFile(file, specs, lambda name: tensors[name].load(), metadata)


def whole_B(file: WeightsFile, A_name: str, name: str, rank: int, enabled: Sequence[bool]) -> MadeTensor:
    """Return the full B (out, n r) of a MergedLinear, which adapts the n `enabled` ones of its equal slices of rows.

    Its A is (n r, in). Its stored B (rows of the n slices, n r / g[, 1]) is the weight of a convolution in g groups:
    group i of these rows multiplies group i of A, and the rest of the full B is zero. (g is n in loralib and
    AdapterHub, and 2 in PEFT before 0.3.)

    Raises:
        InputError: the shapes do not divide into groups and slices.
    """
    A, B = file.specs[A_name].shape, file.specs[name].shape
    n, slots = sum(enabled), [slot for slot, on in enumerate(enabled) if on]
    if len(A) != 2 or len(B) not in (2, 3) or B[2:] not in ((), (1,)) or A[0] != n * rank or not B[1]:
        message = f"is {B} and its A is {A}: not a MergedLinear of rank {rank} with {n} of {len(enabled)} slices"
        raise InputError(message, culprit=name)
    groups, size = A[0] // B[1], B[0] // n
    if groups not in (1, 2, n) or groups * B[1] != A[0] or B[0] % n or B[0] % groups:
        raise InputError(f"is {B}, which does not divide into {n} slices and {A[0]} ranks", culprit=name)

    def with_zeros(stored: Bits) -> Bits:
        import numpy as np

        rows = np.zeros((groups, B[0] // groups, groups, B[1]), stored.dtype)
        for group in range(groups):
            rows[group, :, group] = stored.reshape(groups, -1, B[1])[group]
        out = np.zeros((len(enabled), size, A[0]), stored.dtype)
        out[slots] = rows.reshape(n, size, A[0])
        return out.reshape(-1, A[0])

    return made_of(file, name, (size * len(enabled), A[0]), with_zeros)
