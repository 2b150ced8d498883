"""Multiply and shift each weight, PEFT's GLoRA: X = W * (1 + A) + B, and the bias becomes b * (1 + D) + E + W C.

Chavan et al., 2023; `peft/tuners/glora/layer.py`. A and B are `Xd` (out, r) @ `Xu` (r, in), or `X`, a column (out, 1)
or one number; D and E are an `X`, (out,) or one number; C is `Xd` (in, r) @ `Xu` (r, 1) or `X`, (in, 1). A path without
them is 0. C, if it is a product, and W C have numbers of 36 bits (`numerics.short_products`); W C is in the undo file
of the bias, as the weight has changed when it is undone. LyCORIS's GLoRA is another method.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from ...errors import InputError
from ...files.dtypes import TensorSpec
from ...files.weights_file import WeightsFile
from ..config import AdapterConfig
from .tucker import sum_terms
from .update import Detail, PeftMethod, Update, UpdateSpec, finite_numbers

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.decide import Delta, Entries

ENDS = ("Xd", "Xu", "X", "zeros")
PATHS = tuple(f"glora_{path}.{end}" for path in "ABCDE" for end in ENDS)


@dataclass(frozen=True)
class GLoRA(Update):
    """PEFT's GLoRA of a linear layer, or of its bias."""

    paths: Mapping[str, Numbers]  # by role
    of_weight: bool
    outputs: int = 0
    inputs: int = 0

    kind = "glora"
    roles = ()
    optional = PATHS
    peft = PeftMethod("GLORA", {role: role for role in PATHS})
    additive = False
    in_turn = False

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return next(iter(spec.specs.values())).shape if _is_of_weight(spec) else (cls.flat(spec)[0] or 1,)

    @classmethod
    def fits(cls, spec: UpdateSpec, shape: tuple[int, ...]) -> bool:
        sides = cls.flat(spec)
        return len(shape) == 1 + _is_of_weight(spec) and all(
            side in (None, size) for side, size in zip(sides, shape, strict=False)
        )

    @classmethod
    def flat(cls, spec: UpdateSpec) -> tuple[int | None, int | None]:
        if not _is_of_weight(spec):
            return _common(each.size for role, each in spec.specs.items() if role[6] in "DE"), None
        sides = {role: each.shape for role, each in spec.specs.items() if role[6] in "AB"}
        outputs = _common(shape[0] for role, shape in sides.items() if not role.endswith("Xu"))
        return outputs, _common(shape[1] for role, shape in sides.items() if role.endswith(("Xu", "zeros")))

    @classmethod
    def require(cls, module: str, roles: Mapping[str, str]) -> None:
        for path in "ABC":
            if (f"glora_{path}.Xd" in roles) is not (f"glora_{path}.Xu" in roles):
                raise InputError(f"one of the factors of path {path} of {module} is missing", culprit=module)

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        for path in "ABC":
            if f"glora_{path}.Xd" in specs:
                left, right = (specs[f"glora_{path}.{end}"].shape for end in ENDS[:2])
                if len(left) != 2 or len(right) != 2 or left[1] != right[0]:
                    raise InputError(f"Xd is {left}, Xu is {right}: they cannot be multiplied", culprit=module)
        for axis, ends in ((0, ("Xd", "X", "zeros")), (1, ("Xu", "zeros"))):
            wide = [each.shape for role, each in specs.items() if role[6] in "AB" and role.endswith(ends)]
            if len({shape[axis] for shape in wide if shape != (1,) and len(shape) == 2}) > 1:
                raise InputError(f"its paths A and B are of several sizes: {', '.join(map(str, wide))}", culprit=module)
        for role in (role for role in specs if role.endswith(".X")):
            shape = specs[role].shape
            is_column = len(shape) == 2 and shape[1] == 1
            if shape != (1,) and not (is_column if role[6] in "ABC" else len(shape) == 1):
                raise InputError(f"is {shape}, neither a column nor one number", culprit=roles[role])
        if "glora_C.Xu" in specs and specs["glora_C.Xu"].shape[1] != 1:
            raise InputError(f"is {specs['glora_C.Xu'].shape}, not a column", culprit=roles["glora_C.Xu"])

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        return replace(spec, transposed=False)

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> GLoRA:
        return cls(tensors, _is_of_weight(spec))

    @classmethod
    def load(cls, spec: UpdateSpec, file: WeightsFile, adapter: str) -> GLoRA:
        tensors = finite_numbers(spec.tensors, file, adapter)
        for role in [role for role in tensors if role.endswith("zeros")]:
            if (tensors.pop(role).bits != 0).any():
                raise InputError("stands for an empty path, but is not 0", culprit=spec.tensors[role])
        return cls.make(spec, tensors)

    @classmethod
    def of_bias(cls, spec: UpdateSpec, bias: str) -> UpdateSpec | None:
        tensors = {role: name for role, name in spec.tensors.items() if role[6] in "CDE" and ".X" in role}
        specs = {role: spec.specs[role] for role in tensors}
        return replace(spec, module=bias, tensors=tensors, specs=specs, detail=OfBias(), base=None) if tensors else None

    @classmethod
    def reads_weight(cls, spec: UpdateSpec) -> tuple[str, int] | None:
        C = spec.specs.get("glora_C.Xd", spec.specs.get("glora_C.X"))
        return None if _is_of_weight(spec) or C is None else (spec.module.removesuffix(".bias"), C.shape[0])

    @classmethod
    def projections(cls, spec: UpdateSpec, columns: int) -> int:
        return int(cls.reads_weight(spec) is not None)

    def weighed(self) -> Numbers:
        from ...numerics.arrays import Numbers
        from ...numerics.short_products import row_products

        if "glora_C.X" in self.paths:
            return self.paths["glora_C.X"].reshape(-1, 1)
        return Numbers.of(row_products(self.paths["glora_C.Xd"], self.paths["glora_C.Xu"]))

    def sized(self, outputs: int, inputs: int) -> GLoRA:
        return replace(self, outputs=outputs, inputs=inputs)

    def moved(self, weight: float, transposed: bool, rows: slice, columns: int) -> tuple[Delta, Entries]:
        from ...numerics.decide import Entries

        deltas = {
            path: self._delta(path, Fraction(weight), transposed, rows, columns)
            for path in ("AB" if self.of_weight else "DE")
        }
        factor, shift = deltas.values()
        return shift, Entries(factor)

    def _delta(self, path: str, w: Fraction, transposed: bool, rows: slice, columns: int) -> Delta:
        """Return `w` times a path for some rows of the weight, or of the bias as a column."""
        import numpy as np

        from ...numerics.arrays import Numbers
        from ...numerics.products import Term
        from ...numerics.stored import Zero

        found = {role[-2:].lstrip("."): x for role, x in self.paths.items() if role.startswith(f"glora_{path}.")}
        if "Xd" in found:
            left, right = found["Xd"], found["Xu"]
        elif "X" in found:
            size = rows.stop - rows.start if columns == 1 else self.outputs
            numbers = found["X"].reshape(found["X"].size)
            column = numbers.bits if len(numbers) > 1 else np.repeat(numbers.bits, max(size, rows.stop))
            left = Numbers(column[:, None], numbers.form)
            right = Numbers.of(np.ones((1, self.inputs if self.of_weight else 1), np.float32))
        else:
            return Zero((rows.stop - rows.start, columns))
        return sum_terms([Term(left, right, w)], transposed).rows(rows.start, rows.stop)


@dataclass(frozen=True)
class OfBias(Detail):
    """It is the update of a bias."""


def _is_of_weight(spec: UpdateSpec) -> bool:
    return not isinstance(spec.detail, OfBias)


def _common(sizes: Iterable[int]) -> int | None:
    """Return the largest of some sizes, of which others are 1; None without any."""
    return max((size for size in sizes if size > 1), default=None)
