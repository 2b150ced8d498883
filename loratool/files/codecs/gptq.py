"""Read and write GPTQ: matrices (in, out) of codes and zero points in words, and a scale for each group of columns.

`g_idx` has the group of each column, in any order (act-order); without it, groups follow each other. Zero points are
stored minus 1 if the config's `checkpoint_format` is "gptq" or missing, and unchanged if it is "gptq_v2". No tensor
distinguishes the two. auto-round writes both, and its `packing_format` says which.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import InputError
from ..dtypes import TensorSpec
from .codec import Fault, Parts, StoredWeight, Unclaimed
from .scaled import ScaledCodes, Scales

if TYPE_CHECKING:
    from ...numerics.code_levels import Levels
    from .codec import Codes, Wide
    from .packing import Packing

BITS = (2, 3, 4, 8)

# auto-round's names of the method, and its `packing_format` -> what stored zero points lack
AUTO_ROUND = ("auto-round", "auto_round", "intel/auto-round")

PACKINGS = {
    **dict.fromkeys(("auto_round:auto_gptq", "auto_round:gptq", "auto"), 1),
    **dict.fromkeys(("auto_round", "auto_round:gptqmodel"), 0),
}

AUTO_ROUND_BITS = (*BITS, 5, 6, 7)

FLOATS = ("F16", "BF16", "F32")  # of scales


class Gptq(ScaledCodes):
    """A number is (code - zero point) * scale, with the zero point and scale of its group.

    Sources: AutoGPTQ 0.7.1, nn_modules/qlinear/qlinear_cuda.py; GPTQModel 7.7, utils/model.py (v1 and v2); auto-round
    0.16, auto_round_extension/torch/qlinear_torch.py and qlinear_torch_zp.py.
    """

    key = "gptq"
    ends = (".qweight",)
    code_dtypes = frozenset(("I32",))

    def claim(self, path: str, name: str, unclaimed: Unclaimed) -> StoredWeight | None:
        scale, zero, index = (f"{path}.{tensor}" for tensor in ("scales", "qzeros", "g_idx"))
        if unclaimed.one_of(scale, zero, index) is None or unclaimed.declared.get("quant_method") == "awq":
            return None
        rows, out = matrix(name, unclaimed.specs[name])
        groups, _ = matrix(scale, unclaimed.need(scale, *FLOATS))
        _, words = matrix(zero, unclaimed.need(zero, "I32"))
        widths = AUTO_ROUND_BITS if is_auto_round(unclaimed.declared) else BITS
        bits = next((bits for bits in widths if words * 32 == out * bits), None)
        if bits is None or rows * 32 % bits:
            raise Fault(
                f"{zero} has the shape {unclaimed.specs[zero].shape}, for {name} of {unclaimed.specs[name].shape}"
            )
        unclaimed.shaped(scale, (groups, out))
        unclaimed.shaped(zero, (groups, words))
        columns = rows * 32 // bits
        detail = {"bits": bits, "less": stored_less(unclaimed.declared), "group": 0}
        if index in unclaimed.specs:
            unclaimed.shaped(index, (columns,), "I32", "I64")
        else:
            detail["group"] = group_size(scale, columns, groups, unclaimed.declared)
        tensors = [tensor for tensor in (name, scale, zero, index) if tensor in unclaimed.specs]
        note = disagreement(unclaimed.declared, bits)
        roles = ("codes", "scales", "zeros", "groups")[: len(tensors)]
        return StoredWeight(self, TensorSpec("F64", (out, columns)), tuple(tensors), roles, detail, note)

    def packing(self, parts: Parts) -> Packing:
        from .packing import Down

        _, rows, columns = parts.shape
        return Down(rows, columns, parts.detail("bits"))

    def levels(self, parts: Parts) -> Levels:
        from ...numerics.code_levels import Integers

        return Integers(0, (1 << parts.detail("bits")) - 1)

    def scales(self, parts: Parts, start: int, stop: int) -> Scales:
        groups, out = parts["scales"].spec.shape
        scale, zero = parts["scales"].float_box(groups, out, start, stop).T, self.zeros(parts, start, stop)
        if parts.detail("group"):
            return Scales(scale, parts.detail("group"), zero)
        index, group = column_groups(parts, groups)
        return Scales(scale, group, zero) if group else Scales(scale.take(index, axis=1), 0, zero.take(index, axis=1))

    def zeros(self, parts: Parts, start: int, stop: int) -> Wide:
        """Return the zero points of rows start:stop, (rows, groups).

        Raises:
            InputError: one is stored minus 1 and is below 0; some readers treat it as 0, others as 2**bits.
        """
        from .packing import cut, span

        bits, less = parts.detail("bits"), parts.detail("less")
        groups, width = parts["zeros"].spec.shape
        words = parts["zeros"].box(groups, width, *span(start, stop, bits))
        stored = cut(words, start, stop, bits).T
        if less and (stored == (1 << bits) - 1).any():
            raise InputError(
                f"holds a zero point of {(1 << bits) - 1}, less 1: programs read it as 0 or as {1 << bits}",
                culprit=parts["zeros"].name,
                remedy="save the model as gptq_v2 by the program that made it",
            )
        zeros: Wide = stored + float(less)
        return zeros

    def check(self, parts: Parts) -> None:
        self.require_finite(parts, "scales", parts["scales"])
        self.zeros(parts, 0, parts.weight.spec.shape[0])
        if not parts.detail("group"):
            column_groups(parts, parts["scales"].spec.shape[0])


def matrix(name: str, spec: TensorSpec) -> tuple[int, int]:
    """Return the rows and columns of a tensor.

    Raises:
        Fault: it does not have two dimensions.
    """
    if len(spec.shape) != 2 or not spec.size:
        raise Fault(f"{name} has the shape {spec.shape}, which is not a matrix")
    return spec.shape[0], spec.shape[1]


def stored_less(declared: Any) -> int:
    """Return the number that stored zero points lack: 1 in GPTQ's first format, 0 in its second.

    Raises:
        Fault: the config names neither format.
    """
    if is_auto_round(declared):
        packing = declared.get("packing_format") or "auto"
        if not isinstance(packing, str) or packing not in PACKINGS:
            raise Fault(f"its packing_format {packing!r} does not say how its zero points are stored")
        return PACKINGS[packing]
    if declared.get("quant_method") != "gptq":
        raise Fault("no quantization config says whether its zero points are those of gptq or of gptq_v2")
    form = declared.get("checkpoint_format") or declared.get("format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise Fault(f"its checkpoint_format {form!r} is neither gptq nor gptq_v2")
    return int(form == "gptq")


def is_auto_round(declared: Any) -> bool:
    return declared.get("quant_method") in AUTO_ROUND


def group_size(name: str, columns: int, groups: int, declared: Any) -> int:
    """Return the columns of a group if groups follow each other; the config's number if the scales fit it.

    Raises:
        Fault: the columns cannot be divided into so many groups.
    """
    stated = declared.get("group_size", declared.get("q_group_size"))
    if type(stated) is int and stated > 0 and -(-columns // stated) == groups:
        return stated
    if columns % groups:
        raise Fault(f"{name} has {groups} groups, for a weight of {columns} columns")
    return columns // groups


def column_groups(parts: Parts, groups: int) -> tuple[Codes, int]:
    """Return the group of each column, and the size of the groups, or 0 if they do not follow each other.

    Raises:
        InputError: a column's group does not exist.
    """
    import numpy as np

    index = parts["groups"].integers().view("i4")
    if index.min() < 0 or index.max() >= groups:
        raise parts.damaged("groups", f"names a group that is not among the {groups} of the scales")
    size = int(np.argmax(index != index[0])) or len(index)
    return index, size if np.array_equal(index, np.arange(len(index)) // size) else 0


def disagreement(declared: Any, bits: int) -> str:
    """Return a note if the config has another number of bits for all modules."""
    stated = declared.get("bits")
    is_other = type(stated) is int and stated != bits and not (declared.get("dynamic") or declared.get("extra_config"))
    return f"the config says {stated} bits, the tensors have {bits}" if is_other else ""
