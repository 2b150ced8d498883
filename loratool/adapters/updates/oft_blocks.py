"""Rotate the outputs of a layer by blocks, as kohya's OFT and LyCORIS's diag-OFT and BOFT do.

Q = O - O.T of each block of b outputs, R = (I + Q)(I - Q)^-1, X = diag(s) blockdiag(R).T W, kernels flattened. In
LyCORIS's BOFT (`oft_blocks` of four axes, (m, k, b, b)) factors follow each other: each takes the outputs in an
order, multiplies runs of b of them by its R, not transposed, and puts them back. s is `rescale`.

alpha is a bound: with c = alpha out, and one norm over all blocks, Q is first multiplied by f. LyCORIS: f = c / n if
c > 0 and n = ||Q|| + 1e-8 > c (`lycoris/modules/diag_oft.py`, `boft.py`). kohya: f = (min(||Q||, c) + 1e-8) /
(||Q|| + 1e-8), also where alpha is 0 (sd-scripts, `networks/oft.py`), whose names begin with `oft_unet_`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import InputError
from ...files.dtypes import TensorSpec
from ..config import AdapterConfig
from .rotations import butterfly, cayley, root, rotations, skew_parts, squares
from .update import Detail, Fault, Rotated, Update, UpdateSpec

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.mixed import Mixing

KOHYA_PREFIX = "oft_unet_"
EPS = Fraction(1, 10**8)


@dataclass(frozen=True)
class Bound(Detail):
    """The bound on the norm of Q, for each output."""

    alpha: float
    is_kohyas: bool
    turned: bool = False  # R in place of its transpose, as some program may take it


@dataclass(frozen=True)
class OFTBlocks(Update):
    """OFT of the outputs of a linear layer or a convolution."""

    value: Numbers  # (k, b, b), of BOFT (m, k, b, b)
    scales: Numbers | None  # (out,)
    bound: Bound

    kind = "oft_blocks"
    roles = ("oft_blocks",)
    optional = ("rescale",)
    suffixes: ClassVar = {".oft_blocks": "oft_blocks", ".rescale": "rescale"}
    additive = False
    flattened = True
    mixes = True

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return spec.specs["oft_blocks"].shape

    @classmethod
    def fits(cls, spec: UpdateSpec, shape: tuple[int, ...]) -> bool:
        return len(shape) > 1 and shape[0] == _outputs(spec)

    @classmethod
    def flat(cls, spec: UpdateSpec) -> tuple[int | None, int | None]:
        return _outputs(spec), None

    @classmethod
    def misread(cls, spec: UpdateSpec) -> Mapping[Fault, UpdateSpec]:
        bound = spec.detail
        assert isinstance(bound, Bound)
        faults: dict[Fault, UpdateSpec] = {}
        if len(spec.specs["oft_blocks"].shape) == 3:
            faults["turned"] = replace(spec, detail=replace(bound, turned=True))
        if bound.alpha or bound.is_kohyas:
            faults["unbound"] = replace(spec, detail=replace(bound, alpha=0.0, is_kohyas=False))
            faults["bound by alpha"] = replace(spec, detail=replace(bound, alpha=bound.alpha / _outputs(spec)))
        if "rescale" in spec.specs:
            of_blocks = {"oft_blocks": spec.tensors["oft_blocks"]}
            faults["unscaled"] = replace(spec, tensors=of_blocks, specs={"oft_blocks": spec.specs["oft_blocks"]})
        return faults

    @classmethod
    def together(cls, spec: UpdateSpec, transposed: bool) -> int:
        *factors, _, b, _ = spec.specs["oft_blocks"].shape
        return 1 if transposed else b << (factors[0] - 1 if factors else 0)

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        shape = specs["oft_blocks"].shape
        if len(shape) not in (3, 4) or shape[-1] != shape[-2] or not all(shape):
            raise InputError(f"is {shape}, not square blocks", culprit=roles["oft_blocks"])
        if len(shape) == 4 and (shape[2] % 2 or shape[1] % (1 << (shape[0] - 1))):
            raise InputError(f"is {shape}: its blocks do not make butterflies", culprit=roles["oft_blocks"])
        outputs = shape[-3] * shape[-1]
        if "rescale" in specs and (specs["rescale"].size != outputs or specs["rescale"].shape[0] != outputs):
            raise InputError(f"is {specs['rescale'].shape}, for {outputs} outputs", culprit=roles["rescale"])

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        alpha, is_kohyas = config.alpha, spec.module.startswith(KOHYA_PREFIX)
        if is_kohyas and alpha is None:
            raise InputError("has no alpha, which bounds the rotations of kohya's OFT", culprit=spec.module)
        return replace(spec, transposed=False, detail=Bound(alpha or 0.0, is_kohyas))

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> OFTBlocks:
        assert isinstance(spec.detail, Bound)
        scales = tensors.get("rescale")
        return cls(tensors["oft_blocks"], None if scales is None else scales.reshape(scales.size), spec.detail)

    def rotated(self) -> Rotated:
        *_, k, b, _ = self.value.shape
        Q = skew_parts(self.value.reshape(self.value.size // (b * b), b, b))
        return Rotated(0.0, self._factor(sum(squares(Q), Fraction(0)), k * b) < 1)

    def mixing(self, weight: float, transposed: bool) -> Mixing:
        from ...numerics.mixed import Mixing

        *several, k, b, _ = self.value.shape
        Q = skew_parts(self.value.reshape(math.prod(several) * k, b, b))
        factor = self._factor(sum(squares(Q), Fraction(0)), k * b)
        M = self._butterfly(Q, several[0], b, factor) if several else rotations(Q, None, [factor])
        if not several and not self.bound.turned:
            M = M.swapaxes(1, 2)
        scales = None if self.scales is None else self.scales.wide()
        mixing = Mixing(M[:, None], 0, weight, scales, is_rotation=True)
        return mixing.T if transposed else mixing

    def _factor(self, square: Fraction, outputs: int) -> Fraction:
        """Return what Q is multiplied by. square: of its norm."""
        c, norm = Fraction(self.bound.alpha) * outputs, root(square)
        if self.bound.is_kohyas:
            return Fraction(1) if square <= c * c else (c + EPS) / (norm + EPS)
        return c / (norm + EPS) if c > 0 and norm + EPS > c else Fraction(1)

    def _butterfly(self, Q: Any, factors: int, b: int, factor: Fraction) -> Any:
        """Return the product of all factors, less the unit matrix, of each run of outputs, (runs, L, L)."""
        import numpy as np

        from ...numerics.derived import derived_numbers

        length = b << (factors - 1)
        orders = []
        for stage in range(factors):
            places = np.arange(length).reshape(-1, 2, b // 2 << stage).swapaxes(1, 2)
            orders.append(places.reshape(-1).tolist())
        stages = [[part.reshape(factors, -1, length, b)[stage] for part in Q] for stage in range(factors)]

        def M(*stages: Any) -> Any:
            blocks = (stage.moved(lambda x: x.reshape(-1, b, b)) for stage in stages)
            return butterfly([cayley(Q * factor) for Q in blocks], orders)

        return derived_numbers(M, *stages)


def _outputs(spec: UpdateSpec) -> int:
    *_, k, b, _ = spec.specs["oft_blocks"].shape
    return k * b
