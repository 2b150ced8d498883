"""The table of acceptable ways of rounding for a merged weight.

A way predicts an interval for each weight (`rounding_bounds.Predictions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from ...files.dtypes import DTYPE_NAMES
from ...numerics.arrays import rounded_to
from ...numerics.forms import BF16, F16, F32, F64, Form, Wide


@dataclass(frozen=True)
class Rounding:
    """The types to which a merge rounds at each step. None, or no type, for steps without rounding."""

    base: Form  # W
    factors: Form | None  # A and B, before they are multiplied
    product: Form | None  # B @ A, before it is scaled
    change: tuple[Form, ...]  # each adapter's delta, one type after the other
    total: Form  # W + D, and its norm
    magnitude: Form | None  # m
    ratio: Form  # m / n, and its product with W + D
    apart: bool  # adapters are added one after the other, and each sum is rounded


NARROW = {"bf16": BF16, "fp16": F16}  # what {type} in a title stands for

# Title -> what is rounded to {type}, as in `Rounding`; `cast` is the delta to the base's type, `apart` no type. From
# the least rounding to the most, as in peft/tuners/lora/layer.py (Linear.merge and get_delta_weight), where the
# adapter's type, the device and safe_merge decide.
ROUNDINGS = {
    "one rounding of a float32 sum (peft with an fp32 adapter)": "",
    "one rounding of a float32 sum an adapter": "apart",
    "change rounded to the base's type, then the sum": "cast",
    "change rounded to {type}, then the sum (peft with its adapter in {type}, or safe_merge)": "change",
    "change rounded to {type}, then to the base's type, then the sum": "change cast",
    "change rounded to the base's type, the sum once an adapter": "cast apart",
    "change rounded to {type}, the sum once an adapter": "change apart",
    "change rounded to {type} and to the base's type, the sum once an adapter": "change cast apart",
    "product and scale rounded to {type} (peft on a GPU)": "product change",
    "product and scale rounded to {type}, the sum once an adapter": "product change apart",
    "factors in {type}, one rounding of the sum": "factors",
    "factors and change in {type}": "factors change",
    "factors and change in {type}, the sum once an adapter": "factors change apart",
    "factors, product and scale in {type}": "factors product change",
    "factors, product and scale in {type}, rounded to the base's type": "factors product change cast",
}

# The same for W' = m / ||W + D|| * (W + D), as in peft/tuners/lora/variants.py (DoraLinearVariant.merge_unsafe), where
# torch's type promotion and autocast_adapter_dtype decide.
DORA_ROUNDINGS = {
    "float32 norms, one rounding (peft with an fp32 adapter)": "",
    "float32 norms, the sum once an adapter": "apart",
    "change in {type}, float32 norms": "change",
    "change and magnitudes in {type}, float32 norms": "change magnitude",
    "change, sum and norms in {type}": "change total",
    "all in {type}": "change total magnitude ratio",
    "factors in {type}, float32 norms": "factors",
    "factors and magnitudes in {type}, float32 norms": "factors magnitude",
    "factors and change in {type}, float32 norms": "factors change",
    "factors, change and magnitudes in {type}, float32 norms": "factors change magnitude",
    "factors, change, sum and norms in {type}": "factors change total",
    "factors and all else in {type}": "factors change total magnitude ratio",
}


def cast_wide(x: Wide, form: Form) -> Wide:
    """Return numbers rounded as by `rounded_to`, in float64."""
    return rounded_to(x, form).wide()


def list_roundings(kind: Form, others: Sequence[Form], dora: bool, several: bool) -> list[tuple[str, Rounding]]:
    """Return the distinct ways of rounding on a base of type `kind` with their titles, the likeliest first.

    Args:
        others: types to which the base may have been rounded first.
        dora: whether a DoRA divides rows by their norms.
        several: whether more than one adapter changes the tensor.
    """
    table = (DORA_ROUNDINGS if dora else ROUNDINGS).items()
    totals = {"": F32} if kind != F64 else {"": kind, ", all in float32": F32}
    titles: dict[Rounding, str] = {}
    for base, (end, total), (title, words), (name, form) in product(
        (kind, *others), totals.items(), table, NARROW.items()
    ):
        to = dict.fromkeys(words.split(), form)
        change = dict.fromkeys(each for word, each in (("change", form), ("cast", kind)) if word in to)
        way = Rounding(
            base=base,
            factors=to.get("factors"),
            product=to.get("product"),
            change=tuple(each for each in change if each.itemsize == 2),  # in float32 it is of that type already
            total=to.get("total", total),
            magnitude=to.get("magnitude"),
            ratio=to.get("ratio", F32 if "total" in to else total),
            apart="apart" in to,
        )
        if several or not way.apart:
            first = f", from weights in torch.{DTYPE_NAMES[base.name]}" if base != kind else ""
            titles.setdefault(way, title.format(type=name) + end + first)
    return [(title, way) for way, title in titles.items()]
