"""Dequantize and encode the scheme of most formats: levels of codes, times a scale for each group of a row's columns.

A format's module determines the tensors and their layout; this module computes the numbers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .codec import CodeFormat, Parts, StoredTensor

if TYPE_CHECKING:
    from ...numerics.code_levels import Levels
    from .codec import Codes, Wide
    from .packing import Packing


@dataclass(frozen=True)
class Scales:
    """The scales of some rows.

    A number is `(level - zero) * scale + bias`, or, if `divisor` is set, `(level * scale) / divisor`.

    Attributes:
        scale, zero, bias: (rows, groups), or (rows, 1) or (1, 1); None for no zero and no bias.
        group: columns of a group; the last may be shorter. 0 if the scales are (rows, columns).
    """

    scale: Wide
    group: int
    zero: Wide | None = None
    bias: Wide | None = None
    divisor: float | None = None


class ScaledCodes(CodeFormat):
    """A format whose numbers are levels times scales."""

    @abstractmethod
    def packing(self, parts: Parts) -> Packing:
        """Return the packing of the codes."""

    @abstractmethod
    def levels(self, parts: Parts) -> Levels:
        """Return the levels of codes, their numbers before scaling."""

    @abstractmethod
    def scales(self, parts: Parts, start: int, stop: int) -> Scales:
        """Return the scales of rows start:stop."""

    def width(self, parts: Parts) -> int:
        return self.packing(parts).width

    def row_multiple(self, parts: Parts) -> int:
        return self.packing(parts).row_multiple

    def codes(self, parts: Parts, start: int, stop: int) -> Codes:
        return self.packing(parts).read(parts["codes"], start, stop)

    def places(self, parts: Parts, start: int, codes: Codes) -> Iterator[tuple[int, bytes]]:
        return self.packing(parts).places(start, codes)

    def values(self, parts: Parts, start: int, codes: Codes) -> Wide:
        import numpy as np

        columns = parts.weight.spec.shape[-1]
        scales = self.scales(parts, start, start + len(codes))
        numbers = self.levels(parts).values(codes[:, :columns])
        with np.errstate(all="ignore"):  # of e5m2's infinities
            if scales.zero is not None:
                _each(numbers, scales.zero, scales.group, "subtract")
            _each(numbers, scales.scale, scales.group, "multiply")
            if scales.divisor is not None:
                numbers /= scales.divisor
            if scales.bias is not None:
                _each(numbers, scales.bias, scales.group, "add")
        return numbers

    def nearest(self, parts: Parts, start: int, numbers: Wide) -> Codes:
        import numpy as np

        scales = self.scales(parts, start, start + len(numbers))
        with np.errstate(all="ignore"):
            levels = numbers.copy()
            if scales.bias is not None:
                _each(levels, scales.bias, scales.group, "subtract")
            if scales.divisor is not None:
                levels *= scales.divisor
            _each(levels, scales.scale, scales.group, "divide")
            if scales.zero is not None:
                levels[np.isnan(levels)] = 0.0  # the code of 0 is the zero point
                _each(levels, scales.zero, scales.group, "add")
            return self.levels(parts).nearest(levels)

    def ordinals(self, parts: Parts, codes: Codes) -> Codes:
        return self.levels(parts).ordinals(codes)

    def zero(self, parts: Parts) -> int:
        import numpy as np

        return int(self.levels(parts).nearest(np.zeros(1))[0])

    def from_ordinals(self, parts: Parts, ordinals: Codes) -> Codes:
        return self.levels(parts).from_ordinals(ordinals)

    def check(self, parts: Parts) -> None:
        """Raise InputError if a scale, zero point or bias is nan or infinite."""
        for role in ("scales", "zeros", "biases", "scale_of_scales"):
            tensor = parts.get(role)
            if tensor is not None:
                self.require_finite(parts, role, tensor)

    def require_finite(self, parts: Parts, role: str, tensor: StoredTensor) -> None:
        """Raise InputError if a companion of a type with nan and infinity has any."""
        import numpy as np

        size, step = 0 if tensor.name in tensor.file.finite else tensor.spec.size, 1 << 20
        for first in range(0, size, step):
            if not np.isfinite(self.decoded(role, tensor, first, min(step, size - first))).all():
                raise parts.damaged(role, "holds nan or inf, so that its weight has no numbers")

    def decoded(self, role: str, tensor: StoredTensor, first: int, count: int) -> Wide:
        """Return numbers of a companion; E8M0, which `floats` does not read, is 2**(code - 127)."""
        from ...numerics.code_levels import e8m0

        is_e8m0 = role == "scales" and tensor.spec.dtype in ("U8", "F8_E8M0")
        return e8m0(tensor.integers(first, count)) if is_e8m0 else tensor.floats(first, count)

    def grid(self, parts: Parts, role: str, block: tuple[int, int], start: int, stop: int) -> Wide:
        """Return a companion's numbers for rows start:stop, one for each block of `block` rows and columns.

        The companion has one number for each block of a matrix, (matrices, ceil(rows / block), ceil(columns / block)).
        A size of 0 means one block in that direction. Or it has one number for all matrices.

        Returns:
            (rows, groups), or (1, groups) where all rows have the same.
        """
        import numpy as np

        if parts[role].spec.size == 1:
            return self.decoded(role, parts[role], 0, 1).reshape(1, 1)
        _, rows, columns = parts.shape
        high, groups = (-(-size // each) if each else 1 for size, each in zip((rows, columns), block, strict=True))
        rows_read = np.arange(start, stop)
        row = rows_read // rows * high + (rows_read % rows // block[0] if block[0] else 0)
        first, last = int(row[0]), int(row[-1]) + 1
        numbers = self.decoded(role, parts[role], first * groups, (last - first) * groups).reshape(-1, groups)
        return numbers if len(numbers) == 1 else numbers[row - first]


def _each(numbers: Wide, by: Wide, group: int, operation: str) -> None:
    """Apply an operation to numbers, (rows, columns), in place, with one number for each group of columns of a row."""
    import numpy as np

    apply, columns = getattr(np, operation), numbers.shape[1]
    if by.shape[1] == 1 or not group:
        apply(numbers, by, out=numbers)
    elif columns == by.shape[1] * group:
        parts = numbers.reshape(len(numbers), by.shape[1], group)
        apply(parts, by[:, :, None], out=parts)
    else:
        apply(numbers, np.repeat(by, group, axis=1)[:, :columns], out=numbers)
