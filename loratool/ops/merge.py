"""`merge`: W' = round_once(W + sum of weight * scale * B @ A), streamed from files to files.

Plan from headers alone, refuse all that can be refused, then run independent pieces: untouched ranges are
copied inside the kernel, adapted matrices pass by blocks of rows. The result's bytes depend on nothing but
the inputs (`numerics/exact.py`); memory does not depend on the model's size.
"""

from __future__ import annotations

import math
import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..architectures.quantized import quantization
from ..architectures.roles import role
from ..checkpoint import Checkpoint, open_checkpoint
from ..errors import InputError, NeedsFlag, UsageError
from ..formats import is_adapter, open_adapter
from ..numerics.exact import ARITHMETIC_VERSION, Change, ExactProduct, Workspace, add_rounded
from ..output import Output, check_path, output_path, plan_output
from ..rewrite import refuse_overflow, rewrite
from ..runtime import Prepare, Progress, Step, choose_device, worker_count
from ..sidefiles import provenance
from ..targets import Binding, Placement, Selection, bind, exclude_options, parse_layers

# What --dtype may say -> the safetensors name, None to keep each tensor's own.
MERGE_DTYPES = {
    "keep": None,
    "fp32": "F32",
    "f32": "F32",
    "float32": "F32",
    "float": "F32",
    "bf16": "BF16",
    "bfloat16": "BF16",
    "fp16": "F16",
    "f16": "F16",
    "float16": "F16",
    "half": "F16",
}
KEPT_ENOUGH = 0.95  # below this share of the change that survives rounding, merge warns

AdapterArgument = str | os.PathLike[str] | tuple[str | os.PathLike[str], float]


@dataclass(frozen=True)
class TensorReport:
    """What became of one adapted tensor; W is the base, D the change asked for, W' the result.

    `relative` is ||D|| / ||W||; `changed` the share of weights that differ; `kept` is <W' - W, D> / <D, D>, what
    rounding left of the change (1 is all of it). Each is None where its denominator is 0, and in a dry run.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    rank: int
    scales: tuple[float, ...]
    relative: float | None = None
    changed: float | None = None
    kept: float | None = None


@dataclass(frozen=True)
class AdapterReport:
    name: str
    format: str
    weight: float
    modules: int
    sha256: str


@dataclass(frozen=True)
class MergeReport:
    """The result of `merge`. `kept` is over all adapted tensors; `copied` counts the untouched ones."""

    base: str
    out: str
    dry_run: bool
    nbytes: int
    adapters: tuple[AdapterReport, ...]
    tensors: tuple[TensorReport, ...]
    kept: float | None
    copied: int
    left_out: tuple[str, ...]
    files: tuple[str, ...]
    not_copied: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Plan:
    base: Checkpoint
    adapters: tuple[tuple[Adapter, float], ...]
    binding: Binding
    output: Output


def merge(
    base: str | os.PathLike[str],
    adapters: AdapterArgument | Sequence[AdapterArgument],
    out: str | os.PathLike[str] | None = None,
    *,
    dtype: str = "keep",
    device: str = "auto",
    max_shard_bytes: int | None = None,
    target: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layers: str | None = None,
    alpha: float | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    workers: int | None = None,
) -> MergeReport:
    """Add adapters to a base checkpoint and write the merged model.

    base: a safetensors file, a folder, an index JSON, or `org/model` in the local Hugging Face cache.
    adapters: one or several, each a path or (path, weight); all are added in one pass and rounded once.
    out: a folder, or a file if it ends in .safetensors; `merged` in the working folder by default.
    dtype: a key of MERGE_DTYPES. max_shard_bytes cuts the output anew. target, exclude: patterns of module
    paths (`targets.Selection`); layers: "0-15". alpha: for adapter files that do not say theirs.

    Raises LoratoolError's children: UsageError, InputError, NeedsFlag before anything is written; MachineError
    when the machine fails. Whatever is raised, no unfinished output stays.
    """
    with ExitStack() as opened:
        pairs = _adapter_pairs(adapters)
        checkpoint, loaded = _open_inputs(base, pairs, alpha, opened)
        chosen_dtype = dtype.lower().removeprefix("torch.")
        if chosen_dtype not in MERGE_DTYPES:
            raise UsageError(f"dtype {dtype!r} is none of {', '.join(MERGE_DTYPES)}")
        path, is_file = output_path(out, checkpoint, "merged")
        where = choose_device(device)
        selection = Selection(tuple(target), tuple(exclude), parse_layers(layers))
        binding = bind(checkpoint.specs, checkpoint.model_type, loaded, selection)
        _refuse_tied_head(checkpoint, binding)
        inputs = [shard.path for shard in checkpoint.shards] + [adapter.file.path for adapter, _ in loaded]
        check_path(path, is_file, inputs, force)
        output = plan_output(
            checkpoint,
            path,
            is_file,
            _provenance(checkpoint, loaded, binding),
            binding.placements,
            MERGE_DTYPES[chosen_dtype],
            max_shard_bytes,
        )
        plan = _Plan(checkpoint, loaded, binding, output)
        _check_factors(plan)
        output.require_space()
        changes = {} if dry_run else _execute(plan, where, progress, workers or worker_count())
        return _report(plan, os.fspath(base), changes, dry_run)


def _adapter_pairs(adapters: Any) -> list[tuple[str, float]]:
    weighted = isinstance(adapters, tuple) and len(adapters) == 2 and isinstance(adapters[1], int | float)
    pairs = []
    for given in [adapters] if weighted or isinstance(adapters, str | os.PathLike) else adapters:
        path, weight = given if isinstance(given, tuple) else (given, 1.0)
        if not math.isfinite(weight):
            raise UsageError(f"the weight {weight} is not a finite number", culprit=os.fspath(path))
        pairs.append((os.fspath(path), float(weight)))
    if not pairs:
        raise UsageError("no adapter is given")
    return pairs


def _open_inputs(
    base: str | os.PathLike[str], pairs: Sequence[tuple[str, float]], alpha: float | None, opened: ExitStack
) -> tuple[Checkpoint, tuple[tuple[Adapter, float], ...]]:
    checkpoint = open_checkpoint(base)
    opened.callback(checkpoint.close)
    if is_adapter(checkpoint.specs):
        other, *_ = pairs[0]
        raise InputError(
            "is an adapter, but the first argument is the base model",
            culprit=os.fspath(base),
            remedy=None if _opens_as_adapter(other) else f"swap them: loratool merge {other} {os.fspath(base)}",
        )
    method = quantization(checkpoint.specs, checkpoint.config)
    if method:
        raise InputError(
            f"is quantized ({method}), and adding to its codes would be wrong",
            culprit=os.fspath(base),
            remedy="pass the original model in 16 or 32 bits",
        )
    loaded = []
    for adapter, (_, weight) in zip(_open_adapters([name for name, _ in pairs], alpha, opened), pairs, strict=True):
        for module, update in adapter.updates.items():
            if not math.isfinite(weight * update.scale):
                raise UsageError(f"the weight {weight} times the scale {update.scale} is too large", culprit=module)
        loaded.append((adapter, weight))
    return checkpoint, tuple(loaded)


def _opens_as_adapter(name: str) -> bool:
    try:
        open_adapter(name).file.close()
    except NeedsFlag:
        return True
    except InputError:
        return False
    return True


def _open_adapters(names: Sequence[str], alpha: float | None, opened: ExitStack) -> list[Adapter]:
    """Of several adapters, `alpha` is for those that lack their own, and contradicts none of the others."""
    adapters, used = [], len(names) == 1
    for name in names:
        try:
            adapter = open_adapter(name, alpha if len(names) == 1 else None)
        except NeedsFlag:
            if alpha is None:
                raise
            adapter, used = open_adapter(name, alpha), True
        opened.callback(adapter.file.close)
        adapters.append(adapter)
    if alpha is not None and not used:
        raise UsageError("--alpha is for adapters that do not say theirs, and all of these do")
    return adapters


def _refuse_tied_head(base: Checkpoint, binding: Binding) -> None:
    """A loader that ties the head to the embedding would never look at a changed head."""
    tied = base.config.get("tie_word_embeddings", True) if base.config else False  # transformers' default
    for name in binding.placements:
        module = name.removesuffix(".weight")
        if tied and role(module, 2, True) == "head" and module.endswith(("lm_head", "embed_out")):
            message = (
                "is tied to the embedding by config.json: loaders would drop its change; untying is not supported yet"
            )
            if len(binding.placements) == 1:
                raise InputError(message, culprit=name)
            raise NeedsFlag(message, culprit=name, remedy=f"to leave it out: {exclude_options([module], [])}")


def _provenance(base: Checkpoint, adapters: Sequence[tuple[Adapter, float]], binding: Binding) -> str:
    entries = [
        {"scales_sha256": adapter.scales_sha256, "sha256": adapter.sha256, "weight": weight}
        for adapter, weight in adapters
    ]
    facts = {
        "adapters": sorted(entries, key=lambda entry: (entry["sha256"], entry["scales_sha256"], entry["weight"])),
        "arithmetic": ARITHMETIC_VERSION,
        "left_out": sorted(set(binding.left_out)),
    }
    return provenance("merge", facts, base.metadata.get("loratool"))


def _check_factors(plan: _Plan) -> None:
    """Read every factor once, so that a damaged one is refused before the first byte is written."""
    for placements in plan.binding.placements.values():
        for placement in placements:
            placement.adapter.load(placement.update)


class _Shared:
    """The product of one tensor, made by the first worker that needs it and dropped with the tensor's last item."""

    def __init__(self, placements: Sequence[Placement], device: torch.device) -> None:
        self._placements = placements
        self._device = device
        self._lock = threading.Lock()
        self._product: ExactProduct | None = None

    def get(self) -> ExactProduct:
        with self._lock:
            if self._product is None:
                terms = []
                for placement in self._placements:
                    update = placement.adapter.load(placement.update).to(self._device)
                    terms += update.terms(placement.weight, placement.transposed)
                self._product = ExactProduct(terms)
                if self._device.type == "cuda":
                    torch.cuda.current_stream(self._device).synchronize()  # the other workers' streams read it
            return self._product

    def prepare(self, start: int, stop: int) -> Step:
        product = self.get()
        left = product.left(start, stop)

        def step(base: Tensor, row: int, out: Tensor, work: Workspace) -> Change:
            return add_rounded(base, product, left[row : row + len(base)], out, work)

        return step


def _execute(plan: _Plan, device: torch.device, progress: Progress | None, workers: int) -> dict[str, list[Change]]:
    changes: dict[str, list[Change]] = defaultdict(list)
    placements = plan.binding.placements

    def make_step(name: str) -> Prepare:
        return _Shared(placements[name], device).prepare

    with closing(rewrite(plan.base, plan.output, placements, make_step, device, workers, progress)) as pieces:
        for name, blocks in pieces:
            refuse_overflow(name, blocks, plan.base, plan.output)
            changes[name] += blocks
    return changes


def _report(plan: _Plan, base: str, changes: Mapping[str, list[Change]], dry_run: bool) -> MergeReport:
    rows, warnings = [], []
    total_kept = total_change = 0.0
    for name, placements in plan.binding.placements.items():
        blocks = changes.get(name, [])
        kept = _sum(block.kept for block in blocks)
        change = _sum(block.change_squared for block in blocks)
        base_squared = _sum(block.base_squared for block in blocks)
        not_finite = sum(block.not_finite for block in blocks)
        total_kept, total_change = total_kept + kept, total_change + change
        spec = plan.base.specs[name]
        relative = _ratio(change, base_squared)
        rows.append(
            TensorReport(
                name,
                spec.shape,
                plan.output.specs[name].dtype,
                sum(placement.update.rank for placement in placements),
                tuple(placement.weight * placement.update.scale for placement in placements),
                None if relative is None else math.sqrt(relative),
                sum(block.changed for block in blocks) / spec.size if blocks else None,
                _ratio(kept, change),
            )
        )
        if not_finite:
            warnings.append(f"{name}: {not_finite} weights of the base are inf or nan; they are copied as they are")
    total = _ratio(total_kept, total_change)
    warnings = _warnings(plan, rows, total) + warnings
    return MergeReport(
        base,
        str(plan.output.path),
        dry_run,
        plan.output.nbytes,
        tuple(AdapterReport(a.name, a.format, w, len(a.updates), a.sha256) for a, w in plan.adapters),
        tuple(rows),
        total,
        len(plan.base.specs) - len(rows),
        plan.binding.left_out,
        tuple(file.name for file in plan.output.files),
        plan.output.not_copied,
        tuple(warnings),
    )


def _sum(values: Iterable[float]) -> float:
    """Exactly rounded, so that it does not depend on the order in which the blocks finished; inf where it overflows."""
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf


def _ratio(x: float, y: float) -> float | None:
    """x / y where it says something: y is not 0, and neither sum left float64's range."""
    return x / y if y and math.isfinite(x) and math.isfinite(y) else None


def _warnings(plan: _Plan, rows: Sequence[TensorReport], kept: float | None) -> list[str]:
    warnings = []
    weak = [row for row in rows if row.kept is not None and row.kept < KEPT_ENOUGH]
    if weak:
        worst = min(weak, key=lambda row: row.kept or 0.0)
        wider = {"BF16": "merge with --dtype fp16 or fp32, or ", "F16": "merge with --dtype fp32, or "}
        warnings.append(
            f"rounding to {worst.dtype} loses part of the change in {len(weak)} of {len(rows)} tensors: "
            f"{kept or 0:.1%} is kept in all, {worst.kept or 0:.1%} in {worst.name}; "
            f"{wider.get(worst.dtype, '')}keep the adapter apart"
        )
    still = [row.name for row in rows if row.changed == 0]
    if still:
        warnings.append(
            f"{len(still)} tensors stay as they are, since their change is zero or rounds away: {still[0]}, ..."
        )
    odd = [name for name, spec in plan.base.specs.items() if spec.dtype.startswith(("F8_", "F6_", "F4"))]
    if odd and plan.output.specs != plan.base.specs:
        warnings.append(f"{len(odd)} tensors of {plan.base.specs[odd[0]].dtype} keep their type: {odd[0]}, ...")
    return warnings
