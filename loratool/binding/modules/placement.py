"""Place an update on a base tensor: check its shape, and find its orientation and rows.

Shapes and tables of model families decide. If an update fits in two ways, evidence decides or it is refused; nothing
is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ...adapters.adapter import Adapter
from ...adapters.updates.replace import ReplaceTensor
from ...adapters.updates.update import Stack, Update, UpdateSpec
from ...architectures.conv1d import stores_transposed
from ...architectures.experts import PEFT_TAKES_AS_PLAIN, TRANSPOSED_EXPERTS
from ...architectures.mlx_names import find_share
from ...architectures.prefixes import module_path
from ...architectures.roles import EMBEDDINGS, HEADS, LATENT_INPUTS
from ...architectures.ties import MASKED_HEADS
from ...errors import InputError
from ...files.dtypes import FLOATS, TORCH_FLOATS, TensorSpec
from ...files.tensor_ref import TensorRef

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers

# The last names of modules with one row for each token or label.
SIZED = EMBEDDINGS | HEADS | {head.rpartition(".")[2] for head in MASKED_HEADS}


class ShapeError(InputError):
    """An update has another shape than its weight in the base."""


@dataclass(frozen=True)
class Match:
    """A base tensor that matches an update, or a slice of one if only one side stacks its experts."""

    name: str
    expert: int | None = None  # number of the matrix's expert, if only one side is a stack
    part: int = 0  # number of the slice of that matrix's rows: gate is 0, up is 1
    parts: int = 1
    # if a tensor has the rows of several modules, or several tensors those of a module:
    # the tensor's (start, stop), the update's first row in it, the update's number of rows
    rows: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class RowsOfWeight:
    """The rows of a module's weight that belong to those of its bias."""

    source: TensorRef
    rows: int  # all rows of the matrix
    first: int  # its row for the update's first

    def blocks(self, rows: slice, most: int) -> Iterator[Numbers]:
        """Yield W of some of the update's rows, about `most` numbers at a time.

        Raises:
            InputError: they have inf or nan.
        """
        step = max(1, most * self.rows // max(1, self.source.spec.size))
        for start in range(self.first + rows.start, self.first + rows.stop, step):
            W = self.source.read_matrix(self.rows, start, min(start + step, self.first + rows.stop))
            if not W.all_finite():
                what = "has rows with inf or nan, but a product with them is needed"
                raise InputError(what, culprit=self.source.name)
            yield W


@dataclass(frozen=True)
class Placement:
    """An update, or one expert of it, on some rows of a base tensor with flattened trailing dimensions."""

    adapter: Adapter
    update: UpdateSpec
    weight: float  # the adapter's, or this module's
    transposed: bool  # the base stores (in, out)
    rows: int  # all rows of the matrix
    start: int  # rows [start, stop) of the matrix get the update
    stop: int
    skip: int = 0  # the update's row at `start`
    expert: int | None = None  # number in a stack; None for an update that is not a stack
    beside: RowsOfWeight | None = None  # of an update that `reads_weight`, where there is a W
    # of DoRA along the inputs on some rows: (start, stop, skip) of all rows of the module, whose norms it needs
    runs: tuple[tuple[int, int, int], ...] = ()

    @property
    def together(self) -> int:
        """How many rows the update mixes; its own rows are in blocks of so many."""
        return self.update.cls.together(self.update, self.transposed)

    def sized(self, update: Update, columns: int) -> Update:
        """Return the update of a matrix with the size of its part here. columns: of the base tensor."""
        rows = self.skip + self.stop - self.start
        return update.sized(columns, rows) if self.transposed else update.sized(rows, columns)


def place_update(
    adapter: Adapter,
    module: str,
    weight: float,
    match: Match,
    specs: Mapping[str, TensorSpec],
    model_types: Sequence[str],
    all_matches: Mapping[str, Sequence[Match]],
) -> list[Placement]:
    """Return the placements of one update on one tensor; several if both sides stack their experts.

    Args:
        model_types: the base's `model_type`s.
        all_matches: the matches of all modules of the adapter, as evidence for a square matrix.

    Raises:
        InputError: the shapes contradict each other, or the base's type does not support addition.
    """
    update, spec = adapter.updates[module], specs[match.name]
    if spec.dtype not in FLOATS and (update.cls is not ReplaceTensor or update.specs["value"].dtype != spec.dtype):
        raise InputError(
            f"is {spec.dtype}, which cannot be added to",
            culprit=match.name,
            remedy="pass the original model in 16 or 32 bits",
        )
    target = adapter.file.specs[update.base] if update.base else spec
    if target.shape != spec.shape:
        _check_rows_alone_differ(adapter, target, spec, match.name)
    if update.cls.mixes:
        update = update.cls.of_tensor(update, target.shape)
    rows = target.shape[0] if target.shape else 1
    if update.cls is ReplaceTensor and weight != 1 and (not spec.shape or spec.dtype not in FLOATS):
        raise InputError(f"is {spec}, which cannot be replaced in part: its weight must be 1", culprit=match.name)
    if update.cls is ReplaceTensor and match.rows:
        start, stop, skip, count = match.rows
        if update.shape != (count, *spec.shape[1:]):
            raise _shape_error(adapter, update, spec, match.name, f", and it is {count} of its rows")
        return [Placement(adapter, update, weight, False, rows, start, stop, skip)]
    if update.cls is ReplaceTensor:
        rows = _place_replaced_rows(adapter, update, spec, match.name)
        return [Placement(adapter, update, weight, False, rows, 0, rows)]
    if update.cls.in_stored_layout and not match.rows:
        _check_value(adapter, update, target, match.name)
        return [Placement(adapter, update, weight, False, rows, 0, rows)]
    runs = _whole_runs(update, match, target, all_matches[module]) if update.along_inputs else ()
    if (
        update.cls.reads_columns
        and match.rows
        and (match.rows[2], match.rows[1] - match.rows[0]) != (0, update.shape[0])
    ):
        raise InputError(
            f"has a part of the rows of {update.module}, whose {update.kind} depends on all of them",
            culprit=match.name,
            remedy="pass a base that has the module as one tensor",
        )
    if match.rows:
        return _place_rows(adapter, update, weight, match.name, match.rows, target, runs)
    if match.expert is not None or (len(target.shape) == 3 and update.cls.stack):
        return _place_experts(adapter, update, weight, match, target, model_types)
    transposed = _orient(adapter, update, match.name, target, specs, model_types, all_matches)
    expert = 0 if update.cls.stack else None
    update = update.cls.of_transposed(update) if transposed else update
    return [Placement(adapter, update, weight, transposed, rows, 0, rows, 0, expert)]


def _place_rows(
    adapter: Adapter,
    update: UpdateSpec,
    weight: float,
    base: str,
    covered: tuple[int, int, int, int],
    spec: TensorSpec,
    runs: tuple[tuple[int, int, int], ...],
) -> list[Placement]:
    """Place a module on some rows of a tensor; both are (out, in), and a 1x1 convolution counts as linear."""
    start, stop, skip, count = covered
    if update.cls.of_whole and (skip, stop - start) != (0, count):
        raise InputError(
            f"has {stop - start} of the {count} rows of {update.module}, whose change depends on all of them",
            culprit=base,
            remedy="pass a base that has the module as a tensor of its own, or in rows that follow each other",
        )
    if not update.cls.fits(update, (count, *spec.shape[1:])) or (update.cls.stack and update.experts != 1):
        error = _shape_error(
            adapter, update, spec, base, f", and it is {count} of its rows" if count != spec.shape[0] else ""
        )
        first_two = update.shape[:2]
        if module_path(base).endswith(LATENT_INPUTS) and first_two[:1] == spec.shape[:1] and first_two > spec.shape[:2]:
            error.remedy = (
                f"it is for a base with {first_two[1]} inputs here, as for a control image: pass that base, "
                f"which is this one with {first_two[1] - spec.shape[1]} columns of zeros after its own, and the new "
                "number in its config"
            )
        raise error
    expert = 0 if update.cls.stack else None
    return [Placement(adapter, update, weight, False, spec.shape[0], start, stop, skip, expert, runs=runs)]


def _whole_runs(
    update: UpdateSpec, match: Match, spec: TensorSpec, matches: Sequence[Match]
) -> tuple[tuple[int, int, int], ...]:
    """Return the (start, stop, skip) of a DoRA along the inputs in a tensor, which must have all rows of its module.

    The result is empty if the module is the whole tensor.

    Raises:
        InputError: some rows are in another tensor, so that no norm can be computed, or the number of inputs differs.
    """
    rows, size = (*spec.shape, 1)[0], update.specs["magnitude"].size
    axis = 1 if match.rows or not update.transposed else 0
    if spec.shape[axis : axis + 1] != (size,):
        raise InputError(f"is {spec.shape}, but {update.module} has {size} magnitudes of inputs", culprit=match.name)
    if match.rows in (None, (0, rows, 0, rows)):
        return ()
    runs = tuple(each.rows[:3] for each in matches if each.name == match.name and each.rows)
    if sum(stop - start for start, stop, _ in runs) == update.shape[0]:
        return runs
    raise InputError(
        f"is a part of {update.module}, which is DoRA along the inputs: its norms are those of the complete module",
        culprit=match.name,
        remedy="pass a base that has the module in one tensor, as single files have fused ones",
    )


def _shape_error(adapter: Adapter, update: UpdateSpec, spec: TensorSpec, base: str, layout: str = "") -> ShapeError:
    roles = " and ".join(f"{role} is {each.shape}" for role, each in update.specs.items())
    return ShapeError(
        f"{roles} in {adapter.name}, but the base weight is {spec.shape}{layout}",
        culprit=base,
        remedy=f"is this the adapter's base? {adapter.base_hint}".rstrip(),
    )


def _check_rows_alone_differ(adapter: Adapter, replaced: TensorSpec, spec: TensorSpec, base: str) -> None:
    """Raise ShapeError unless two shapes differ only in the rows of an embedding or a head.

    A vocabulary or a classifier may have another size than the base's.
    """
    last = base.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    same = len(replaced.shape) == len(spec.shape) and replaced.shape[1:] == spec.shape[1:]
    if not same or last not in SIZED or "pos" in last or last == "wpe":
        raise ShapeError(f"is {spec.shape}, but {adapter.name} replaces it by {replaced.shape}", culprit=base)


def _place_replaced_rows(adapter: Adapter, update: UpdateSpec, spec: TensorSpec, base: str) -> int:
    value = update.specs["value"]
    if value.shape != spec.shape:
        _check_rows_alone_differ(adapter, value, spec, base)
    if value.dtype not in TORCH_FLOATS and value.dtype != spec.dtype:
        raise InputError(f"is {spec.dtype}, but {adapter.name} replaces it by {value.dtype}", culprit=base)
    return value.shape[0] if value.shape else 1


def _check_value(adapter: Adapter, update: UpdateSpec, spec: TensorSpec, base: str) -> None:
    reason = update.cls.misfit(update, spec, adapter.name)
    if reason:
        raise InputError(reason, culprit=base)


def _place_experts(
    adapter: Adapter, update: UpdateSpec, weight: float, match: Match, spec: TensorSpec, model_types: Sequence[str]
) -> list[Placement]:
    """Place an update where at least one side stacks its experts: one placement for each expert and slice."""
    if update.cls.stack and match.expert is not None:  # stacked factors on one matrix per expert
        if len(spec.shape) != 2 or match.expert >= update.shape[0]:
            raise _shape_error(adapter, update, spec, match.name)
        rows, columns = spec.shape
        crossed = _is_transposed_family(model_types)  # whose classes store (in, out), and single experts (out, in)
        one = (columns, rows * match.parts) if crossed else (rows * match.parts, columns)
        stacked = TensorSpec(spec.dtype, (update.shape[0], *one))  # as the class has these experts
        transposed = _orient_stack(adapter, update, match.name, stacked, model_types) != crossed
        return [Placement(adapter, update, weight, transposed, rows, 0, rows, match.part * rows, match.expert)]
    if update.cls.stack:  # stacked factors on a stack
        if match.parts > 1:  # the file has each part as a separate stack
            experts, out, width = update.shape
            if spec.shape != (experts, out // match.parts, width) or out % match.parts:
                raise _shape_error(adapter, update, spec, match.name)
        transposed = match.parts == 1 and _orient_stack(adapter, update, match.name, spec, model_types)
        per_expert, rows = spec.shape[1], spec.shape[0] * spec.shape[1]
        return [
            Placement(
                adapter,
                update,
                weight,
                transposed,
                rows,
                e * per_expert,
                (e + 1) * per_expert,
                match.part * per_expert,
                e,
            )
            for e in range(spec.shape[0])
        ]
    # the factors of one expert on a stack
    assert match.expert is not None
    if len(spec.shape) != 3 or len(update.shape) != 2 or match.expert >= spec.shape[0]:
        raise _shape_error(adapter, update, spec, match.name)
    out, width = update.shape
    if (out * match.parts, width) != spec.shape[1:] or _is_transposed_family(model_types):
        raise _shape_error(adapter, update, spec, match.name, " as (experts, out, in)")
    start = (match.expert * match.parts + match.part) * out
    rows = spec.shape[0] * spec.shape[1]
    return [Placement(adapter, update, weight, False, rows, start, start + out)]


def _is_transposed_family(model_types: Sequence[str]) -> bool:
    return any(model_type in TRANSPOSED_EXPERTS for model_type in model_types)


def _orient_stack(
    adapter: Adapter, update: UpdateSpec, base: str, spec: TensorSpec, model_types: Sequence[str]
) -> bool:
    """Return whether the base stores a stack as (experts, in, out).

    The shape decides. For square matrices the format decides, or the model's family and the version of PEFT that wrote
    the adapter. PEFT up to 0.18 took every stack for (experts, in, out); since 0.19 it tells them apart (peft PR 3083).
    """
    experts, out, width = update.shape
    fitting = [t for t in (False, True) if spec.shape == ((experts, width, out) if t else (experts, out, width))]
    if not fitting:
        raise _shape_error(adapter, update, spec, base)
    if len(fitting) == 1:
        return fitting[0]
    if isinstance(update.detail, Stack) and update.detail.transposed is not None:
        return update.detail.transposed
    if _is_transposed_family(model_types) and base.endswith(".weight") and find_share(base, model_types):  # MLX's
        raise InputError("its experts are square, and have another layout than in transformers' class", culprit=base)
    version = re.match(r"(\d+)\.(\d+)", str(adapter.config.peft.get("peft_version")))
    if version and (int(version[1]), int(version[2])) < (0, 19):
        return True
    if _is_transposed_family(model_types):
        return not PEFT_TAKES_AS_PLAIN.intersection(model_types)
    if version and any(stores_transposed((model_type,), base) is False for model_type in model_types):
        return False
    raise InputError(
        f"its experts are square, and nothing tells whether they are (out, in) or (in, out) ({adapter.name})",
        culprit=base,
        remedy="give the base's config.json a known model_type, and adapter_config.json the peft_version that wrote it",
    )


def _orient(
    adapter: Adapter,
    update: UpdateSpec,
    base: str,
    spec: TensorSpec,
    specs: Mapping[str, TensorSpec],
    model_types: Sequence[str],
    all_matches: Mapping[str, Sequence[Match]],
) -> bool:
    """Return whether the base stores a weight as (in, out): by its shape, or by evidence if it is square."""
    shape, plain, fits = spec.shape, update.shape, partial(update.cls.fits, update)
    if update.cls.stack and update.experts != 1:
        raise _shape_error(adapter, update, spec, base)
    if len(plain) > 2 and not update.cls.stack and not fits(shape):
        grouped = len(shape) == len(plain) and shape[2:] == plain[2:] and plain[1] % max(1, shape[1]) == 0
        raise _shape_error(adapter, update, spec, base, ": a grouped convolution cannot be merged" if grouped else "")
    known = update.transposed
    if known is None:
        known = False if len(spec.shape) > 2 else stores_transposed(model_types, base.removesuffix(".weight"))
    fitting = [transposed for transposed in (False, True) if fits(shape[::-1] if transposed else shape)]
    if not fitting or (known is not None and known not in fitting):
        layout = {None: "", False: " as (out, in)", True: " as (in, out)"}[known]
        raise _shape_error(adapter, update, spec, base, layout)
    if known is not None:
        return known
    return fitting[0] if len(fitting) == 1 else _open_orientation(adapter, update.module, base, specs, all_matches)


def _open_orientation(
    adapter: Adapter,
    module: str,
    base: str,
    specs: Mapping[str, TensorSpec],
    all_matches: Mapping[str, Sequence[Match]],
) -> bool:
    """Return whether a matrix of an unknown family is (in, out), if it is square or its update fits both ways.

    Its bias decides, if it is not square; else the adapter's matrices that are not square, first those of the same
    name; then the config's fan_in_fan_out.
    """
    sides, told = specs[base].shape, _told_by_bias(base, specs)
    if told is not None:
        return told
    siblings: dict[str, bool] = {}
    for other, (match, *_) in all_matches.items():
        shape, update = specs[match.name].shape, adapter.updates[other]
        shape = (match.rows[3], *shape[1:]) if match.rows else shape
        if len(shape) != 2 or shape[0] == shape[1] or update.cls.stack or update.transposed is not None:
            continue
        if update.rank:
            siblings[other] = shape != update.shape
        elif (told := _told_by_bias(match.name, specs)) is not None:
            siblings[other] = told
    last = module.rpartition(".")[2]
    of_same_name = {transposed for other, transposed in siblings.items() if other.rpartition(".")[2] == last}
    if len(of_same_name) == 1:
        return of_same_name.pop()
    if siblings and not any(siblings.values()):  # other Conv1D layers say nothing about this one
        return False
    if adapter.config.fan_in_fan_out is not None and not siblings:
        return adapter.config.fan_in_fan_out
    remedy = "give the base's config.json a known model_type"
    how = "is square" if sides[0] == sides[1] else "fits both ways"
    raise InputError(
        f"{how}, and nothing tells whether the base stores it as (out, in) or (in, out) ({adapter.name})",
        culprit=module,
        remedy=remedy if siblings else f"say so with fan_in_fan_out in adapter_config.json, or {remedy}",
    )


def _told_by_bias(name: str, specs: Mapping[str, TensorSpec]) -> bool | None:
    """Return whether a matrix is (in, out) by its bias, which is of the outputs; None if nothing tells."""
    (rows, columns), bias = specs[name].shape, specs.get(f"{name.removesuffix('.weight')}.bias")
    return None if bias is None or rows == columns or bias.size not in (rows, columns) else bias.size == columns
